"""Shards that are written from class folders: the same images, whole or not at all, and nothing left out in silence."""
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image

from lightning_app import prepare as module
from lightning_app.cli import main
from lightning_app.data.locking import locked
from lightning_app.data.shards import ShardSource
from lightning_app.data.sources import FolderSource
from lightning_app.data.splits import open_split
from lightning_app.prepare import Settings, prepare, scaled_down, shard_paths, write_shard

SETTINGS = Settings(short_side=None, quality=90, images_per_shard=1000, seed=0)
COUNTS = {'cat': 9, 'dog': 8, 'eel': 6}


@pytest.fixture
def folders(tmp_path, noise):
    """Return a root with files of several kinds and sizes in train/ and val/."""
    for split, counts in (('train', COUNTS), ('val', {'cat': 2, 'eel': 3})):
        for label, (name, count) in enumerate(counts.items()):
            (tmp_path / 'folders' / split / name).mkdir(parents=True)
            for index in range(count):
                kind = 'png' if index % 4 == 3 else 'JPEG'
                noise(100 * label + index, (50 + 8 * index, 90)).save(
                    tmp_path / 'folders' / split / name / f'{index}.of.{name}.{kind}', quality=95)
    return tmp_path / 'folders'


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != '.lock'}


@pytest.mark.parametrize('workers', [1, 2])
def test_same_images_as_in_the_folders(folders, tmp_path, workers):
    assert prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=7, workers=workers) == {
        'train': 23, 'val': 5}
    assert sorted(files(tmp_path / 'shards')) == [
        'classes.txt', 'prepared.json', 'train-0000.tar', 'train-0001.tar', 'train-0002.tar', 'train-0003.tar',
        'val-0000.tar']
    for split in ('train', 'val'):
        source, expected = open_split(tmp_path / 'shards', split), open_split(folders, split)
        assert type(source) is ShardSource
        assert source.classes == expected.classes
        np.testing.assert_array_equal(source.labels, expected.labels)
        every = range(len(expected.labels))
        assert [source.read(index) for index in every] == [expected.read(index) for index in every]
    with tarfile.open(tmp_path / 'shards/train-0000.tar') as tar:
        classes = [name.partition('/')[0] for name in tar.getnames()]
    assert len(set(classes)) > 1  # mixed


# it leaves its files to the garbage collector
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_webdataset_reads_them(folders, tmp_path):
    prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=7, workers=1)
    pattern = str(tmp_path / 'shards' / 'train-{0000..0003}.tar')
    rows = list(webdataset.WebDataset(pattern, shardshuffle=False).decode('pil').to_tuple('jpg;png', 'cls', '__key__'))
    assert len(rows) == 23
    source = FolderSource(folders / 'train')
    by_key = {(int(label), path.rpartition('/')[2].rpartition('.')[0].replace('.', '_')): index
              for index, (path, label) in enumerate(zip(source.paths, source.labels, strict=True))}
    for image, label, key in rows:
        np.testing.assert_array_equal(image, source.load(by_key[label, key.rpartition('/')[2]]))


def test_shards_of_others_are_not_taken_for_ours(folders, tmp_path, refused):
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / 'train-0000.tar').write_bytes(b'')
    with refused(f'output: {tmp_path}/shards', 'it holds train-0000.tar, which was not made by prepare', 'another'):
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)


def test_any_number_of_workers_gives_the_same_files(folders, tmp_path):
    for workers in (1, 2):
        prepare(str(folders), str(tmp_path / f'of{workers}'), images_per_shard=7, workers=workers)
    assert files(tmp_path / 'of1') == files(tmp_path / 'of2')


def test_short_side(folders, tmp_path):
    prepare(str(folders), str(tmp_path / 'shards'), short_side=64, quality=80, workers=1)
    source, before = open_split(tmp_path / 'shards', 'train'), open_split(folders, 'train')
    for index in range(23):
        small, large = source.load(index), before.load(index)
        if min(large.size) <= 64:
            assert source.read(index) == before.read(index)  # not scaled up, and not encoded again
        else:
            assert min(small.size) == 64
            assert abs(small.width / small.height - large.width / large.height) < 0.02
            assert source.name(index).endswith('.jpg')
            file = io.BytesIO()
            large.resize(small.size, Image.Resampling.LANCZOS).save(file, 'JPEG', quality=80)
            assert source.read(index) == file.getvalue()


