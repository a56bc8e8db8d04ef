"""Bad input: three lines, exit status 2, and not one training step."""
import dataclasses
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_app.cli import main
from lightning_app.data import Augment, ImageDataModule, ImageNetDataModule
from lightning_app.messages import ELSEWHERE

pytestmark = [
    pytest.mark.usefixtures('in_tmp_path'),
    # of a run that is resumed in its folder, before it is refused
    pytest.mark.filterwarnings('ignore:Checkpoint directory .* exists and is not empty:UserWarning'),
]

CONFIGS = Path(__file__).parents[2] / 'configs'
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='tells of a machine without GPU')


@pytest.fixture
def refused(cli_error, optimizer_steps):
    """As `cli_error`, and no optimiser has stepped."""
    def run(args, given='', why='', do=''):
        lines = cli_error(args)
        for line, wanted in zip(lines, (given, why, do), strict=True):
            assert wanted in line, lines
        assert not optimizer_steps
        return lines

    return run


# Keys and values on the command line


@pytest.mark.parametrize(('option', 'remedy'), [
    ('--model.lr=0.1', 'model.optim.lr'),
    ('--model.nmae=test_resnet', 'model.name'),
    ('--model.num_clases=3', 'data.num_classes'),  # which model.num_classes follows
    ('--model.optim.lrr=0.1', 'model.optim.lr'),
    ('--model.optim.weight_deacy=0.1', 'model.optim.weight_decay'),
    ('--model.schedule.warmup=5', 'model.schedule.warmup_epochs'),
    ('--model.optim=0.1', ''),
    ('--trainer.max_epoch=3', 'trainer.max_epochs'),  # a prefix of two options, which argparse would take as one
    ('--trainer.precisio=32', 'trainer.precision'),
    ('--trainer.max_epo=3', 'trainer.max_epochs'),
    ('--traner.max_epochs=3', 'trainer.max_epochs'),
    ('--data.batchsize=8', 'batch_size'),
    ('--data.batch=8', 'batch_size'),
    ('--data.augment.hflp=0.1', 'hflip'),
    ('--optimizer=SGD', 'model.optim.name'),
    ('--root=photos', 'data.root'),
    ('--epochs=3', 'trainer.max_epochs?'),
    ('--batch-size=8', 'data.batch_size'),
    ('--opt=sgd', 'model.optim.name?'),
    ('--model.optim.learning_rate=0.1', 'model.optim.lr?'),
    ('--data-dir=photos', 'data.root?'),
    ('--amp', 'trainer.precision?'),
    ('--ckpt=x', 'ckpt_path'),
    ('--ckpt_pth=x', 'ckpt_path'),
])
def test_unknown_option(refused, on_photos, option, remedy):
    given, _, do = refused(['fit', *on_photos, option])
    assert option.lstrip('-').split('=')[0].rpartition('.')[2] in given
    assert remedy in do


def test_names_of_other_programs_lead_to_options(refused, on_photos, capfd):
    with pytest.raises(SystemExit):
        main(['fit', '--help'])
    options = set(re.findall(r'--([a-z_.]+)', capfd.readouterr().out))
    for module in (ImageDataModule, ImageNetDataModule):
        options |= {f'data.{name}' for name in inspect.signature(module).parameters}
    options |= {f'data.augment.{field.name}' for field in dataclasses.fields(Augment)}
    assert set(ELSEWHERE.values()) <= options
    assert not set(ELSEWHERE) & options
    for name in ('learning_rate', 'opt', 'model_ema', 'aug_repeats'):
        _, _, do = refused(['fit', *on_photos, f'--{name}=1'])
        assert do == f'did you mean --{ELSEWHERE[name]}?'


@pytest.mark.parametrize(('option', 'remedy'), [
    ('--model=se_resnet50', 'model.name=se_resnet50?'), ('--model.loss=bce', 'model.loss.name=bce?'),
    ('--model.mix=0.2', 'model.mix.cutmix'), ('--data.augment=rrc', 'data.augment.auto_augment'),
    ('--model.network=reduction', '--model.network.NAME=VALUE'), ('--model.add_se=true', '--model.add_se.NAME=VALUE'),
    ('--model.optim.options=1', '--model.optim.options.NAME=VALUE'),
    ('--model.distill=resnet50', '--model.distill.teacher=NAME')])
def test_value_in_place_of_options(refused, on_photos, option, remedy):
    key, value = option.lstrip('-').split('=')
    given, _, do = refused(['fit', *on_photos, option])
    assert given.endswith(f'{key.rpartition(".")[2]}: {value}')
    assert remedy in do


@pytest.mark.parametrize(('option', 'value', 'wanted'), [
    ('--model.optim.lr', 'abc', 'number'),
    ('--model.channels_last', 'maybe', 'true or false'),
    ('--trainer.max_epochs', 'ten', ''),
    ('--data.batch_size', 'ten', ''),
    ('--model.schedule.name', 'cosin', 'cosine'),
    ('--model.loss.name', 'cee', 'ce'),
    ('--data.augment.crop', 'rcc', 'rrc'),
    ('--trainer.precision', '17-mixed', '16-mixed'),
])
def test_wrong_value(refused, on_photos, option, value, wanted):
    given, why, do = refused(['fit', *on_photos, f'{option}={value}'])
    assert value in given + why
    assert wanted in why + do


