"""A training that is stopped at the end of an epoch and resumed is the unbroken one, bit for bit."""
from pathlib import Path

import pytest
import torch

from lightning_app.cli import main

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


@pytest.fixture
def recipe(write_yaml, on_photos):
    """Return a function that gives the arguments of a training of three epochs with the given callbacks first."""
    def arguments(*callbacks, **settings):
        config = write_yaml('recipe.yaml', {'trainer': {
            'callbacks': [*callbacks, *CHECKPOINTS], 'logger': {'class_path': 'lightning_app.logger.CsvLogger'}}})
        options = {'trainer.max_epochs': 3, 'model.optim.lr': 0.05, 'model.schedule.warmup_epochs': 1, **settings}
        return ['fit', *on_photos, '--config', config, *[f'--{name}={value}' for name, value in options.items()]]

    return arguments


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


def test_last_is_the_newest_last_checkpoint_of_the_runs(recipe, cli_error):
    given, why, _ = cli_error([*recipe(), '--ckpt_path=last'])
    assert 'last' in given
    assert 'runs/test_resnet' in why
    last = ['--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.filename=last']
    main([*recipe(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}), *last])
    main([*recipe(**{'trainer.max_epochs': 2}), *last])
    (FIRST / 'checkpoints' / 'last.ckpt').touch()
    cli = main([*recipe(), *last, '--ckpt_path=last'])
    assert cli.trainer.default_root_dir == str(FIRST.resolve())
    assert cli.trainer.global_step == 9


def test_recorded_config_of_a_resumed_run_is_that_of_its_beginning(recipe):
    main(recipe())
    before = (FIRST / 'config.yaml').read_text()
    main([*recipe(), '--ckpt_path', stop_after(0)])
    assert (FIRST / 'config.yaml').read_text() == before


def test_training_that_slurm_starts_again_goes_on(recipe, monkeypatch):
    # as Lightning does on SIGUSR1: it saves, and asks SLURM to start the job again
    cli = main(recipe(**{'trainer.max_epochs': 1, 'model.schedule.warmup_epochs': 0}))
    cli.trainer.save_checkpoint(FIRST / 'hpc_ckpt_1.ckpt')
    for name, value in {'JOB_ID': 7, 'NTASKS': 1, 'JOB_NAME': 'train', 'RESTART_COUNT': 1, 'PROCID': 0, 'LOCALID': 0,
                        'NODEID': 0, 'NODELIST': 'here'}.items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
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
