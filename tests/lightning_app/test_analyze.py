"""`python -m lightning_app analyze`: figures, numbers and words are those of the network and its images."""
import copy
import csv
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from lightning_app import ImageClassifier
from lightning_app.analysis.findings import described, removable, variation
from lightning_app.analysis.gate_figures import draw_by_class, draw_within_class
from lightning_app.analysis.gate_statistics import GateStatistics
from lightning_app.analysis.grad_cam import draw_grad_cam
from lightning_app.analysis.subject import Subject, first_of_each_class, labels_of
from lightning_app.cli import main
from lightning_app.data import imagenet
from lightning_app.data.samples import IGNORE
from se_timm.gates import GateReader, SEBlock, find_se
from se_timm.pruning import prune_se

FILES = {f'{figure}{suffix}' for figure in ('figure6', 'figure7') for suffix in ('.png', '.svg', '.csv')} | {
    'blocks.csv', 'findings.txt'}


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


TRAINED = {}  # by one training for all tests


@pytest.fixture
def trained(on_photos, in_tmp_path):
    """A trained SE-ResNet-20: its checkpoint, the network, its validation images as it sees them, and their labels."""
    if not TRAINED:
        cli = main(['fit', *on_photos, '--model.name=se_resnet20_cifar'])
        data = cli.datamodule
        TRAINED.update(
            path=str(Path(cli.trainer.checkpoint_callback.best_model_path).resolve()), net=cli.model.net.eval(),
            images=torch.stack([data.normalisation(image) for image, _ in data.validation]),
            labels=np.array([label for _, label in data.validation]),
            top1=float(cli.trainer.callback_metrics['val/top1']))
    return SimpleNamespace(**{**TRAINED, 'net': copy.deepcopy(TRAINED['net'])})


@pytest.fixture
def constant(trained):
    """A file of weights of a network whose last gates depend on no image."""
    torch.manual_seed(0)
    for block in find_se(trained.net)[-2:]:
        fc2 = trained.net.get_submodule(block.module).fc2
        torch.nn.init.zeros_(fc2.weight)
        torch.nn.init.normal_(fc2.bias)
    torch.save(trained.net.state_dict(), 'constant.pth')
    return 'constant.pth'


def gates_of(net, images):
    with torch.no_grad(), GateReader(net) as reader:
        net(images)
        return {name: gate.double().numpy() for name, gate in reader.gates.items()}


def test_numbers_are_those_of_the_images(trained):
    images, labels = trained.images, trained.labels
    written = main(['analyze', '--ckpt_path', trained.path, '--output', 'out'])
    assert {each.name for each in written} == FILES
    assert {each.name for each in Path('out').iterdir()} == FILES
    gates = gates_of(trained.net, images)
    drawn = rows('out/figure6.csv')
    assert [row['block'] for row in drawn if row['class'] == 'all' and row['channel'] == '0'] == [
        'layer1.2', 'layer2.2', 'layer3.0', 'layer3.1', 'layer3.2']
    assert {row['class'] for row in drawn} == {'ant', 'bee', 'cat', 'all'}
    assert [int(row['channel']) for row in drawn if row['block'] == 'layer3.2' and row['class'] == 'all'] == list(
        range(0, 64, 2))
    for row in drawn:
        of_channel = gates[row['block']][:, int(row['channel'])]
        if row['class'] != 'all':
            of_channel = of_channel[labels == ('ant', 'bee', 'cat').index(row['class'])]
        assert float(row['mean']) == pytest.approx(of_channel.mean(), abs=1e-5)
    within = rows('out/figure7.csv')
    assert {row['class'] for row in within} == {'ant', 'cat'}
    for row in within:
        of_class = gates[row['block']][labels == ('ant', 'bee', 'cat').index(row['class']), int(row['channel'])]
        assert float(row['std']) == pytest.approx(of_class.std(), abs=1e-5)
    blocks = rows('out/blocks.csv')
    assert [row['module'] for row in blocks] == [block.module for block in find_se(trained.net)]
    assert float(blocks[0]['mean']) == pytest.approx(gates['layer1.0'].mean(), abs=1e-5)