@pytest.mark.parametrize('command', ['fit', 'validate', 'predict'])
def test_limit_with_which_nothing_is_done(refused, on_photos, command):
    name = {'fit': 'train', 'validate': 'val'}.get(command, command)
    options = ['--model.network={pretrained: true}', f'--trainer.limit_{name}_batches=0']
    refused([command, *on_photos, *options],
            given=f'trainer.limit_{name}_batches: 0', why=f'{command} would do nothing')


@pytest.mark.parametrize(('option', 'given', 'remedy'), [
    ('--model.name', '--model.name', '--model.name=VALUE'), ('--config', '--config', '--config=VALUE'),
    ('--data.batch_size', 'an option of the data', '--data.NAME=VALUE'),
    ('--model.distill.hard', 'an option of model.distill', '--model.distill.NAME=VALUE')])
def test_option_without_a_value(refused, on_photos, option, given, remedy):
    refused(['fit', *on_photos, option], given=f'{given} without a value', why='takes one', do=remedy)


def test_unknown_option_of_a_callback(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.monitr=val/top1'],
            given='monitr', do='monitor')


@pytest.mark.parametrize(('options', 'given', 'why', 'do'), [
    (['--data.mean=[0.1,0.2]'], 'data.mean: [0.1, 0.2]', 'it takes 3 values', 'as many'),
    (['--data.mean=0.1'], 'data.mean: 0.1', 'it takes a list', "'[0.1, 0.1, 0.1]'"),
    (['--data.mean=[a,b,c]'], "data.mean: ['a', 'b', 'c']", 'a tuple[float, float, float]', 'correct the values'),
    (['--trainer.logger=lightning_app.logger.WandbLogger', '--trainer.logger.tags=[2026]'],
     'trainer.logger.tags: [2026]', 'a list[str]', 'correct the values'),
    (['--data.batch_size=ten'], 'data.batch_size: ten', 'a whole number', ''),
    (['--data.crop_mode=centre'], 'data.crop_mode: centre', 'one of center, squash, border', 'did you mean center?'),
    (['--trainer.logger=lightning_app.logger.WandbLogger', '--trainer.logger.mode=off'], 'trainer.logger.mode: off',
     'one of online, offline, disabled', 'did you mean offline?'),
    (['--trainer.logger=lightning_app.logger.WandbLogger', '--trainer.logger.log_model=maybe'],
     'trainer.logger.log_model: maybe', 'one of all, true, false', '')])
def test_value_of_an_option_of_a_class(refused, on_photos, options, given, why, do):
    refused(['fit', *on_photos, *options], given, why, do)


