"""A training that is stopped, at any step, and resumed is the unbroken one, bit for bit."""
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from torch.nn.utils import parameters_to_vector

from lightning_app import ImageClassifier, ImageNetDataModule, folders
from lightning_app.analysis.runs import cut_off, read_runs
from lightning_app.callbacks import BestCheckpoint, LastCheckpoint
from lightning_app.cli import AppCLI, main
from lightning_app.data import base
from lightning_app.data.sources import FolderSource
from lightning_app.resume import drop_elapsed_time, first_other_class
from se_timm.errors import InputError

pytestmark = [
    pytest.mark.usefixtures('in_tmp_path'),
    # a resumed run goes on in its folder
    pytest.mark.filterwarnings('ignore:Checkpoint directory .* exists and is not empty:UserWarning'),
]

# the best and, for the comparison, every epoch; as in the recipes
CHECKPOINTS = [
    {'class_path': 'ModelCheckpoint', 'init_args': {'filename': 'best', 'monitor': 'val/top1', 'mode': 'max'}},
    {'class_path': 'ModelCheckpoint', 'init_args': {'filename': '{epoch}', 'save_top_k': -1}},
    {'class_path': 'lightning_app.callbacks.ResultLine'},
]
EMA = {'class_path': 'lightning_app.callbacks.WeightEMA', 'init_args': {'decay': 0.9}}
FIRST = Path('runs/test_resnet/version_0')
SPEED = ('train/images_per_second', 'train/data_wait')


@pytest.fixture
def training_with(write_yaml, on_photos):
    """Return a function that gives one which gives the arguments of a training of three epochs with these callbacks."""
    def last(own):
        def arguments(*callbacks, **settings):
            config = write_yaml('recipe.yaml', {'trainer': {
                'callbacks': [*callbacks, *own], 'logger': {'class_path': 'lightning_app.logger.CsvLogger'}}})
            options = {'trainer.max_epochs': 3, 'model.optim.lr': 0.05, 'model.schedule.warmup_epochs': 1, **settings}
            return ['fit', *on_photos, '--config', config, *[f'--{name}={value}' for name, value in options.items()]]

        return arguments

    return last


@pytest.fixture
def recipe(training_with):
    """Return a function that gives the arguments of a training of three epochs with the given callbacks first."""
    return training_with(CHECKPOINTS)


def state(path):
    return torch.load(path, weights_only=True)


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def stop_after(epoch, folder=FIRST):
    """Make the run what it was when it was killed after `epoch`; return the checkpoint to resume."""
    for path in (folder / 'checkpoints').glob('epoch=*.ckpt'):
        if int(path.stem.split('=')[1]) > epoch:
            path.unlink()
    return str(folder / 'checkpoints' / f'epoch={epoch}.ckpt')


@pytest.mark.parametrize('callbacks', [[], [EMA]], ids=['weights', 'average'])
@pytest.mark.parametrize('settings', [
    {}, {'model.optim.name': 'adamw', 'model.optim.lr': 0.001}, {'trainer.accumulate_grad_batches': 2}],
    ids=['momentum', 'adamw', 'accumulated'])
def test_resumed_training_is_the_unbroken_one(recipe, callbacks, settings):
    unbroken = main(recipe(*callbacks, **settings))
    whole = state(FIRST / 'checkpoints' / 'epoch=2.ckpt')
    resumed = main([*recipe(*callbacks, **settings), '--ckpt_path', stop_after(0)])
    part = state(FIRST / 'checkpoints' / 'epoch=2.ckpt')
    assert_equal_states(whole['state_dict'], part['state_dict'])
    assert ('current_model_state' in whole) == bool(callbacks)
    if callbacks:
        assert_equal_states(whole['current_model_state'], part['current_model_state'])
    assert whole['global_step'] == part['global_step'] == 9
    names = ('val/loss', 'val/top1', 'val/top5', 'train/loss', 'lr')
    assert {name: float(resumed.trainer.callback_metrics[name]) for name in names} == {
        name: float(unbroken.trainer.callback_metrics[name]) for name in names}


def test_resumed_training_takes_the_folder_of_its_first_part(recipe):
    main(recipe())
    main([*recipe(), '--ckpt_path', stop_after(0)])
    assert [path.name for path in Path('runs/test_resnet').iterdir()] == ['version_0']