def test_figures_are_pictures(trained, capsys):
    main(['analyze', '--ckpt_path', trained.path, '--output', 'out'])
    for figure in ('figure6', 'figure7'):
        with Image.open(f'out/{figure}.png') as image:
            assert min(image.size) > 300
            assert len(image.convert('RGB').getcolors(1 << 24)) > 10
        assert ElementTree.parse(f'out/{figure}.svg').getroot().tag.endswith('svg')
    text = Path('out/findings.txt').read_text()
    assert text.strip() in capsys.readouterr().out
    assert text.startswith('se_resnet20_cifar: gates over 7 images of 3 classes, 32 px\n'
                           'fewer than 50 images: 3 of 3 classes, the fewest bee with 2;')


@pytest.mark.parametrize(('options', 'blocks', 'classes'), [
    (['--blocks=[layer1.0,layer2.*]'], ['layer1.0', 'layer2.0', 'layer2.1', 'layer2.2'], {'ant', 'bee', 'cat', 'all'}),
    (['--classes=[Bee,0]'], ['layer1.2', 'layer2.2', 'layer3.0', 'layer3.1', 'layer3.2'], {'ant', 'bee', 'all'})])
def test_blocks_and_classes_that_are_named(options, blocks, classes, trained):
    main(['analyze', '--ckpt_path', trained.path, '--output', 'out', *options])
    drawn = rows('out/figure6.csv')
    assert list(dict.fromkeys(row['block'] for row in drawn)) == blocks
    assert {row['class'] for row in drawn} == classes


def test_so_many_images_of_each_class(trained, capsys):
    images, labels = trained.images, trained.labels
    main(['analyze', '--ckpt_path', trained.path, '--output', 'out', '--images_per_class=2'])
    assert 'gates over 6 images' in capsys.readouterr().out
    first = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(3)])
    mean = gates_of(trained.net, images[first])['layer3.2'].mean()
    assert float(rows('out/blocks.csv')[-1]['mean']) == pytest.approx(mean, abs=1e-5)


def test_accuracy_before_and_after(trained, capsys):
    images, labels = trained.images, trained.labels
    main(['analyze', '--ckpt_path', trained.path, '--output', 'out', '--prune=[layer3.*]'])
    said = capsys.readouterr().out
    means = {name: torch.tensor(gate.mean(0)).float() for name, gate in gates_of(trained.net, images).items()
             if name.startswith('layer3')}
    pruned = prune_se(trained.net, 'layer3.*', means, input_size=(3, 32, 32))

    def top1(net):
        with torch.no_grad():
            return 100 * float((net(images).argmax(1).numpy() == labels).mean())

    assert f'saved: {pruned.parameters:,} parameters' in said
    assert f'top-1 {top1(trained.net):.2f} % before, {top1(pruned.net):.2f} % after' in said
    assert trained.top1 == pytest.approx(top1(trained.net))


@pytest.mark.parametrize(('options', 'pruned'), [([], True), (['--prune=[]'], False)])
def test_no_block_is_taken_out_where_none_is_to_be(trained, capsys, options, pruned):
    main(['analyze', '--ckpt_path', trained.path, '--output', 'out', *options])
    assert ('% after' in capsys.readouterr().out) == pruned


def test_class_without_images_is_drawn_by_no_default(trained, photos, cli_error):
    shutil.rmtree(photos / 'val' / 'cat')
    arguments = ['analyze', '--ckpt_path', trained.path, '--root', str(photos), '--output', 'out', '--grad_cam=true']
    main(arguments)
    assert {row['class'] for row in rows('out/figure6.csv')} == {'ant', 'bee', 'all'}
    given, why, _ = cli_error([*arguments, '--classes=[bee,cat]'])
    assert (given, why) == ('classes: cat', 'there is no image of it')


