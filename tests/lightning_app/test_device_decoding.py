"""Files that are decoded on the device give the training that workers' pixels give; here the device is the CPU."""
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_app.cli import main
from lightning_app.data import Augment, ImageNetDataModule, device_decoding
from lightning_app.data.device_decoding import Encoded, File, decode_files, for_device
from lightning_app.data.picture import Picture

CPU = torch.device('cpu')


@pytest.fixture
def write(tmp_path, noise):
    """Return a function that writes JPEG files of many sizes, in training also a PNG file, CMYK, grey and turned."""
    def written(**settings):
        for split, count in (('train', 24), ('val', 4)):
            for number in range(count):
                folder = tmp_path / split / 'ab'[number % 2]
                folder.mkdir(parents=True, exist_ok=True)
                image, options = noise(number, (40 + number, 60 - number)), dict(settings)
                if number == 5:
                    options['exif'] = Image.Exif()
                    options['exif'][274] = 6  # to be turned by 90 degrees
                image = image.convert({6: 'CMYK', 7: 'L'}.get(number, 'RGB'))
                image.save(folder / f'{number:02}.jpg', 'PNG' if number == 4 else 'JPEG', **options)
        return tmp_path
    return written


@pytest.fixture
def root(write):
    """Return the root of such files."""
    return write()


def damage(file):
    """Damage a file within, where only who decodes it sees it; return its content."""
    content = bytearray(file.read_bytes())
    at = content.index(b'\xff\xc4')  # the Huffman tables
    content[at + 4:at + 200] = bytes(196)
    file.write_bytes(content)
    return torch.frombuffer(content, dtype=torch.uint8)


def batches(root, **options):
    """Return the batches of an epoch, as a training gets them, and the data module."""
    torch.manual_seed(0)
    data = ImageNetDataModule(root=root, batch_size=8, image_size=32, **{
        'num_workers': 2, 'decoder': 'torchcodec', **options})
    data.setup('fit')
    loaded = list(data.train_dataloader())
    return loaded, [data.on_after_batch_transfer(data.transfer_batch_to_device(batch, CPU, 0), 0)
                    for batch in loaded], data


def same(one, other):
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize('options', [{}, {'num_workers': 0}, {'augment': Augment(hflip=0.0)},
                                     {'interpolation': 'bicubic'}, {'repeats': 4}])
def test_batches_are_those_of_workers(root, options):
    _, expected, _ = batches(root, **options)
    loaded, got, data = batches(root, decode_on_device=True, **options)
    assert same(got, expected)
    assert data.training.unreadable == 0
    assert all(isinstance(images, Encoded) for images, _ in loaded)
    if not options:
        kinds = [isinstance(image, File) for images, _ in loaded for image in images.images]
        assert kinds.count(False) == 3  # PNG, CMYK and the turned one


def test_same_training(root, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level('INFO')

    def trained(*options):
        fitted = main([
            'fit', '--data=ImageNetDataModule', f'--data.root={root}', '--data.batch_size=8', '--data.image_size=32',
            '--data.num_workers=2', '--model.name=se_resnet20_cifar', '--model.optim.lr=0.05',
            '--trainer.max_epochs=2', '--trainer.enable_progress_bar=false', '--trainer.accelerator=cpu',
            '--trainer.logger=false', '--data.decoder=torchcodec', *options])
        return fitted.model.state_dict()

    expected, got = trained(), trained('--data.decode_on_device=true')
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    said = [text.rpartition('JPEG files decoded by ')[2] for text in caplog.messages if 'decoded by' in text]
    assert said == ['torchcodec', 'torchcodec on cpu']


def test_damaged_files_are_replaced_named_and_counted(root, caplog):
    """One is cut off, which the worker sees, and one is damaged within, which the decoder on the device refuses."""
    cut, damaged = (Path(root, 'train', name) for name in ('a/10.jpg', 'b/11.jpg'))
    os.truncate(cut, 300)
    content = damage(damaged)
    assert for_device(Picture(content.numpy().tobytes()))
    assert decode_files([content], CPU) == [None]
    _, expected, _ = batches(root, num_workers=0)
    with caplog.at_level(logging.WARNING):
        _, got, data = batches(root, num_workers=0, decode_on_device=True)
    assert same(got, expected)
    assert data.training.unreadable == 2
    assert all(f'{path}: ' in caplog.text for path in (cut, damaged))


def test_a_file_that_only_this_decoder_refuses_is_the_others(root, monkeypatch):
    _, expected, _ = batches(root)
    monkeypatch.setattr(device_decoding, 'decode_files', lambda files, device: [None] * len(files))
    _, got, data = batches(root, decode_on_device=True)
    assert same(got, expected)
    assert data.training.unreadable == 0


def test_a_decoder_that_does_not_work_here(root, refused, monkeypatch):
    def broken(source, device):
        raise RuntimeError('nvJPEG is not there')

    monkeypatch.setattr('torchcodec.decoders.decode_jpeg', broken)
    with refused('data.decode_on_device: true', 'decodes nothing on cpu: nvJPEG is not there', 'leave data.decode'):
        batches(root, num_workers=0, decoder='pillow', decode_on_device=True)


def test_a_batch_without_a_file_for_the_device(tmp_path, write_images):
    for split in ('train', 'val'):
        write_images(tmp_path / split)
    loaded, got, _ = batches(tmp_path, decode_on_device=True)
    assert not isinstance(loaded[0][0], Encoded)
    assert same(got, batches(tmp_path)[1])


@pytest.mark.parametrize('options', [
    {'augment': Augment(random_erasing=0.5)}, {'augment': Augment(auto_augment='rand-m9')}, {'exact': True},
    {'augment': Augment(crop='pad')}, {'augment': Augment(vflip=0.5)}, {'augment': Augment(rotation=10)}])
def test_what_the_device_does_not_do(root, options, refused):
    with refused('data.decode_on_device: true', 'data.augment or data.exact', 'leave data.decode_on_device out'):
        batches(root, decode_on_device=True, **options)


def test_without_torchcodec(root, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchcodec', None)
    with refused('data.decode_on_device: true', 'torchcodec is not installed', "pip install 'se-timm[torchcodec]'"):
        batches(root, decode_on_device=True, decoder='pillow')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_nvjpeg_is_near(write, photo):
    """Of 4:2:0, as the photo has it, nvJPEG repeats the colours, and libjpeg interpolates them: far off in noise."""
    root = write(subsampling=0)
    for name in 'ab':
        photo.save(root / 'train' / name / 'photo.jpg', quality=95)
    one, other = (batches(root, num_workers=0, augment=Augment(scale=(1.0, 1.0)), **options)[2] for options in (
        {}, {'decode_on_device': True}))
    for here, there in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        images = other.transfer_batch_to_device(there, torch.device('cuda'), 0)[0].cpu()
        difference = (images.int() - here[0].int()).abs().float()
        assert difference.mean() < 3
        assert np.percentile(difference.numpy(), 99) < 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_nvjpeg_refuses_a_damaged_file_and_goes_on(root):
    whole, damaged = Path(root, 'train/a/10.jpg'), Path(root, 'train/b/11.jpg')
    files = [torch.frombuffer(bytearray(whole.read_bytes()), dtype=torch.uint8), damage(damaged)]
    for _ in range(2):
        found = decode_files(files, torch.device('cuda'))
        assert found[0].shape == decode_files(files[:1], CPU)[0].shape
        assert found[1] is None
