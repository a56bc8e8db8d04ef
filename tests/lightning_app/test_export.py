"""What is exported computes what the checkpoint does, and knows how its images are made."""
import copy
import csv
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from lightning.pytorch import Trainer

from lightning_app import ImageClassifier, ImageNetDataModule, classifier
from lightning_app.cli import main
from lightning_app.export import compare
from se_timm.errors import InputError

pytestmark = pytest.mark.usefixtures('in_tmp_path')

EMA = ['--trainer.callbacks+=lightning_app.callbacks.WeightEMA', '--trainer.callbacks.decay=0.5']
SIZES = ['--data.eval_size=48', '--data.mean=[0.1,0.2,0.3]', '--data.crop_pct=0.9']


@pytest.fixture
def checkpoint(on_photos):
    """Return a function that trains an epoch, and returns the checkpoint."""
    def train(*options):
        main(['fit', *on_photos, '--model.name=se_resnet20_cifar', '--model.optim.lr=0.1', *SIZES, *options])
        return str(next(Path('runs').rglob('*.ckpt')))

    return train


@pytest.fixture
def images():
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(3))


def logits(path, images, part='state_dict'):
    """Return what the network of a checkpoint makes of `images`."""
    model = ImageClassifier.load_from_checkpoint(path, map_location='cpu')
    model.load_state_dict(torch.load(path, weights_only=True)[part])
    with torch.no_grad():
        return model.net.eval()(images)


def altered(path, alter, to='altered.ckpt'):
    """Write a checkpoint anew, after `alter` has changed its contents."""
    content = torch.load(path, weights_only=True)
    alter(content)
    torch.save(content, to)
    return to


@pytest.fixture(params=['file', 'folder'])
def initial(in_tmp_path, checkpoint, request):
    """Return the arguments that build the network with its weights, from the checkpoint or from its export."""
    path = checkpoint()
    if request.param == 'file':
        return ['--model.name=se_resnet20_cifar', f'--model.network={{checkpoint_path: {path}}}']
    main(['export', '--ckpt_path', path, '--output', 'exported'])
    return ['--model.name=local-dir:exported', '--model.network={pretrained: true}']


