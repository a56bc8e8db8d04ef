"""What is exported computes what the checkpoint does, and knows how its images are made."""
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

from lightning_app import ImageClassifier
from lightning_app.cli import main

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


@pytest.mark.parametrize('options', [[], ['--model.network.reduction=4'], ['--model.plain=true'], EMA], ids=[
    'se', 'reduction', 'plain', 'ema'])
def test_folder_for_timm(checkpoint, images, options, capsys):
    path = checkpoint(*options)
    folder = main(['export', '--ckpt_path', path])
    assert folder == Path(path).with_suffix('')
    assert sorted(file.name for file in folder.iterdir()) == ['config.json', 'model.safetensors']
    net = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(net(images), logits(path, images))
    data = timm.data.resolve_model_data_config(net)
    assert (data['input_size'], tuple(data['mean']), data['crop_pct']) == ((3, 48, 48), (0.1, 0.2, 0.3), 0.9)
    assert json.loads((folder / 'config.json').read_text())['label_names'] == ['ant', 'bee', 'cat']
    assert sum(module.__class__.__name__ == 'SqueezeExcite' for module in net.modules()) == 9 * (options[:1] != [
        '--model.plain=true'])
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in capsys.readouterr().out


def test_either_weights_of_a_training_with_an_average(checkpoint, images, capsys):
    path = checkpoint(*EMA)
    found = {}
    for weights in ('ema', 'raw'):
        main(['export', '--ckpt_path', path, '--weights', weights, '--output', weights])
        with torch.no_grad():
            found[weights] = timm.create_model(f'local-dir:{weights}', pretrained=True).eval()(images)
    assert torch.equal(found['ema'], logits(path, images))
    assert torch.equal(found['raw'], logits(path, images, 'current_model_state'))
    assert not torch.equal(found['raw'], found['ema'])
    assert 'the average of the weights' in capsys.readouterr().out


@pytest.mark.parametrize('options', [[], ['--fold=true']], ids=['plain', 'folded'])
def test_onnx(checkpoint, images, options):
    path = checkpoint()
    file = main(['export', '--ckpt_path', path, '--format=onnx', '--output=net.onnx', *options])
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for count in (1, 5):
        found, = session.run(None, {'images': images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(path, images)[:count], rtol=1e-4, atol=1e-4)
    described = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props
                 if entry.key in ('mean', 'input_size', 'classes')}
    assert described == {'mean': [0.1, 0.2, 0.3], 'input_size': [3, 48, 48], 'classes': ['ant', 'bee', 'cat']}


def test_program_of_torch_export_with_se_that_was_put_in(checkpoint, images):
    path = checkpoint('--model.name=test_resnet', '--model.add_se', '{}')
    file = main(['export', '--ckpt_path', path, '--format=pt2', '--output=net.pt2'])
    extra = {'config.json': ''}
    with open(file, 'rb') as opened:
        net = torch.export.load(opened, extra_files=extra).module()
    with torch.no_grad():
        for count in (1, 5):
            torch.testing.assert_close(net(images[:count]), logits(path, images[:count]), rtol=1e-4, atol=1e-5)
    assert json.loads(extra['config.json'])['classes'] == ['ant', 'bee', 'cat']


def fail(*args, **options):
    raise OSError('full')


def test_older_export_stays_until_the_new_one_is_whole(checkpoint, monkeypatch):
    path = checkpoint()
    for options in ([], ['--format=pt2', '--output=net.pt2']):
        before = main(['export', '--ckpt_path', path, *options])
        kept = (before / 'model.safetensors' if before.is_dir() else before).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr('lightning_app.export.compare', fail)
            with pytest.raises(OSError, match='full'):
                main(['export', '--ckpt_path', path, *options])
        assert (before / 'model.safetensors' if before.is_dir() else before).read_bytes() == kept
        assert not list(before.parent.glob('.*'))
        main(['export', '--ckpt_path', path, *options])


def test_other_logits_are_found(checkpoint, monkeypatch, cli_error):
    path = checkpoint()
    create = timm.create_model

    def altered(name, **arguments):
        net = create(name, **arguments)
        if name.startswith('local-dir:'):
            torch.nn.init.zeros_(net.get_classifier().weight)
        return net

    monkeypatch.setattr(timm, 'create_model', altered)
    given, why, _ = cli_error(['export', '--ckpt_path', path])
    assert 'logits that differ' in given
    assert 'was removed' in why
    assert not Path(path).with_suffix('').exists()


@pytest.mark.parametrize(('options', 'given', 'do'), [
    (['--weights=ema'], 'weights: ema', 'leave weights out'), (['--fold=true'], 'fold: true', 'onnx or pt2'),
    (['--format=onx'], 'format: onx', 'onnx'), (['--output=photos'], 'output: photos', 'another folder'),
    (['--format=pt2', '--output=photos'], 'output: photos', 'another file'), (['--outptu=x'], '--outptu', 'output')])
def test_what_cannot_be_exported(checkpoint, cli_error, options, given, do):
    error = cli_error(['export', '--ckpt_path', checkpoint(), *options])
    assert given in error[0]
    assert do in error[2]


def test_network_that_timm_cannot_build(checkpoint, cli_error):
    path = checkpoint('--model.name=test_resnet', '--model.add_se', '{}')
    assert 'onnx or pt2' in cli_error(['export', '--ckpt_path', path])[2]


def test_missing_checkpoint(cli_error):
    assert cli_error(['export', '--ckpt_path=nothing.ckpt'])[0] == 'ckpt_path: nothing.ckpt'
    assert 'ckpt_path' in ' '.join(cli_error(['export']))


@pytest.mark.parametrize('verb', ['exprt', ''])
def test_verbs_are_named(cli_error, verb):
    assert 'export' in cli_error([verb] if verb else [])[2]
