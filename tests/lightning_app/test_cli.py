"""The command line: what is given wins, configs merge, checkpoints complete what is not given, runs have folders."""
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.callbacks import Timer

from lightning_app import ImageClassifier, folders
from lightning_app.callbacks import ResultLine, Throughput
from lightning_app.cli import main

pytestmark = [
    pytest.mark.usefixtures('in_tmp_path'),
    # a resumed run goes on in its folder
    pytest.mark.filterwarnings('ignore:Checkpoint directory .* exists and is not empty:UserWarning'),
]

CSV = '--trainer.logger=lightning_app.logger.CsvLogger'
WANDB = '--trainer.logger=lightning_app.logger.WandbLogger'


def only_checkpoint(folder='runs'):
    checkpoints = list(Path(folder).rglob('*.ckpt'))
    assert len(checkpoints) == 1
    return str(checkpoints[0])


def validation(cli):
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()
            if name.startswith('val/') and name != 'val/top1_best'}  # of a training only


def files_below(folder):
    return sorted(str(path) for path in Path(folder).rglob('*'))


# What is given wins over what a checkpoint says


def test_settings_given_survive_ckpt_path(on_photos, optimizer_steps):
    main(['fit', *on_photos, '--model.optim.momentum=0.9', '--model.optim.weight_decay=0.001'])
    del optimizer_steps[:]
    cli = main(['fit', *on_photos, '--ckpt_path', only_checkpoint(), '--model.optim.lr=0.003',
                '--model.optim.momentum=0.5', '--model.optim.weight_decay=0.02', '--model.schedule.name=constant',
                '--model.loss.smoothing=0.1', '--trainer.max_epochs=2'])
    assert cli.model.hparams.optim['lr'] == 0.003
    assert cli.model.hparams.loss['smoothing'] == 0.1
    assert len(optimizer_steps) == 3  # the second epoch
    for groups in optimizer_steps:
        assert {group['lr'] for group in groups} == {0.003}
        assert {group['momentum'] for group in groups} == {0.5}
        assert sorted(group['weight_decay'] for group in groups) == [0, 0.02]


def test_settings_not_given_in_a_resumed_fit_are_the_defaults_not_the_checkpoints(on_photos, optimizer_steps):
    # a training is described by its config alone: what it is must not depend on a binary file
    main(['fit', *on_photos, '--model.optim.momentum=0.3'])
    del optimizer_steps[:]
    main(['fit', *on_photos, '--ckpt_path', only_checkpoint(), '--trainer.max_epochs=2'])
    assert {group['momentum'] for groups in optimizer_steps for group in groups} == {0.9}


def test_settings_given_win_over_the_checkpoint_in_an_evaluation(on_photos):
    fitted = main(['fit', *on_photos])
    cli = main(['validate', '--ckpt_path', only_checkpoint(), '--data.eval_batch_size=3', '--data.eval_size=48'])
    assert cli.datamodule.eval_batch_size == 3
    assert cli.datamodule.eval_size == 48
    assert cli.datamodule.batch_size == 8  # the checkpoint's
    assert validation(cli)['val/loss'] != validation(fitted)['val/loss']


# Configs merge


def test_dataclasses_merge_by_field_over_configs_and_the_command_line(write_yaml):
    first = write_yaml('first.yaml', {
        'model': {'name': 'test_resnet', 'optim': {'lr': 0.1, 'momentum': 0.8}, 'schedule': {'min_lr': 0.01}},
        'data': {'class_path': 'DigitsDataModule', 'init_args': {'augment': {'padding': 2}, 'batch_size': 32}}})
    second = write_yaml('second.yaml', {
        'model': {'optim': {'lr': 0.2}, 'loss': {'smoothing': 0.1}},
        'data': {'init_args': {'augment': {'vflip': 0.5}}}})
    cli = main(['--config', first, '--config', second, '--model.schedule.warmup_epochs=2'], run=False)
    assert (cli.model.optim.lr, cli.model.optim.momentum) == (0.2, 0.8)
    assert (cli.model.schedule.min_lr, cli.model.schedule.warmup_epochs) == (0.01, 2)
    assert cli.model.loss.smoothing == 0.1
    assert (cli.datamodule.augment.padding, cli.datamodule.augment.vflip) == (2, 0.5)
    assert cli.datamodule.augment.hflip == 0  # the data module's own default, not the dataclass's
    assert cli.datamodule.batch_size == 32