def test_goes_on_where_it_was_interrupted(folders, tmp_path, monkeypatch):
    prepare(str(folders), str(tmp_path / 'whole'), images_per_shard=4, workers=1)
    write, done = module.write_shard, []

    def interrupted(path, *args):
        if len(done) == 3:
            path.with_suffix('.tar.partial').write_bytes(b'half of it')
            raise KeyboardInterrupt
        done.append(path.name)
        write(path, *args)

    monkeypatch.setattr(module, 'write_shard', interrupted)
    with pytest.raises(SystemExit) as end:
        prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=4, workers=1)
    assert end.value.code == 130
    monkeypatch.setattr(module, 'write_shard', lambda path, *args: (done.append(path.name), write(path, *args)))
    prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=4, workers=1)
    assert len(done) == len(set(done)) == 8
    assert files(tmp_path / 'shards') == files(tmp_path / 'whole')


def test_part_of_a_split_is_not_taken_for_all_of_it(folders, tmp_path, refused):
    shards = tmp_path / 'shards'
    prepare(str(folders), str(shards), images_per_shard=4, workers=1)
    for number in (5, 2, 3):  # of 6; the last ones have not been written, as the names do not tell
        (shards / f'train-000{number}.tar').unlink()
        with refused(f'shards: train in {shards}', ' of the 6 shards are there that prepare began', 'the same prepare'):
            open_split(shards, 'train')
    assert len(open_split(shards, 'train-{0000..0001}.tar').labels) == 8  # as asked for
    assert len(open_split(shards, 'val').labels) == 5
    prepare(str(folders), str(shards), images_per_shard=4, workers=1)
    assert len(open_split(shards, 'train').labels) == 23


def test_numbers_of_shards_are_of_one_length(tmp_path):
    # so that their names are in their order
    source = SimpleNamespace(labels=range(10_001))
    paths = shard_paths(tmp_path, 'train', source, Settings(short_side=None, quality=90, images_per_shard=1, seed=0))
    assert paths == sorted(paths)
    assert [paths[0].name, paths[-1].name] == ['train-00000.tar', 'train-10000.tar']


def test_part_of_a_split_in_a_store_is_not_taken_for_all_of_it(folders, tmp_path, refused, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=4, workers=1)
    (tmp_path / 'shards' / 'train-0005.tar').unlink()
    with refused('shards: train in ', '5 of the 6 shards are there that prepare began', 'copy all'):
        open_split(f'file://{tmp_path}/shards', 'train')


def test_record_of_an_earlier_version(folders, tmp_path):
    prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=4, workers=1)
    record = tmp_path / 'shards' / 'prepared.json'
    older = json.loads(record.read_text())
    del older['splits']
    record.write_text(json.dumps(older))
    (tmp_path / 'shards' / 'train-0005.tar').unlink()
    assert len(open_split(tmp_path / 'shards', 'train').labels) == 20
    prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=4, workers=1)
    assert len(open_split(tmp_path / 'shards', 'train').labels) == 23


@pytest.mark.parametrize('content', ['', '{"seed": 0, "spl', '[3]'])
def test_record_that_cannot_be_read(folders, tmp_path, refused, content):
    prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    record = tmp_path / 'shards' / 'prepared.json'
    record.write_text(content)
    for read in (lambda: open_split(tmp_path / 'shards', 'train'),
                 lambda: prepare(str(folders), str(tmp_path / 'shards'), workers=1)):
        with refused(f'shards: {record}', 'it cannot be read', 'copy it again, or remove it and the shards'):
            read()


def test_nothing_is_done_twice(folders, tmp_path, monkeypatch, capsys):
    prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    monkeypatch.setattr(module, 'write_shard', lambda *args: pytest.fail('it is there'))
    assert prepare(str(folders), str(tmp_path / 'shards'), workers=1) == {'train': 23, 'val': 5}
    assert prepare(str(folders), str(tmp_path / 'shards'), ['val'], workers=1) == {'val': 5}


@pytest.mark.parametrize('workers', [1, 2])
def test_what_cannot_be_read_is_left_out_and_named(folders, tmp_path, workers, capsys):
    broken = folders / 'train' / 'dog' / '2.of.dog.JPEG'
    broken.write_bytes(broken.read_bytes()[:-2000])
    (folders / 'train' / 'eel' / '3.of.eel.png').write_bytes(b'')
    for _ in range(2):  # also by a run that finds all done
        assert prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=7, workers=workers)['train'] == 21
        error = capsys.readouterr().err
        assert 'train: 2 images cannot be read and were left out:' in error
        assert f'{broken}: ' in error
        assert 'truncated' in error
    assert len(open_split(tmp_path / 'shards', 'train').labels) == 21