@pytest.mark.parametrize('count', [2, 9])
@pytest.mark.parametrize('name', ['cat', 'a name of a class that is rather long'])
def test_figures_hold_every_line_title_and_name(count, name):
    block = SEBlock('layer3.2', 'layer3.2.se', 'SE_4_3', 0., 2., 1)
    statistics = GateStatistics([block], count, within=True)
    labels = torch.arange(40) % count
    statistics.update({'layer3.2': 3 + torch.rand(40, 16)}, labels)  # of a ReLU
    titles = [f'{name} {number}' for number in range(count)]
    classes = list(range(count))
    for draw in (draw_by_class, draw_within_class):
        figure = draw(statistics.results(), classes, titles, 'Gates within a class: se_resnet20_cifar, 40 images')
        figure.canvas.draw()
        width = figure.bbox.x1 + 1
        shown = [text for axes in figure.axes for text in (axes.title, *axes.texts)] + [figure._suptitle]
        shown += [text for legend in figure.legends for text in legend.get_texts()]
        for text in shown:
            box = text.get_window_extent()
            assert -1 <= box.x0 <= box.x1 <= width, text.get_text()
        for axes in figure.axes:
            assert axes.get_ylim()[1] > 3.4
            assert axes.get_window_extent().height > 150
        if figure.legends:
            looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
            assert len(set(looks)) == len(looks)


def test_network_beside_a_checkpoint(trained, cli_error):
    given, why, _ = cli_error(['analyze', '--ckpt_path', trained.path, '--network.reduction=8'])
    assert given == "network: {'reduction': 8} with ckpt_path"
    assert why == 'the network is that of the checkpoint'


def test_gates_that_are_no_numbers(trained, tmp_path, cli_error):
    checkpoint = torch.load(trained.path, weights_only=True)
    name = next(name for name in checkpoint['state_dict'] if '.se.' in name)
    checkpoint['state_dict'][name].fill_(float('nan'))
    torch.save(checkpoint, tmp_path / 'nan.ckpt')
    given, why, do = cli_error(['analyze', '--ckpt_path', str(tmp_path / 'nan.ckpt')])
    assert given.startswith('gates of ')
    assert 'not finite' in why
    assert do == 'take an earlier checkpoint'


def test_images_of_one_class(trained, photos):
    for name in ('ant', 'bee'):
        shutil.rmtree(photos / 'val' / name)
    main(['analyze', '--ckpt_path', trained.path, '--root', str(photos), '--output', 'out'])
    assert {row['class'] for row in rows('out/figure7.csv')} == {'cat'}


def test_classes_with_names_of_any_kind(constant, tmp_path, photos, capsys):
    images = sorted((photos / 'val').rglob('*.png'))
    names = ['a$x^$b', 'K\udce4tze', '_none', 'cat, black', 'cat, white']
    for name, image in zip(names, images, strict=False):
        (tmp_path / 'odd' / 'val' / name).mkdir(parents=True)
        shutil.copy(image, tmp_path / 'odd' / 'val' / name)
    main(['analyze', '--name=se_resnet20_cifar', '--network', '{checkpoint_path: constant.pth, num_classes: 3}',
          f'--root={tmp_path / "odd"}', '--output=out', '--classes', str([0, 1, 2, 3, 4])])
    legend = Path('out/figure6.svg').read_text()
    for name in ('_none', 'cat, black', 'cat, white', 'K\ufffdtze'):
        assert f'<!-- {name} -->' in legend
    assert {row['class'] for row in rows('out/figure6.csv')} == {
        'a$x^$b', 'K\ufffdtze', '_none', 'cat, black', 'cat, white', 'all'}


def test_folder_that_cannot_be_written_is_found_before_the_work(trained, cli_error, monkeypatch):
    monkeypatch.setattr('lightning_app.analysis.analyze.survey', lambda *_, **__: pytest.fail('it has begun'))
    given, _, do = cli_error(['analyze', '--ckpt_path', trained.path, '--output', '/proc'])
    assert given == 'output: /proc'
    assert 'name a folder' in do