def timm_network(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


# What is written


@pytest.mark.parametrize(('options', 'blocks'), [
    ([], 9), (['--model.network.reduction=4'], 9), (['--model.plain=true'], 0)], ids=['se', 'reduction', 'plain'])
def test_folder_for_timm(checkpoint, images, options, blocks, capsys):
    path = checkpoint(*options)
    folder, = main(['export', '--ckpt_path', path])
    assert folder == Path(path).with_suffix('')
    assert sorted(file.name for file in folder.iterdir()) == ['config.json', 'model.safetensors']
    net = timm_network(folder)
    with torch.no_grad():
        assert torch.equal(net(images), logits(path, images))
    data = timm.data.resolve_model_data_config(net)
    assert (data['input_size'], tuple(data['mean']), data['crop_pct']) == ((3, 48, 48), (0.1, 0.2, 0.3), 0.9)
    assert json.loads((folder / 'config.json').read_text())['label_names'] == ['ant', 'bee', 'cat']
    assert sum(module.__class__.__name__ == 'SqueezeExcite' for module in net.modules()) == blocks
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in capsys.readouterr().out


@pytest.fixture
def other_photos(initial, photos):
    """After the training, the photos with classes of other names, though as many, and in the order of the former."""
    for name, other in (('ant', 'dog'), ('bee', 'eel'), ('cat', 'fox')):
        for split in ('train', 'val'):
            (photos / split / name).rename(photos / split / other)
    return photos


def test_initial_weights_know_their_classes(initial, photos):
    main(['predict', *initial, '--data=ImageNetDataModule', f'--data.images={photos}/val/ant', '--data.num_workers=0',
          '--data.num_classes=3', '--trainer.accelerator=cpu'])
    with open('predictions.csv', newline='') as file:
        assert {row['class1'] for row in csv.DictReader(file)} <= {'ant', 'bee', 'cat'}
    main(['validate', *initial, '--data=ImageNetDataModule', f'--data.root={photos}', '--trainer.accelerator=cpu'])


def test_initial_weights_know_their_images(in_tmp_path, checkpoint, photos):
    """The same numbers by the checkpoint, by weights out of it, and by its export."""
    path = checkpoint('--data.crop_mode=squash', '--data.interpolation=bicubic')
    main(['export', '--ckpt_path', path, '--output', 'exported'])
    images = ['--data=ImageNetDataModule', f'--data.root={photos}', '--trainer.accelerator=cpu', '--data.num_workers=0']
    ways = [[f'--ckpt_path={path}'],
            ['--model.name=se_resnet20_cifar', f'--model.network={{checkpoint_path: {path}}}'],
            ['--model.name=local-dir:exported', '--model.network={pretrained: true}']]
    losses = [float(main(['validate', *way, *images]).trainer.callback_metrics['val/loss']) for way in ways]
    assert losses[0] == losses[1] == losses[2]
    model = ImageClassifier.load_from_checkpoint(path)  # with its network, in Python
    data = ImageNetDataModule(root=str(photos), num_workers=0)
    assert Trainer(accelerator='cpu', logger=False).validate(model, data)[0]['val/loss'] == losses[0]
    cli = main(['validate', *ways[1], *images, '--data.mean=[0.5,0.5,0.5]'])  # what is given comes first
    assert cli.datamodule.normalisation_settings['mean'] == (0.5, 0.5, 0.5)
    assert float(cli.trainer.callback_metrics['val/loss']) != losses[0]


def test_views_of_an_evaluation_are_not_exported(in_tmp_path, checkpoint, capsys):
    main(['export', '--ckpt_path', checkpoint('--data.eval_views=flip')])
    assert 'data.eval_views was flip' in capsys.readouterr().out


def test_checkpoint_keeps_what_the_networks_configuration_said(in_tmp_path, checkpoint, on_photos, cli_error):
    """It may say something else later."""
    main(['export', '--ckpt_path', checkpoint(), '--output', 'exported'])
    main(['fit', *on_photos, '--model.name=local-dir:exported', '--model.network={pretrained: true}',
          '--trainer.default_root_dir=tuned'])
    path = next(Path('tuned').rglob('*.ckpt'))
    before = main(['validate', f'--ckpt_path={path}']).trainer.callback_metrics['val/loss']
    config = Path('exported/config.json')
    config.write_text(config.read_text().replace('0.1', '0.7'))
    cli = main(['validate', f'--ckpt_path={path}'])
    assert cli.trainer.callback_metrics['val/loss'] == before
    assert cli.datamodule.mean == (0.1, 0.2, 0.3)
    Path('exported').rename('elsewhere')
    assert cli_error(['validate', f'--ckpt_path={path}'])[2] == (
        'put the folder there, as python -m lightning_app export has written it')


def test_export_of_a_network_with_a_configuration_of_its_own(in_tmp_path, checkpoint, on_photos, images):
    """As README recommends for weights in a file."""
    main(['export', '--ckpt_path', checkpoint(), '--output', 'exported'])
    overlay = '{pretrained: true, pretrained_cfg_overlay: {file: exported/model.safetensors, num_classes: 3}}'
    main(['fit', *on_photos, '--model.name=se_resnet20_cifar', f'--model.network={overlay}',
          '--trainer.default_root_dir=tuned'])
    path = next(Path('tuned').rglob('*.ckpt'))
    folder, = main(['export', '--ckpt_path', str(path), '--output', 'again'])
    with torch.no_grad():
        assert torch.equal(timm_network(folder)(images), logits(path, images))


def test_weights_of_other_classes_of_the_same_number_are_not_evaluated(initial, other_photos, cli_error, capfd):
    given, why, _ = cli_error(['validate', *initial, '--data=ImageNetDataModule', f'--data.root={other_photos}',
                               '--trainer.accelerator=cpu'])
    assert given == 'data: 3 classes, of which number 0 is dog'
    assert 'it is ant' in why
    name, network = (each.partition('=')[2] for each in initial)
    main(['analyze', '--name', name, '--network', network.replace('{', '{num_classes: 3, '), '--output', 'gates',
          '--root', str(other_photos)])
    assert 'accuracy: not known' in capfd.readouterr().out


@pytest.mark.usefixtures('other_photos')
def test_classifier_begins_anew_for_other_classes_of_the_same_number(initial, on_photos, caplog, monkeypatch):
    renew, changed = classifier.renew_classifier, []

    def watched(net):
        before = copy.deepcopy(net.state_dict()), list(net.parameters())
        renew(net)
        assert all(one is other for one, other in zip(before[1], net.parameters(), strict=True))
        changed.extend(key for key, value in net.state_dict().items() if not torch.equal(before[0][key], value))

    monkeypatch.setattr(classifier, 'renew_classifier', watched)
    with caplog.at_level('INFO'):
        cli = main(['fit', *on_photos, *initial, '--trainer.fast_dev_run=1'])
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)  # it knows these classes now
    assert 'of classes with other names; the classifier begins anew' in caplog.text
    assert changed == ['fc.weight', 'fc.bias']