def test_what_can_be_read_at_the_second_attempt_is_not_named(folders, tmp_path, capsys):
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / 'train-0000.skipped.json').write_text('[["0.of.cat.JPEG", "Input/output error"]]')
    assert prepare(str(folders), str(tmp_path / 'shards'), workers=1)['train'] == 23
    assert 'left out' not in capsys.readouterr().err


def test_files_are_called_what_they_are(tmp_path, noise):
    for split in ('train', 'val'):
        (tmp_path / 'folders' / split / 'cat').mkdir(parents=True)
        for name, kind in [('a.JPEG', 'PNG'), ('b.jpg', 'JPEG'), ('c.png', 'WEBP'), ('d.jpg', 'GIF'), ('e.bmp', 'BMP')]:
            noise(1).save(tmp_path / 'folders' / split / 'cat' / name, kind)
    prepare(str(tmp_path / 'folders'), str(tmp_path / 'shards'), workers=1)
    source = open_split(tmp_path / 'shards', 'train')
    assert [source.name(index).rpartition('/')[2] for index in range(5)] == [
        'a.png', 'b.jpg', 'c.webp', 'd.png', 'e.bmp']


def test_names_that_become_the_same(tmp_path, noise):
    folder = tmp_path / 'folders' / 'train' / 'cat'
    for index, name in enumerate(['x/1.png', 'y/1.png', 'z/1.jpg', '1-1.png']):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(index).save(folder / name)
    prepare(str(tmp_path / 'folders'), str(tmp_path / 'shards'), ['train'], workers=1)
    source, before = open_split(tmp_path / 'shards', 'train'), open_split(tmp_path / 'folders', 'train')
    assert sorted(source.read(index) for index in range(4)) == sorted(before.read(index) for index in range(4))


def test_from_shards_with_other_settings(folders, tmp_path):
    """Any form is read, also this one."""
    prepare(str(folders), str(tmp_path / 'one'), images_per_shard=7, workers=1)
    prepare(str(tmp_path / 'one'), str(tmp_path / 'other'), images_per_shard=3, seed=5, workers=1)
    source, expected = open_split(tmp_path / 'other', 'train'), open_split(folders, 'train')
    assert [source.read(index) for index in range(23)] == [expected.read(index) for index in range(23)]
    assert source.classes == expected.classes


def test_output_of_other_settings(folders, tmp_path, refused):
    prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    with refused(f'output: {tmp_path}/shards', 'made with short_side None, now it is 64', 'another folder'):
        prepare(str(folders), str(tmp_path / 'shards'), short_side=64)
    (folders / 'train' / 'cat' / '0.of.cat.JPEG').unlink()
    with refused(f'output: {tmp_path}/shards', 'other images of train, 23 in number, not of these 22', 'the same root'):
        prepare(str(folders), str(tmp_path / 'shards'))


def test_root_that_is_spelled_otherwise_or_was_moved(folders, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    prepare('folders', 'shards', workers=1)
    prepare(str(folders), 'shards', workers=1)
    folders.rename(tmp_path / 'moved')
    prepare('moved/', 'shards', workers=1)
    scaled_down(Image.open('moved/train/cat/0.of.cat.JPEG'), 20).save('moved/train/cat/0.of.cat.JPEG')  # same names
    with refused('output: shards', 'other images of train, 23 in number, not of these 23', 'another folder'):
        prepare('moved', 'shards', workers=1)


@pytest.mark.parametrize(('options', 'given', 'why'), [
    ({'short_side': 0}, 'short_side: 0', 'at least 1'), ({'quality': 101}, 'quality: 101', 'at most 100'),
    ({'images_per_shard': 0}, 'images_per_shard: 0', 'at least 1'), ({'splits': ['tain']}, 'root: ', 'neither tain/'),
    ({'workers': -1}, 'workers: -1', 'at least 1'), ({'seed': -1}, 'seed: -1', 'at least 0'),
    ({'splits': []}, 'splits: []', 'nothing to write'), ({'splits': ['val', 's/val']}, 'splits: s/val', 'no path'),
    ({'splits': ['train-{0000..0001}.tar']}, 'splits: train-{0000..0001}.tar', 'no pattern'),
    ({'splits': ['train-*.tar']}, 'splits: train-*.tar', 'no pattern')])
def test_what_cannot_be(folders, tmp_path, refused, options, given, why):
    with refused(given, why, ''):
        prepare(str(folders), str(tmp_path / 'shards'), **options)
    assert not (tmp_path / 'shards').exists()


def test_output_in_an_object_store(folders, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused('output: s3://bucket/shards', 'to a folder of this machine', 'copy it to the store'):
        prepare(str(folders), 's3://bucket/shards')
    assert not (tmp_path / 's3:').exists()


def test_disk_that_is_full(folders, tmp_path, refused, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module, 'write_shard', full)
    with refused(f'output: {tmp_path}/shards', 'No space left on device', 'make room there'):
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)


def test_disk_that_keeps_something_else(folders, tmp_path, refused, monkeypatch):
    add = module.add
    monkeypatch.setattr(module, 'add', lambda tar, name, content: add(tar, name, content.replace(b'\x00', b'\x01')))
    with refused('output: ', 'other ones were read again', 'goes on where it was'):
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    assert not list((tmp_path / 'shards').glob('*.tar'))


def test_sigterm_ends_it_as_ctrl_c_does(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, 'write_shard', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    assert end.value.code == 143
    assert 'the same command goes on' in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_signals_do_not_interrupt_the_pool(folders, tmp_path, monkeypatch, name):
    """Python's pools wait for ever if their locks stay taken."""
    calls = []

    def signalled(*args):
        signal.raise_signal(getattr(signal, name))
        calls.append(wait(*args))
        return calls[-1]

    monkeypatch.setattr(module, 'wait', signalled)
    with pytest.raises(SystemExit) as end:
        prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=1, workers=2)
    assert end.value.code == 128 + getattr(signal, name)
    assert len(calls) == 1  # it came to its end, and no other one began
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=1, workers=2)['val'] == 5


