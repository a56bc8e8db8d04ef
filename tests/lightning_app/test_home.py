"""`~` is the home folder wherever an option may name a path: after `=`, within braces, in config files, from Python."""
import csv

import pytest
import yaml

from lightning_app.cli import main
from lightning_app.data import CIFAR10DataModule, ImageNetDataModule
from lightning_app.home import expand, expand_words
from se_timm import zoo

pytestmark = pytest.mark.usefixtures('in_tmp_path')


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    return tmp_path / 'home'


@pytest.mark.parametrize(('word', 'expanded'), [
    ('--x=~/y', '--x={home}/y'), ('~/y', '{home}/y'), ('--x', '--x'), ('--x=~', '--x=~'), ('--x=a~/b', '--x=a~/b'),
    ('--x=~nobody-of-this-name/y', '--x=~nobody-of-this-name/y'), ('x=~/y', 'x=~/y'), ('--x=hf://a', '--x=hf://a')])
def test_words(word, expanded, home):
    assert expand_words([word]) == [expanded.format(home=home)]


def test_values(home):
    value = {'a': ['~/x', 1, None, ('~/y',)], 'b': '~'}
    assert expand(value) == {'a': [f'{home}/x', 1, None, (f'{home}/y',)], 'b': '~'}


def test_no_command_takes_it_as_the_name_of_a_folder(on_photos, photos, home, tmp_path, weights):
    photos.rename(home / 'photos')
    weights()
    (tmp_path / 'weights.pth').rename(home / 'weights.pth')
    (home / 'c.yaml').write_text(yaml.safe_dump({'trainer': {'default_root_dir': '~/runs'}}))
    main(['fit', *on_photos, '--data.root=~/photos', '--config=~/c.yaml',
          '--model.network={checkpoint_path: ~/weights.pth}', '--trainer.logger=lightning_app.logger.CsvLogger'])
    run = home / 'runs' / 'version_0'
    checkpoint, = run.rglob('*.ckpt')
    short = f'~/{checkpoint.relative_to(home)}'
    main(['validate', f'--ckpt_path={short}'])
    (home / 'd.yaml').write_text(yaml.safe_dump({'ckpt_path': short, 'data': {'init_args': {'images': '~/photos'}}}))
    main(['predict', '--config=~/d.yaml', '--output=~/out.csv'])
    main(['export', f'--ckpt_path={short}', '--output=~/exported'])
    main(['compare', '~/runs', '--output=~/compared'])
    assert {'out.csv', 'exported', 'compared.png'} <= {path.name for path in home.iterdir()}
    assert (home / 'exported' / 'config.json').is_file()
    assert not list(tmp_path.rglob('~*'))


def test_data_modules(home, photos):
    photos.rename(home / 'photos')
    data = ImageNetDataModule(root='~/photos', images='~/photos/val')
    assert len(data.open('val').labels) == len(list((home / 'photos' / 'val').rglob('*.png')))
    assert data.images == f'{home}/photos/val'
    assert CIFAR10DataModule(root='~/cifar').root == f'{home}/cifar'


def test_tools(home):
    assert zoo.main(['se_resnet20_cifar', '--csv=~nobody-of-this-name.csv']) == 0
    assert zoo.main(['se_resnet20_cifar', '--csv=~/zoo.csv']) == 0
    with open(home / 'zoo.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 1