def test_either_weights_of_a_training_with_an_average(checkpoint, images, capsys):
    path = checkpoint(*EMA)
    found, printed = {}, {}
    for weights in (None, 'ema', 'raw'):
        given = ['--weights', weights] if weights else []
        folder, = main(['export', '--ckpt_path', path, f'--output={weights}', *given])
        with torch.no_grad():
            found[weights], printed[weights] = timm_network(folder)(images), capsys.readouterr().out
    assert torch.equal(found['ema'], logits(path, images))
    assert torch.equal(found['raw'], logits(path, images, 'current_model_state'))
    assert torch.equal(found[None], found['ema'])
    assert not torch.equal(found['raw'], found['ema'])
    assert 'the average of the weights' in printed[None]
    assert 'the weights, not their average' in printed['raw']


@pytest.mark.parametrize('options', [
    ['--model.name=test_resnet', '--model.add_se', '{}'], pytest.param([], marks=pytest.mark.slow)], ids=[
        'se put in', 'se_resnet20'])
@pytest.mark.parametrize('fold', ['false', pytest.param('true', marks=pytest.mark.slow)])
def test_programs_for_any_number_of_images(checkpoint, images, options, fold):
    path = checkpoint(*options)
    files = main(['export', '--ckpt_path', path, '--format=[onnx,pt2]', f'--fold={fold}', '--output=net'])
    assert files == [Path('net.onnx'), Path('net.pt2')]
    session = onnxruntime.InferenceSession('net.onnx', providers=['CPUExecutionProvider'])
    extra = {'config.json': ''}
    net = torch.export.load('net.pt2', extra_files=extra).module()
    for count in (1, 5):
        expected = logits(path, images[:count])
        found = torch.from_numpy(session.run(None, {'images': images[:count].numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(net(images[:count]), expected, rtol=1e-4, atol=1e-4)
    described = {entry.key: json.loads(entry.value) for entry in onnx.load('net.onnx').metadata_props}
    for found in (described, json.loads(extra['config.json'])):
        assert [found[key] for key in ('mean', 'input_size', 'crop_pct', 'classes')] == [
            [0.1, 0.2, 0.3], [3, 48, 48], 0.9, ['ant', 'bee', 'cat']]


def test_program_for_one_image_of_another_size(checkpoint):
    path = checkpoint('--model.name=test_resnet')
    file, = main(['export', '--ckpt_path', path, '--format=pt2', '--dynamic_batch=false', '--image_size=40'])
    assert file == Path(path).with_suffix('.pt2')
    net = torch.export.load(str(file)).module()
    image = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(net(image), logits(path, image), rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError, match='Guard failed'):
            net(image.repeat(2, 1, 1, 1))


# What must not happen


@pytest.mark.parametrize('format', [
    'safetensors', *(pytest.param(name, marks=pytest.mark.slow) for name in ('onnx', 'pt2'))])
def test_full_disk_keeps_the_older_export(checkpoint, cli_error, full_disk, format):
    path = checkpoint('--model.name=test_resnet')
    export = ['export', '--ckpt_path', path, f'--format={format}', '--output=net']
    written, = main(export)
    file = written / 'model.safetensors' if written.is_dir() else written
    before, names = file.read_bytes(), sorted(Path().iterdir())
    with full_disk(len(before) // 2):
        given, why, _ = cli_error(export)
    assert (given, why.startswith('it cannot be written (')) == (f'output: {written}', True)
    assert file.read_bytes() == before
    assert sorted(Path().iterdir()) == names
    assert main(export) == [written]


def test_other_logits_are_found(checkpoint, cli_error, monkeypatch):
    path = checkpoint()
    create = timm.create_model

    def with_other_classifier(name, **arguments):
        net = create(name, **arguments)
        if name.startswith('local-dir:'):
            torch.nn.init.zeros_(net.get_classifier().weight)
        return net

    monkeypatch.setattr(timm, 'create_model', with_other_classifier)
    given, why, _ = cli_error(['export', '--ckpt_path', path])
    assert 'logits that differ' in given
    assert 'was removed' in why
    assert not Path(path).with_suffix('').exists()


@pytest.mark.parametrize('kind', ['safetensors', 'onnx', 'pt2'])
@pytest.mark.parametrize('found', [[[1.0, float('nan')]], [[1.0, 2.1]], [[1.0, 2.0], [1.0, 2.0]]])
def test_comparison_refuses(kind, found):
    with pytest.raises(InputError, match='logits that differ'):
        compare(kind, torch.tensor(found), torch.tensor([[1.0, 2.0]]))


def test_comparison_of_logits_that_are_all_zero():
    compare('onnx', torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(InputError):
        compare('onnx', torch.full((1, 2), 1e-9), torch.zeros(1, 2))


def test_output_never_costs_other_files(checkpoint, cli_error):
    path = checkpoint('--model.name=test_resnet')
    content = Path(path).read_bytes()
    assert main(['export', '--ckpt_path', path, '--format=pt2', f'--output={path}']) == [Path(f'{path}.pt2')]
    assert Path(path).read_bytes() == content
    Path('net.pt2').write_bytes(content)
    assert 'it is the checkpoint' in cli_error(['export', '--ckpt_path=net.pt2', '--format=pt2'])[1]
    folder, = main(['export', '--ckpt_path', path, '--output=folder'])
    (folder / 'README.md').write_text('of mine')
    for output in ('folder', 'nothing/..', 'photos'):
        assert 'other files lie there' in cli_error(['export', '--ckpt_path', path, '--output', output])[1]
    (folder / 'README.md').unlink()
    Path('link').symlink_to(folder)
    main(['export', '--ckpt_path', path, '--output=link'])
    assert Path('link').is_symlink()
    assert {file.name for file in folder.iterdir()} == {'config.json', 'model.safetensors'}


def test_working_directory_is_not_replaced(checkpoint, cli_error, tmp_path, monkeypatch):
    path = Path(checkpoint('--model.name=test_resnet')).resolve()
    (tmp_path / 'here').mkdir()
    with monkeypatch.context() as patch:
        patch.chdir('here')
        assert 'the working directory' in cli_error(['export', '--ckpt_path', str(path), '--output=.'])[1]


def test_what_cannot_be_exported(checkpoint, cli_error):
    path = checkpoint('--model.name=test_resnet')
    Path('file').write_text('')
    for options, given, do in [
            ('--weights=ema', 'weights: ema', 'leave weights out'), ('--fold=true', 'fold: true', 'onnx or pt2'),
            ('--format=onx', 'format: onx', 'did you mean onnx'), ('--format=[]', 'format: []', 'pt2'),
            ('--output=file', 'output: file', 'another folder'), ('--output=file/x', 'output: file/x', 'another place'),
            ('--format=pt2 --output=photos', 'output: photos', 'another file'),
            ('--format=pt2 --output=net.onnx', 'net.onnx with format: pt2', 'leave the suffix out: net'),
            ('--dynamic_batch=false', 'dynamic_batch: false', 'leave it out'),
            ('--image_size=0', 'image_size: 0', 'leave it out'), ('--image_size=x', 'image_size: x', 'correct'),
            ('--outptu=x', '--outptu', 'did you mean --output?'), ('--xyz=1', '--xyz', 'export --help')]:
        error = cli_error(['export', '--ckpt_path', path, *options.split()])
        assert given in error[0]
        assert do in error[2]


def test_network_that_timm_cannot_build(checkpoint, cli_error):
    path = checkpoint('--model.name=test_resnet', '--model.add_se', '{}')
    assert 'onnx or pt2' in cli_error(['export', '--ckpt_path', path])[2]


def test_checkpoint_that_cannot_be_exported(checkpoint, cli_error):
    path = checkpoint('--model.name=test_resnet')
    diverged = altered(path, lambda content: content['state_dict']['net.fc.weight'].fill_(float('nan')), 'nan.ckpt')
    assert 'not finite' in cli_error(['export', '--ckpt_path', diverged])[1]
    other = altered(path, lambda content: content['state_dict'].pop('net.fc.weight'), 'other.ckpt')
    assert 'fc.weight' in cli_error(['export', '--ckpt_path', other])[1]
    bare = altered(path, lambda content: content.pop('hyper_parameters'), 'bare.ckpt')
    assert 'settings of a network' in cli_error(['export', '--ckpt_path', bare])[1]
    Path('cut.ckpt').write_bytes(Path(path).read_bytes()[:5000])
    assert 'cut off' in cli_error(['export', '--ckpt_path=cut.ckpt'])[1]
    torch.save({'weight': torch.zeros(1)}, 'foreign.ckpt')
    assert 'no checkpoint' in cli_error(['export', '--ckpt_path=foreign.ckpt'])[1]


def test_missing_package_is_named_before_any_work(checkpoint, cli_error, monkeypatch):
    path = checkpoint('--model.name=test_resnet')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    error = cli_error(['export', '--ckpt_path', path, '--format=onnx', '--output=new/net'])
    assert "pip install 'se-timm[onnx]'" in error[2]
    assert not Path('new').exists()


def test_missing_checkpoint(cli_error):
    assert cli_error(['export', '--ckpt_path=nothing.ckpt'])[0] == 'ckpt_path: nothing.ckpt'
    assert 'ckpt_path' in ' '.join(cli_error(['export']))


@pytest.mark.parametrize('verb', ['exprt', ''])
def test_verbs_are_named(cli_error, verb):
    assert 'export' in cli_error([verb] if verb else [])[2]


def test_nothing_takes_its_place_before_all_is_written(checkpoint, cli_error, full_disk):
    """The program is larger than the weights, so that the disk is full when they are written."""
    path = checkpoint('--model.name=test_resnet')
    files = main(['export', '--ckpt_path', path, '--format=[safetensors,pt2]', '--output=net'])
    weights, program = files[0] / 'model.safetensors', files[1]
    before = {file: file.read_bytes() for file in (weights, program)}
    inode = weights.stat().st_ino
    with full_disk((weights.stat().st_size + program.stat().st_size) // 2):
        cli_error(['export', '--ckpt_path', path, '--format=[safetensors,pt2]', '--output=net'])
    assert weights.stat().st_ino == inode
    assert {file: file.read_bytes() for file in before} == before


def test_plain_twin_of_a_network_with_se_put_in(checkpoint, capsys):
    path = checkpoint('--model.name=test_resnet', '--model.add_se', '{}', '--model.plain=true')
    folder, = main(['export', '--ckpt_path', path])
    assert ', the weights, ' in capsys.readouterr().out  # and no average of them
    assert not any('se.' in key for key in timm_network(folder).state_dict())