def test_no_further_shards_are_written_once_it_is_interrupted(folders, tmp_path, monkeypatch):
    """Wherever that is: here, while the progress is shown."""
    monkeypatch.setattr(module.tqdm, 'update', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        prepare(str(folders), str(tmp_path / 'shards'), images_per_shard=1, workers=2)
    assert not multiprocessing.active_children()
    assert len(list((tmp_path / 'shards').glob('*.tar'))) <= 5  # of 23


def test_a_shard_that_is_being_written_elsewhere(folders, tmp_path):
    """By a process that outlives its own prepare for a moment."""
    class Elsewhere(FolderSource):
        def read(self, index):
            if not (tmp_path / 'train-0000.tar').is_file():
                write_shard(tmp_path / 'train-0000.tar', np.arange(3), FolderSource(self.root), SETTINGS)
            return super().read(index)

    write_shard(tmp_path / 'train-0000.tar', np.arange(4), Elsewhere(folders / 'train'), SETTINGS)
    assert len(open_split(tmp_path, 'train').labels) == 4
    assert not list(tmp_path.glob('*.partial'))


@pytest.fixture
def begun(folders, tmp_path):
    """Return a prepare in a process group of its own, with two workers and some of 1,006 shards done."""
    for index in range(983):
        os.link(folders / 'train' / 'cat' / '0.of.cat.JPEG', folders / 'train' / 'cat' / f'more{index}.JPEG')
    with subprocess.Popen(
            [sys.executable, '-m', 'lightning_app', 'prepare', '--root', str(folders), '--output',
             str(tmp_path / 'shards'), '--images_per_shard', '1', '--workers', '2'],
            stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list(tmp_path.glob('shards/*.tar')):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'to_all'), [('SIGINT', False), ('SIGINT', True), ('SIGTERM', True)])
def test_ctrl_c(begun, folders, tmp_path, name, to_all):
    number = getattr(signal, name)
    os.killpg(begun.pid, number) if to_all else begun.send_signal(number)
    error = begun.communicate()[1]
    assert begun.returncode == 128 + number
    assert 'Traceback' not in error
    main(['prepare', '--root', str(folders), '--output', str(tmp_path / 'shards'), '--images_per_shard', '1',
          '--workers', '1'])
    assert len(open_split(tmp_path / 'shards', 'train').labels) == 1006
    assert not list(tmp_path.glob('shards/*.partial'))


@pytest.mark.slow
def test_workers_end_when_it_is_killed(begun):
    begun.kill()
    begun.communicate(timeout=20)  # until nobody is left who could print


def test_two_at_once_are_refused(folders, tmp_path, refused):
    with locked(tmp_path / 'shards' / module.RECORD), refused(
            f'output: {tmp_path}/shards', 'another prepare is writing there', 'wait for it'):
        prepare(str(folders), str(tmp_path / 'shards'))
    assert prepare(str(folders), str(tmp_path / 'shards'))['val'] == 5