def test_callbacks_are_replaced_by_a_later_config_and_appended_with_plus(write_yaml):
    def callbacks(key):
        second = write_yaml('second.yaml', {'trainer': {key: [
            {'class_path': 'lightning.pytorch.callbacks.Timer', 'init_args': {'duration': '00:01:00:00'}}]}})
        cli = main(['--config', first, '--config', second], run=False)
        return {type(callback) for callback in cli.trainer.callbacks} & {Timer, ResultLine, Throughput}

    first = write_yaml('first.yaml', {
        'model': {'name': 'test_resnet'}, 'data': {'class_path': 'DigitsDataModule'},
        'trainer': {'accelerator': 'cpu', 'callbacks': [
            {'class_path': f'lightning_app.callbacks.{name}'} for name in ('Throughput', 'ResultLine')]}})
    assert callbacks('callbacks') == {Timer}
    assert callbacks('callbacks+') == {Timer, ResultLine, Throughput}


def test_no_callback_is_added_that_is_not_named(on_photos):
    cli = main(['fit', *on_photos])
    ours = [callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith('lightning_app')]
    assert [type(callback).__name__ for callback in ours] == ['RecordConfig']  # writes config.yaml


@pytest.mark.parametrize(('value', 'expected'), [('1', 1), ('1.0', 1.0), ('0.5', 0.5), ('7', 7)])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_one_batch_is_not_all_of_them(split, value, expected, on_photos, in_tmp_path):
    """Nor in the config that is recorded."""
    key = f'limit_{split}_batches'
    trainer = main(['fit', *on_photos, f'--trainer.{key}={value}', '--data.eval_batch_size=2']).trainer
    recorded = yaml.safe_load(next(Path('runs').rglob('config.yaml')).read_text())['trainer'][key]
    for found in (getattr(trainer, key), recorded):
        assert (found, type(found)) == (expected, type(expected))


CALLBACKS = ['lightning_app.callbacks.ProgressBar', 'ModelCheckpoint', 'lightning_app.callbacks.ResultLine']


@pytest.mark.parametrize(('switch', 'callback'), [
    ('enable_progress_bar', 'ProgressBar'), ('enable_checkpointing', 'ModelCheckpoint')])
def test_switch_of_the_trainer_wins_over_the_callback_of_a_config(on_photos, write_yaml, switch, callback):
    # Lightning refuses the two together
    config = write_yaml('config.yaml', {'trainer': {'callbacks': [{'class_path': name} for name in CALLBACKS]}})
    given = [*on_photos, '--trainer.enable_progress_bar=true', f'--trainer.{switch}=false']
    cli = main(['fit', '--config', config, *given])
    names = {type(each).__name__ for each in cli.trainer.callbacks}
    assert {'ProgressBar', 'ModelCheckpoint', 'ResultLine'} - names == {callback}
    assert bool(list(Path('runs').rglob('*.ckpt'))) == (switch != 'enable_checkpointing')


def test_settings_in_place_of_a_file_may_be_many(write_yaml):
    config = write_yaml('config.yaml', {'data': {'class_path': 'DigitsDataModule'}})
    model = {'name': 'test_resnet', 'network': {'drop_rate': 0.1}, 'optim': {'options': {'betas': [0.9] * 50}}}
    given = yaml.safe_dump(model, default_flow_style=True, width=math.inf)
    assert len(given) > 255  # longer than any file's name
    assert main(['--config', config, '--model', given], run=False).model.hparams.network == {'drop_rate': 0.1}


def test_word_in_place_of_a_file_may_look_like_a_date_that_there_is_not(on_photos, in_tmp_path):
    main(['fit', *on_photos, '--config', '{trainer: {default_root_dir: 2026-02-30}}'])
    assert list(Path('2026-02-30').rglob('*.ckpt'))


