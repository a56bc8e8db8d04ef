"""Every config that is shipped builds, sets no key that follows from another, and trains a step."""
from pathlib import Path

import pytest
import yaml

from lightning_app.cli import main
from lightning_app.messages import LINKED
from lightning_app.optim import Optim, Schedule, without_effect

pytestmark = pytest.mark.usefixtures('in_tmp_path')

CONFIGS = Path(__file__).parents[2] / 'configs'
EVERY = sorted(CONFIGS.rglob('*.yaml'))
OVERLAYS = [path for path in EVERY if path.parent.name == 'overlay']
# sweeps are W&B's files, not configs of the program
RECIPES = [path for path in EVERY if path not in OVERLAYS and 'program' not in yaml.safe_load(path.read_text())]

LARGE = ('imagenet/', 'places365/', 'cifar/cifar10_shake', 'cifar/cifar10_wrn')  # networks

# One process on the CPU, whatever the recipe is for, and no W&B.
HERE = ['--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.num_nodes=1', '--trainer.strategy=auto',
        '--trainer.logger=false', '--trainer.benchmark=false']
TINY = ['--data.batch_size=8', '--data.num_workers=0']


def name(path):
    return path.relative_to(CONFIGS).as_posix()


@pytest.fixture
def data_of(photos, fake_cifar):
    """Return a function that gives the arguments by which a config finds small fake images."""
    def arguments(path):
        content = yaml.safe_load(path.read_text())
        kind = content['data']['class_path'].rpartition('.')[2]
        if kind.startswith('CIFAR'):
            return [f'--data.root={fake_cifar}', *TINY]
        if kind == 'ImageNetDataModule':
            grows = any(each['class_path'].endswith('ProgressiveSize') for each in content['trainer']['callbacks'])
            sizes = [] if grows else ['--data.image_size=64']  # it says where they begin
            return [f'--data.root={photos}', *sizes, '--data.eval_size=64', *TINY]
        return TINY

    return arguments


def keys(content, prefix=''):
    """Return the dotted keys of a config, however they are nested."""
    for key, value in content.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f'{prefix}{key}.')


def test_configs_are_found():
    assert {'quickstart.yaml', 'imagenette.yaml', 'overlay/plain.yaml'} <= {name(path) for path in EVERY}


@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_options_of_the_logger_are_those_of_wandb(path):
    """Which are the ones that are given on the command line; they reach the last of several."""
    assert yaml.safe_load(path.read_text())['trainer']['logger'][-1]['class_path'].endswith('WandbLogger')


@pytest.mark.parametrize('path', EVERY, ids=name)
def test_no_key_is_set_that_follows_from_another(path):
    # in a nested file the program refuses it; here also where a file is only ever an overlay
    assert not LINKED.keys() & set(keys(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_no_setting_is_without_effect(path):
    content = yaml.safe_load(path.read_text())
    model, epochs = content['model'], content['trainer']['max_epochs']
    assert without_effect(Optim(**model.get('optim', {})), Schedule(**model.get('schedule', {})), epochs) == []


@pytest.mark.parametrize('path', EVERY, ids=name)
def test_config_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith('# ')
    assert any(line.startswith('#') and name(path) in line for line in lines)  # the command that uses it


@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_recipe_builds(path, data_of):
    cli = main(['--config', str(path), *data_of(path), *HERE], run=False)
    content = yaml.safe_load(path.read_text())
    assert cli.model.name == content['model']['name']
    assert cli.model.net.num_classes == cli.datamodule.num_classes
    assert cli.trainer.max_epochs == content['trainer']['max_epochs']
    named = [callback['class_path'].rpartition('.')[2] for callback in content['trainer']['callbacks']]
    assert set(named) <= {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.parametrize('path', [pytest.param(
    path, marks=[pytest.mark.slow] if name(path).startswith(LARGE) else []) for path in RECIPES], ids=name)
def test_recipe_trains_and_validates_a_step(path, data_of):
    cli = main(['fit', '--config', str(path), *data_of(path), *HERE, '--trainer.fast_dev_run=1'])
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics['val/loss'].isfinite()


@pytest.mark.parametrize('recipe', RECIPES, ids=name)
@pytest.mark.parametrize('path', OVERLAYS, ids=name)
def test_overlay_goes_on_every_recipe(path, recipe, data_of, capsys, write_yaml):
    def resolved(*configs):
        with pytest.raises(SystemExit) as stop:
            main(['fit', *(f'--config={config}' for config in configs), *data_of(recipe), '--print_config'])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    plain, overlaid = resolved(recipe), resolved(recipe, path)
    assert overlaid != plain
    # what the overlay does not name is the recipe's
    named = {key.partition('.')[0] for key in yaml.safe_load(path.read_text())}
    for group in plain.keys() - named:
        assert overlaid[group] == plain[group], group


@pytest.mark.parametrize('path', OVERLAYS, ids=name)
def test_overlay_builds(path, data_of):
    recipe = CONFIGS / 'quickstart.yaml'
    cli = main(['--config', str(recipe), '--config', str(path), *data_of(recipe), *HERE], run=False)
    assert cli.model.net.num_classes == 10


@pytest.mark.parametrize('recipe', RECIPES, ids=name)
def test_plain_twin_differs_in_se_alone(recipe, data_of):
    def built(*configs):
        return main([*(f'--config={config}' for config in configs), *data_of(recipe), *HERE], run=False)

    se, plain = built(recipe), built(recipe, CONFIGS / 'overlay' / 'plain.yaml')
    ours, theirs = (dict(cli.model.net.named_parameters()) for cli in (se, plain))
    assert theirs.keys() < ours.keys()
    assert all('.se.' in key for key in ours.keys() - theirs.keys())
    assert all(ours[key].shape == value.shape for key, value in theirs.items())
    assert (plain.model.optim, plain.model.schedule, plain.model.loss) == (
        se.model.optim, se.model.schedule, se.model.loss)
