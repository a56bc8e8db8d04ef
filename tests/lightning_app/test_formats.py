"""The same images from each form in which people have them: folders, tar files, shards, and other libraries' sets."""
import io
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import litdata
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, Dataset

from lightning_app.cli import main
from lightning_app.data import ImageNetDataModule, object_store, tars
from lightning_app.data.decode import UnreadableImage
from lightning_app.data.hugging_face import HuggingFaceSource, split_named
from lightning_app.data.index_cache import cached_arrays
from lightning_app.data.optimised import LitDataSource, check_pixels, keys_of
from lightning_app.data.shards import ShardSource, missing_shards, named
from lightning_app.data.sources import FolderSource, TarSource
from lightning_app.data.splits import expanded, has_split, open_split, shards_of
from se_timm.errors import InputError

CLASSES = {'cat': 7, 'dog': 6, 'eel': 5}
SPLITS = ('train', 'val')


@pytest.fixture
def folders(tmp_path, noise):
    """Return a root with JPEG files in train/CLASS/ and val/CLASS/."""
    number = 0
    for split in SPLITS:
        for name, count in CLASSES.items():
            (tmp_path / 'folders' / split / name).mkdir(parents=True)
            for index in range(count):
                number += 1
                file = tmp_path / 'folders' / split / name / f'{name}_{index}.JPEG'
                noise(number, (40 + index, 32)).save(file, 'JPEG', quality=90)
    return tmp_path / 'folders'


def samples(root, split):
    """Return key, file and class of each image, in an order that mixes the classes."""
    source = FolderSource(root / split)
    order = np.random.default_rng(0).permutation(len(source.labels)).tolist()
    return [(source.paths[index].removesuffix('.JPEG'), source.read(index), int(source.labels[index]))
            for index in order]


def as_tar(root, to):
    for split in SPLITS:
        with tarfile.open(to / f'{split}.tar', 'w') as tar:
            tar.add(root / split, split)


def as_shards(root, to, label='cls'):
    """Write them by the library webdataset, a few in each shard."""
    for split in SPLITS:
        with webdataset.ShardWriter(f'{to}/pets-{split}-%04d.tar', maxcount=5, verbose=0) as writer:
            for key, file, number in samples(root, split):
                labels = {'cls': {'cls': number}, 'json': {'json': {'label': number, 'width': 40}}, 'folder': {}}[label]
                writer.write({'__key__': key if label == 'folder' else key.partition('/')[2], 'jpg': file, **labels})
    if label != 'folder':
        (to / 'classes.txt').write_text(''.join(f'{name}\t{name.title()}\n' for name in CLASSES))


def as_shards_with_json(root, to):
    as_shards(root, to, 'json')


def as_shards_of_folders(root, to):
    as_shards(root, to, 'folder')


def as_shards_in_folders(root, to):
    for split in SPLITS:
        (to / split).mkdir()
        with webdataset.ShardWriter(f'{to}/{split}/%06d.tar', maxcount=4, verbose=0) as writer:
            for key, file, _ in samples(root, split):
                writer.write({'__key__': key, 'jpg': file})


def as_saved_datasets(root, to):
    datasets.DatasetDict({split: as_dataset(root, split) for split in SPLITS}).save_to_disk(str(to))


def as_saved_validation(root, to):
    splits = {'train': as_dataset(root, 'train'), 'validation': as_dataset(root, 'val')}
    datasets.DatasetDict(splits).save_to_disk(str(to))


def as_dataset(root, split):
    rows = sorted(samples(root, split))
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict({
        'image': [{'bytes': file, 'path': None} for _, file, _ in rows], 'label': [number for *_, number in rows],
    }, features=features)


def optimised(row):
    return {'image': row[1], 'label': row[2]}


def words(number):
    return {'text': str(number)}


def optimize(function, rows, to):
    """Write by litdata, which leaves handlers of signals and a variable behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    litdata.optimize(function, rows, str(to), chunk_bytes='8KB', num_workers=1, start_method='fork')
    os.environ.pop('DATA_OPTIMIZER_NUM_WORKERS', None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def as_optimised(root, to):
    for split in SPLITS:
        rows = sorted(samples(root, split))
        optimize(optimised, rows, to / split)
        (to / split / 'classes.txt').write_text('\n'.join(CLASSES))


FORMS = {
    TarSource: [as_tar], ShardSource: [as_shards, as_shards_with_json, as_shards_of_folders, as_shards_in_folders],
    HuggingFaceSource: [as_saved_datasets, as_saved_validation], LitDataSource: [as_optimised]}
EVERY = [(kind, write) for kind, writers in FORMS.items() for write in writers]


@pytest.fixture
def written(folders, tmp_path):
    """Return a function that writes the images in a form, and returns the root."""
    def written(write):
        root = tmp_path / write.__name__
        root.mkdir()
        write(folders, root)
        return root
    return written


@pytest.mark.parametrize(('kind', 'write'), EVERY)
def test_same_images_in_the_same_order(kind, write, folders, written):
    root = written(write)
    for split in SPLITS:
        expected, source = open_split(folders, split), open_split(root, split)
        assert type(source) is kind
        assert source.classes == expected.classes == list(CLASSES)
        np.testing.assert_array_equal(source.labels, expected.labels)
        every = range(len(expected.labels))
        assert [source.read(index) for index in every] == [expected.read(index) for index in every]
        assert len({source.name(index) for index in every}) == len(every)
        assert pickle.loads(pickle.dumps(source)).read(3) == expected.read(3)
        assert open_split(root, split).read(4) == expected.read(4)  # by what was kept of the first time


class Read(Dataset):
    """Images as the loader's workers read them, after the main process has."""

    def __init__(self, source):
        self.source = source
        source.read(2)

    def __len__(self):
        return len(self.source.labels)

    def __getitem__(self, index):
        return self.source.read(index)


@pytest.mark.parametrize(('kind', 'write'), EVERY)
def test_workers_read_the_same(kind, write, folders, written):
    source, expected = open_split(written(write), 'train'), open_split(folders, 'train')
    for _ in range(2):
        loader = DataLoader(Read(source), 3, num_workers=2, collate_fn=list, shuffle=False)
        assert [file for batch in loader for file in batch] == [
            expected.read(index) for index in range(len(expected.labels))]


def trained(root, *options):
    """Train three steps with two workers; return the state and what validation found."""
    fitted = main([
        'fit', '--data=lightning_app.data.ImageNetDataModule', f'--data.root={root}', '--data.batch_size=6',
        '--data.image_size=32', '--data.num_workers=2', '--model.name=se_resnet20_cifar', '--model.optim.lr=0.05',
        '--trainer.max_epochs=1', '--trainer.enable_progress_bar=false', '--trainer.accelerator=cpu',
        '--trainer.logger=false', *options])
    return fitted.model.state_dict(), {name: float(value) for name, value in fitted.trainer.callback_metrics.items()}


LAST = ['--trainer.callbacks=lightning_app.callbacks.LastCheckpoint', '--trainer.callbacks.every_n_steps=1',
        '--trainer.callbacks.keep=9']