def test_command_line_wins_over_the_config_before_it(write_yaml):
    config = write_yaml('config.yaml', {'model': {'name': 'test_resnet', 'optim': {'lr': 0.1}},
                                        'data': {'class_path': 'DigitsDataModule'}})
    assert main(['--config', config, '--model.optim.lr=0.3'], run=False).model.optim.lr == 0.3


def test_number_of_classes_comes_from_the_data(on_photos):
    cli = main(on_photos, run=False)
    assert cli.model.net.num_classes == 3
    assert cli.model.hparams.num_classes == 3


# Run folders and records


@pytest.mark.parametrize('logger', [CSV, WANDB, None])
def test_each_run_has_its_folder_and_config(on_photos, logger):
    for lr in ('0.01', '0.02'):
        main(['fit', *on_photos, f'--model.optim.lr={lr}', *([logger] if logger else []),
              '--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.filename=best'])
        wandb.finish()  # in a process of its own the end of the process does it
    runs = Path('runs/test_resnet')
    assert sorted(path.name for path in runs.iterdir()) == ['version_0', 'version_1']
    for version, lr in enumerate((0.01, 0.02)):
        folder = runs / f'version_{version}'
        assert yaml.safe_load((folder / 'config.yaml').read_text())['model']['optim']['lr'] == lr
        assert (folder / 'checkpoints' / 'best.ckpt').is_file()
        assert (folder / 'metrics.csv').exists() == (logger == CSV)
        assert len(list(folder.rglob('run-*.wandb'))) == (logger == WANDB)
    assert sorted(os.listdir()) == ['photos', 'runs']  # nothing beside the folders


def test_trainings_that_begin_at_once_have_folders_of_their_own(on_photos, monkeypatch):
    config = ['fit', *on_photos, '--trainer.fast_dev_run=false', '--trainer.max_steps=1']
    original, begun = folders.next_free, []

    def next_free(base, prefix):
        """Return what is free, and let another training take it, once."""
        free = original(base, prefix)
        if not begun:
            begun.append(free)
            free.mkdir(parents=True)
        return free

    monkeypatch.setattr(folders, 'next_free', next_free)
    cli = main(config)
    assert begun[0].name == 'version_0'
    assert Path(cli.trainer.default_root_dir).name == 'version_1'


def test_refused_training_leaves_no_folder(on_photos, photos, cli_error, in_tmp_path):
    before = {path.name for path in in_tmp_path.iterdir()}
    logger = '--trainer.logger=lightning_app.logger.CsvLogger'
    cli_error(['fit', *on_photos, logger, '--model.mix.mixup=0.2', '--data.batch_size=7'])
    assert {path.name for path in in_tmp_path.iterdir()} == before
    (in_tmp_path / 'mine').mkdir()
    cli_error(['fit', *on_photos, logger, '--model.mix.mixup=0.2', '--data.batch_size=7',
               '--trainer.default_root_dir=mine'])
    assert list((in_tmp_path / 'mine').iterdir()) == []


def test_default_root_dir_holds_the_run_folders(on_photos):
    main(['fit', *on_photos, '--trainer.default_root_dir=out/study'])
    assert Path('out/study/version_0/config.yaml').is_file()
    assert not Path('runs').exists()


@pytest.mark.parametrize('logger', [[], [CSV], [WANDB]], ids=['none', 'csv', 'wandb'])
def test_checkpoints_without_a_callback_are_in_the_run_folder(on_photos, logger):
    main(['fit', *on_photos, *logger])
    assert Path(only_checkpoint()).parent == Path('runs/test_resnet/version_0/checkpoints')


def test_fast_dev_run_and_evaluation_write_nothing(on_photos):
    main(['fit', *on_photos, '--trainer.fast_dev_run=1'])
    assert os.listdir() == ['photos']
    main(['fit', *on_photos])
    before = files_below('.')
    main(['validate', '--ckpt_path', only_checkpoint()])
    main(['test', '--ckpt_path', only_checkpoint()])
    assert files_below('.') == before