def test_option_of_a_callback_before_it_is_named(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.callbacks.patience=3'], 'Callback: patience', do='behind the --config')


def test_unknown_command(refused):
    refused(['fitt'], given='fitt', do='fit')


def test_no_command(refused):
    refused([], do='fit')


def test_missing_config(refused):
    refused(['fit', '--config=nothing.yaml'], given='nothing.yaml', why='no such file')
    refused(['fit', f'--config={CONFIGS}/imagenet/papr.yaml'], 'imagenet/papr.yaml', 'no such file',
            f'did you mean {CONFIGS}/imagenet/paper.yaml?')


def test_broken_config(refused, write_yaml):
    refused(['fit', '--config', write_yaml('broken.yaml', 'model: {name: [')], given='broken.yaml')


def test_missing_data(refused):
    refused(['fit', '--model.name=test_resnet'], given='data', do='--data')


@pytest.mark.parametrize('option', ['--data', '--data.help'])
@pytest.mark.parametrize(('name', 'do'), [
    ('ImagenetDataModule', 'did you mean ImageNetDataModule'), ('lightning_app.data.ImagNet', 'ImageNetDataModule'),
    ('torch.nn.Linear', 'valid: CIFAR10DataModule'), ('nothing.Data', 'valid: CIFAR10DataModule')])
def test_unknown_data_module(refused, option, name, do):
    refused(['fit', f'{option}={name}'], given='data: ', why='no such data module', do=do)


@pytest.mark.parametrize('option', ['--trainer.callbacks', '--trainer.callbacks.help'])
@pytest.mark.parametrize(('name', 'do'), [
    ('Gatess', 'such as lightning_app.callbacks.Gates'),
    ('lightning_app.callbacks.LastCheckpont', 'such as lightning_app.callbacks.LastCheckpoint'),
    ('torch.nn.Linear', 'such as lightning_app.callbacks.')])
def test_unknown_callback(refused, on_photos, option, name, do):
    refused(['fit', *on_photos, f'{option}={name}'], 'trainer.callbacks: ', 'no such callback', do)


def test_class_of_lightning_that_needs_a_package(refused, on_photos, monkeypatch):
    monkeypatch.setattr('lightning.pytorch.callbacks.progress.rich_progress._RICH_AVAILABLE', False)
    refused(['fit', *on_photos, '--trainer.callbacks=RichProgressBar'], 'RichProgressBar', 'pip install', 'leave')


def test_logger_of_lightning_that_needs_a_package(refused, on_photos, monkeypatch):
    missing = RequirementCache('no-such-package>=1.0')
    monkeypatch.setattr('lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE', missing)
    refused(['fit', *on_photos, '--trainer.logger=MLFlowLogger'], 'no-such-package>=1.0', 'not installed, or too old',
            "pip install 'no-such-package>=1.0', or leave")
    for name in ('_TENSORBOARD_AVAILABLE', '_TENSORBOARDX_AVAILABLE'):
        monkeypatch.setattr(f'lightning.fabric.loggers.tensorboard.{name}', RequirementCache('no-such-package'))
    refused(['fit', *on_photos, '--trainer.logger=TensorBoardLogger', '--trainer.logger.save_dir=tb'],
            'no-such-package', 'not installed', "pip install 'no-such-package', or leave")


@pytest.mark.parametrize('given', ['--model=own.Mine', '--model.class_path=own.Mine', '--config=own.yaml'])
def test_class_of_the_model_is_no_option(refused, on_photos, write_yaml, given):
    write_yaml('own.yaml', {'model': {'class_path': 'own.Mine', 'init_args': {'gamma': 1.0}}})
    refused(['fit', *on_photos, given], 'own.Mine' if 'yaml' not in given else 'model.', 'none of the options',
            'lightning_app.cli.main(model_class=')


def test_unknown_class_of_another_kind(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.plugins=torch.nn.Linear'], 'trainer.plugins: torch.nn.Linear',
            'no such class', 'name a class by its import path')


def test_trainer_setting_that_lightning_refuses(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.limit_train_batches=-1'], given='trainer')


# Keys in YAML


RECIPE = {
    'model': {'name': 'test_resnet'}, 'data': {'class_path': 'DigitsDataModule'}, 'trainer': {'accelerator': 'cpu'}}
MISSPELT = {'class_path': 'ModelCheckpoint', 'init_args': {'monitr': 'val/top1'}}


@pytest.mark.parametrize(('content', 'given', 'remedy'), [
    ({'modle': {'name': 'x'}}, 'modle', 'model'),
    ({'model': {'lr': 0.1}}, 'lr', 'model.optim.lr'),
    ({'model': {'optim': {'lrr': 0.1}}}, 'lrr', 'model.optim.lr'),
    ({'model': {'schedule': {'warmup': 1}}}, 'warmup', 'model.schedule.warmup_epochs'),
    ({'model.optim.lrr': 0.1}, 'lrr', 'model.optim.lr'),
    ({'trainer': {'max_epoch': 1}}, 'max_epoch', 'trainer.max_epochs'),
    ({'trainer': {'precisio': 32}}, 'precisio', 'trainer.precision'),
    ({'trainer': {'callbacks': [MISSPELT]}}, 'monitr', 'monitor'),
    ({'trainer': {'callbacks': [{'class_path': 'lightning_app.callbacks.WeightEMA', 'init_args': {'deacy': 1}}]}},
     'deacy', 'decay'),
    ({'trainer': {'callbacks': [{'class_path': 'lightning_app.callbacks.Thruput'}]}}, 'Thruput', 'Throughput'),
    ({'trainer': {'callbacks+': [MISSPELT]}}, 'monitr', 'monitor'),
    ({'trainer': {'logger': [{'class_path': 'lightning_app.logger.WandbLogger', 'init_args': {'projct': 'x'}}]}},
     'projct', 'project'),
    ({'data': {'class_path': 'DigitsDataModule', 'init_args': {'batchsize': 1}}}, 'batchsize', 'batch_size'),
    ({'data': {'class_path': 'DigitsDataModule', 'init_args': {'augment': {'hflp': 1}}}}, 'hflp', 'hflip'),
    ({'data': {'class_path': 'DigitDataModule'}}, 'DigitDataModule', 'DigitsDataModule'),
    ({'data': {'class_path': 'DigitsDataModule', 'batch_size': 1}}, 'batch_size', 'init_args'),
])
def test_unknown_key_in_yaml(refused, write_yaml, content, given, remedy):
    path = write_yaml('config.yaml', RECIPE | content)
    refused(['fit', '--config', path, '--trainer.fast_dev_run=1'], given=given, do=remedy)


@pytest.mark.parametrize(('option', 'remedy'), [
    ('model.loss.class_weights=1,2,3', "'[1,2,3]'"), ('model.schedule.decay_milestones=30', "'[30]'"),
    ('data.mean=0.5', "'[0.5, 0.5, 0.5]'")])
def test_list_without_brackets(refused, on_photos, option, remedy):
    key, _, value = option.partition('=')
    refused(['fit', *on_photos, f'--{option}'], f'{key}: {value}', 'it takes a list', f'--{key} {remedy}')


def test_logger_that_there_is_not(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.logger=wandb'], 'trainer.logger: wandb', 'no such logger',
            'logger.WandbLogger')


@pytest.mark.parametrize('content', [
    {'model': {'name': 'test_resnet', 'num_classes': 3}},
    {'model': {'name': 'test_resnet'}, 'model.num_classes': 3},
    {'model': {'num_classes': None}},
])
def test_linked_key_in_yaml(refused, write_yaml, content):
    path = write_yaml('config.yaml', RECIPE | content)
    refused(['fit', '--config', path, '--trainer.fast_dev_run=1'], 'model.num_classes', 'follows', 'data.num_classes')


def test_linked_key_in_the_second_of_two_configs(refused, write_yaml):
    first, second = write_yaml('a.yaml', RECIPE), write_yaml('b.yaml', {'model': {'num_classes': 3}})
    refused(['fit', '--config', first, '--config', second, '--trainer.fast_dev_run=1'], 'b.yaml', 'follows')


@pytest.mark.parametrize('named', ['config', 'option'])
def test_linked_key_in_a_file_for_the_group(refused, write_yaml, named):
    group = write_yaml('model.yaml', {'name': 'test_resnet', 'num_classes': 3})
    path = write_yaml('config.yaml', RECIPE | ({'model': group} if named == 'config' else {}))
    options = ['--model', group] if named == 'option' else []
    refused(['fit', '--config', path, *options, '--trainer.fast_dev_run=1'], 'model.num_classes', 'follows')


@pytest.mark.parametrize(('option', 'given'), [
    ('--model', '{name: test_resnet, num_classes: 3}'), ('--config', '{model: {num_classes: 3}}')])
def test_linked_key_in_place_of_a_file(refused, on_photos, option, given):
    refused(['fit', *on_photos, option, given], f'model.num_classes in {given}', 'follows')


def test_linked_key_in_a_file_that_is_named_in_place_of_one(refused, on_photos, in_tmp_path):
    Path('of model').mkdir()
    Path('of model', 'm.yaml').write_text('num_classes: 3')
    refused(['fit', *on_photos, '--config', '{model: "of model/m.yaml"}'], 'model.num_classes in of model/m.yaml')


def test_dates_that_there_are_not(refused, on_photos, write_yaml):
    refused(['fit', *on_photos, '--config', '2024-13-45'], '2024-13-45')
    path = write_yaml('c.yaml', '{trainer: {default_root_dir: 2026-02-30}}')
    refused(['fit', *on_photos, '--config', path], f'config: {path}', 'is not YAML', 'correct it')


def test_linked_key_on_the_command_line(refused, on_photos):
    refused(['fit', *on_photos, '--model.num_classes=3'], 'model.num_classes', 'follows', 'data.num_classes')


# The network


@pytest.mark.parametrize(('name', 'near'), [
    ('se_resnet5', 'se_resnet50'), ('se_resnext50', 'se_resnext50_32x4d'), ('convnext_tyny', 'convnext_tiny')])
def test_unknown_network(refused, on_photos, name, near):
    refused(['fit', *on_photos, f'--model.name={name}'], name, 'no such', near)


def test_unknown_network_in_an_evaluation(refused, on_photos):
    refused(['validate', *on_photos, '--model.name=se_resnet5'], 'se_resnet5', 'no such', 'se_resnet50')


def test_unknown_argument_of_the_network(refused, on_photos):
    refused(['fit', *on_photos, '--model.network.reductoin=3'], 'reductoin', 'reductoin')


def test_argument_a_network_of_ours_cannot_honour(refused, on_photos):
    refused(['fit', *on_photos, '--model.name=se_resnet18', '--model.network.excitation=sigmoyd'],
            'sigmoyd', '', 'sigmoid')


def test_unknown_optimiser(refused, on_photos):
    refused(['fit', *on_photos, '--model.optim.name=admw'], 'admw', 'no such', 'adamw')


def test_option_the_optimiser_does_not_take(refused, on_photos):
    refused(['fit', *on_photos, '--model.optim.name=adamw', '--model.optim.options.foo=1'], 'foo', '', 'betas')


def test_steps_without_epochs(refused, on_photos):
    # the schedule is one of epochs
    args = [arg for arg in on_photos if not arg.startswith('--trainer.max_epochs')]
    _, why, _ = refused(['fit', *args, '--trainer.max_steps=2'], do='trainer.max_epochs')
    assert '-1' not in why


def test_warmup_longer_than_the_training(refused, on_photos, in_tmp_path):
    refused(['fit', *on_photos, '--model.schedule.warmup_epochs=5'], 'warmup_epochs: 5', 'max_epochs is 1',
            'max_epochs')
    assert not Path('runs').exists()  # neither a folder nor a run of W&B's, before it is known


@pytest.mark.parametrize(('options', 'batches'), [
    ([], 3), (['--trainer.limit_train_batches=2'], 2), (['--trainer.accumulate_grad_batches=2'], 6),
    (['--trainer.limit_train_batches=0.5', '--trainer.accumulate_grad_batches=2'], 3)])
def test_validations_further_apart_than_an_epoch(options, batches, refused, on_photos):
    args = ['fit', *on_photos, *options]
    refused([*args, f'--trainer.val_check_interval={batches + 1}'], f'val_check_interval: {batches + 1}',
            f'{batches} batches', 'check_val_every_n_epoch: null')


def test_validation_after_the_last_batch_of_an_epoch(on_photos):
    args = ['fit', *on_photos, '--trainer.limit_train_batches=2']
    assert main([*args, '--trainer.val_check_interval=2']).trainer.global_step == 2
    main([*args, '--trainer.val_check_interval=5', '--trainer.check_val_every_n_epoch=null'])


# The data


def test_missing_folder(refused, on_photos):
    # the nearest name beside it is offered
    refused(['fit', *on_photos, '--data.root=photo'], 'photo', 'no such folder', 'photos')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_split(refused, on_photos, photos, split):
    (photos / split).rename(photos / f'{split}ing')
    refused(['fit', *on_photos], str(photos), split, f'{split}ing')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_empty_split(refused, on_photos, photos, split):
    shutil.rmtree(photos / split)
    (photos / split).mkdir()
    refused(['fit', *on_photos], str(photos / split))


def test_empty_class(refused, on_photos, photos):
    for path in (photos / 'train' / 'bee').iterdir():
        path.unlink()
    refused(['fit', *on_photos], str(photos), 'bee')


def test_validation_class_that_training_lacks(refused, on_photos, photos):
    (photos / 'val' / 'cat').rename(photos / 'val' / 'cats')
    refused(['fit', *on_photos], 'cats', '3 classes', 'cat')


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_image_in_evaluation(refused, on_photos, photos, weights, workers):
    path = next((photos / 'val' / 'ant').iterdir())
    path.write_bytes(path.read_bytes()[:200])
    args = [*on_photos, f'--data.num_workers={workers}']
    refused(['fit', *args], path.name, 'cannot be read', 'allow_unreadable')
    refused(['validate', *args, weights()], path.name, 'cannot be read', 'allow_unreadable')


def test_unreadable_image_may_be_left_out(on_photos, photos, weights):
    path = next((photos / 'val' / 'ant').iterdir())
    path.write_bytes(b'no image')
    cli = main(['validate', *on_photos, weights(), '--data.allow_unreadable=true'])
    assert cli.datamodule.validation.unreadable == 1
    assert float(cli.trainer.callback_metrics['val/top5']) == 100  # six images of three classes


def test_group_without_what_it_needs(on_photos, cli_error):
    given, _, do = cli_error(['fit', *on_photos, '--model.distill.weight=0.3'])
    assert given == 'model.distill without teacher'
    assert '--model.distill.teacher' in do


@pytest.mark.parametrize(('teacher', 'network', 'given', 'do'), [
    ('test_resnt', '{pretrained: true}', "model.distill.teacher: 'test_resnt'", 'test_resnet'),
    ('test_resnet', '{checkpoint_path: none.pth}', 'model.distill.network.checkpoint_path: none.pth', 'name a file'),
    ('test_resnet', '{pretrained: true, depths: 3}', 'model.distill: test_resnet with', 'model.distill.network')])
def test_error_of_a_teacher_names_its_own_keys(on_photos, cli_error, teacher, network, given, do):
    lines = cli_error([
        'fit', *on_photos, f'--model.distill.teacher={teacher}', f'--model.distill.network={network}'])
    assert lines[0].startswith(given)
    assert do in lines[2]


def test_error_of_a_callback_has_three_lines(on_photos, cli_error, write_yaml):
    config = write_yaml('callback.yaml', {'trainer': {'callbacks': [
        {'class_path': 'lightning_app.callbacks.FreezeBackbone', 'init_args': {'epochs': 0}}]}})
    given, why, _ = cli_error(['fit', *on_photos, '--config', config])
    assert given == 'FreezeBackbone: epochs 0'
    assert why == 'nothing would be frozen'


def test_classifier_that_the_weights_do_not_cover_is_not_evaluated(on_photos, weights, cli_error):
    given, why, do = cli_error(['validate', *on_photos, weights(5)])
    assert given == 'validate: weights of 5 classes'
    assert 'there are 3 here' in why
    assert 'random' in why
    assert 'train it first' in do


@pytest.mark.parametrize(('options', 'why'), [
    (['--data.batch_size=25'], '24 training images'),
    (['--data.batch_size=0'], ''),
    (['--data.batch_size=-8'], ''),
    (['--data.batch_size=8', '--trainer.accumulate_grad_batches=3'], 'accumulating 3'),
    (['--data.eval_batch_size=0'], ''),
    (['--data.eval_batch_size=-1'], ''),
])
def test_batch_size_without_a_step(refused, on_photos, options, why):
    refused(['fit', *on_photos, *options], 'batch_size', why)


def test_class_count_that_the_data_do_not_have(refused, on_photos):
    refused(['fit', *on_photos, '--data.num_classes=5'], 'data.num_classes: 5', '3 classes')


def test_prediction_without_images(refused, on_photos, weights):
    refused(['predict', *on_photos, weights()], 'data.images', '', '--data.images')


def test_prediction_of_a_missing_folder(refused, on_photos, weights):
    refused(['predict', *on_photos, weights(), '--data.images=photo'], 'photo', 'no such', 'photos')


@pytest.mark.parametrize('command', ['validate', 'test', 'predict'])
def test_network_without_weights_is_not_evaluated(refused, on_photos, command):
    refused([command, *on_photos], 'test_resnet without weights', 'random', '--ckpt_path')


@pytest.mark.parametrize('command', ['validate', 'test', 'predict'])
@pytest.mark.parametrize('word', ['best', 'last', 'hpc'])
def test_checkpoint_of_no_training_here(refused, on_photos, command, word):
    refused([command, *on_photos, f'--ckpt_path={word}'], f'ckpt_path: {word}', 'no such file')


def test_word_like_last(refused, on_photos):
    refused(['fit', *on_photos, '--ckpt_path=lastt'], 'ckpt_path: lastt', 'no such file', 'did you mean last?')


def test_output_that_is_a_folder(refused, on_photos, weights, photos):
    refused(['predict', *on_photos, weights(), f'--data.images={photos}', f'--output={photos}'],
            f'output: {photos}', 'a folder', 'predictions.csv')


@pytest.mark.parametrize(('options', 'given', 'why'), [
    (['--model.network.checkpoint_path=nope.pth'], 'checkpoint_path: nope.pth', 'no such file'),
    (['--model.add_se={reductoin: 4}'], "model.add_se: argument of add_se: 'reductoin'", 'no such'),
    (['--model.optim.name=adahessian'], 'adahessian', 'second derivatives'),
    (['--model.plain=true'], 'model.plain: true with model.name: test_resnet', 'none of the SE networks'),
    (['--model.max_nonfinite_steps=-1'], 'model.max_nonfinite_steps: -1', 'too small'),
    (['--seed_everything=-1'], 'seed_everything: -1', '32 bits'),
    (['--model.network.drop_rate=1.5'], 'model.network.drop_rate: 1.5', 'share'),
    (['--model.network.drop_path_rate=1.5'], 'model.network.drop_path_rate: 1.5', 'share'),
    (['--trainer.gradient_clip_val=-1'], 'trainer.gradient_clip_val: -1.0', 'clipped to nothing'),
    (['--trainer.callbacks=lightning_app.callbacks.WeightEMA', '--trainer.callbacks.decay=1.5'], 'WeightEMA: decay 1.5',
     'share'),
    (['--trainer.callbacks=lightning_app.callbacks.BestCheckpoint', '--trainer.callbacks.monitor=val/acc'],
     "BestCheckpoint: monitor: 'val/acc'", 'no such'),
    (['--model.loss.smoothing=1'], 'model.loss.smoothing: 1', 'share'),
    (['--model.optim.lr_scaling=linear', '--model.optim.lr_batch=0'], 'lr_batch: 0', ''),
    (['--model.schedule.name=step'], 'decay_epochs: None', ''),
    (['--data.augment.auto_augment=foo'], "auto_augment='foo'", 'timm'),
    (['--data.num_workers=-1'], 'data.num_workers: -1', 'at least 0'),
    (['--data.image_size=0'], 'data.image_size: 0', 'at least 1'),
    (['--model.name=vit_tiny_patch16_224', '--trainer.callbacks=lightning_app.callbacks.NetworkSummary'],
     '32 px', 'match'),
    (['--model.network.name=resnet18'], 'model.network.name: resnet18', 'of model.name'),
    (['--model.network.keys=x'], 'test_resnet with', 'keys'),
    (['--model.network.num_classes=5'], 'model.network.num_classes: 5', 'the images say'),
    (['--model.network.features_only=true'], 'model.network.features_only: True', 'no classes'),
    (['--model.network.in_chans=1'], 'model.network.in_chans: 1', 'three channels'),
    (['--model.name=se_inception_v3', '--model.network.aux_logits=true'], 'model.network.aux_logits: True', 'no loss'),
    (['--trainer.accumulate_grad_batches=0'], 'trainer.accumulate_grad_batches: 0', 'number of batches'),
    (['--trainer.check_val_every_n_epoch=0'], 'trainer.check_val_every_n_epoch: 0', 'number of epochs'),
    (['--trainer.val_check_interval=0'], 'trainer.val_check_interval: 0', 'share of an epoch'),
    (['--trainer.accelerator=gpuu'], 'trainer', 'gpuu'),
    (['--trainer.strategy=fsdp'], 'trainer', 'FSDP'),
    (['--trainer.precision=bf16-true', '--trainer.callbacks=lightning_app.callbacks.WeightEMA'],
     'trainer.precision: bf16-true, with WeightEMA', 'would not move'),
    (['--trainer.callbacks=lightning_app.callbacks.WeightEMA',
      '--trainer.callbacks+=lightning_app.callbacks.WeightEMA', '--trainer.callbacks.decay=0.5'],
     'trainer.callbacks: WeightEMA, 2 times', 'what the other does'),
    (['--trainer.callbacks=lightning_app.callbacks.Gates', '--trainer.callbacks+=lightning_app.callbacks.Gates'],
     'trainer.callbacks: Gates, 2 times', 'what the other does'),
], ids=lambda value: '' if isinstance(value, str) else value[0].removeprefix('--'))
def test_settings_that_cannot_be_used(refused, on_photos, options, given, why):
    refused(['fit', *on_photos, *options], given, why)


def test_groups_with_nothing_below_them_are_the_defaults(on_photos, write_yaml):
    groups = dict.fromkeys(('optim', 'schedule', 'loss', 'mix'))
    config = write_yaml('empty.yaml', {'model': groups, 'data': {'augment': None}})
    main(['fit', *on_photos, '--config', config, '--trainer.fast_dev_run=1', '--model.network.in_chans=3',
          '--model.network.features_only=false'])


def test_pretrained_weights_that_cannot_be_downloaded(refused, on_photos, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)  # else it tries again for a minute
    refused(['fit', *on_photos, '--model.name=resnet18', '--model.network.pretrained=true'],
            'resnet18', 'connection', 'model.network.checkpoint_path')


def test_last_of_several_checkpoints_counts(on_photos):
    main(['fit', *on_photos])
    main(['fit', *on_photos, '--model.network={drop_rate: 0.1}'])
    first, second = sorted(Path('runs').rglob('*.ckpt'))
    cli = main(['validate', f'--ckpt_path={first}', f'--ckpt_path={second}'])
    assert cli.model.hparams['network'] == {'drop_rate': 0.1}
    assert cli.trainer.ckpt_path == str(second)


# The machine


@needs_no_gpu
@pytest.mark.parametrize('options', [
    ['--trainer.accelerator=gpu'],
    ['--trainer.accelerator=gpu', '--trainer.devices=8'],
    ['--trainer.accelerator=cuda', '--trainer.devices=[0,1]'],
    ['--trainer.accelerator=auto', '--trainer.devices=2'],
])
def test_more_gpus_than_there_are(refused, on_photos, options):
    args = [arg for arg in on_photos if not arg.startswith(('--trainer.accelerator', '--trainer.devices'))]
    refused(['fit', *args, *options], 'trainer.devices', '0 GPUs', '--trainer.accelerator=cpu')


def test_more_processes_than_cores(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.devices=1000'], 'trainer.devices: 1000', 'CPU cores', '--trainer.devices')


@pytest.mark.parametrize('devices', ['0', '-2', '[]', 'none'])
def test_no_devices(refused, on_photos, devices):
    given, why, _ = refused(['fit', *on_photos, f'--trainer.devices={devices}'])
    assert 'devices' in given + why


# Checkpoints


@pytest.fixture
def checkpoint(on_photos):
    main(['fit', *on_photos])
    return next(Path('runs').rglob('*.ckpt'))


@pytest.fixture
def refused_checkpoint(checkpoint, cli_error, optimizer_steps):
    """Return a function that runs a command line on a checkpoint, which must be refused without a step."""
    del optimizer_steps[:]  # those that made the checkpoint
    before = sorted(Path('runs').rglob('*'))

    def run(args, given='', why='', do=''):
        lines = cli_error(args)
        for line, wanted in zip(lines, (given, why, do), strict=True):
            assert wanted in line, lines
        assert not optimizer_steps
        assert sorted(Path('runs').rglob('*')) == before  # nor a folder for a run that is none

    return run


@pytest.mark.parametrize('command', ['fit', 'validate', 'test', 'predict'])
def test_checkpoint_of_another_network(refused_checkpoint, on_photos, checkpoint, command, photos):
    # the optimiser's state does not fit either: the network must be looked at first
    refused_checkpoint([command, *on_photos, '--ckpt_path', str(checkpoint), '--model.name=se_resnet20_cifar',
                        f'--data.images={photos}', '--trainer.max_epochs=2'],
                       'test_resnet', 'se_resnet20_cifar', '--model.name test_resnet')


def test_checkpoint_of_another_class_count(refused_checkpoint, on_photos, checkpoint, photos):
    for split in ('train', 'val'):
        shutil.rmtree(photos / split / 'cat')
    refused_checkpoint(['fit', *on_photos, '--ckpt_path', str(checkpoint), '--trainer.max_epochs=2'],
                       '3 classes', '2 classes', 'say --model.network.checkpoint_path in place of --ckpt_path')


@pytest.mark.parametrize('command', ['validate', 'test'])
def test_checkpoint_with_fewer_classes_than_the_images(refused_checkpoint, on_photos, checkpoint, photos, command):
    shutil.copytree(photos / 'val' / 'cat', photos / 'val' / 'dog')
    refused_checkpoint([command, *on_photos, '--ckpt_path', str(checkpoint)],
                       'class dog in val', '3 classes, and this is none of them')


@pytest.mark.parametrize('command', ['fit', 'validate', 'predict'])
@pytest.mark.parametrize('place', ['option', 'config'])
def test_truncated_checkpoint(refused_checkpoint, on_photos, checkpoint, write_yaml, command, place):
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    config = write_yaml('config.yaml', {'ckpt_path': str(checkpoint)})
    where = ['--ckpt_path', str(checkpoint)] if place == 'option' else ['--config', config]
    refused_checkpoint([command, *on_photos, *where, '--data.images=photos'],
                       str(checkpoint), 'cut off or altered', 'another checkpoint')


@pytest.mark.parametrize('place', ['option', 'config'])
def test_missing_checkpoint(refused_checkpoint, on_photos, checkpoint, write_yaml, place):
    wrong = str(checkpoint.with_name('bset.ckpt'))
    config = write_yaml('config.yaml', {'ckpt_path': wrong})
    where = ['--ckpt_path', wrong] if place == 'option' else ['--config', config]
    refused_checkpoint(['validate', *on_photos, *where], wrong, 'no such file', str(checkpoint))


def test_folder_is_no_checkpoint(refused_checkpoint, on_photos, checkpoint):
    folder = str(checkpoint.parents[1])
    refused_checkpoint(['validate', *on_photos, f'--ckpt_path={folder}'], folder, 'it is a folder', str(checkpoint))


@pytest.mark.parametrize('content', [{'conv1.weight': torch.zeros(3)}, {'state_dict': {}}, [1, 2], torch.zeros(2)],
                         ids=['state dict', 'empty', 'list', 'tensor'])
@pytest.mark.parametrize('command', ['fit', 'validate'])
def test_file_that_is_no_checkpoint_of_ours(refused_checkpoint, on_photos, checkpoint, content, command):
    torch.save(content, checkpoint)
    refused_checkpoint([command, *on_photos, '--ckpt_path', str(checkpoint)])


def test_resume_to_fewer_epochs_than_are_done(cli_error, on_photos, optimizer_steps):
    main(['fit', *on_photos, '--trainer.max_epochs=3'])
    del optimizer_steps[:]
    checkpoint = next(Path('runs').rglob('*.ckpt'))
    given, why, _ = cli_error(['fit', *on_photos, '--ckpt_path', str(checkpoint), '--trainer.max_epochs=1'])
    assert 'max_epochs' in given + why
    assert not optimizer_steps


# A loss that is not finite


CHECKPOINT = ['--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.filename=best',
              '--trainer.callbacks.monitor=val/top1', '--trainer.callbacks.mode=max',
              '--trainer.callbacks.enable_version_counter=false']


def finite(path):
    state = torch.load(path, weights_only=True)['state_dict']
    return all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_loss_that_is_not_finite_stops_the_training(cli_error, on_photos):
    given, why, do = cli_error(['fit', *on_photos, '--model.optim.lr=1e30', '--trainer.max_epochs=4', *CHECKPOINT])
    assert 'not finite' in given
    assert 'lr 1e+30' in why
    assert 'warmup' in do


@pytest.mark.parametrize('monitor', ['val/top1', 'val/loss', None])
@pytest.mark.parametrize('every', [1, 50])
def test_good_checkpoint_is_kept_and_named_when_the_training_diverges(cli_error, on_photos, monitor, every):
    # lr is good in the first epoch and grows beyond all bounds after it
    callback = [*CHECKPOINT[:2], *([f'--trainer.callbacks.monitor={monitor}', '--trainer.callbacks.mode='
                                    + ('max' if monitor == 'val/top1' else 'min')] if monitor else [])]
    _, _, do = cli_error([
        'fit', *on_photos, '--model.optim.lr=0.001', '--model.schedule.name=step', *callback,
        '--model.schedule.decay_epochs=1', '--model.schedule.decay_rate=1e33', '--trainer.max_epochs=3',
        f'--trainer.log_every_n_steps={every}'])
    kept = list(Path('runs').rglob('*.ckpt'))
    assert len(kept) == 1
    assert finite(kept[0])
    assert torch.load(kept[0], weights_only=True)['epoch'] == 0
    assert str(kept[0]) in do
    assert main(['validate', '--ckpt_path', str(kept[0])]).trainer.callback_metrics['val/loss'].isfinite()


def test_no_checkpoint_is_named_where_none_was_written(cli_error, on_photos):
    _, _, do = cli_error(['fit', *on_photos, '--model.optim.lr=1e30', '--trainer.max_epochs=4', *CHECKPOINT,
                          '--trainer.log_every_n_steps=50'])
    kept = list(Path('runs').rglob('*.ckpt'))
    assert all(finite(path) for path in kept)
    assert kept or 'no checkpoint had been written' in do
    assert all(str(path) in do for path in kept)


def test_weights_that_diverge_in_the_last_step_of_an_epoch_are_not_saved(cli_error, on_photos):
    # the loss of the only step is finite; the step then destroys the weights
    cli_error(['fit', *on_photos, '--data.batch_size=24', '--model.optim.lr=1e30', '--model.optim.weight_decay=1e20',
               *CHECKPOINT])
    assert all(finite(path) for path in Path('runs').rglob('*.ckpt'))


def test_steps_that_are_not_finite_may_be_allowed(on_photos):
    cli = main(['fit', *on_photos, '--model.optim.lr=1e30', '--model.max_nonfinite_steps=1000'])
    assert cli.trainer.global_step == 3


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='there is no folder in which nobody can write')
def test_folder_in_which_nobody_can_write(refused, on_photos):
    refused(['fit', *on_photos, '--trainer.default_root_dir=/proc/runs'],
            given='trainer.default_root_dir: /proc/runs', why='nothing can be written to /proc', do='name a folder')
    refused(['predict', *on_photos, '--model.network={pretrained: true}', '--output=/proc/x/pred.csv'],
            given='output: /proc/x', why='nothing can be written to /proc')
    refused(['fit', *on_photos, '--trainer.logger=lightning_app.logger.CsvLogger', '--trainer.logger.save_dir=/proc/x'],
            given='trainer.logger.save_dir: /proc/x', why='nothing can be written to /proc', do='name a folder')


def test_folder_that_stands_alone_is_that_of_the_images(refused, photos):
    refused(['fit', '--model.name=test_resnet', '--data=ImageNetDataModule', str(photos)],
            given=str(photos), why='no option', do=f'say --data.root {photos}')


def test_other_products_are_not_proposed(on_photos, capfd, in_tmp_path):
    main(['fit', *on_photos, '--trainer.fast_dev_run'])
    said = capfd.readouterr().err
    assert 'Tip' not in said
    assert 'GPU available' in said  # which comes by the same way
