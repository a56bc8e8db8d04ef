"""What the tests of the program share: fake images, written where each test wants them, and the check of an error."""
import logging
import resource
import runpy
import signal
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from se_timm.errors import InputError

PETS = {'cat': 5, 'dog': 4, 'eel': 3}


def noise(number, size=(40, 32)):
    """Return an RGB image of random pixels that is unlike that of every other number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(name='noise')
def noise_fixture():
    return noise


@pytest.fixture(scope='session')
def photo():
    """Return a real photo, 640x427 pixels, which comes with scikit-learn."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image('china.jpg'))


@pytest.fixture
def real_data():
    """Return the folder of real photos for development, where there is one."""
    folder = Path(__file__).parents[3] / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip('there are no real photos here')
    return folder


@pytest.fixture
def caplog(caplog, monkeypatch):
    """Catch what Lightning logs too: imported before pytest listens, its loggers keep messages to themselves."""
    for name in ('lightning.pytorch', 'lightning.fabric'):
        monkeypatch.setattr(logging.getLogger(name), 'propagate', True)
    return caplog


@pytest.fixture
def write_images():
    """Return a function that writes images to `root/CLASS/NUMBER.png`, and returns `root`."""
    def write(root, counts=PETS, size=(40, 32), first=0):
        number = first
        for name, count in counts.items():
            Path(root, name).mkdir(parents=True)
            for index in range(count):
                noise(number, size).save(Path(root, name, f'{index}.png'))
                number += 1
        return Path(root)
    return write


@pytest.fixture
def pack():
    """Return a function that writes a folder to a tar file beside it, members shuffled, and returns its path."""
    def pack(folder, prefix='', suffix='.tar', mode='w'):
        path = Path(f'{folder}{suffix}')
        files = sorted(file for file in Path(folder).rglob('*') if file.is_file())
        with tarfile.open(path, mode) as tar:
            for index in np.random.default_rng(0).permutation(len(files)):
                tar.add(files[index], prefix + files[index].relative_to(folder).as_posix())
        return path
    return pack


@pytest.fixture
def pets(tmp_path, write_images):
    """Return a folder with `train/` and `val/`, 12 images each, in three classes."""
    write_images(tmp_path / 'pets' / 'train')
    write_images(tmp_path / 'pets' / 'val', first=100)
    return tmp_path / 'pets'


@pytest.fixture
def full_disk():
    """Return a context in which no file grows over so many bytes: writes fail in the middle, as on a full disk."""
    @contextmanager
    def full_disk(room=4096):
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return full_disk


@pytest.fixture
def wandb_server():
    """A stand-in for the W&B server; the test fails if the client asks for what it cannot answer."""
    module = runpy.run_path(str(Path(__file__).with_name('wandb_server.py')))
    with module['WandbServer']() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def refused():
    """Return a context in which an error is expected: exactly three lines that hold the given texts, line by line."""
    @contextmanager
    def refused(given, why, do):
        with pytest.raises(InputError) as caught:
            yield
        check_three_lines(str(caught.value), given, why, do)
    return refused


@pytest.fixture
def weights(tmp_path):
    """Return a function that writes weights of `test_resnet` to a file, and returns the option that names it."""
    def weights(num_classes=3):
        file = tmp_path / 'weights.pth'
        torch.save(timm.create_model('test_resnet', num_classes=num_classes).state_dict(), file)
        return f'--model.network.checkpoint_path={file}'
    return weights


def check_three_lines(text, given, why, do):
    lines = text.split('\n')
    assert len(lines) == 3, text
    assert given in lines[0]
    assert lines[1].startswith('  why: ')
    assert why in lines[1]
    assert lines[2].startswith('  do:  ')
    assert do in lines[2]


@pytest.fixture(name='check_three_lines')
def check_three_lines_fixture():
    return check_three_lines