def test_config_is_recorded_nested_in_folder_wandb_and_csv(on_photos, write_yaml, read_wandb):
    loggers = write_yaml('loggers.yaml', {'trainer': {'logger': [
        {'class_path': 'lightning_app.logger.WandbLogger', 'init_args': {'tags': ['a', 'b'], 'group': 'study'}},
        {'class_path': 'lightning_app.logger.CsvLogger'}]}})
    main(['fit', '--config', loggers, *on_photos, '--model.optim.momentum=0.7', '--trainer.limit_train_batches=2'])
    folder = Path('runs/test_resnet/version_0')
    config = yaml.safe_load((folder / 'config.yaml').read_text())
    assert config['model']['optim']['momentum'] == 0.7
    assert config['trainer']['limit_train_batches'] == 2
    assert config['data']['init_args']['batch_size'] == 8
    assert 'num_classes' not in config['model']  # follows from the data

    recorded = {}
    for record in read_wandb(folder):
        for part in (record.config, record.run.config):
            recorded |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in part.update}
    for group in ('model', 'data', 'trainer', 'seed_everything'):
        assert recorded[group] == config[group]
    assert not {'name', 'optim', 'lr'} & recorded.keys()  # no flat copy beside it

    hparams = yaml.safe_load((folder / 'hparams.yaml').read_text())
    assert hparams['model'] == config['model']
    assert hparams['trainer']['limit_train_batches'] == 2


def test_setting_that_is_an_enum_is_recorded(on_photos):
    main(['fit', *on_photos, '--trainer.callbacks=Timer', '--trainer.callbacks.duration=00:01:00:00'])
    callbacks = yaml.safe_load(Path('runs/test_resnet/version_0/config.yaml').read_text())['trainer']['callbacks']
    assert callbacks[0]['init_args']['interval'] == 'step'
    main(['fit', '--config=runs/test_resnet/version_0/config.yaml'])


def test_recorded_config_runs_again_as_it_is_with_the_same_result(on_photos):
    first = main(['fit', *on_photos, CSV, '--model.schedule.warmup_epochs=0', '--trainer.limit_train_batches=2'])
    second = main(['fit', '--config', 'runs/test_resnet/version_0/config.yaml'])
    assert validation(second) == validation(first)
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path('runs/test_resnet').glob('*/config.yaml'))]
    assert len(configs) == 2
    assert configs[0] == configs[1]


def test_switches_stand_alone_or_with_a_value(on_photos, capsys):
    with pytest.raises(SystemExit):
        main(['fit', *on_photos, '--model.plain', '--trainer.fast_dev_run', '--trainer.deterministic',
              '--model.recompute', 'false', '--trainer.detect_anomaly=true', '--print_config'])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config['model']['plain'], config['model']['recompute']) == (True, False)
    assert [config['trainer'][name] for name in ('fast_dev_run', 'deterministic', 'detect_anomaly')] == [True] * 3


def test_print_config_runs_again(on_photos, capsys, write_yaml):
    with pytest.raises(SystemExit) as stop:
        main(['fit', *on_photos, '--model.optim.lr=0.25', '--print_config'])
    assert stop.value.code == 0
    cli = main(['fit', '--config', write_yaml('printed.yaml', capsys.readouterr().out), '--trainer.fast_dev_run=1'])
    assert cli.model.optim.lr == 0.25