def test_where_files_cannot_be_locked(folders, tmp_path, monkeypatch):
    def refused(*_):
        raise NotImplementedError('no locks here')

    monkeypatch.setattr('filelock.FileLock._acquire', refused)
    assert prepare(str(folders), str(tmp_path / 'shards'))['val'] == 5


def test_output_that_cannot_be_written(folders, tmp_path, refused):
    (tmp_path / 'shards').write_text('a file')
    with refused(f'output: {tmp_path}/shards', 'it cannot be written', 'make room there'):
        prepare(str(folders), str(tmp_path / 'shards'))


@pytest.mark.skipif(sys.platform != 'linux', reason='names of files must be text there')
def test_class_names_that_are_no_text(folders, tmp_path):
    for split in ('train', 'val'):
        (folders / split / 'cat').rename(folders / split / 'ca\udcff')
    prepare(str(folders), str(tmp_path / 'shards'))
    prepare(str(folders), str(tmp_path / 'shards'))  # goes on: the classes are read again
    for split in ('train', 'val'):
        source = open_split(tmp_path / 'shards', split)
        assert source.classes == open_split(folders, split).classes
        assert 'ca\udcff' in source.classes


def test_class_names_with_separators(folders, tmp_path, refused):
    """The one of Unicode is no end of a line to others; tabs are, and classes.txt would have other names."""
    for split in ('train', 'val'):
        (folders / split / 'cat').rename(folders / split / 'ca\u2028t')
    for _ in range(2):
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    for split in ('train', 'val'):
        assert open_split(tmp_path / 'shards', split).classes == open_split(folders, split).classes
    for split in ('train', 'val'):
        (folders / split / 'eel').rename(folders / split / 'eel\tfish')
    with refused(r"class: 'eel\tfish'", 'a name a line, up to a tab', 'otherwise'):
        prepare(str(folders), str(tmp_path / 'others'), workers=1)


def test_class_that_an_earlier_prepare_had_not(folders, tmp_path, refused):
    prepare(str(folders), str(tmp_path / 'shards'), splits=['val'], workers=1)
    with refused('class: dog', 'an earlier prepare made it of other splits', 'with all splits'):
        prepare(str(folders), str(tmp_path / 'shards'), splits=['train', 'val'], workers=1)


def test_seed_and_number_of_the_shards(folders, tmp_path):
    for seed in (0, 5):
        prepare(str(folders), str(tmp_path / f'seed{seed}'), ['train'], seed=seed, workers=1)
    assert files(tmp_path / 'seed0')['train-0000.tar'] != files(tmp_path / 'seed5')['train-0000.tar']


def test_photos_of_cameras_keep_their_bytes(tmp_path, noise):
    """A phone's .jpg may hold several images (MPO)."""
    folder = tmp_path / 'folders' / 'train' / 'cat'
    folder.mkdir(parents=True)
    noise(1).save(folder / 'a.jpg', 'MPO', save_all=True, append_images=[noise(2)])
    prepare(str(tmp_path / 'folders'), str(tmp_path / 'shards'), ['train'], workers=1)
    source = open_split(tmp_path / 'shards', 'train')
    assert source.read(0) == (folder / 'a.jpg').read_bytes()
    assert source.name(0).endswith('/a.jpg')


def test_file_that_cannot_be_opened_is_left_out_and_named(folders, tmp_path, capsys):
    broken = folders / 'train' / 'dog' / '2.of.dog.JPEG'
    broken.unlink()
    broken.symlink_to(broken.name)  # a link that leads nowhere
    assert prepare(str(folders), str(tmp_path / 'shards'), ['train'], workers=1) == {'train': 22}
    assert f'{broken}: ' in capsys.readouterr().err


def test_image_of_another_name_is_another_image(folders, tmp_path, refused):
    prepare(str(folders), str(tmp_path / 'shards'), workers=1)
    (folders / 'train' / 'eel' / '5.of.eel.JPEG').rename(folders / 'train' / 'eel' / '9.of.eel.JPEG')
    with refused(f'output: {tmp_path}/shards', 'other images of train, 23 in number, not of these 23', 'the same root'):
        prepare(str(folders), str(tmp_path / 'shards'), workers=1)


def test_part_of_a_split_is_known_after_the_next_split(folders, tmp_path, refused):
    shards = tmp_path / 'shards'
    for split in ('train', 'val'):
        prepare(str(folders), str(shards), [split], images_per_shard=4, workers=1)
    (shards / 'train-0005.tar').unlink()
    with refused(f'shards: train in {shards}', '5 of the 6 shards are there that prepare began', 'the same prepare'):
        open_split(shards, 'train')