@pytest.mark.parametrize('write', [as_tar, as_shards, as_saved_datasets, as_optimised])
def test_same_training_same_metrics_and_exact_resume(write, folders, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = written(write)
    expected = trained(folders, *LAST)
    after_two_of_folders = next(tmp_path.rglob('*step=00000002.ckpt')).rename(tmp_path / 'folders.ckpt')
    found = trained(root, *LAST)
    assert found[1] == expected[1]
    assert all(torch.equal(value, found[0][name]) for name, value in expected[0].items())
    after_two = next(path for path in sorted(tmp_path.rglob('*.ckpt')) if 'step=00000002' in path.name)
    for start in (after_two, after_two_of_folders):
        again = trained(root, f'--ckpt_path={start}')
        assert again[1] == expected[1]
        assert all(torch.equal(value, again[0][name]) for name, value in expected[0].items())


# What people have


def test_classes_of_imagenet_by_the_names_of_its_files(tmp_path, noise):
    """As in the public shards of ImageNet: keys are the names of its files, labels are numbers."""
    file = io.BytesIO()
    noise(0).save(file, 'JPEG')
    with webdataset.ShardWriter(f'{tmp_path}/imagenet1k-validation-%02d.tar', maxcount=2, verbose=0) as writer:
        for key, number in [('n02000000_12', 1), ('n01440764_99', 0), ('n01440764_5', 0)]:
            writer.write({'__key__': key, 'jpg': file.getvalue(), 'cls': number, 'json': {'label': number}})
    source = open_split(tmp_path, 'val')
    assert source.classes == ['n01440764', 'n02000000']
    assert [source.name(index).rpartition(':')[2] for index in range(3)] == [
        'n01440764_5.jpg', 'n01440764_99.jpg', 'n02000000_12.jpg']


@pytest.fixture
def numbered(tmp_path, noise):
    """Return a function that writes shards of a split, from keys and numbers."""
    def write(split, *samples):
        with webdataset.ShardWriter(f'{tmp_path}/imagenet1k-{split}-%02d.tar', maxcount=2, verbose=0) as writer:
            for index, (key, number) in enumerate(samples):
                file = io.BytesIO()
                noise(index).save(file, 'JPEG')
                writer.write({'__key__': key, 'jpg': file.getvalue(), 'cls': number})
    return write


TRAINING = [('n02000000_12', 7), ('n01440764_99', 0), ('n01440764_5', 0), ('n01500000_1', 3)]
NUMBERED = [('ILSVRC2012_val_00000001', 7), ('ILSVRC2012_val_00000002', 0)]


@pytest.mark.parametrize('named', ['train', 'validation'])
def test_classes_that_only_one_split_has_names_for(numbered, tmp_path, named):
    """As in the public shards of ImageNet, whose validation images are called ILSVRC2012_val_00000001 and so on."""
    unnamed = [(f'image{index}', number) for index, (_, number) in enumerate(TRAINING)]
    numbered('train', *(TRAINING if named == 'train' else unnamed))
    numbered('validation', *(NUMBERED if named == 'train' else [('n02000000_3', 7), ('n01440764_4', 0)]))
    datamodule = ImageNetDataModule(root=str(tmp_path))
    source = datamodule.open('val')
    assert source.classes == datamodule.class_names == (
        ['n01440764', 'n01500000', 'n02000000'] if named == 'train' else ['0', '3', '7'])
    assert sorted(source.labels) == [0, 2]
    alone = ImageNetDataModule(root=str(tmp_path))
    alone.use_classes(datamodule.class_names)  # of a checkpoint
    np.testing.assert_array_equal(alone.open('val').labels, source.labels)


@pytest.mark.parametrize('commands', [['[train,val]'], ['[train]', '[val]'], ['[val]', '[val]'], ['[val,train]']])
def test_shards_are_made_of_shards_that_name_classes_in_one_split(numbered, tmp_path, commands):
    numbered('train', *TRAINING)
    numbered('validation', *NUMBERED, ('ILSVRC2012_val_00000003', 3))
    for splits in commands:
        main(['prepare', f'--root={tmp_path}', f'--output={tmp_path}/made', f'--splits={splits}'])
    expected, made = (ImageNetDataModule(root=str(root)).open('val') for root in (tmp_path, tmp_path / 'made'))
    assert made.classes == expected.classes == ['n01440764', 'n01500000', 'n02000000']
    # in the order of their keys, to which the class belongs now
    assert [(made.labels[index], made.read(index)) for index in range(3)] == [
        (expected.labels[index], expected.read(index)) for index in range(3)]


def test_numbers_have_names_from_a_split_that_numbers_them(numbered, tmp_path, write_images):
    """Though the classes of the first split are in another order."""
    write_images(tmp_path / 'train', {'n01440764': 1, 'n01500000': 1, 'n02000000': 1})
    numbered('val', ('n02000000_1', 0), ('n01440764_1', 1))
    numbered('test', ('x', 1), ('y', 0))
    main(['prepare', f'--root={tmp_path}', f'--output={tmp_path}/made', '--splits=[train]'])
    main(['prepare', f'--root={tmp_path}', f'--output={tmp_path}/made', '--splits=[val,test]'])
    for split in ('val', 'test'):
        made = ImageNetDataModule(root=str(tmp_path / 'made'), val_split=split).open('val')
        assert [made.classes[label] for label in made.labels] == ['n01440764', 'n02000000']


def test_numbers_are_not_taken_for_names_that_are_digits(numbered, tmp_path):
    for split, samples in (('train', [('a', 0), ('b', 1), ('c', 2)]), ('val', [('d', 0), ('e', 2)])):
        numbered(split, *samples)
        (tmp_path / split).mkdir()
        for index, shard in enumerate(sorted(tmp_path.glob(f'imagenet1k-{split}-*.tar'))):
            shard.rename(tmp_path / split / f'{index}.tar')
    (tmp_path / 'train' / 'classes.txt').write_text('1\n2\n0\n')
    source = ImageNetDataModule(root=str(tmp_path)).open('val')
    assert source.classes == ['1', '2', '0']
    assert list(source.labels) == [0, 2]


def test_number_that_training_lacks(numbered, tmp_path, refused):
    numbered('train', *TRAINING)
    numbered('validation', *NUMBERED, ('ILSVRC2012_val_00000003', 5))
    with refused('class 5 in val', 'training images have 3 classes', 'remove it'):
        ImageNetDataModule(root=str(tmp_path)).open('val')


def test_numbers_are_not_taken_for_those_of_folders(numbered, tmp_path, refused, write_images):
    write_images(tmp_path / 'train', {'n01440764': 1, 'n01500000': 1})
    numbered('val', ('a', 0), ('b', 1))
    with refused('class 0 in val, and 1 more', 'training images have 2 classes', 'classes.txt'):
        ImageNetDataModule(root=str(tmp_path)).open('val')


def test_numbers_are_names_where_there_are_no_others(tmp_path, noise):
    file = io.BytesIO()
    noise(0).save(file, 'PNG')
    with webdataset.ShardWriter(f'{tmp_path}/train-%02d.tar', verbose=0) as writer:
        for number in (10, 2, 0):
            writer.write({'__key__': f'image{number}', 'png': file.getvalue(), 'cls': number})
    source = open_split(tmp_path, 'train')
    assert source.classes == ['0', '2', '10']
    assert source.load(1).size == noise(0).size


def test_split_with_a_slash_behind_it(folders):
    # as a shell completes the name of a folder
    assert list(open_split(folders, 'train/').paths) == list(open_split(folders, 'train').paths)


def test_more_shards_than_may_be_open(folders, written, monkeypatch):
    monkeypatch.setattr(tars, 'OPEN_FILES', 2)
    source, expected = open_split(written(as_shards), 'train'), open_split(folders, 'train')
    assert len(source.paths_of_shards) == 4
    for _ in range(2):
        assert [source.read(index) for index in range(18)] == [expected.read(index) for index in range(18)]
    assert len(source._tars._open) == 2


def test_shards_by_a_pattern(written):
    root = written(as_shards)
    assert list(open_split(root, 'pets-train-{0000..0001}.tar').labels) != list(open_split(root, 'train').labels)
    assert len(open_split(root, 'pets-train-{0000..0001}.tar').labels) == 10
    assert len(open_split(root, 'pets-*-0000.tar').labels) == 10
    (root / '._pets-train-0000.tar').write_bytes(b'of macOS')
    assert len(open_split(root, '*-train-0000.tar').labels) == 5
    assert expanded('{0..1}-{08..10}') == ['0-08', '0-09', '0-10', '1-08', '1-09', '1-10']


@pytest.mark.parametrize(('names', 'missing'), [
    (['a-00.tar', 'a-02.tar', 'b-1.tar'], ['a-01.tar']), (['a-0.tar', 'a-1.tar'], []), (['train.tar'], []),
    (['a-1.tar', 'a-2.tar'], []), (['x-1715400000.tar'], []),  # numbered from one, and by a date
    (['x-00-of-04.tar', 'x-01-of-04.tar', 'x-03-of-04.tar'], ['x-02-of-04.tar']),
    (['x-00-of-04.tar', 'x-01-of-04.tar'], ['x-02-of-04.tar', 'x-03-of-04.tar']),  # its end
    (['x-1-of-4.tar', 'x-2-of-4.tar', 'x-4-of-4.tar'], ['x-3-of-4.tar']), (['x-1-of-2.tar', 'x-2-of-2.tar'], []),
    (['a-0000.tar', 'a-0004.tar'], ['a-0001.tar', 'a-0002.tar', 'a-0003.tar']), (['a-0.tar', 'a-9.tar'], []),
    (['a-02.tar', 'a-03.tar'], ['a-01.tar']), (['a-1.tar', 'a-5.tar'], ['a-2.tar', 'a-3.tar', 'a-4.tar']),
    (['a-0049281734.tar'], [])])
def test_shards_that_a_series_lacks(names, missing):
    assert missing_shards(names) == missing


def test_a_hole_in_the_series_is_told(written):
    root = written(as_shards)
    (root / 'pets-train-0001.tar').unlink()
    with pytest.warns(UserWarning, match='1 shards are missing by their numbers.*pets-train-0001.tar'):
        assert len(open_split(root, 'train').labels) == 13


def test_a_changed_shard_is_looked_at_again(written, folders):
    root = written(as_shards)
    assert len(open_split(root, 'train').labels) == 18
    (root / 'pets-train-0003.tar').unlink()
    (root / 'pets-train-0002.tar').rename(root / 'pets-train-0003.tar')
    (root / 'pets-train-0001.tar').rename(root / 'pets-train-0002.tar')
    (root / 'pets-train-0000.tar').rename(root / 'pets-train-0001.tar')
    source = open_split(root, 'train')
    assert len(source.labels) == 15
    assert all(Image.open(io.BytesIO(source.read(index))) for index in range(15))


def test_a_file_that_was_written_anew_is_looked_at_again(tmp_path, monkeypatch):
    """Though it is as large as before."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    file, looked_at = tmp_path / 'file', []

    def find():
        looked_at.append(file.read_bytes())
        return {'count': np.array(len(looked_at))}

    for content, time_of_change, count in ((b'one', 0, 1), (b'one', 0, 1), (b'two', 60, 2)):
        file.write_bytes(content)
        os.utime(file, (time_of_change, time_of_change))
        assert cached_arrays('kind', [str(file)], find)['count'] == count
    assert looked_at == [b'one', b'two']


def test_same_images_from_an_object_store(folders, written, tmp_path, monkeypatch):
    """By fsspec, as from s3:// and gs://: copied once."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    expected = FolderSource(folders / 'train')
    for write in (as_tar, as_shards, as_shards_in_folders, as_saved_datasets, as_optimised):
        url = f'memory://bucket/{write.__name__}'
        store, path = object_store.connected(url, 'root')
        store.put(f'{written(write)}/', path, recursive=True)
        source = open_split(url, 'train')
        assert source.classes == expected.classes
        assert [source.read(index) for index in range(18)] == [expected.read(index) for index in range(18)]
        assert has_split(url, 'val')
        assert not has_split(url, 'vala')
    copied = {path: path.stat().st_mtime_ns for path in (tmp_path / 'cache').rglob('copies/*/pets-*.tar')}
    assert {path.name[:10] for path in copied} == {'pets-train'}  # not what no one asked for
    open_split('memory://bucket/as_shards', 'train')
    assert copied == {path: path.stat().st_mtime_ns for path in copied}
    next(iter(copied)).write_bytes(b'cut off')
    assert open_split('memory://bucket/as_shards', 'train').read(17) == expected.read(17)


@pytest.fixture
def bucket(folders, written, tmp_path, monkeypatch):
    """Return a function that puts a form of the images into a store, and gives its URL, the store, and a path."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    number = itertools.count()

    def put(write=None):
        url = f'memory://bucket{next(number)}-{tmp_path.name}/pets'
        store, path = object_store.connected(url, 'root')
        store.put(f'{written(write) if write else folders}/', path, recursive=True)
        return url, store, path
    return put


def rewrite(store, file, content):
    """Put other content where a file was, an hour later."""
    store.pipe(file, content)
    store.store[file].created += timedelta(hours=1)


def test_copies_follow_the_store(bucket, monkeypatch):
    """What was written anew is fetched again, of the same size as well; what is gone is gone here."""
    url, store, path = bucket()
    before = open_split(url, 'train')
    changed, gone, *_ = store.find(f'{path}/train')
    content = store.cat(changed)[:-1] + b'!'
    rewrite(store, changed, content)
    store.rm(gone)
    fetched = []
    original = type(store).get_file
    monkeypatch.setattr(type(store), 'get_file', lambda self, file, *args, **options: (
        fetched.append(file), original(self, file, *args, **options)))
    after = open_split(url, 'train')
    assert fetched == [changed]
    assert list(after.paths) == [name for name in before.paths if not gone.endswith(name)]
    assert len(after.paths) == len(before.paths) - 1
    assert after.read(0) == content
    store.mv(f'{path}/train/cat', f'{path}/train/yak', recursive=True)
    assert open_split(url, 'train').classes == ['dog', 'eel', 'yak']


def test_copies_of_a_url_with_a_slash_behind_it_are_the_same(bucket):
    url, _, _ = bucket()
    assert open_split(f'{url}/', 'train').file(0) == open_split(url, 'train').file(0)


def test_copies_follow_shards_of_the_same_size(bucket):
    url, store, path = bucket(as_shards)
    before = open_split(url, 'train')
    shard = f'{path}/{os.path.basename(before.file(0))}'
    rewrite(store, shard, store.cat(shard).replace(before.read(0), before.read(0)[:-1] + b'!'))
    assert open_split(url, 'train').read(0) == before.read(0)[:-1] + b'!'


def test_copies_stay_where_the_store_does_not_answer(bucket, refused, monkeypatch):
    """A listing that fails is no empty folder."""
    url, store, _ = bucket()
    expected = list(open_split(url, 'train').paths)
    original = type(store).ls

    def ls(self, place, **options):
        if place.endswith('train/dog'):
            raise ConnectionResetError('Connection reset by peer')
        return original(self, place, **options)

    with monkeypatch.context() as broken:
        broken.setattr(type(store), 'ls', ls)
        with refused(f'data.root: {url}', 'ConnectionResetError: Connection reset by peer', 'see '):
            open_split(url, 'train')
    copies = list((Path(os.environ['XDG_CACHE_HOME']) / 'se_timm' / 'copies').rglob('train/*/*'))
    assert sorted('/'.join(file.parts[-2:]) for file in copies) == expected


def test_what_is_called_as_before_and_is_something_else(bucket):
    """A file where a folder was, and the reverse; names of classes that are gone."""
    url, store, path = bucket(as_shards)
    assert open_split(url, 'train').classes == list(CLASSES)
    store.rm(f'{path}/classes.txt')
    assert open_split(url, 'train').classes == ['0', '1', '2']
    url, store, path = bucket()
    place = f'{path}/train/cat/x.JPEG'
    file = store.cat(store.find(f'{path}/train/cat')[0])
    for name in (place, f'{place}/0.JPEG', place):
        store.pipe(name, file)
        source = open_split(url, 'train')
        assert [each for each in source.paths if 'x.JPEG' in each] == [name.removeprefix(f'{path}/train/')]
        store.rm(place, recursive=True)


def test_links_in_a_store(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (folders / 'train' / 'yak').symlink_to(folders / 'train' / 'cat')
    (folders / 'test').symlink_to(folders / 'val')
    for split in ('train', 'test'):
        source, expected = open_split(f'file://{folders}', split), open_split(folders, split)
        assert source.classes == expected.classes
        assert list(source.paths) == list(expected.paths)


def test_the_top_of_a_store(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    store, _ = object_store.connected('memory://', 'root')
    before = store.ls('', detail=False)
    store.put(f'{folders}/train/', '/top-train', recursive=True)
    assert open_split('memory://', 'top-train').classes == list(CLASSES)
    assert {path.name for path in (tmp_path / 'cache' / 'se_timm').iterdir()} <= {'copies', 'shards', 'copies.lock'}
    store.rm('/top-train', recursive=True)
    assert store.ls('', detail=False) == before


@pytest.mark.parametrize('split', ['train', 'pets-train-*.tar', 'pets-train-{0000..0003}.tar'])
@pytest.mark.parametrize('is_stored', [False, True], ids=['disk', 'store'])
def test_splits_further_below(split, is_stored, bucket, written, refused):
    """With the names of classes that lie beside them."""
    root, _, below = (bucket(as_shards)[0] if is_stored else str(written(as_shards))).rpartition('/')
    source = open_split(root, f'{below}/{split}')
    assert source.classes == list(CLASSES)
    assert list(source.paths) == list(open_split(f'{root}/{below}', 'train').paths)
    with refused(f'data.root: {root}/{below}', 'holds neither pets-tain/ nor', 'it holds: classes.txt'):
        open_split(root, f'{below}/pets-tain')


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return a function that lets a web server have a folder, and returns its URL."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    servers = []

    def served(root, handler=SimpleHTTPRequestHandler):
        server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(root)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{server.server_port}'

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


def test_copies_from_a_web_server(written, served):
    """It says no time in a list, and of a file no size."""
    root = written(as_tar)
    url = served(root)
    assert len(open_split(url, 'val').labels) == 18
    shutil.copy(root / 'train.tar', root / 'val.tar')
    with open(root / 'val.tar', 'ab') as file:
        file.write(bytes(10240))
    copy = Path(open_split(url, 'val').file(0))
    assert copy.read_bytes() == (root / 'val.tar').read_bytes()


def test_names_on_a_web_server_are_those_of_the_files(tmp_path, served, write_images):
    root = write_images(tmp_path / 'web' / 'train', {'golden retriever': 2, 'été': 1, '100%25': 1})
    source = open_split(served(tmp_path / 'web'), 'train')
    assert source.classes == FolderSource(root).classes
    assert [source.read(index) for index in range(4)] == [FolderSource(root).read(index) for index in range(4)]


class Sorting(SimpleHTTPRequestHandler):
    """Lists folders with links that sort the list, as Apache does."""

    def list_directory(self, path):
        names = ['?C=N;O=D', '?C=M;O=A', *(f'{each.name}{"/" * each.is_dir()}' for each in Path(path).iterdir())]
        content = ''.join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        return io.BytesIO(content)


def test_links_that_sort_the_list_of_a_web_server_are_no_files(tmp_path, served, write_images):
    write_images(tmp_path / 'web' / 'train', {'cat': 2})
    source = open_split(served(tmp_path / 'web', Sorting), 'train')
    assert len(source.paths) == 2
    assert sum(each.is_file() for each in Path(source.file(0)).parents[2].rglob('*')) == 2


@pytest.mark.parametrize(('entry', 'expected'), [
    ({'size': 3, 'LastModified': datetime(2026, 1, 2, tzinfo=timezone.utc), 'mtime': 'x'}, (3, 1767312000)),
    ({'size': 3, 'last_modified': datetime(2026, 1, 2)}, (3, 1767312000)),  # of no time zone
    ({'size': None, 'mtime': 12.75, 'created': 5.0}, (None, 12)), ({'name': 'x'}, (None, None))])
def test_what_stores_say_of_a_file(entry, expected):
    assert object_store.Stored.of(entry) == expected


# What is wrong with them


@pytest.mark.parametrize(('url', 'why'), [
    ('memory://bucket/nothing-here', 'FileNotFoundError'), ('s4://bucket/x', 'it cannot be opened'),
    ('http://127.0.0.1:9/imagenet', 'it cannot be had')])
def test_object_store_out_of_reach(url, why, refused):
    with refused(f'data.root: {url}', why, 'see '):
        open_split(url, 'train')


def test_file_of_a_web_server_that_has_changed(written, served):
    """Not in its size."""
    root = written(as_tar)
    url = served(root)
    if 'Last-Modified' not in object_store.connected(url, '')[0].info(f'{url}/train.tar'):
        pytest.skip('this fsspec does not tell')
    before = open_split(url, 'train').read(0)
    content = (root / 'train.tar').read_bytes()
    (root / 'train.tar').write_bytes(content.replace(before, before[:-1] + b'!'))
    os.utime(root / 'train.tar', (time.time() - 3600,) * 2)
    assert open_split(url, 'train').read(0) == before  # the copy is younger
    os.utime(root / 'train.tar', (time.time() + 60,) * 2)
    assert open_split(url, 'train').read(0) == before[:-1] + b'!'


def test_object_store_without_the_split(written, refused):
    store, path = object_store.connected('memory://shop', 'root')
    store.put(f'{written(as_tar)}/', path, recursive=True)
    with refused('data.root: memory://shop', 'holds neither tain/ nor tain.tar', 'did you mean train.tar?'):
        open_split('memory://shop', 'tain')


def test_shards_where_nothing_can_be_kept(written, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
    assert len(open_split(written(as_shards), 'train').labels) == 18


def test_a_shard_that_was_named_is_missing(written, refused):
    root = written(as_shards)
    with refused('shards: pets-train-{0002..0005}.tar', '2 of 4 are missing: pets-train-0004.tar', 'did you mean'):
        open_split(root, 'pets-train-{0002..0005}.tar')


@pytest.mark.parametrize('name', ['lost+found', '__MACOSX', '.cache'])
def test_shards_beside_a_folder_of_the_system(name, written):
    root = written(as_shards)
    expected = open_split(root, 'train')
    (root / 'train' / name).mkdir(parents=True)
    for path in root.glob('pets-train-*.tar'):
        path.rename(root / 'train' / path.name)
    (root / 'train' / '._pets-train-0000.tar').write_bytes(b'of macOS')
    source = open_split(root, 'train')
    assert list(source.labels) == list(expected.labels)


def test_shard_that_is_cut_off(written, refused):
    root = written(as_shards)
    with open(root / 'pets-train-0001.tar', 'r+b') as file:
        file.truncate(3000)
    with refused(f'tar file: {root}/pets-train-0001.tar', 'cannot be read', 'make it anew'):
        open_split(root, 'train')


def test_shard_that_is_lost_during_a_training(written):
    source = open_split(written(as_shards), 'train')
    for path in source.paths_of_shards:
        os.unlink(path)
    with pytest.raises(FileNotFoundError, match='pets-train-0'):
        source.read(0)


def test_sample_without_a_label(tmp_path, noise, refused):
    file = io.BytesIO()
    noise(0).save(file, 'JPEG')
    with webdataset.ShardWriter(f'{tmp_path}/train-%02d.tar', verbose=0) as writer:
        writer.write({'__key__': 'one', 'jpg': file.getvalue(), 'cls': 1})
        writer.write({'__key__': 'two', 'jpg': file.getvalue(), 'json': {'class': 1}})
    with refused(f'sample: {tmp_path}/train-00.tar:two.jpg', 'it has no label', 'lightning_app prepare'):
        open_split(tmp_path, 'train')


def test_samples_without_an_image_are_told(tmp_path, noise):
    file = io.BytesIO()
    noise(0).save(file, 'JPEG')
    with webdataset.ShardWriter(f'{tmp_path}/train-%02d.tar', verbose=0) as writer:
        writer.write({'__key__': 'one', 'jpg': file.getvalue(), 'cls': 1})
        writer.write({'__key__': 'two', 'txt': 'words', 'cls': 1})
    with pytest.warns(UserWarning, match='1 samples have no image and are left out: two'):
        assert len(open_split(tmp_path, 'train').labels) == 1


def test_names_of_classes_that_do_not_suffice(written, refused):
    root = written(as_shards)
    (root / 'classes.txt').write_text('cat\ndog\n')
    with refused('classes.txt: 2 lines', 'there is a class 2', 'a name a line'):
        open_split(root, 'train')


def write_shard(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(('members', 'what', 'why'), [
    ({'x/0.jpg': b'0', 'x/0.cls': b'dog'}, 'train-0.tar:x/0.cls', "its label is 'dog', and no whole number"),
    ({'0.jpg': b'0', '0.cls': b'-1'}, 'train-0.tar:0.cls', 'its label is -1'),
    ({'0.jpg': b'0', '0.cls': b'\xff'}, 'train-0.tar:0.cls', 'and no whole number from 0'),
    ({'0.jpg': b'0', '0.json': b'{"label": true}'}, 'train-0.tar:0.json', 'its label is True'),
    ({'0.jpg': b'0', '0.json': b'{"label": 1.7}'}, 'train-0.tar:0.json', 'its label is 1.7'),
    ({'a/1.0.jpg': b'0', 'a/1.5.jpg': b'1'}, 'train-0.tar:a/1', 'several images have this key: a/1.0.jpg, a/1.5.jpg'),
])
def test_samples_that_would_be_lost_or_mistaken(tmp_path, members, what, why, refused):
    write_shard(tmp_path / 'train-0.tar', members)
    with refused(what, why, ''):
        open_split(tmp_path, 'train')


@pytest.mark.parametrize('stray', [{}, {'imgs/montage.jpg': b'?'}, {'montage.jpg': b'?'}])
def test_folder_around_the_classes_is_no_class(tmp_path, stray):
    """Though a shard holds one class alone."""
    write_shard(tmp_path / 'train-0.tar', {'imgs/a/1.jpg': b'1', 'imgs/b/2.jpg': b'2'})
    write_shard(tmp_path / 'train-1.tar', {'imgs/c/3.jpg': b'3', 'imgs/c/sub/4.jpg': b'4', **stray})
    with pytest.warns(UserWarning, match='1 images lie above.*montage') if stray else nullcontext():
        source = open_split(tmp_path, 'train')
    assert source.classes == ['a', 'b', 'c']
    assert [(source.labels[index], source.read(index)) for index in range(len(source.labels))] == [
        (0, b'1'), (1, b'2'), (2, b'3'), (2, b'4')]


@pytest.mark.parametrize('prefix', ['', 'imgs/'])
def test_shards_of_a_single_class(tmp_path, prefix):
    write_shard(tmp_path / 'train-0.tar', {f'{prefix}a/1.jpg': b'1', f'{prefix}a/2.jpg': b'2'})
    assert open_split(tmp_path, 'train').classes == ['a']


def test_single_class_with_as_many_images_in_a_folder(tmp_path):
    write_shard(tmp_path / 'train-0.tar', {'a/1.jpg': b'1', 'a/sub/2.jpg': b'2'})
    assert open_split(tmp_path, 'train').classes == ['a']


@pytest.mark.parametrize(('members', 'image', 'classes'), [
    ({'0.jpg': b'0', '0.cls': b'2', '0.json': b'{"label": 5}'}, b'0', ['2']),
    ({'0.bmp': b'?', '0.jpg': b'0', '0.cls': b'2'}, b'0', ['2']),
    ({'._0.jpg': b'of macOS', '._0.cls': b'?', '0.jpg': b'0', '0.cls': b'2'}, b'0', ['2']),
    # names as of ImageNet: of two classes the same, or of one class several
    ({'n01440764_1.jpg': b'0', 'n01440764_1.cls': b'0', 'n01440764_2.jpg': b'1', 'n01440764_2.cls': b'1'}, b'0',
     ['0', '1']),
    ({'n01440764_1.jpg': b'0', 'n01440764_1.cls': b'0', 'n01443537_1.jpg': b'1', 'n01443537_1.cls': b'0'}, b'0',
     ['0'])])
def test_which_file_is_the_image_and_which_the_class(tmp_path, members, image, classes):
    write_shard(tmp_path / 'train-0.tar', members)
    source = open_split(tmp_path, 'train')
    assert (source.read(0), source.classes) == (image, classes)


LABELLED = {f'train/{number}.{kind}': b'3' for number in range(3) for kind in ('jpg', 'cls')}


@pytest.mark.parametrize(('members', 'what', 'why'), [
    ({**LABELLED, 'train/9.jpg': b'9'}, 'train-0.tar:train/9.jpg', 'no label in KEY.cls or KEY.json, and 3 images'),
    ({**LABELLED, **{f'a/{number}.jpg': b'9' for number in range(4)}}, 'train-0.tar:train/0.jpg',
     'its label is 3, and 4 images have none')])
def test_some_samples_with_a_number_and_others_without(tmp_path, members, what, why, refused):
    write_shard(tmp_path / 'train-0.tar', members)
    with refused(what, why, 'lightning_app prepare'):
        open_split(tmp_path, 'train')


def test_image_and_not_its_mask(tmp_path):
    write_shard(tmp_path / 'train-0.tar', {'2.seg.png': b'mask', '2.jpg': b'image', '2.cls': b'0'})
    assert open_split(tmp_path, 'train').read(0) == b'image'


def test_folders_with_a_stray_file_are_no_shard(tmp_path):
    write_shard(tmp_path / 'train.tar', {'train/a/1.jpg': b'1', 'train/b/2.jpg': b'2', 'train/meta.json': b'{}'})
    assert open_split(tmp_path, 'train').classes == ['a', 'b']


def test_class_folders_beside_an_archive_are_folders(folders):
    write_shard(folders / 'train' / 'cat.tar', {'1.jpg': b''})
    assert type(open_split(folders, 'train')) is FolderSource


def test_labels_with_zeros_in_front(tmp_path):
    write_shard(tmp_path / 'train-0.tar', {
        '0.jpg': b'0', '0.cls': b'00000', '1.jpg': b'1', '1.cls': b'010\n', '2.jpg': b'2', '2.json': b'{"label": 2}'})
    assert open_split(tmp_path, 'train').classes == ['0', '2', '10']


@pytest.mark.parametrize('content', [b'[1, 2]', b'{"class": 1}', b'"a caption"', b'null', b'no JSON'])
def test_json_of_something_else_beside_class_folders(tmp_path, content):
    write_shard(tmp_path / 'train-0.tar', {
        f'{name}/1.{kind}': content for name in ('cat', 'dog') for kind in ('jpg', 'json')})
    assert open_split(tmp_path, 'train').classes == ['cat', 'dog']


def test_names_of_many_classes_with_a_mark_in_front(tmp_path):
    """Which some programs write, to say that the file is UTF-8."""
    (tmp_path / 'classes.txt').write_text('\n'.join(f'n{number}\tname' for number in range(21841)), 'utf-8-sig')
    start = time.perf_counter()
    assert named(['0', *map(str, range(2, 21841))], tmp_path / 'classes.txt')[:2] == ['n0', 'n2']
    assert time.perf_counter() - start < 1  # as their square it is 13 s


def test_two_classes_of_one_name(written, refused):
    root = written(as_shards)
    (root / 'classes.txt').write_text('crane\nhen\ncrane\n')
    with refused('classes.txt: crane', 'two classes have this name', 'crane 2'):
        open_split(root, 'train')


def test_optimised_set_is_whole_in_each_process(written):
    """litdata's own length is the share of a process."""
    root = written(as_optimised)
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=2)
    try:
        assert len(open_split(root, 'train').labels) == 18
    finally:
        torch.distributed.destroy_process_group()


