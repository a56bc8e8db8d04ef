"""The benchmark of the loading runs every row, on the same files."""
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from lightning_app import loading
from lightning_app.cli import main
from lightning_app.data.jpeg import WHOLE, installed
from lightning_app.data.sources import FolderSource

WHOLE_FILES = [name for name in installed() if name not in WHOLE]


@pytest.fixture
def root(tmp_path, noise):
    """Return a root with JPEG files of random pixels."""
    for number in range(48):
        folder = tmp_path / 'train' / 'ab'[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, (48, 40)).save(folder / f'{number}.jpg')
    return tmp_path


def rows(root, *options):
    return main(['loading', str(root), '--batch_size=4', '--size=32', '--rounds=1', *options])


def test_every_row_is_timed(root, tmp_path, capsys):
    other = tmp_path / 'shards'
    main(['prepare', f'--root={root}', f'--output={other}', '--splits=[train]', '--images_per_shard=20'])
    speeds = main(['loading', str(root), str(other), '--batch_size=4', '--size=32', '--rounds=2',
                   '--decoder=nvimgcodec', '--images_per_second=3000'])
    assert list(speeds) == [
        loading.TIMM, f'{root}, 1 worker', f'{other}, 1 worker', f'{root}, exact, 1 worker', f'{root}, 2 workers',
        *(f'decoding alone, {name}' for name in WHOLE_FILES), 'decoding alone, simplejpeg, 2 workers']
    assert all(speed > 0 for speed in speeds.values())
    text = capsys.readouterr().out
    assert all(row in text for row in speeds)
    assert '48 images, 48 of them JPEG files' in text
    assert '40 px on the shorter side' in text
    assert '2 workers load ' in text
    assert 'A GPU that trains on 3000 images/s needs' in text


@pytest.mark.parametrize(('workers', 'arrivals', 'expected'), [
    (1, [5, 6, 7, 8, 9, 10, 11], 4),
    (2, [5, 5, 6, 6, 7, 7, 8, 8, 9], 8),  # the second is idle while the first loads the last batch
    (3, [5, 5, 5, 6, 6, 6, 7, 7, 7, 8], 12),
])
def test_as_many_batches_of_each_worker_count(monkeypatch, workers, arrivals, expected):
    times = iter(arrivals)
    monkeypatch.setattr(loading.time, 'perf_counter', lambda: next(times))
    assert loading.speed(range(len(arrivals)), 4, workers) == expected


def test_files_that_are_made(root, capsys):
    rows(root, '--made_size=[100, 75]', '--images=40', '--workers=1')
    assert '40 images, 40 of them JPEG files' in (text := capsys.readouterr().out)
    assert '75 px on the shorter side' in text
    assert '2 workers' not in text


@pytest.mark.parametrize('options', [[], ['--made_size=[100, 75]']])
def test_damaged_files_are_left_out_and_named(root, capsys, options):
    (root / 'train' / 'a' / '2.jpg').write_bytes(b'no image')
    (root / 'train' / 'b' / '3.jpg').write_bytes((root / 'train' / 'b' / '3.jpg').read_bytes()[:500])
    rows(root, '--workers=1', *options)
    shown = capsys.readouterr()
    assert '46 images, 46 of them JPEG files' in shown.out
    assert f'2 images cannot be read and are left out: {root}/train/a/2.jpg' in shown.err


def test_augmentation_of_a_recipe(root, monkeypatch):
    """Both sides do it."""
    policies = []
    for function in ('create_loader', 'training_transform'):
        original = getattr(loading, function)
        monkeypatch.setattr(loading, function, lambda *args, original=original, **given: policies.append(
            given.get('auto_augment') or args[0].auto_augment) or original(*args, **given))
    rows(root, '--workers=1', '--augment.auto_augment=rand-m7-mstd0.5', '--augment.random_erasing=0.5')
    assert policies == ['rand-m7-mstd0.5'] * 4  # as a check, timm's, ours, ours to the pixel


@pytest.mark.parametrize(('option', 'named'), [
    ('crop=pad', 'augment.crop: pad'), ('cutout=8', 'augment.cutout: 8'), ('rotation=10', 'augment.rotation: 10')])