def test_metrics_of_the_first_part_are_kept(recipe, read_csv):
    main(recipe(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    before = read_csv(FIRST, 'val/loss')
    main([*recipe(), '--ckpt_path', stop_after(0)])
    after = read_csv(FIRST, 'val/loss')
    assert after[:1] == before
    assert len(after) == 3
    assert [step for step, _ in read_csv(FIRST, 'train/loss')] == list(range(9))


def test_best_result_of_the_first_part_is_kept(recipe, capsys):
    main(recipe())
    best = capsys.readouterr().out
    main([*recipe(), '--ckpt_path', stop_after(1)])
    def line(text):
        return next(line for line in text.splitlines() if line.startswith('best:'))

    assert line(capsys.readouterr().out) == line(best)


def test_best_checkpoint_of_the_first_part_is_kept(recipe):
    # lr falls to nothing: no later epoch is better than the first
    still = {'model.schedule.name': 'step', 'model.schedule.decay_epochs': 1, 'model.schedule.decay_rate': 0,
             'model.schedule.warmup_epochs': 0}
    first = main(recipe(**{**still, 'trainer.max_epochs': 1})).trainer.checkpoint_callback
    best = state(first.best_model_path)
    resumed = main([*recipe(**still), '--ckpt_path', stop_after(0)]).trainer.checkpoint_callback
    assert (resumed.best_model_path, resumed.best_model_score) == (first.best_model_path, first.best_model_score)
    assert_equal_states(state(resumed.best_model_path)['state_dict'], best['state_dict'])


def test_lookahead_goes_on_counting(recipe):
    # the third step of each epoch is not a multiple of its six
    settings = {'model.optim.name': 'lookahead_momentum'}
    main(recipe(**settings))
    whole = state(FIRST / 'checkpoints' / 'epoch=2.ckpt')
    main([*recipe(**settings), '--ckpt_path', stop_after(0)])
    part = state(FIRST / 'checkpoints' / 'epoch=2.ckpt')
    assert_equal_states(whole['state_dict'], part['state_dict'])
    assert whole['optimizer_states'][0]['param_groups'] == part['optimizer_states'][0]['param_groups']


def test_last_is_the_newest_checkpoint_of_the_runs(recipe, cli_error):
    given, why, _ = cli_error([*recipe(), '--ckpt_path=last'])
    assert 'last' in given
    assert 'runs/test_resnet' in why
    main(recipe(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    main(recipe(**{'trainer.max_epochs': 2}))
    (FIRST / 'checkpoints' / 'epoch=0.ckpt').touch()
    cli = main([*recipe(), '--ckpt_path=last'])
    assert cli.trainer.default_root_dir == str(FIRST.resolve())
    assert cli.trainer.global_step == 9


def test_recorded_config_of_a_resumed_run_is_that_of_its_beginning(recipe):
    main(recipe())
    before = (FIRST / 'config.yaml').read_text()
    main([*recipe(), '--ckpt_path', stop_after(0)])
    assert (FIRST / 'config.yaml').read_text() == before


def test_checkpoint_that_lightning_wrote_for_slurm_is_found(recipe, monkeypatch):
    # as it does on SIGUSR1 where there is no LastCheckpoint: it saves, and asks SLURM to start the job again
    for name, value in {'JOB_ID': 7, 'NTASKS': 1, 'JOB_NAME': 'train', 'PROCID': 0, 'LOCALID': 0, 'NODEID': 0,
                        'NODELIST': 'here'}.items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    cli = main(recipe(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    cli.trainer.save_checkpoint(FIRST / 'hpc_ckpt_1.ckpt')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    cli = main(recipe())
    assert [path.name for path in Path('runs/test_resnet').iterdir()] == ['version_0']
    assert cli.trainer.ckpt_path.endswith('version_0/hpc_ckpt_1.ckpt')
    assert cli.trainer.global_step == 9


@pytest.mark.parametrize(('settings', 'given', 'trained'), [
    ({'model.optim.name': 'adamw'}, 'name adamw', 'name momentum'),
    ({'model.optim.decay_bias_and_norm': True}, 'decay_bias_and_norm True', 'decay_bias_and_norm False'),
    ({'model.optim.weight_decay': 0}, 'weight_decay 0', 'weight_decay 0.0001'),
    ({'model.optim.layer_decay': 0.9}, 'layer_decay 0.9', 'layer_decay None'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_another_optimiser_cannot_go_on(recipe, cli_error, settings, given, trained):
    main(recipe())
    first, why, _ = cli_error([*recipe(**settings), '--ckpt_path', stop_after(0)])
    assert given in first
    assert trained in why


@pytest.mark.parametrize(('name', 'settings', 'given', 'trained'), [
    ('adamw', {'model.optim.options': '{amsgrad: true}'}, 'amsgrad True', 'amsgrad False'),
    ('rmsprop', {'model.optim.options': '{centered: true}'}, 'centered True', 'centered False'),
    ('rmsprop', {'model.optim.momentum': 0.5}, 'momentum 0.5', 'momentum 0')], ids=['amsgrad', 'centered', 'momentum'])
def test_optimiser_that_remembers_more_cannot_go_on(name, settings, given, trained, recipe, cli_error):
    optim = {'model.optim.name': name, 'model.optim.lr': 0.001, 'model.optim.momentum': 0}
    main(recipe(**optim))
    first, why, _ = cli_error([*recipe(**{**optim, **settings}), '--ckpt_path', stop_after(0)])
    assert given in first
    assert trained in why
    betas = {'model.optim.options': '{betas: [0.8, 0.9]}' if name == 'adamw' else '{alpha: 0.9}'}
    assert main([*recipe(**{**optim, **betas}), '--ckpt_path', stop_after(0)]).trainer.global_step == 9


def test_training_of_other_parts_cannot_go_on(recipe, cli_error):
    main(recipe({'class_path': 'lightning_app.callbacks.FreezeBackbone'}))
    given, why, do = cli_error([*recipe(), '--ckpt_path', stop_after(0)])
    assert given.endswith('tensors that train')
    assert why.endswith('an optimiser of 2')
    assert 'FreezeBackbone' in do


def test_weights_alone_cannot_go_on(recipe, cli_error):
    main([*recipe(), '--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.save_weights_only=true'])
    _, why, _ = cli_error([*recipe(), '--ckpt_path', str(next(FIRST.rglob('*.ckpt')))])
    assert 'optimiser' in why


@pytest.mark.filterwarnings('ignore:The dirpath has changed')  # nothing of the other folder is deleted
def test_another_copy_of_a_checkpoint_starts_a_folder_of_its_own(recipe):
    main(recipe())
    Path(stop_after(0)).rename('copy.ckpt')
    main([*recipe(), '--ckpt_path', 'copy.ckpt'])
    assert sorted(path.name for path in Path('runs/test_resnet').iterdir()) == ['version_0', 'version_1']


def test_training_of_more_epochs_goes_on(recipe):
    main(recipe())
    cli = main([*recipe(**{'trainer.max_epochs': 5}), '--ckpt_path', str(FIRST / 'checkpoints' / 'epoch=2.ckpt')])
    assert cli.trainer.global_step == 15
    # the schedule is that of five epochs: the learning rate has risen again
    assert float(cli.trainer.callback_metrics['lr']) < 0.01


# Within an epoch


WITHIN = [
    {'class_path': 'lightning_app.callbacks.BestCheckpoint'},
    {'class_path': 'lightning_app.callbacks.ResultLine'},
    {'class_path': 'lightning_app.callbacks.Throughput'},
    {'class_path': 'lightning_app.callbacks.LastCheckpoint', 'init_args': {'every_n_steps': 1, 'keep': 99}},
]
MANY = {  # everything that could carry something along
    'model.optim.name': 'adamw', 'model.optim.lr': 0.001, 'trainer.accumulate_grad_batches': 2,
    'data.num_workers': 2, 'trainer.val_check_interval': 0.5, 'model.max_nonfinite_steps': 1,
    'model.network.drop_path_rate': 0.3, 'data.augment.auto_augment': 'rand-m5'}


@pytest.fixture
def steps(training_with):
    """Return a function that gives the arguments of a training of three epochs of three steps, each of them saved."""
    return training_with(WITHIN)


def rarely(steps):
    """Return the callbacks with a checkpoint after so many steps."""
    return [*WITHIN[:-1], {**WITHIN[-1], 'init_args': {'every_n_steps': steps, 'keep': 99}}]


@pytest.fixture
def started_with(monkeypatch):
    """Return a function that runs a training with one callback more."""
    def run(callback, arguments):
        monkeypatch.setattr(AppCLI, 'before_fit', lambda cli: cli.trainer.callbacks.insert(0, callback), raising=False)
        try:
            return main(arguments)
        finally:
            monkeypatch.delattr(AppCLI, 'before_fit')

    return run


def at(step, folder=FIRST):
    return folder / 'checkpoints' / f'last-step={step:08d}.ckpt'


def killed_after(step, folder=FIRST):
    """Make the run what it was when it was killed after `step`, but for its metrics; return the checkpoint."""
    for path in (folder / 'checkpoints').glob('last-step=*.ckpt'):
        if path.name > at(step).name:
            path.unlink()
    return str(at(step, folder))


def assert_same(first, second, where=''):
    """Fail unless two checkpoints hold the same, to the bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - {'epoch_loop.val_loop.batch_progress'}:  # begins anew with the next validation
            assert_same(first[key], second[key], f'{where}/{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f'{where}/{index}')
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def rows(folder=FIRST):
    """Return the lines of the metrics but for the speed."""
    with open(folder / 'metrics.csv', newline='') as file:
        return [{key: value for key, value in row.items() if value and key not in SPEED}
                for row in csv.DictReader(file)]


@pytest.mark.parametrize(('callbacks', 'settings', 'stops'), [
    ([EMA], MANY, (1, 5, 7)), ([], {}, range(1, 9)), ([], {'trainer.val_check_interval': 1}, (1, 2, 4, 8)),
    ([], {'trainer.val_check_interval': 2, 'trainer.check_val_every_n_epoch': 'null'}, (1, 2, 4, 6)),
    ([], {'trainer.max_steps': 9}, (2, 3, 6))],
    ids=['everything', 'plain', 'validated', 'validated over epochs', 'of so many steps'])
def test_training_resumed_at_any_step_is_the_unbroken_one(steps, callbacks, settings, stops):
    main(steps(*callbacks, **settings))
    whole, metrics = {step: state(at(step)) for step in range(1, 10)}, rows()
    assert len({row['train/loss'] for row in metrics if 'train/loss' in row}) == 9
    for stop in stops:
        main([*steps(*callbacks, **settings), '--ckpt_path', killed_after(stop)])
        for step in range(stop + 1, 10):
            assert_same(whole[step], state(at(step)), f'{step} after {stop}')
        assert rows() == metrics


@pytest.mark.parametrize('settings', [{}, {'trainer.max_steps': 9}], ids=['epochs', 'steps'])
def test_training_goes_on_from_the_best(steps, settings):
    """Which was written before its epoch was over."""
    best = {'class_path': 'lightning_app.callbacks.BestCheckpoint', 'init_args': {'keep': 3}}
    arguments = [*steps(**settings), '--trainer.callbacks', json.dumps([best, *WITHIN[1:]])]
    main(arguments)
    whole, metrics = {step: state(at(step)) for step in range(1, 10)}, rows()
    for epoch in (0, 1):
        main([*arguments, '--ckpt_path', str(FIRST / 'checkpoints' / f'best-epoch={epoch}-step={3 * epoch + 3}.ckpt')])
        for step in range(3 * epoch + 4, 10):
            assert_same(whole[step]['state_dict'], state(at(step))['state_dict'], f'{step} after {epoch}')
        assert rows() == metrics


@pytest.mark.filterwarnings('ignore:.*does not have many workers')
def test_run_that_was_copied_goes_on_from_its_last_step_and_keeps_its_best(steps, capsys):
    main([*steps(**{'trainer.max_epochs': 2}), '--trainer.default_root_dir=runs/whole'])
    run = Path('runs/whole/version_0')
    best = run / 'checkpoints' / 'best.ckpt'
    content = torch.load(best, weights_only=True)
    key = next(key for key in content['callbacks'] if key.startswith('BestCheckpoint'))
    for path in (best, at(5, run), at(6, run)):  # no later epoch is better
        changed = torch.load(path, weights_only=True)
        scores = changed['callbacks'][key]
        scores['best_model_score'] = scores['kth_value'] = torch.tensor(101.)
        scores['best_k_models'] = {scores['best_model_path']: torch.tensor(101.)}
        changed['metrics']['val/top1'] = 101.
        torch.save(changed, path)
    shutil.copytree('runs/whole', 'runs/copy', copy_function=shutil.copy)  # without the times
    os.utime('runs/copy/version_0/checkpoints/best.ckpt')
    capsys.readouterr()
    cli = main([*steps(**{'trainer.max_epochs': 3}), '--trainer.default_root_dir=runs/copy', '--ckpt_path=auto'])
    copied = Path('runs/copy/version_0').resolve()
    assert Path(cli.trainer.ckpt_path).resolve() == at(6, copied)
    assert torch.load(copied / 'checkpoints' / 'best.ckpt', weights_only=True)['global_step'] == content['global_step']
    assert cli.trainer.checkpoint_callback.best_model_path == str(copied / 'checkpoints' / 'best.ckpt')
    assert 'best: top-1 101.00 %' in capsys.readouterr().out


def test_run_goes_on_in_the_folder_that_is_given(steps, capfd):
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    before = {path: path.read_bytes() for path in FIRST.rglob('*') if path.is_file()}
    args = [*steps(), '--ckpt_path', str(at(2))]
    cli = main([*args, '--trainer.default_root_dir=runs/other'])
    assert cli.trainer.global_step == 9
    assert Path('runs/other/version_0/config.yaml').is_file()
    assert cli.trainer.checkpoint_callback.best_model_path.endswith('runs/other/version_0/checkpoints/best.ckpt')
    assert {path: path.read_bytes() for path in FIRST.rglob('*') if path.is_file()} == before
    assert 'this training goes on in runs/other/version_0' in capfd.readouterr().err
    main([*args, '--trainer.default_root_dir=runs/test_resnet'])  # its own
    assert not Path('runs/test_resnet/version_1').exists()


@pytest.mark.parametrize('folder', [Path('kept'), Path('kept/checkpoints')])
def test_folder_with_a_config_of_the_user_is_no_run(folder, steps, capfd):
    """A checkpoint that was taken out of its run does not lead to the folder in which it lies."""
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    folder.mkdir(parents=True)
    shutil.copy(at(2), folder)
    Path('kept/config.yaml').write_text('mine: 1\n')
    cli = main([*steps(), '--ckpt_path', str(folder / at(2).name)])
    assert cli.trainer.global_step == 9
    assert cli.trainer.default_root_dir == 'runs/test_resnet/version_1'
    assert 'in no folder of a run, which has a launch.txt: this training goes on in runs/' in capfd.readouterr().err
    assert Path('kept/config.yaml').read_text() == 'mine: 1\n'
    assert {path.name for path in Path('kept').rglob('*')} <= {'checkpoints', 'config.yaml', at(2).name}


class Stop(Callback):
    """Ends the training as `trainer.max_time` does, after a batch, or as an early stopping does, after a validation."""

    def __init__(self, step, validation=False):
        self.step, self.validation = step, validation

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step and not self.validation

    def on_validation_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step and self.validation


def epochs_done():
    """The epochs of the run that are done, as its comparison with others tells."""
    return read_runs([FIRST])[0][0].epochs


@pytest.mark.parametrize(('step', 'validation'), [(1, False), (5, False), (5, True)])
def test_training_that_ended_early_goes_on(steps, started_with, step, validation):
    """From there, and not from the next epoch."""
    settings = {'trainer.max_time': '00:01:00:00', **({'trainer.val_check_interval': 1} if validation else {})}
    arguments = [*steps(**settings), '--trainer.callbacks', json.dumps(rarely(None))]
    main(arguments)
    whole = state(at(9))
    shutil.rmtree(FIRST / 'checkpoints')
    assert not cut_off(FIRST.parent)  # as metrics.csv tells
    shutil.rmtree('runs')
    started_with(Stop(step, validation), arguments)
    assert sorted(FIRST.glob('checkpoints/last*'))[-1] == at(step)
    assert epochs_done() == step // 3
    assert cut_off(FIRST.parent)
    main([*arguments, '--ckpt_path=auto'])
    assert epochs_done() == 3
    assert not cut_off(FIRST.parent)
    assert_same(whole['state_dict'], state(at(9))['state_dict'])


def test_time_is_that_of_each_start(steps, caplog):
    """A job that goes on has none of the time of earlier ones behind it, and needs no limit of its own."""
    limited = [*steps(), '--trainer.max_time=00:01:00:00']
    main(limited)
    path = killed_after(4)
    checkpoint = state(path)
    timer = next(key for key in checkpoint['callbacks'] if key.startswith('Timer'))
    checkpoint['callbacks'][timer]['time_elapsed']['train'] = 4000.0
    mine = {'callbacks': {'Timer': {'kept': 1}, 'TimerOfMine': {'kept': 1}}}
    for callbacks, kept in (([type('Timer', (Callback,), {})()], ['Timer', 'TimerOfMine']), ([], ['TimerOfMine'])):
        drop_elapsed_time(others := {'callbacks': {timer: {}, **mine['callbacks']}}, callbacks)
        assert list(others['callbacks']) == kept
    torch.save(checkpoint, path)
    assert main([*limited, '--ckpt_path', path]).trainer.global_step == 9
    assert 'max_time: stopped' not in caplog.text
    assert main([*steps(), '--ckpt_path', killed_after(4)]).trainer.global_step == 9
    assert 'Timer' not in caplog.text


class OutOfTime(Callback):
    """Lets the time of `trainer.max_time` be over in a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 == self.step:
            next(each for each in trainer.callbacks if isinstance(each, Timer))._duration = 0


def test_where_the_time_ended_is_said(steps, started_with, caplog):
    limited = [*steps(), '--trainer.max_time=00:01:00:00']
    started_with(OutOfTime(2), limited)
    assert ('trainer.max_time: stopped at step 2, the checkpoint is of step 2; the same command with --ckpt_path auto '
            'goes on from there') in caplog.text
    caplog.clear()
    started_with(OutOfTime(9), [*limited, '--ckpt_path=auto'])
    assert 'max_time: stopped' not in caplog.text


@pytest.mark.parametrize(('limit', 'interval'), [(2, 1), (0.7, 0.5)], ids=['numbers', 'shares'])
def test_numbers_of_batches_follow_where_each_process_keeps_its_images(limit, interval, steps, caplog):
    arguments = steps(**{'trainer.limit_train_batches': limit, 'trainer.val_check_interval': interval})
    main(arguments)
    whole, lines = at(6), [(row['step'], row.get('lr'), 'val/top1' in row) for row in rows()]
    content = torch.load(at(3), weights_only=True)
    content['position']['processes'] = 2  # of which each had half of the images of a batch
    torch.save(content, at(3))
    for step in (3, 4):
        for file in whole.parent.glob('*.ckpt'):
            if file not in [at(number) for number in range(1, step + 1)]:
                file.unlink()
        caplog.clear()
        trainer = main([*arguments, '--ckpt_path', str(at(step))]).trainer
        assert 'each accumulates 2 batches of 4 images, so that a step has 8 as before' in caplog.text
        assert trainer.global_step == 6
        assert (trainer.limit_train_batches, trainer.val_check_interval) == (4, 2)
        position = torch.load(at(5), weights_only=True)['position']
        assert (position['processes'], position['accumulated'], position['images_per_batch']) == (1, 1, 4)
        assert [(row['step'], row.get('lr'), 'val/top1' in row) for row in rows()] == lines


class Saved(Callback):
    """Checkpoints of every batch, validation and epoch."""

    def save(self, trainer, *_):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f'all/{len(list(Path("all").glob("*"))):02}.ckpt', weights_only=False)

    on_train_batch_end = on_validation_end = on_train_epoch_end = save


class Rows(Logger):
    """What is logged, and at which step."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        metrics.pop('val/top1_best', None)  # Lightning leaves out a validation that was due where it was saved
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.filterwarnings('ignore:trainer.limit_train_batches. 3. an epoch has 3 batches, 2 make a step:UserWarning')
@pytest.mark.parametrize('arguments', [
    {'limit_train_batches': 4, 'val_check_interval': 1}, {'limit_train_batches': 3, 'val_check_interval': 1},
    {'limit_train_batches': 3, 'check_val_every_n_epoch': 2},
    {'limit_train_batches': 3, 'val_check_interval': 2, 'accumulate_grad_batches': 1}],
    ids=['even', 'odd', 'epochs', 'not'])
def test_any_checkpoint_within_an_accumulated_step_goes_on(arguments, make_trainer, photo_data):
    """Of a network without batch norms, whose statistics know no steps."""
    def fit(*callbacks, **options):
        torch.manual_seed(0)
        rows, model = Rows(), ImageClassifier('test_convnext', num_classes=3)
        trainer = make_trainer(**{
            'accumulate_grad_batches': 2, 'max_epochs': 2, 'logger': rows, 'callbacks': list(callbacks), **arguments})
        trainer.fit(model, photo_data(), **options)
        return trainer.global_step, rows.rows, parameters_to_vector(model.parameters())

    steps, rows, weights = fit(Saved())
    saved = sorted(Path('all').glob('*'))
    assert len(saved) > 7
    for path in saved:
        again = fit(ckpt_path=str(path))
        assert again[0] == steps
        assert again[1] == rows[len(rows) - len(again[1]):]
        assert torch.equal(again[2], weights)


@pytest.mark.parametrize('batch_size', [4, 16])
def test_step_that_was_left_is_done_again_in_its_size_alone(batch_size, make_trainer, photo_data, refused):
    def trainer(*callbacks):
        return make_trainer(accumulate_grad_batches=2, limit_train_batches=2, callbacks=list(callbacks))

    trainer(Saved()).fit(ImageClassifier('test_convnext', num_classes=3), photo_data())
    with refused(f'data.batch_size: {batch_size}', 'after 4 images of its epoch, in the middle of a step of 8', '8'):
        trainer().fit(
            ImageClassifier('test_convnext', num_classes=3), photo_data(batch_size=batch_size),
            ckpt_path='all/00.ckpt')


@pytest.mark.parametrize(('batches', 'told'), [(1, True), (2, False)])
def test_step_that_is_done_again_is_told(batches, told, make_trainer, photo_data):
    def fit(*callbacks, **arguments):
        trainer = make_trainer(accumulate_grad_batches=2, limit_train_batches=4, callbacks=list(callbacks))
        trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data(), **arguments)

    fit(Saved())
    twice = 'within a step of 8, which is done again: batch norms count 4 images twice'
    with pytest.warns(UserWarning, match=twice) if told else nullcontext():
        fit(ckpt_path=f'all/{batches - 1:02}.ckpt')


def test_validation_by_time_goes_on_in_fewer_processes(steps, caplog):
    by_time = steps(**{'trainer.val_check_interval': '00:01:00:00'})
    main(by_time)
    content = torch.load(at(3), weights_only=True)
    content['position']['processes'] = 2
    torch.save(content, at(3))
    trainer = main([*by_time, '--data.batch_size=16', '--ckpt_path', str(at(3))]).trainer
    assert trainer.global_step == 5
    assert 'each accumulates 4 batches of 4 images, so that a step has 16' in caplog.text
    assert 'as before' not in caplog.text


@pytest.mark.skipif(folders.fcntl is None, reason='files cannot be locked')
def test_training_in_the_folder_of_one_that_runs_is_refused(steps, monkeypatch, cli_error):
    main(steps())
    before = {path: path.read_bytes() for path in FIRST.rglob('*') if path.is_file()}
    monkeypatch.setattr(folders, 'SECONDS', 0.3)
    with open(FIRST / 'launch.txt', 'a') as other:
        folders.fcntl.flock(other, folders.fcntl.LOCK_EX)  # as another process does
        given, why, do = cli_error([*steps(**{'trainer.max_epochs': 4}), '--ckpt_path=auto'])
        assert given.startswith('ckpt_path: of the run ')
        assert given.endswith('runs/test_resnet/version_0')
        assert why.startswith('another training is writing to it (')
        assert do.startswith('wait until it has ended')
        assert {path: path.read_bytes() for path in FIRST.rglob('*') if path.is_file()} == before
        assert not Path('runs/test_resnet/version_1').exists()
        main(steps())  # a new one has a folder of its own
    assert main([*steps(**{'trainer.max_epochs': 4}), f'--ckpt_path={at(9)}']).trainer.global_step == 12


@pytest.mark.skipif(sys.platform != 'linux', reason='whoever runs the tests may write to any file')
def test_training_in_a_folder_without_leave_is_refused(steps, cli_error):
    main(steps())
    shutil.copy(str(shutil.which('sleep')), FIRST / 'launch.txt')
    with subprocess.Popen(['sleep', '60'], executable=FIRST / 'launch.txt') as running:  # may not be written to
        assert 'nothing can be written there (Text file busy)' in cli_error([*steps(), f'--ckpt_path={at(9)}'])[1]
        running.kill()


@pytest.mark.skipif(folders.fcntl is None, reason='files cannot be locked')
def test_training_that_has_waited_for_another_goes_on_where_that_ended(steps, monkeypatch):
    main(steps())
    newer = [file for file in at(9).parent.glob('*.ckpt') if file not in [at(step) for step in range(1, 5)]]
    for file in newer:
        file.rename(file.name)
    with open(FIRST / 'launch.txt', 'a') as other:
        folders.fcntl.flock(other, folders.fcntl.LOCK_EX)

        def end(seconds):
            for file in newer:
                Path(file.name).rename(file)
            at(4).unlink()  # as of those that are too old
            folders.fcntl.flock(other, folders.fcntl.LOCK_UN)

        monkeypatch.setattr(folders.time, 'sleep', end)
        trainer = main([*steps(**{'trainer.max_epochs': 4}), '--ckpt_path=auto']).trainer
    assert trainer.global_step == 12
    assert Path(trainer.ckpt_path).samefile(at(9))


def test_names_of_classes_that_were_numbers_are_those_of_now():
    assert first_other_class([7, 8], ['7', '8']) is None
    assert first_other_class([7, 8], ['7', '9']) == (1, 8, '9')


def test_from_python_no_command_goes_on(make_trainer, photo_data, caplog):
    callbacks = [OutOfTime(2), LastCheckpoint(handle_signals=False)]
    make_trainer(max_time='00:01:00:00', callbacks=callbacks, enable_checkpointing=True).fit(
        ImageClassifier('test_resnet', num_classes=3), photo_data())
    assert 'the checkpoint is of step 2; fit with it as ckpt_path goes on from there' in caplog.text


def test_training_of_more_steps_goes_on(steps, monkeypatch):
    main(steps(**{'trainer.max_steps': 5}))
    loaded = note_loads(monkeypatch)
    cli = main([*steps(**{'trainer.max_steps': 9}), '--ckpt_path=auto'])
    assert cli.trainer.global_step == 9
    assert len(loaded) == 8 + 24


@pytest.mark.filterwarnings('ignore:You requested to overfit')
def test_epoch_of_images_in_their_order_cannot_be_continued(steps, cli_error):
    settings = {'trainer.overfit_batches': 3}
    main(steps(**settings))
    given, why, _ = cli_error([*steps(**settings), '--ckpt_path', killed_after(4)])
    assert given == 'trainer.overfit_batches: 3'
    assert 'begin with the first image' in why
    main([*steps(**settings), '--ckpt_path', str(at(3))])


FREEZING = [{'class_path': f'lightning_app.callbacks.{name}', 'init_args': arguments} for name, arguments in (
    ('FreezeBackbone', {'epochs': 1}), ('FreezeBatchNorm', {'last_epochs': 1, 'affine': True}))]
TAUGHT = {
    'model.mix.mixup': 0.4, 'model.mix.cutmix': 1.0, 'model.mix.off_epoch': 2, 'model.loss.smoothing': 0.1,
    'model.distill.teacher': 'test_resnet', 'model.distill.network': '{checkpoint_path: teacher.pth, num_classes: 3}'}


def test_mixtures_a_teacher_and_frozen_parts_go_on(steps):
    teacher = timm.create_model('test_resnet', num_classes=3).state_dict()
    torch.save(teacher, 'teacher.pth')
    main(steps(EMA, *FREEZING, **TAUGHT))
    whole, metrics = {step: state(at(step)) for step in range(1, 10)}, rows()
    for stop in (1, 4, 7):  # with the backbone frozen, with nothing, and with batch norm
        main([*steps(EMA, *FREEZING, **TAUGHT), '--ckpt_path', killed_after(stop)])
        for step in range(stop + 1, 10):
            assert_same(whole[step], state(at(step)), f'{step} after {stop}')
        assert rows() == metrics
    assert not any('teacher' in key or 'criterion' in key for key in whole[9]['state_dict'])
    Path('teacher.pth').unlink()  # an evaluation needs none
    main(['validate', '--ckpt_path', str(at(9)), '--trainer.enable_progress_bar=false'])


def note_loads(monkeypatch):
    """Return a list that gets the name of each training image that is loaded."""
    names = []
    monkeypatch.setattr(base, 'first_files', lambda *_: [])  # by which a decoder is chosen
    read = FolderSource.read

    def noted(self, index):
        if 'train_' in self.name(index):
            names.append(self.name(index))
        return read(self, index)

    monkeypatch.setattr(FolderSource, 'read', noted)
    return names


def test_what_a_data_module_draws_on_the_device_is_drawn_again(steps, monkeypatch):
    def noisy(data, batch, dataloader_idx, after=ImageNetDataModule.on_after_batch_transfer):
        images, labels = after(data, batch, dataloader_idx)
        drawn.append(torch.rand(()) if data.trainer.training else 0)
        return images + drawn[-1] * torch.randn_like(images), labels

    drawn = []
    monkeypatch.setattr(ImageNetDataModule, 'on_after_batch_transfer', noisy)
    main(steps())
    whole = state(at(9))
    main([*steps(), '--ckpt_path', killed_after(4)])
    assert_same(whole['state_dict'], state(at(9))['state_dict'])
    assert len(set(map(float, drawn))) == 9 + 1


@pytest.mark.parametrize(('settings', 'was', 'do'), [
    ({'model.add_se': '{reduction: 4}'}, 'model.add_se was None, and is {', 'say model.add_se as in its training, or'),
    ({'model.name': 'test_vit'}, 'model.name was test_resnet, and is test_vit', 'say --model.name test_resnet, or')])
def test_other_network_than_that_of_the_checkpoint(steps, cli_error, settings, was, do):
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    given, why, remedy = cli_error([*steps(**settings), '--ckpt_path', str(at(2))])
    assert given == 'checkpoint: test_resnet'
    assert was in why
    assert do in remedy
    assert 'config.yaml of its run' in remedy


def test_run_that_was_renamed_is_told(steps, caplog):
    fit = [*steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}), '--ckpt_path=auto']
    FIRST.mkdir(parents=True)
    (FIRST / 'launch.txt').write_text('1')  # of a training that was killed before its first checkpoint
    main(fit)
    assert 'begins a new training' not in caplog.text
    shutil.rmtree(FIRST)
    FIRST.with_name('version_1').rename(FIRST.with_name('final'))
    assert main(fit).trainer.ckpt_path is None
    assert f'auto begins a new training: {FIRST.with_name("final")} is a run, but' in caplog.text


def test_images_that_were_seen_are_not_loaded_again(steps, monkeypatch):
    main(steps())
    loaded = note_loads(monkeypatch)
    main([*steps(), '--ckpt_path', killed_after(4)])
    assert len(loaded) == 16 + 24


def test_whole_epoch_is_seen_once(steps, monkeypatch):
    loaded = note_loads(monkeypatch)
    main(steps())
    before = loaded[:40]
    loaded.clear()
    main([*steps(), '--ckpt_path', killed_after(5)])
    assert sorted(before[24:40] + loaded[:8]) == sorted(before[:24])


@pytest.mark.parametrize(('settings', 'given', 'why'), [
    ({'seed_everything': 1}, 'seed_everything: 1', 'begun with 0'),
    ({'data.repeats': 2}, 'data.repeats: 2', 'begun with 1'),
    ({'data.batch_size': 6}, 'data.batch_size: 6', 'after 8 images'),
])
def test_epoch_that_cannot_be_continued(steps, cli_error, settings, given, why):
    main(steps(**{'trainer.max_epochs': 2}))
    error = cli_error([*steps(**settings), '--ckpt_path', killed_after(4)])
    assert given in error[0]
    assert why in error[1]
    assert 'end of an epoch' in error[2]
    main([*steps(**settings), '--ckpt_path', str(at(3))])  # it is as it says


def test_epoch_of_other_images_cannot_be_continued(steps, cli_error, photos):
    main(steps(**{'trainer.max_epochs': 2}))
    (photos / 'train' / 'ant' / 'train_00.png').unlink()
    given, why, _ = cli_error([*steps(), '--ckpt_path', str(at(4))])
    assert given == 'data: training images: 23'
    assert 'begun with 24' in why


@pytest.mark.parametrize(('what', 'other'), [('names', 'bee/z.png'), ('labels', 'cat/train_01.png')])
def test_epoch_of_as_many_other_images_cannot_be_continued(steps, cli_error, photos, what, other):
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    (photos / 'train' / 'bee' / 'train_01.png').rename(photos / 'train' / other)
    given, why, _ = cli_error([*steps(), '--ckpt_path', str(at(1))])
    assert given == f'data: training images with other {what}'
    assert 'seen twice' in why
    older = state(at(1))
    del older['position']['labels'], older['position']['names']
    torch.save(older, 'older.ckpt')
    main([*steps(), '--ckpt_path', 'older.ckpt'])


def test_new_training_of_the_same_data_begins_with_the_first_image(make_trainer, photo_data):
    data, counts = photo_data(), []
    for start, steps in ((None, 1), ('stopped.ckpt', -1), (None, -1)):
        trainer = make_trainer(max_steps=steps, limit_val_batches=0)
        trainer.fit(ImageClassifier('test_resnet', 3), data, ckpt_path=start, weights_only=True)
        counts.append(len(list(data.sampler)))
        trainer.save_checkpoint('stopped.ckpt')
    assert counts == [24, 16, 24]


def test_settings_that_are_given_hold_from_the_step_on(steps, optimizer_steps):
    main(steps(**{'model.schedule.name': 'constant', 'model.schedule.warmup_epochs': 0}))
    optimizer_steps.clear()
    given = {'model.schedule.name': 'step', 'model.schedule.decay_epochs': 2, 'model.schedule.warmup_epochs': 0,
             'model.optim.lr': 0.5, 'model.optim.weight_decay': 0.02, 'model.optim.momentum': 0.8}
    main([*steps(**given), '--ckpt_path', killed_after(4)])
    rates = [groups[0]['lr'] for groups in optimizer_steps]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.05])
    assert {groups[0]['momentum'] for groups in optimizer_steps} == {0.8}
    assert {max(group['weight_decay'] for group in groups) for groups in optimizer_steps} == {0.02}


def test_average_that_is_given_up(steps, caplog):
    main(steps(EMA, **{'trainer.max_epochs': 2}))
    there = state(at(4))
    with caplog.at_level('INFO'):
        main([*steps(**{'model.optim.lr': 1e-30, 'model.optim.momentum': 0, 'model.optim.weight_decay': 0.0001}),
              '--ckpt_path', killed_after(4)])
    assert 'goes on without' in caplog.text
    last = state(at(9))
    assert 'current_model_state' not in last
    weights = [name for name, value in there['current_model_state'].items() if 'running' not in name
               and value.is_floating_point()]
    assert_same({name: there['current_model_state'][name] for name in weights},
                {name: last['state_dict'][name] for name in weights})


# Which checkpoint


@pytest.mark.parametrize('damage', ['cut', 'altered', 'empty'])
@pytest.mark.parametrize('word', ['last', 'auto'])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(steps, damage, word):
    main(steps(**{'trainer.max_epochs': 2}))
    killed_after(5)
    (FIRST / 'checkpoints' / 'best.ckpt').unlink()
    data = bytearray(at(5).read_bytes())
    if damage == 'altered':
        data[len(data) // 2] ^= 1
    at(5).write_bytes(data[:{'cut': -1000, 'altered': None, 'empty': 0}[damage]])
    with pytest.warns(UserWarning, match=r'last-step=00000005.ckpt: passed over, as it was altered|cut off'):
        cli = main([*steps(), '--ckpt_path', word])
    assert cli.trainer.ckpt_path == str(at(4))
    assert cli.trainer.global_step == 9


def test_damaged_checkpoint_that_is_named_is_refused(steps, cli_error):
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    at(2).write_bytes(at(2).read_bytes()[:-10])
    for command in ([*steps()], ['validate']):
        given, why, remedy = cli_error([*command, '--ckpt_path', str(at(2))])
        assert str(at(2)) in given
        assert 'cut off or altered' in why
        assert '.ckpt' in remedy


def test_auto_begins_a_training_where_there_is_none(steps):
    assert main([*steps(), '--ckpt_path=auto']).trainer.ckpt_path is None
    killed_after(4)
    (FIRST / 'checkpoints' / 'best.ckpt').unlink()
    assert main([*steps(), '--ckpt_path=auto']).trainer.ckpt_path == str(at(4))
    assert [path.name for path in Path('runs/test_resnet').iterdir()] == ['version_0']


@pytest.mark.parametrize('variables', [
    {'TORCHELASTIC_RUN_ID': '7', 'TORCHELASTIC_RESTART_COUNT': '0', 'WORLD_SIZE': '1'},
    {'TORCHELASTIC_RUN_ID': 'none', 'TORCHELASTIC_RESTART_COUNT': '0', 'WORLD_SIZE': '1'}, {'SLURM_JOB_ID': '7'}])
def test_training_that_is_started_again_goes_on(steps, monkeypatch, variables):
    main(steps(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))  # another run
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    second = FIRST.with_name('version_1')
    main(steps(**{'trainer.max_epochs': 2}))
    killed_after(4, second)
    (second / 'checkpoints' / 'best.ckpt').unlink()
    assert main(steps()).trainer.ckpt_path is None  # not started again: a new training
    count = 'SLURM_RESTART_COUNT' if 'SLURM_JOB_ID' in variables else 'TORCHELASTIC_RESTART_COUNT'
    monkeypatch.setenv(count, '1')
    (FIRST.with_name('version_2') / 'launch.txt').write_text('another')
    cli = main(steps())
    assert cli.trainer.ckpt_path == str(at(4, second))
    assert len(list(Path('runs/test_resnet').iterdir())) == 3


def test_run_that_is_started_again_is_the_last_of_its_job(tmp_path, monkeypatch):
    """A job may train several times. On several machines torchrun counts for each of them, which tells nothing."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', '7')
    monkeypatch.setenv('GROUP_WORLD_SIZE', '')
    monkeypatch.setenv('NODE_RANK', '')
    assert folders.writes()
    for number, job in enumerate(('torchrun 7', 'torchrun 7', 'torchrun 8')):
        launch = tmp_path / f'version_{number}' / 'launch.txt'
        launch.parent.mkdir()
        launch.write_text(job)
        os.utime(launch, (number, number))
    assert folders.restarted_run(tmp_path) is None
    monkeypatch.setenv('SLURM_RESTART_COUNT', '')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert folders.restarted_run(tmp_path) == tmp_path / 'version_1'
    monkeypatch.setenv('GROUP_WORLD_SIZE', '2')
    assert folders.restarted_run(tmp_path) is None


def test_torchrun_without_an_id_is_known_by_its_process(monkeypatch):
    """All such have the id `none`: one that is started again would go on with the training of another."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert folders.launch_id() == f'parent {os.getppid()} on {platform.node()}'


# Asked to stop


class Kill(Callback):
    """Sends this process a signal within a step, or within a validation."""

    def __init__(self, number, step, validation=False):
        self.number, self.step, self.validation = number, step, validation

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == self.step and not self.validation:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and self.validation:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def stopped(steps, started_with):
    """Return a function that runs a training which a signal stops, and returns its exit status."""
    def run(*signal_and_moment, arguments=None):
        with pytest.raises(SystemExit) as stop:
            started_with(Kill(*signal_and_moment), arguments or steps())
        return stop.value.code

    return run


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_saves_after_the_step_and_ends(steps, stopped, number):
    main(steps())
    whole, metrics = state(at(9)), rows()
    shutil.rmtree('runs')
    assert stopped(number, 3) == 128 + number
    assert [path.name for path in sorted(FIRST.glob('checkpoints/last*'))][-1] == at(4).name
    main([*steps(), '--ckpt_path=auto'])
    assert_same(whole, state(at(9)))
    assert rows() == metrics


def test_signal_in_a_validation_ends_it(steps, stopped):
    main(steps())
    whole, metrics = state(at(9)), rows()
    shutil.rmtree('runs')
    assert stopped(signal.SIGTERM, 6, True) == 128 + signal.SIGTERM
    newest = sorted(FIRST.glob('checkpoints/last*'))[-1]
    assert newest.name == at(5).name
    main([*steps(), '--ckpt_path', str(newest)])
    assert_same(whole, state(at(9)))
    assert rows() == metrics


@pytest.mark.parametrize(('step', 'validation'), [(1, True), (4, False)])
def test_signal_at_a_validation_within_an_epoch(steps, stopped, step, validation):
    """In it, or in the step before it: both are done again, from the checkpoint before them."""
    arguments = [*steps(**{'trainer.val_check_interval': 2}), '--trainer.callbacks', json.dumps(rarely(None))]
    main(arguments)
    whole, metrics = state(at(9)), rows()
    shutil.rmtree('runs')
    assert stopped(signal.SIGTERM, step + validation, validation, arguments=arguments) == 128 + signal.SIGTERM
    assert sorted(FIRST.glob('checkpoints/last*'))[-1] == at(step)
    assert epochs_done() == step // 3
    main([*arguments, '--ckpt_path=auto'])
    assert epochs_done() == 3
    assert_same(whole['state_dict'], state(at(9))['state_dict'])
    assert rows() == metrics


def test_signal_before_the_first_step(stopped, caplog):
    """In Lightning's sanity check, from which it would end with the status of a training that is finished."""
    assert stopped(signal.SIGTERM, 0, True) == 128 + signal.SIGTERM
    assert 'SIGTERM: stopped at step 0, before there was a checkpoint to go on from' in caplog.text
    assert not list(FIRST.glob('checkpoints/*'))


def test_signal_in_a_validation_by_time(steps, stopped, caplog):
    """Whose step has no checkpoint: it is done to its end."""
    by_time = steps(**{'trainer.val_check_interval': '00:00:00:00', 'trainer.check_val_every_n_epoch': 'null'})
    arguments = [*by_time, '--trainer.callbacks', json.dumps(rarely(None))]
    assert stopped(signal.SIGTERM, 2, True, arguments=arguments) == 128 + signal.SIGTERM
    assert 'SIGTERM: stopped at step 2, the checkpoint is of step 2' in caplog.text
    assert main([*arguments, '--ckpt_path=auto']).trainer.global_step == 9


@pytest.mark.parametrize('command', ['validate', 'predict'])
def test_evaluation_that_is_stopped_has_the_status_of_that(command, steps, monkeypatch, photos):
    class Stop(Kill):
        def on_predict_batch_start(self, *_):
            os.kill(os.getpid(), self.number)

    main(steps(**{'trainer.max_epochs': 2}))
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(AppCLI, f'before_{command}', lambda cli: cli.trainer.callbacks.append(
        Stop(signal.SIGTERM, 0, True)), raising=False)
    images = ['--data.images', str(photos / 'val')] if command == 'predict' else []
    with pytest.raises(SystemExit) as stop:
        main([command, '--ckpt_path', str(FIRST / 'checkpoints/best.ckpt'), *images])
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert not Path('predictions.csv').exists()


def test_slurm_is_asked_to_start_the_job_again(stopped, monkeypatch, tmp_path):
    script = tmp_path / 'bin' / 'scontrol'
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f'{script.parent}:{os.environ["PATH"]}')
    monkeypatch.setenv('SLURM_JOB_ID', '77')
    assert stopped(signal.SIGUSR1, 2) == 0
    assert Path('asked').read_text() == 'requeue 77\n'


def test_last_checkpoint_comes_last(make_trainer, photo_data):
    trainer = make_trainer(enable_checkpointing=True, callbacks=[LastCheckpoint(), BestCheckpoint()])
    with pytest.raises(InputError, match=r'BestCheckpoint after LastCheckpoint\n.*\n  do:  list LastCheckpoint last$'):
        trainer.fit(ImageClassifier('test_resnet', 3), photo_data())


def test_checkpoint_callback_that_is_added_saves_before_the_last(steps):
    main([*steps(), '--trainer.callbacks+=ModelCheckpoint', '--trainer.callbacks.filename=each-{step}'])
    [added] = [value for key, value in state(at(9))['callbacks'].items() if key.startswith('ModelCheckpoint')]
    assert Path(added['best_model_path']).name == 'each-step=9.ckpt'


def test_newest_are_kept(steps):
    keep = [*WITHIN[:1], {**WITHIN[-1], 'init_args': {'every_n_steps': 4, 'keep': 2}}]
    main([*steps(), '--trainer.callbacks', json.dumps(keep)])
    assert sorted(path.name for path in FIRST.glob('checkpoints/*')) == ['best.ckpt', at(8).name, at(9).name]


def test_checkpoints_of_a_training_that_was_abandoned_are_removed(steps):
    """They are of later steps than the newest of this one."""
    keep = [*WITHIN[:-1], {**WITHIN[-1], 'init_args': {'every_n_steps': 1, 'keep': 2}}]
    main(steps())
    main([*steps(), '--trainer.callbacks', json.dumps(keep), '--trainer.max_steps=5', '--ckpt_path', str(at(3))])
    assert sorted(path.name for path in FIRST.glob('checkpoints/last-step*')) == [at(4).name, at(5).name]


def test_signal_in_the_last_step_lets_the_training_end(steps, started_with):
    """Nothing is left to go on with: SLURM must not start it again."""
    cli = started_with(Kill(signal.SIGUSR1, 8), [
        *steps(), '--trainer.limit_val_batches=0', '--trainer.callbacks', json.dumps(WITHIN[2:])])
    assert cli.trainer.global_step == 9
    assert sorted(FIRST.glob('checkpoints/last*'))[-1] == at(9)


def test_run_that_goes_on_elsewhere_has_a_best_of_its_own(steps):
    """Though none of its epochs is better: the file of the best so far is in the other folder."""
    main(steps(**{'trainer.max_epochs': 2}))
    changed = torch.load(at(4), weights_only=True)
    key = next(key for key in changed['callbacks'] if key.startswith('BestCheckpoint'))
    scores = changed['callbacks'][key]
    scores['best_model_score'] = scores['kth_value'] = torch.tensor(101.)
    scores['best_k_models'] = {scores['best_model_path']: torch.tensor(101.)}
    torch.save(changed, at(4))
    cli = main([*steps(), '--ckpt_path', str(at(4)), '--trainer.default_root_dir=runs/other'])
    best = Path(cli.trainer.checkpoint_callback.best_model_path)
    assert best.is_file()
    assert best.resolve().is_relative_to(Path('runs/other').resolve())


# The folder of a run


def test_second_machine_makes_no_folder_and_holds_none(tmp_path, monkeypatch):
    """It shares the disk with the first, which does."""
    monkeypatch.setenv('NODE_RANK', '1')
    assert folders.claimed(tmp_path, 'version_') == tmp_path / 'version_0'
    with folders.held(tmp_path / 'version_0') as waited:
        assert not waited
    assert list(tmp_path.iterdir()) == []


def test_folder_is_numbered_after_the_largest_that_has_a_number(tmp_path):
    for name in ('version_3', 'version_10', 'version_old', 'version_'):
        (tmp_path / name).mkdir()
    assert folders.next_free(tmp_path, 'version_') == tmp_path / 'version_11'


@pytest.mark.skipif(folders.fcntl is None, reason='files cannot be locked')
def test_processes_that_outlive_a_training_do_not_hold_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, 'SECONDS', 0.3)
    with ExitStack() as ended:
        with folders.held(tmp_path):
            if (child := os.fork()) == 0:  # as a worker, with all files that are open
                try:
                    signal.pause()
                finally:
                    os._exit(1)
            ended.callback(os.waitpid, child, 0)
            ended.callback(os.kill, child, signal.SIGKILL)  # first
        with folders.held(tmp_path) as waited:
            assert not waited


@pytest.mark.skipif(not hasattr(os, 'O_PATH'), reason='needs a file that cannot be locked')
def test_file_that_cannot_be_locked_is_every_ones(tmp_path):
    (tmp_path / 'launch.txt').touch()
    file = os.open(tmp_path / 'launch.txt', os.O_PATH)  # a lock of it is refused
    try:
        assert folders.locks(file)
    finally:
        os.close(file)


def test_folder_is_given_back_only_where_no_training_has_written(tmp_path):
    empty, begun = tmp_path / 'runs/new/version_0', tmp_path / 'runs/old/version_0'
    for folder, content in ((empty, ''), (begun, 'slurm 7')):
        folder.mkdir(parents=True)
        (folder / 'launch.txt').write_text(content)
        folders.give_back(folder, tmp_path / 'runs')
    assert sorted(path.name for path in (tmp_path / 'runs').iterdir()) == ['old']
    assert (begun / 'launch.txt').read_text() == 'slurm 7'
    folders.give_back(tmp_path / 'runs/none/version_0', tmp_path / 'runs/none')
    assert (tmp_path / 'runs').is_dir()