def unlabelled(row):
    return {'image': row[1], 'label': -1 if row[0] == 'eel/eel_2' else row[2]}


def test_optimised_set_without_some_labels(folders, tmp_path, refused):
    """They are no last class."""
    optimize(unlabelled, samples(folders, 'train'), tmp_path / 'train')
    with refused(f'data.root: {tmp_path}/train', 'some of its labels are missing', 'test splits often have none'):
        open_split(tmp_path, 'train')


def test_optimised_set_that_lacks_a_file(written, refused):
    root = written(as_optimised)
    (root / 'train' / 'chunk-0-1.bin').unlink()
    with refused(f'data.root: {root}/train', 'files with samples are missing: chunk-0-1.bin', 'copy'):
        open_split(root, 'train')


@pytest.mark.parametrize('content', ['{"files": []}', '[]', '{"chunks"', b'\xff\xfe'])
def test_index_of_something_else_beside_class_folders(folders, content):
    (folders / 'train' / 'index.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    assert type(open_split(folders, 'train')) is FolderSource


def test_class_among_other_numbers():
    assert keys_of({'index': 7, 'image': b'', 'class': 3}, '') == ('image', 'class')


def test_several_numbers_and_no_class(refused):
    with refused('data.root: here', 'index, image, width', 'FILE AS BYTES'):
        keys_of({'index': 7, 'image': b'', 'width': 3}, 'here')


def as_numpy(row):
    return {'id': row[0].encode(), 'image': row[1], 'label': np.int64(row[2])}


def test_labels_that_are_numbers_of_numpy(folders, tmp_path):
    optimize(as_numpy, samples(folders, 'train'), tmp_path / 'train')
    source = LitDataSource(tmp_path / 'train')
    for index, (_, file, label) in enumerate(samples(folders, 'train')):
        assert (source.read(index), source.labels[index]) == (file, label)


def test_labels_of_files_that_were_replaced(folders, tmp_path):
    rows = samples(folders, 'train')
    optimize(optimised, rows, tmp_path / 'train')
    first = LitDataSource(tmp_path / 'train').labels.tolist()
    optimize(optimised, [(key, file, 2 - label) for key, file, label in rows], tmp_path / 'other')
    for chunk in (tmp_path / 'other').glob('chunk*'):
        chunk.replace(tmp_path / 'train' / chunk.name)
    assert LitDataSource(tmp_path / 'train').labels.tolist() == [2 - label for label in first]


@pytest.mark.parametrize(('pixels', 'said'), [
    (np.full((4, 4, 3), 60.0), 'float64'), (np.zeros((3, 5, 5), np.uint8), '(3, 5, 5)'),
    (np.zeros((4, 4, 3), np.int64), 'int64')])
def test_arrays_that_are_no_images(pixels, said, refused):
    with refused('data.root: here', said, 'uint8'):
        check_pixels(pixels, 'here')
    check_pixels(np.ones((4, 4, 3), np.float32), 'here')
    check_pixels(torch.zeros(3, 4, 4), 'here')


def as_numbered_shards_in_folders(root, to):
    as_shards(root, to)
    for split in SPLITS:
        (to / split).mkdir()
        for path in to.glob(f'pets-{split}-*.tar'):
            path.rename(to / split / path.name)
        shutil.copy(to / 'classes.txt', to / split)


@pytest.mark.parametrize('write', [as_numbered_shards_in_folders, as_optimised])
def test_names_of_classes_beside_the_splits(write, folders, tmp_path):
    """Once for all, and not in each; where each has its own, these count."""
    write(folders, tmp_path)
    (tmp_path / 'classes.txt').write_text('a\nb\nc\n')
    assert open_split(tmp_path, 'val').classes == list(CLASSES)
    for split in SPLITS:
        (tmp_path / split / 'classes.txt').unlink()
    assert open_split(tmp_path, 'val').classes == ['a', 'b', 'c']


def test_classes_of_optimised_samples_are_those_there_are(tmp_path):
    """As of shards: a number without images is no class."""
    for split, numbers in (('train', [5, 2, 9, 2]), ('val', [9, 2])):
        optimize(optimised, [('', b'image', number) for number in numbers], tmp_path / split)
    data = ImageNetDataModule(root=str(tmp_path), batch_size=2)
    assert (data.class_names, data.open('train').labels.tolist()) == (['2', '5', '9'], [1, 0, 2, 0])
    assert data.open('val').labels.tolist() == [2, 0]
    (tmp_path / 'classes.txt').write_text('\n'.join('abcdefghij'))
    named = ImageNetDataModule(root=str(tmp_path), batch_size=2)
    assert named.class_names == ['c', 'f', 'j']
    named = ImageNetDataModule(root=str(tmp_path), batch_size=2)
    named.use_classes(['2', '5', '9'])  # of a checkpoint of before they had names
    assert named.open('val').labels.tolist() == [2, 0]


def test_class_column_of_several(folders, tmp_path, refused):
    rows = as_dataset(folders, 'train')
    kind = [label % 2 for label in rows['label']]
    both = rows.add_column('kind', kind).cast_column('kind', datasets.ClassLabel(names=['pet', 'fish']))
    both = both.select_columns(['image', 'kind', 'label'])
    assert HuggingFaceSource(both, 'here').classes == list(CLASSES)
    both = both.rename_column('label', 'species')
    with refused('data set: here', 'several columns of class labels: kind, species', 'say which by label_column'):
        HuggingFaceSource(both, 'here')
    with refused('label_column: sort', 'here has kind, species of class labels', 'cast the column'):
        HuggingFaceSource(both, 'here', 'sort')
    datasets.DatasetDict(train=both, val=both).save_to_disk(str(tmp_path / 'set'))
    both.to_parquet(tmp_path / 'hub' / 'train.parquet')
    both.to_parquet(tmp_path / 'hub' / 'validation.parquet')
    for root in (tmp_path / 'set', f'hf://{tmp_path}/hub'):
        named = ImageNetDataModule(root=str(root), batch_size=2, image_size=32, num_workers=0, label_column='kind')
        named.setup('fit')
        assert named.class_names == ['pet', 'fish']
        assert named.settings()['init_args']['label_column'] == 'kind'  # a checkpoint has it
    main(['prepare', '--root', str(tmp_path / 'set'), '--output', str(tmp_path / 'shards'), '--label_column=species'])
    assert open_split(tmp_path / 'shards', 'val').classes == list(CLASSES)
    with refused('label_column: kind', 'no data set of Hugging Face', 'leave it out'):
        open_split(folders, 'train', label_column='kind')


@pytest.mark.parametrize(('names', 'split', 'expected'), [
    (['val-0000.tar', 'val-v2-0000.tar', 'val-v2-0001.tar'], 'val', ['val-0000.tar']),
    (['val-0000.tar', 'val-v2-0000.tar'], 'val-v2', ['val-v2-0000.tar']),
    (['imagenet-train-val-0000.tar'], 'train', []), (['imagenet-train-val-0.tar'], 'val', ['imagenet-train-val-0.tar']),
    (['._train-0000.tar', 'train-0000.tar'], 'train', ['train-0000.tar']),
    (['._x-train-0.tar', 'x-train-0.tar'], 'train', ['x-train-0.tar']),
    (['train-00000-of-00002.tar', 'x.tar'], 'train', ['train-00000-of-00002.tar']),
    (['net1k-train-0.tar', 'train_9.tar'], 'train', ['train_9.tar']),
    (['im-train.tar', 'im-train-0000.tar'], 'train', ['im-train-0000.tar']),
    *((names, 'train', names) for names in (
        ['train-shard-01.tar', 'train-shard-02.tar'],
        ['train-00000042.tar', 'train-0000abcd.tar', 'train-fadedcab.tar'],
        ['train-00a.tar', 'train-010.tar'], ['train-00000-of-00002-a1b2c3d4.tar', 'train-00001-of-00002-9.tar'],
        ['train-000000-000999.tar', 'train-001000-001999.tar'], ['x-train-0-00000.tar', 'x-train-1-00000.tar'],
        ['train_rank0_000.tar', 'train_rank1_000.tar'], ['train-aa.tar', 'train-ab.tar'], ['train-0000.224.tar'],
        ['train-0000_images.tar', 'train-0001_images.tar'], ['test-set-train-part-0001.tar'])),
    (['train2-0.tar', 'pretrain-0.tar'], 'train', [])])
@pytest.mark.filterwarnings('ignore:shards. val')
def test_shards_of_a_split(names, split, expected):
    assert shards_of(names, split) == expected


def test_shards_that_are_not_taken_are_told():
    with pytest.warns(UserWarning, match='1 are taken.*val_256.tar, and 1 others are not, such as val_large.tar; val-'):
        assert shards_of(['val_256.tar', 'val_large.tar'], 'val') == ['val_256.tar']


def test_several_series_of_shards(refused):
    with refused('shards: val', 'those of v1-val and of v2-val lie here', 'such as v1-val, by'):
        shards_of(['v1-val-0.tar', 'v2-val-0.tar'], 'val')


@pytest.mark.parametrize(('members', 'why'), [
    ({'a/1.jpg': b'0', 'a/1.JPG': b'1'}, 'several images have this key: a/1.jpg, a/1.JPG'),
    ({'1.png': b'0', '1.webp': b'1', '1.cls': b'0'}, 'which image is meant: 1.png, 1.webp?'),
    ({'1.left.jpg': b'0', '1.right.jpg': b'1', '1.cls': b'0'}, 'which image is meant: 1.left.jpg, 1.right.jpg?'),
    ({'a/1.full.jpg': b'0', 'a/1.full.cls': b'1'}, 'a key ends at the first point')])
def test_samples_of_which_it_cannot_be_told_what_they_are(tmp_path, members, why, refused):
    write_shard(tmp_path / 'train-0.tar', members)
    with refused(f'sample: {tmp_path}/train-0.tar', why, ''):
        open_split(tmp_path, 'train')


@pytest.mark.parametrize('others', [
    {'1.png': b'mask'}, {'1.depth.png': b'depth'}, {'1.txt': b'a', '1.TXT': b'b'},
    {'1.seg.png': b'0', '1.seg.cls': b'9'}])
def test_photo_is_the_image_of_several(tmp_path, others):
    write_shard(tmp_path / 'train-0.tar', {'1.jpg': b'photo', '1.cls': b'0', **others})
    assert open_split(tmp_path, 'train').read(0) == b'photo'
    write_shard(tmp_path / 'val-0.tar', {'1.rgb.jpg': b'photo', '1.depth.png': b'depth', '1.cls': b'0'})
    assert open_split(tmp_path, 'val').read(0) == b'photo'


def test_what_is_left_out_is_told_each_time(tmp_path):
    write_shard(tmp_path / 'train-0.tar', {'1.jpg': b'0', '1.cls': b'0', '2.cls': b'1'})
    for _ in range(2):
        with pytest.warns(UserWarning, match='1 samples have no image and are left out: 2'):
            open_split(tmp_path, 'train')


@pytest.mark.parametrize('padding', [0, 3 << 19], ids=['', '1.5 MiB between'])
def test_archive_that_was_appended_to_another(padding, folders, tmp_path, refused):
    for name in ('cat', 'dog'):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
            tar.add(folders / 'train' / name, name)
    content = bytes(padding).join((tmp_path / f'{name}.tar').read_bytes() for name in ('cat', 'dog'))
    (tmp_path / 'train.tar').write_bytes(content)
    with refused(f'tar file: {tmp_path}/train.tar', 'more follows its end', 'make it anew'):
        open_split(tmp_path, 'train')


def test_files_that_are_kept_without_their_holes(tmp_path):
    holes = tmp_path / 'pets' / 'cat' / '1.bmp'
    holes.parent.mkdir(parents=True)
    with open(holes, 'wb') as file:
        file.truncate(1 << 20)
        file.write(b'BM')
    done = subprocess.run(['tar', '-S', '-cf', tmp_path / 'train.tar', '-C', tmp_path / 'pets', 'cat'], check=False)
    if done.returncode:
        pytest.skip('there is no tar with -S')
    source = open_split(tmp_path, 'train')
    with pytest.raises(OSError, match='kept without its holes'):
        source.read(0)


@pytest.mark.parametrize('name', ['train', 'train.tar', 'train-0000.tar'])
def test_link_that_leads_nowhere(tmp_path, name, refused):
    (tmp_path / name).symlink_to(tmp_path / 'not mounted' / name)
    with refused('train', '', ''):
        open_split(tmp_path, 'train')


def test_dataset_without_classes(folders, tmp_path, refused):
    as_dataset(folders, 'train').remove_columns('label').save_to_disk(str(tmp_path / 'set' / 'train'))
    with refused(f'data set: {tmp_path}/set/train', 'no column of class labels, but image', 'datasets.ClassLabel'):
        open_split(tmp_path / 'set', 'train')


def test_dataset_without_labels(folders, tmp_path, refused):
    rows = as_dataset(folders, 'train').map(lambda row: {'label': -1})
    rows.save_to_disk(str(tmp_path / 'set' / 'train'))
    with refused('data set: ', 'some of its labels are missing', 'test splits often have none'):
        open_split(tmp_path / 'set', 'train')


def test_dataset_of_files_beside_it(folders):
    # as of a folder of images on the hub: the rows hold their paths
    file = next((folders / 'train' / 'cat').iterdir())
    dataset = datasets.Dataset.from_dict({'image': [str(file)], 'label': [0]}).cast_column('image', datasets.Image())
    source = HuggingFaceSource(dataset.cast_column('label', datasets.ClassLabel(names=['cat'])), 'files')
    assert source.read(0) == file.read_bytes()


def test_usual_names_of_columns_in_any_case_and_the_most_usual_first(folders):
    dataset = as_dataset(folders, 'train').rename_columns({'image': 'JPG', 'label': 'Target'})
    dataset = dataset.add_column('Image', [None] * 18, feature=datasets.Image())
    dataset = dataset.add_column('Label', [0] * 18, feature=datasets.ClassLabel(names=['pet']))
    source = HuggingFaceSource(dataset, 'set')
    assert (source.image, source.classes) == ('Image', ['pet'])


def test_row_without_an_image_is_unreadable(folders, tmp_path):
    rows = as_dataset(folders, 'train').cast_column('image', datasets.Image(decode=False))
    rows = rows.map(lambda row, index: {'image': None if index == 3 else row['image']}, with_indices=True)
    rows.save_to_disk(str(tmp_path / 'set' / 'train'))
    source = open_split(tmp_path / 'set', 'train')
    assert source.read(2) == FolderSource(folders / 'train').read(2)
    with pytest.raises(UnreadableImage, match='no image in this row'):
        source.read(3)


def test_split_that_a_dataset_lacks(written, refused):
    with refused('split: tain of', 'it has train, val', 'did you mean train?'):
        open_split(written(as_saved_datasets), 'tain')
    assert split_named('val', ['train', 'validation'], '') == 'validation'


@pytest.mark.parametrize('name', ['validation', 'valid', 'dev'])
def test_validation_under_another_name(folders, tmp_path, name):
    """As a folder and a tar file; the name itself comes first."""
    expected = FolderSource(folders / 'val')
    as_tar(folders, tmp_path)
    (tmp_path / 'val.tar').rename(tmp_path / f'{name}.tar')
    (folders / 'val').rename(folders / name)
    for root, kind in ((folders, FolderSource), (tmp_path, TarSource)):
        assert has_split(root, 'val')
        source = open_split(root, 'val')
        assert type(source) is kind
        assert source.read(3) == (folders / name / expected.paths[3]).read_bytes()
    (folders / 'val').mkdir()
    with pytest.raises(InputError, match='no folder with images'):
        open_split(folders, 'val')


def test_validation_alone_of_another_library(folders, tmp_path):
    """On disk, and as from the hub."""
    rows = as_dataset(folders, 'val')
    datasets.DatasetDict({'validation': rows}).save_to_disk(str(tmp_path / 'saved'))
    rows.to_parquet(tmp_path / 'hub' / 'validation.parquet')
    for root in (tmp_path / 'saved', f'hf://{tmp_path}/hub'):
        assert not has_split(root, 'train')
        datamodule = ImageNetDataModule(root=str(root), batch_size=2, image_size=32, num_workers=0)
        datamodule.setup('validate')
        assert len(datamodule.validation) == 18
        assert datamodule.class_names == list(CLASSES)


def test_hub_out_of_reach(refused, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    with refused('data.root: hf://no/such', 'the hub does not give it', 'hf auth login'):
        open_split('hf://no/such', 'train')


def test_optimised_samples_of_another_kind(tmp_path, refused):
    optimize(words, [1, 2], tmp_path / 'train')
    with refused(f'data.root: {tmp_path}/train', 'its samples hold text: no image, or not one class', 'FILE AS BYTES'):
        open_split(tmp_path, 'train')


@pytest.mark.parametrize(('write', 'package', 'extra'), [
    (as_saved_datasets, 'datasets', 'datasets'), (as_optimised, 'litdata', 'litdata')])
def test_library_that_is_not_installed(write, package, extra, written, refused, monkeypatch):
    root = written(write)
    monkeypatch.setitem(sys.modules, package, None)
    with refused('data.root: ', f'the package {package} is not installed', f"pip install 'se-timm[{extra}]'"):
        open_split(root, 'train')


def test_copies_of_old_files_are_not_fetched_again(bucket, monkeypatch):
    url, store, path = bucket()
    for file in store.find(path):
        store.store[file].created -= timedelta(days=1)
    expected = list(open_split(url, 'train').paths)
    monkeypatch.setattr(type(store), 'get', None)
    assert list(open_split(url, 'train').paths) == expected


def test_more_files_than_are_asked_for_together(bucket, monkeypatch):
    monkeypatch.setattr(object_store, 'AT_ONCE', 4)
    assert len(open_split(bucket()[0], 'train').labels) == 18


def test_folder_that_a_store_lists_in_itself(bucket, monkeypatch):
    """As S3 does of a folder that was made before its files."""
    url, store, _ = bucket()
    original = type(store).ls
    monkeypatch.setattr(type(store), 'ls', lambda self, place, **options: [
        {'name': f'{place}/', 'size': 0, 'type': 'directory'}, *original(self, place, **options)])
    assert len(open_split(url, 'train').labels) == 18


def test_linked_file_in_a_store(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    file = next((folders / 'train' / 'cat').iterdir())
    file.with_name(f'z{file.name}').symlink_to(file)
    assert list(open_split(f'file://{folders}', 'train').paths) == list(open_split(folders, 'train').paths)