def test_seed_is_recorded_and_changes_the_run(on_photos):
    first, second, third = (
        main(['fit', *on_photos, f'--seed_everything={seed}']).model.net.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert 'seed_everything: 2\n' in Path('runs/test_resnet/version_2/config.yaml').read_text()


# A checkpoint is evaluated without a config


@pytest.mark.parametrize('options', [
    ['--trainer.precision=32'],
    ['--trainer.precision=bf16-mixed'],
    pytest.param(['--trainer.precision=16-mixed'], marks=pytest.mark.filterwarnings(
        'ignore:You passed `Trainer.accelerator=.cpu., precision=.16-mixed:UserWarning')),
    ['--trainer.precision=bf16-mixed', '--model.channels_last=true'],
    ['--trainer.callbacks=lightning_app.callbacks.WeightEMA', '--trainer.callbacks.decay=0.9'],
    ['--data.eval_size=40', '--data.crop_pct=0.9', '--data.interpolation=bilinear', '--data.eval_batch_size=2'],
    ['--model.network.drop_rate=0.1', '--data.mean=[0.1,0.2,0.3]', '--data.std=[0.5,0.6,0.7]'],
], ids=['32', 'bf16', '16', 'channels_last', 'ema', 'evaluation', 'network'])
def test_checkpoint_alone_gives_the_numbers_of_the_fit(on_photos, options):
    fitted = main(['fit', *on_photos, *options])
    alone = main(['validate', '--ckpt_path', only_checkpoint()])
    assert set(validation(fitted)) == {'val/loss', 'val/top1', 'val/top5', 'val/top1_error', 'val/top5_error'}
    assert validation(alone) == validation(fitted)


@pytest.mark.parametrize('order', [1, -1])
def test_recorded_config_and_checkpoint_give_the_numbers_of_the_fit(on_photos, order):
    fitted = main(['fit', *on_photos])
    given = ['--config=runs/test_resnet/version_0/config.yaml', f'--ckpt_path={only_checkpoint()}']
    assert validation(main(['validate', *given[::order]])) == validation(fitted)


def test_training_goes_on_whether_a_recorded_config_comes_first_or_last(on_photos):
    main(['fit', *on_photos, CSV])
    checkpoint = only_checkpoint()
    cli = main(['fit', '--ckpt_path=auto', '--config=runs/test_resnet/version_0/config.yaml', '--trainer.max_epochs=2'])
    assert (cli.trainer.ckpt_path, cli.trainer.global_step) == (checkpoint, 6)


def test_test_counts_the_test_split(on_photos):
    fitted = main(['fit', *on_photos])
    # without a test split the validation images are the test
    tested = main(['test', '--ckpt_path', only_checkpoint()]).trainer.callback_metrics
    assert {f'val/{name[5:]}': float(value) for name, value in tested.items()} == validation(fitted)


def test_moved_data_are_named_beside_the_checkpoint(on_photos, photos):
    fitted = main(['fit', *on_photos])
    photos.rename('moved')
    alone = main(['validate', '--ckpt_path', only_checkpoint(), '--data.root=moved'])
    assert validation(alone) == validation(fitted)


def test_evaluation_needs_no_training_images(on_photos, photos):
    """The checkpoint knows their classes; a part of them may be evaluated, and its labels are those of the whole."""
    fitted = main(['fit', *on_photos])
    whole, count = validation(fitted), len(list((photos / 'val').rglob('*.*')))
    shutil.rmtree(photos / 'train')
    recorded = str(next(Path('runs').rglob('config.yaml')))
    for given in ([], [f'--config={recorded}']):
        assert validation(main(['validate', *given, '--ckpt_path', only_checkpoint()])) == whole
    sums = dict.fromkeys(whole, 0)
    for kept, removed in (('bee',), ('ant', 'cat')), (('ant', 'cat'), ('bee',)):
        part = Path(f'without_{"_".join(removed)}')
        for name in kept:
            shutil.copytree(photos / 'val' / name, part / 'val' / name)
        share = len(list((part / 'val').rglob('*.*'))) / count
        metrics = validation(main([
            'validate', f'--config={recorded}', '--ckpt_path', only_checkpoint(), f'--data.root={part}']))
        for name, value in metrics.items():
            sums[name] += share * value
    assert sums == pytest.approx(whole, rel=1e-5)


OWN_DATA = '''
from typing import Any
from lightning_app import ImageNetDataModule


class Kept(ImageNetDataModule):
    def __init__(self, kept: set[int] | None = None, **common):
        super().__init__(**common)
        self.kept = kept


class Flavoured(Kept):
    def __init__(self, flavour: Any = None, **common):
        super().__init__(**common)
        self.flavour = flavour or len
'''


def test_evaluation_has_the_arguments_of_a_data_module_of_the_user(on_photos, tmp_path, monkeypatch, recwarn):
    (tmp_path / 'own_data.py').write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    main(['fit', *on_photos, '--data=own_data.Flavoured', '--data.kept=[2, 1]'])
    assert torch.load(only_checkpoint(), weights_only=True)['data_left_out'] == ['flavour']
    evaluate = ['validate', '--ckpt_path', only_checkpoint(), '--trainer.accelerator=cpu']
    for given in (['--data.flavour=sour'], ['--data=own_data.Kept'], []):
        assert not [warning for warning in recwarn if 'the checkpoint is without' in str(warning.message)]
        assert main([*evaluate, *given]).datamodule.kept == {1, 2}
    assert any('data.flavour: the checkpoint is without' in str(warning.message) for warning in recwarn)


class Mine(ImageClassifier):
    def __init__(self, *args, gamma: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters('gamma', logger=False)


def test_classifier_of_the_user_has_the_command_line(on_photos, cli_error, capfd):
    main(['fit', *on_photos, '--model.gamma=1.5', '--trainer.callbacks=lightning_app.callbacks.ResultLine'],
         model_class=Mine)
    fitted = capfd.readouterr().out
    assert yaml.safe_load(next(Path('runs').rglob('config.yaml')).read_text())['model']['gamma'] == 1.5
    evaluated = main(['validate', '--ckpt_path', only_checkpoint(), '--trainer.accelerator=cpu'], model_class=Mine)
    assert type(evaluated.model) is Mine
    assert evaluated.model.hparams.gamma == 1.5
    assert cli_error(['validate', '--ckpt_path', only_checkpoint()])[0].endswith('model.gamma')
    assert f'evaluate:   python {sys.argv[0]} validate --ckpt_path' in fitted
    with pytest.raises(SystemExit):
        main(['sweep', 'a.yaml'], model_class=Mine)
    assert 'it trains by ImageClassifier, not by Mine' in capfd.readouterr().err


def test_trainer_without_a_command_leaves_configs_of_the_user(on_photos, cli_error, refused):
    Path('config.yaml').write_text('mine: 1\n')
    options = [*on_photos, '--trainer.callbacks+=lightning_app.callbacks.LastCheckpoint']
    for _ in range(2):
        cli = main(options, run=False)
        if list(Path('checkpoints').glob('last-*')):
            with refused('default_root_dir: ', 'of another training', 'by ckpt_path'):
                cli.trainer.fit(cli.model, cli.datamodule)
        else:
            cli.trainer.fit(cli.model, cli.datamodule)
    assert Path('config.yaml').read_text() == 'mine: 1\n'
    assert not Path('launch.txt').exists()


def test_classes_that_the_checkpoint_does_not_know(on_photos, photos, cli_error):
    main(['fit', *on_photos])
    for split in ('train', 'val'):
        (photos / split / 'bee').rename(photos / split / 'beetle')
    what, why, remedy = cli_error(['validate', '--ckpt_path', only_checkpoint()])
    assert 'class beetle in val' in what
    assert 'the training images of the checkpoint have 3 classes, and this is none of them' in why
    assert 'did you mean bee?' in remedy


# Checkpoints hold plain types


def test_checkpoint_loads_with_weights_only(on_photos):
    cli = main(['fit', *on_photos])
    checkpoint = torch.load(only_checkpoint(), weights_only=True)
    assert checkpoint['class_names'] == ['ant', 'bee', 'cat']
    model = ImageClassifier.load_from_checkpoint(only_checkpoint())
    assert model.class_names == ['ant', 'bee', 'cat']
    assert model.optim == cli.model.optim
    for name, value in cli.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_result_is_returned_from_run_false_without_a_subcommand(on_photos):
    cli = main(on_photos, run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 3


def test_refused_resume_leaves_the_run_as_it_was(on_photos, cli_error):
    main(['fit', *on_photos, CSV])
    folder = Path('runs/test_resnet/version_0')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    _, why, _ = cli_error(['fit', *on_photos, CSV, '--ckpt_path=auto', '--trainer.max_epochs=3',
                           '--model.optim.name=adamw'])
    assert 'momentum' in why
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
    main(['fit', *on_photos, CSV, '--ckpt_path=auto', '--trainer.max_epochs=2'])
    assert yaml.safe_load((folder / 'config.yaml').read_text())['trainer']['max_epochs'] == 2


def test_training_that_is_refused_for_its_data_leaves_no_file(on_photos, cli_error):
    given, _, _ = cli_error(['fit', *on_photos, CSV, '--data.batch_size=1024'])
    assert '1024' in given
    assert not any(path.is_file() for path in Path('runs').rglob('*'))


def test_checkpoint_with_more_epochs_than_are_wanted(on_photos, cli_error, capfd):
    main(['fit', *on_photos, '--trainer.max_epochs=2', '--trainer.callbacks=LastCheckpoint'])
    given, why, do = cli_error(['fit', *on_photos, '--ckpt_path=auto', '--trainer.max_epochs=1'])
    assert (given, why) == ('trainer.max_epochs: 1', 'the checkpoint has 2 behind it')
    assert 'take a larger number' in do
    capfd.readouterr()
    main(['fit', *on_photos, '--ckpt_path=auto', '--trainer.max_epochs=2'])
    assert 'the checkpoint is of the end of 2 epochs: a larger trainer.max_epochs' in capfd.readouterr().err


def test_checkpoint_with_more_steps_than_are_wanted(on_photos, cli_error, capfd):
    args = ['fit', *on_photos, '--trainer.callbacks=LastCheckpoint', '--trainer.max_epochs=2']
    main([*args, '--trainer.max_steps=4'])
    given, why, do = cli_error([*args, '--ckpt_path=auto', '--trainer.max_steps=3'])
    assert (given, why) == ('trainer.max_steps: 3', 'the checkpoint has 4 behind it')
    assert 'take a larger number' in do
    capfd.readouterr()
    assert main([*args, '--ckpt_path=auto', '--trainer.max_steps=4']).trainer.global_step == 4
    assert 'the checkpoint is of the end of 4 steps: a larger trainer.max_steps' in capfd.readouterr().err
    assert main([*args, '--ckpt_path=auto', '--trainer.max_steps=6']).trainer.global_step == 6
    assert main([*args, '--ckpt_path=auto', '--trainer.max_steps=6']).trainer.global_step == 6
    assert 'the end of 2 epochs and 6 steps: a larger trainer.max_epochs and' in capfd.readouterr().err
    assert cli_error([*args, '--ckpt_path=auto', '--trainer.fast_dev_run=1']) == (
        'trainer.fast_dev_run with a checkpoint', 'a trial is of 1 epochs, and it has 2 behind it',
        'leave out ckpt_path')


def test_early_stopping_with_validations_by_the_clock(on_photos):
    trainer = main([
        'fit', *on_photos, '--trainer.val_check_interval=00:00:00:01', '--trainer.check_val_every_n_epoch=null',
        '--trainer.max_epochs=1000', '--trainer.callbacks=EarlyStopping', '--trainer.callbacks.monitor=val/top1',
        '--trainer.callbacks.mode=max', '--trainer.callbacks.patience=1']).trainer
    assert trainer.early_stopping_callback.wait_count == 1
    assert trainer.current_epoch < 1000


def test_nothing_untrue_is_said_of_the_validation_on_the_images_of_the_training(on_photos, program):
    said = program('fit', *on_photos, '--trainer.overfit_batches=1').stderr
    assert 'train dataloader shuffling' in said
    assert 'val dataloader shuffling' not in said


def test_fast_dev_run_writes_nothing(on_photos, in_tmp_path):
    before = files_below('.')
    main(['fit', *on_photos, '--trainer.fast_dev_run', '--trainer.callbacks=LastCheckpoint'])
    assert files_below('.') == before