def test_steady_blocks_are_taken_out_without_loss(constant, photos, capsys):
    main(['analyze', '--name=se_resnet20_cifar', '--network', '{checkpoint_path: constant.pth, num_classes: 3}',
          f'--root={photos}', '--output=out'])
    said = capsys.readouterr().out
    # without settings of a training the images are of the network's own size
    assert 'taken out, with their mean gates as constants (variation): ' in said
    assert 'layer3.1 (0.0 %), layer3.2 (0.0 %)' in said
    before, after = (part.split(' % ')[0] for part in said.split('top-1 ')[1].split('; ')[0].split(' before, '))
    assert before.split()[0] == after.split()[0]


def test_network_of_other_classes_has_no_accuracy(constant, photos, capsys):
    torch.save(timm.create_model('se_resnet20_cifar', num_classes=8).state_dict(), 'eight.pth')
    main(['analyze', '--name=se_resnet20_cifar', '--network', '{checkpoint_path: eight.pth, num_classes: 8}',
          f'--root={photos}', '--output=out', '--prune=[layer3.2]'])
    assert 'accuracy: not known, the network was trained on other classes' in capsys.readouterr().out


def test_grad_cam(trained):
    written = main(['analyze', '--ckpt_path', trained.path, '--output', 'out', '--grad_cam=true'])
    assert Path('out/grad_cam.png') in written
    with Image.open('out/grad_cam.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 24)) > 1000


class ChannelMeans(torch.nn.Module):
    """A network whose three logits are the means of the channels of an image."""

    def __init__(self):
        super().__init__()
        self.maps = torch.nn.Conv2d(3, 3, 1, bias=False)
        self.maps.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return self.maps(x).mean((2, 3))


def test_grad_cam_shows_an_image_of_each_class_and_where_the_network_sees_it():
    def image(value):
        pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
        pixels[0, :, :4] = pixels[2, :, 4:] = value  # red on the left, blue on the right
        return pixels

    samples = [(image(50), IGNORE), (image(100), 1), (image(150), 1), (image(200), 0)]  # the first is unreadable
    names = ['blue', 'red']
    subject = Subject(ChannelMeans().eval(), 'net', names, names, names, samples, np.array([1, 1, 1, 0]), [2, 0],
                      lambda pixels: pixels / 255, 8)
    axes = draw_grad_cam(subject, 'maps', [0, 1]).axes
    for column, (name, value, dark) in enumerate((('blue', 200, np.s_[:4]), ('red', 100, np.s_[4:]))):
        assert axes[column].get_title() == name
        assert np.array_equal(axes[column].images[0].get_array(), image(value).permute(1, 2, 0))
        heat = axes[2 + column].images[1].get_array()
        assert heat.max() > 0
        assert heat[:, dark].max() == 0


def test_network_in_which_classes_are_told_apart():
    block = SEBlock('a', 'a.se', 'SE_5_1', 0., 1., 10)
    labels = torch.arange(3).repeat(10)
    statistics = GateStatistics([block], 3)
    statistics.update({'a': torch.tensor([[.1, .9], [.5, .5], [.9, .1]])[labels]}, labels)
    results = statistics.results()
    assert removable(results) == []
    assert variation(results[0]) == pytest.approx(
        np.sqrt(results[0].stds**2).mean() / np.sqrt((.1**2 + .5**2 + .9**2) / 3), rel=1e-4)
    text = described(results)
    assert 'class-specific (more than 50 % of the variance over images lies between the classes): SE_5_1' in text
    assert 'shared by the classes (less than 10 %): none' in text


def test_saturated_and_steady_blocks_are_named():
    blocks = [SEBlock(name, f'{name}.se', f'SE_5_{number}', 0., 1., 10) for number, name in enumerate('abc', 1)]
    statistics = GateStatistics(blocks, 1)
    statistics.update({'a': torch.full((8, 4), 0.99), 'b': torch.full((8, 4), 0.01),
                       'c': torch.tensor([0.3, 0.7]).repeat(4)[:, None].expand(8, 4)}, torch.zeros(8, dtype=torch.long))
    told = dict(line.rsplit(': ', 1) for line in described(statistics.results()).splitlines() if ': ' in line)
    assert {kind.partition(' (')[0]: titles for kind, titles in told.items()} == {
        'class-specific': 'none', 'shared by the classes': 'none', 'saturated near one': 'SE_5_1',
        'saturated near zero': 'SE_5_2', 'steady': 'SE_5_1, SE_5_2'}


# Classes and images


def test_classes_of_a_pretrained_network_are_found_by_name():
    names = ImageNetInfo().label_names()
    assert labels_of(1000, None, ['n02110958', 'n01443537']) == [254, 1]
    assert labels_of(1000, None, names) == list(range(1000))
    assert labels_of(1000, None, ['cat', 'dog']) is None
    assert labels_of(2, None, ['cat', 'dog']) == [0, 1]
    assert labels_of(3, ['cat', 'dog', 'eel'], ['eel', 'cat']) == [2, 0]
    assert labels_of(3, ['cat', 'dog', 'eel'], ['ant', 'cat', 'dog']) is None


def test_first_images_of_each_class():
    assert first_of_each_class(np.array([2, 0, 2, 0, 2, 1]), 2).tolist() == [0, 1, 2, 3, 5]


# What cannot be used


@pytest.mark.parametrize(('args', 'error'), [
    ([], ('no network', 'nothing to analyse', '--ckpt_path')),
    (['--ckpt_path=PATH', '--name=se_resnet50'], ('ckpt_path', 'each names a network', 'leave one')),
    (['--ckpt_path=PATH', '--blocks=[layer3.9]'], ("block: 'layer3.9'", 'no SE block of this name', 'layer3.')),
    (['--ckpt_path=PATH', '--prune=[SE_5_3]'], ("block: 'SE_5_3'", 'no SE block of this name', 'layer3.2')),
    (['--ckpt_path=PATH', '--classes=[catt]'], ("class: 'catt'", 'there is no such class', 'did you mean cat')),
    (['--ckpt_path=PATH', '--images_per_class=0'], ('images_per_class: 0', 'it is too small', 'from 1')),
    (['--ckpt_path=PATH', '--root=nowhere'], ('nowhere', '', '')),
    (['--ckpt_path=none.ckpt'], ('ckpt_path: none.ckpt', 'there is no such file', '')),
    (['--ckpt_path=PATH', '--output=a_file'], ('output: a_file', 'is a file', 'name a folder')),
    (['--name=se_resnet20_cifar', '--network={checkpoint_path: WEIGHTS, num_classes: 3}'],
     ('root: none', 'there are no images', '--root DIR')),
    (['--name=se_resnet20_cifar', '--root=PHOTOS', '--network={checkpoint_path: WEIGHTS, num_classes: 10}'],
     ('se_resnet20_cifar with 10 classes', 'weights are of 3 classes', 'num_classes: 3')),
    (['--name=se_resnet32_cifar', '--root=PHOTOS', '--network={checkpoint_path: WEIGHTS, num_classes: 3}'],
     ('name: se_resnet32_cifar with', '', '')),
    (['--name=se_resnet5', '--root=PHOTOS'], ('name: ', 'there is no such', 'se_resnet50')),
    (['--ckpt_path=PATH', '--batch_size=0'], ('batch_size: 0', 'it is too small', 'from 1')),
    (['--ckpt_path=PATH', '--num_workers=-1'], ('num_workers: -1', 'it is too small', 'from 0')),
    (['--ckpt_path=PATH', '--blocks=[]'], ('blocks: []', 'nothing would be drawn', 'leave it out')),
    (['--ckpt_path=PATH', '--classes=[]'], ('classes: []', 'nothing would be drawn', 'leave it out')),
    (['--ckpt_path=other.ckpt'], ('ckpt_path: other.ckpt', 'this program has not written it', 'fit')),
    (['--ckpt_path=elsewhere.ckpt'], ('data: no_such_module.Data', 'No module named', 'PYTHONPATH')),
    (['--ckpt_path=PATH', '--image_per_class=3'], ('--image_per_class', 'there is no such option', 'images_per_class')),
], ids=str)
def test_what_cannot_be_used_is_refused(args, error, trained, photos, cli_error):
    torch.save(trained.net.state_dict(), 'weights.pth')
    Path('a_file').touch()
    checkpoint = torch.load(trained.path, weights_only=True)
    torch.save({**checkpoint, 'data': {**checkpoint['data'], 'class_path': 'no_such_module.Data'}}, 'elsewhere.ckpt')
    torch.save({**checkpoint, 'hyper_parameters': {'lr': 0.1}}, 'other.ckpt')
    args = [arg.replace('PATH', trained.path).replace('PHOTOS', str(photos)).replace('WEIGHTS', 'weights.pth')
            for arg in args]
    for said, expected in zip(cli_error(['analyze', *args]), error, strict=True):
        assert expected in said
    assert not Path('gates').exists() or not any(Path('gates').iterdir())


def test_images_that_cannot_be_read(trained, photos, in_tmp_path, cli_error, capfd):
    shutil.copytree(photos, 'broken')
    broken = sorted(Path('broken/val/bee').iterdir())[0]
    broken.write_bytes(b'no image')
    options = ['analyze', '--ckpt_path', trained.path, '--root=broken', '--output=out', '--grad_cam=true']
    given, _, do = cli_error(options)
    assert broken.name in given
    assert 'analyze: --allow_unreadable' in do
    main([*options, '--allow_unreadable=true'])
    said = capfd.readouterr().out
    assert 'images that could not be read, named in the log and left out: 1' in said
    kept = np.ones(len(trained.labels), bool)
    kept[np.flatnonzero(trained.labels == 1)[0]] = False
    gates = gates_of(trained.net, trained.images[torch.from_numpy(kept)])
    drawn = [row for row in rows('out/figure6.csv') if row['block'] == 'layer3.2' and row['class'] == 'all']
    means = [float(row['mean']) for row in drawn]
    np.testing.assert_allclose(means, gates['layer3.2'].mean(0)[::2], atol=2e-6)
    assert f'gates over {kept.sum()} images' in said
    for file in Path('broken/val').rglob('*.*'):
        file.write_bytes(b'no image')
    _, why, _ = cli_error([*options, '--allow_unreadable=true'])
    assert 'none of them could be read' in why


def test_training_images_are_not_needed(trained, photos, in_tmp_path, monkeypatch):
    opened = []
    open_split = imagenet.open_split
    monkeypatch.setattr(
        imagenet, 'open_split', lambda root, split, **more: opened.append(split) or open_split(root, split, **more))
    main(['analyze', '--ckpt_path', trained.path, '--output=out'])
    assert opened == ['val']


def test_network_without_se_is_said(on_photos, in_tmp_path, cli_error):
    path = main(['fit', *on_photos]).trainer.checkpoint_callback.best_model_path
    _, why, do = cli_error(['analyze', '--ckpt_path', path])
    assert 'no SE block of a kind that is known' in why
    assert 'se_resnet50' in do


def test_package_that_is_missing_is_named(trained, cli_error, monkeypatch):
    monkeypatch.setitem(sys.modules, 'captum', None)
    _, why, do = cli_error(['analyze', '--ckpt_path', trained.path, '--grad_cam=true'])
    assert 'captum' in why
    assert "pip install 'se-timm[analysis]'" in do


@pytest.mark.slow
def test_checkpoint_of_another_kind_of_data_takes_a_folder(in_tmp_path, photos, capsys):
    fitted = main(['fit', '--model.name=se_resnet20_cifar', '--data=DigitsDataModule', '--data.batch_size=64',
                   '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--trainer.limit_val_batches=1',
                   '--trainer.accelerator=cpu', '--trainer.enable_progress_bar=false', '--data.num_workers=0'])
    assert isinstance(fitted.model, ImageClassifier)
    path = fitted.trainer.checkpoint_callback.best_model_path
    main(['analyze', '--ckpt_path', path, '--output=out', '--images_per_class=2'])
    assert 'gates over 20 images of 10 classes, 32 px' in capsys.readouterr().out
    main(['analyze', '--ckpt_path', path, '--output=out', f'--root={photos}'])
    assert 'gates over 7 images of 3 classes, 32 px' in capsys.readouterr().out