def test_augmentation_that_timm_has_not(root, capsys, option, named):
    with pytest.raises(SystemExit):
        rows(root, f'--augment.{option}')
    assert named in (error := capsys.readouterr().err)
    assert "timm's loader, the other side, has no such thing" in error


@pytest.mark.parametrize('option', [
    'rounds=0', 'workers=0', 'batch_size=0', 'size=-1', 'images=0', 'images_per_second=-5'])
def test_numbers_by_which_nothing_is_loaded(root, capsys, option):
    with pytest.raises(SystemExit):
        rows(root, f'--{option}')
    assert option.replace('=', ': ') in (error := capsys.readouterr().err)
    assert 'take a number from 1' in error


def test_made_files_have_the_size(noise):
    made = Image.open(io.BytesIO(loading.made(noise(0), (100, 75))))
    assert (made.size, made.format) == ((100, 75), 'JPEG')


@pytest.mark.skipif(not hasattr(os, 'posix_fadvise'), reason='this system forgets no files')
def test_cold(root, monkeypatch):
    forgotten = []
    monkeypatch.setattr(loading, 'forget', forgotten.append)
    rows(root, '--cold=true', '--decoder=pillow', '--workers=1')
    assert len(forgotten) == 3 + len(WHOLE_FILES)  # before each row


@pytest.mark.skipif(not hasattr(os, 'posix_fadvise'), reason='this system forgets no files')
def test_files_can_still_be_read_when_they_are_forgotten(root):
    source = loading.Part(FolderSource(root / 'train'), 10)
    before = [source.read(index) for index in range(10)]
    loading.forget(source)
    assert [source.read(index) for index in range(10)] == before


def test_both_sides_load_the_same_images(root):
    source = FolderSource(root / 'train')
    opened = loading.Opened(source)
    opened.transform = np.asarray
    image, label = opened[5]
    np.testing.assert_array_equal(image, source.load(5))
    assert label == source.labels[5]
    assert len(opened) == 48


@pytest.mark.parametrize(('options', 'parts'), [
    (['--batch_size=8'], ('batch_size: 8', '8 batches are needed, as the first 4 do not count', 'at most 6')),
    (['--workers=16'], ('batch_size: 4', '32 batches are needed', 'at most 1')),
    (['--cold=true', '--made_size=[50, 50]'], ('cold: true with', 'its file is in memory', 'without made_size')),
    (['--decoder=simplejpg'], ("'simplejpg'", 'no such', 'did you mean simplejpeg or simplejpeg-fast?')),
    (['--augment.auto_augment=foo'], ('data.augment: ', 'timm makes no transform of it', 'rand-m9-mstd0.5')),
    (['--split=tain'], ('root: ', 'it holds neither tain/', 'did you mean train?')),
])
def test_what_cannot_be_measured(root, options, parts, cli_error):
    lines = cli_error(['loading', str(root), '--batch_size=4', '--size=32', *options])
    assert all(part in line for part, line in zip(parts, lines, strict=True))


def test_rows_load_as_they_are_called(root, monkeypatch):
    called = []
    monkeypatch.setattr(loading, 'own', lambda source, exact=False, workers=1, **given: called.append(
        (given['decoder'], exact, workers)) or 1.0)
    rows(root, '--decoder=simplejpeg-fast')
    assert called == [('simplejpeg-fast', False, 1), ('simplejpeg', True, 1), ('simplejpeg-fast', False, 2)]


def test_what_is_printed_follows_from_the_speeds(root, monkeypatch, capsys):
    speeds = {loading.TIMM: 100, f'{root}, 1 worker': 200, f'{root}, 2 workers': 300,
              'decoding alone, pillow': 400, 'decoding alone, pillow, 2 workers': 1000}
    monkeypatch.setattr(loading, 'timed', lambda *_: {row: [speed, speed, 5 * speed] for row, speed in speeds.items()})
    rows(root, '--decoder=pillow', '--images_per_second=500')
    text = capsys.readouterr().out
    assert re.search(r'1 worker +200 +2\.00 +0\.50\n', text)
    assert '2 workers load 1.50 times what one does; where they only decode, 2.50 times.' in text
    assert 'needs 3 cores, each of which loads 200 images/s' in text
