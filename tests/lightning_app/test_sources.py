"""Class folders, tar files of the same layout, and folders to predict."""
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from lightning_app.data import ImageNetDataModule
from lightning_app.data.compact import Texts
from lightning_app.data.sources import FolderSource, ImageFolder, TarSource, first_files
from lightning_app.data.splits import open_split

# Images directly below the source: {folder of each: count}
LAYOUTS = {
    'flat': {'dog': 3, 'cat': 4, 'eel': 2},
    'upper and lower case': {'b': 1, 'B': 1, 'a': 1, '_': 1},
    'numbers': {'n10': 2, 'n9': 2, '01440764': 2},
    'many files': {'a': 12, 'b': 1},  # 10.png before 2.png
    'spaces and accents': {'great auk': 2, 'ïbis': 2, 'owl': 1},
    'a name that begins another': {'cat': 2, 'cat-fish': 2, 'cat fish': 2, 'cat.bird': 1},
    'nested': {'cat': 2, 'cat/indoors/old': 2, 'cat/indoors-new': 1, 'dog/big': 2, 'dog/small': 2, 'eel': 1},
}


def contents(source):
    """Return all that a source tells of its images, but for where they lie."""
    return source.classes, list(source.labels), [source.load(index).tobytes() for index in range(len(source.labels))]


def paths(source):
    return [path.removeprefix('./').removeprefix('train/') for path in source.paths]


@pytest.fixture
def not_an_image(tmp_path, write_images):
    """Return a folder of class folders with a file that is no image in one of them."""
    write_images(tmp_path / 'train')
    (tmp_path / 'train' / 'dog' / 'notes.txt').write_text('bark')
    return tmp_path / 'train'


# Folder and tar


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_folder_and_its_tar_file_are_the_same(tmp_path, write_images, pack, layout):
    # in the same order, too: the training's permutation is one of positions
    folder = write_images(tmp_path / 'train', LAYOUTS[layout])
    one, other = FolderSource(folder), TarSource(pack(folder))
    assert paths(one) == paths(other)
    assert contents(one) == contents(other)
    assert len(one.labels) == sum(LAYOUTS[layout].values())


@pytest.mark.parametrize('prefix', ['./', 'train/', './train/', 'data/imagenet/train/'])
def test_a_tar_file_with_leading_folders(tmp_path, write_images, pack, prefix):
    folder = write_images(tmp_path / 'train')
    assert contents(FolderSource(folder)) == contents(TarSource(pack(folder, prefix)))


@pytest.mark.parametrize('layout', [name for name in LAYOUTS if name != 'nested'])
def test_as_torchvision(tmp_path, write_images, layout):
    folder = write_images(tmp_path / 'train', LAYOUTS[layout])
    ours, theirs = FolderSource(folder), datasets.ImageFolder(str(folder))
    assert ours.classes == theirs.classes
    assert [(ours.name(index), label) for index, label in enumerate(ours.labels)] == theirs.samples
    assert all(ours.load(index).tobytes() == theirs[index][0].tobytes() for index in range(len(ours.labels)))


def test_nested_folders_belong_to_the_class_on_top(tmp_path, write_images):
    folder = write_images(tmp_path / 'train', LAYOUTS['nested'])
    ours, theirs = FolderSource(folder), datasets.ImageFolder(str(folder))
    assert ours.classes == theirs.classes == ['cat', 'dog', 'eel']
    assert {(ours.name(index), label) for index, label in enumerate(ours.labels)} == set(theirs.samples)


def test_hidden_files_and_folders_are_left_out(tmp_path, write_images, pack):
    # macOS and notebooks leave such files in folders, and so in tar files
    folder = write_images(tmp_path / 'train', {'cat': 2, 'dog': 1})
    expected = contents(FolderSource(folder))
    (folder / 'cat' / '._0.png').write_bytes(b'resource fork')
    write_images(folder / '.checkpoints', {'cat': 1})
    assert contents(FolderSource(folder)) == expected
    assert contents(TarSource(pack(folder))) == expected


@pytest.mark.filterwarnings('ignore:.*no image ending')  # whether it is announced does not matter
@pytest.mark.parametrize('prefix', ['', './', 'train/', './train/', 'data/train/'])
def test_a_file_beside_the_class_folders_makes_no_class(tmp_path, write_images, pack, prefix):
    folder = write_images(tmp_path / 'train')
    expected = contents(FolderSource(folder))
    (folder / 'classes.txt').write_text('cat dog eel')
    assert contents(FolderSource(folder)) == expected
    assert contents(TarSource(pack(folder, prefix))) == expected


@pytest.mark.parametrize('prefix', ['', 'train/'])
@pytest.mark.parametrize('counts', [{'cat': 2}, {'cat': 2, 'cat/indoors': 1}])
def test_a_tar_file_of_a_single_class(tmp_path, write_images, pack, prefix, counts):
    folder = write_images(tmp_path / 'train', counts)
    assert contents(TarSource(pack(folder, prefix))) == contents(FolderSource(folder))


@pytest.mark.parametrize('prefix', ['', 'train/', './data/train/'])
@pytest.mark.parametrize('counts', [{'cat': 5, 'dog': 4, 'eel': 3}, {'cat': 3}])
def test_images_above_the_class_folders_are_left_out(tmp_path, write_images, noise, pack, prefix, counts):
    """They do not make a class of the folder that they lie in."""
    folder = write_images(tmp_path / 'train', counts)
    expected = contents(FolderSource(folder))
    noise(99).save(folder / 'montage.png')
    for kind, place, name in ((FolderSource, folder, ''), (TarSource, pack(folder, prefix), prefix)):
        with pytest.warns(UserWarning, match=f'1 images lie above the class folders .*: {name}montage.png'):
            assert contents(kind(place)) == expected


def test_linked_images_are_read(tmp_path, write_images):
    target = write_images(tmp_path / 'elsewhere', {'cat': 2})
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'cat').symlink_to(target / 'cat')
    assert contents(FolderSource(tmp_path / 'train')) == contents(FolderSource(target))


def test_hard_links_in_a_tar_file_are_read(tmp_path, write_images, pack):
    # tar stores a file with two names once, and a link: without it the image would be missing
    folder = write_images(tmp_path / 'train', {'cat': 2})
    os.link(folder / 'cat' / '0.png', folder / 'cat' / '2.png')
    assert contents(TarSource(pack(folder))) == contents(FolderSource(folder))


@pytest.mark.parametrize('prefix', ['', './'])
def test_symbolic_links_in_a_tar_file_are_read(tmp_path, write_images, prefix):
    folder = write_images(tmp_path / 'train', {'cat': 2, 'dog': 1})
    (folder / 'cat' / '2.png').symlink_to('../dog/0.png')
    (folder / 'dog' / '1.png').symlink_to('../cat/2.png')  # a link to a link
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(folder, f'{prefix}train')
    assert contents(TarSource(tmp_path / 'train.tar')) == contents(FolderSource(folder))


@pytest.mark.parametrize('target', ['../elsewhere/eel', '/no/where', 'cat', 'eel'])
def test_links_that_lead_out_of_a_tar_file_are_named(tmp_path, write_images, target):
    """Of which a whole class may be lost; or to a folder, or to themselves."""
    folder = write_images(tmp_path / 'train', {'cat': 2, 'dog': 1})
    write_images(tmp_path / 'elsewhere', {'eel': 1})
    (folder / 'eel').symlink_to(target)
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(folder, 'train')
    with pytest.warns(UserWarning, match='1 links lead to no file in it.*: train/eel; make it anew with tar -h'):
        assert TarSource(tmp_path / 'train.tar').classes == ['cat', 'dog']


def test_example_that_cannot_be_read_is_left_out(pets):
    source = FolderSource(pets / 'train')
    expected = [source.read(1), source.read(2)]
    (pets / 'train' / source.paths[0]).unlink()
    assert list(first_files(source, 3)) == expected


@pytest.mark.parametrize(('kind', 'name'), [('PNG', '0.jpg'), ('BMP', '0.JPEG'), ('WEBP', '0.jpeg'), ('JPEG', '0.png')])
def test_the_content_counts_and_not_the_ending(tmp_path, noise, pack, kind, name):
    file = tmp_path / 'train' / 'cat' / name
    file.parent.mkdir(parents=True)
    noise(0).save(file, kind)
    expected = Image.open(file)
    assert expected.format == kind
    for source in (FolderSource(tmp_path / 'train'), TarSource(pack(tmp_path / 'train'))):
        np.testing.assert_array_equal(source.load(0), expected)


@pytest.mark.parametrize('tar', [False, True])
def test_names_lead_to_the_image(tmp_path, write_images, pack, tar):
    folder = write_images(tmp_path / 'train')
    source = TarSource(pack(folder)) if tar else FolderSource(folder)
    assert source.name(5) == (f'{folder}.tar:dog/0.png' if tar else f'{folder}/dog/0.png')
    np.testing.assert_array_equal(source.load(5), Image.open(folder / 'dog' / '0.png'))


@pytest.mark.parametrize('tar', [False, True])
def test_files_without_an_image_ending_are_announced(not_an_image, pack, tar):
    path = pack(not_an_image) if tar else not_an_image
    with pytest.warns(UserWarning, match=r'1 files have no image ending and are left out: dog/notes\.txt'):
        source = (TarSource if tar else FolderSource)(path)
    assert list(source.labels) == [0] * 5 + [1] * 4 + [2] * 3


# Tar files and processes


class Images(Dataset):
    """The bare images of a source."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source.labels)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.source.load(index)))


def open_files(path):
    """Return what Linux tells of each file descriptor of this process on `path`: its offset and more."""
    return {file.name: Path('/proc/self/fdinfo', file.name).read_text()
            for file in Path('/proc/self/fd').iterdir() if os.path.realpath(file) == os.path.realpath(path)}


@pytest.mark.skipif(not Path('/proc/self/fdinfo').is_dir(), reason='the offsets of open files are looked up in /proc')
def test_workers_that_are_forked_after_reading_get_right_images(tmp_path, write_images, pack):
    # a file that is opened before the fork has one offset for all processes, and reading moves it
    folder = write_images(tmp_path / 'train', {'cat': 60, 'dog': 60})
    source = TarSource(pack(folder))
    source.load(7)
    position = open_files(source.path)
    assert len(position) == 1
    loader = DataLoader(Images(source), batch_size=4, num_workers=2, multiprocessing_context='fork')
    expected = torch.stack([torch.from_numpy(np.array(FolderSource(folder).load(index))) for index in range(120)])
    assert torch.equal(torch.cat(list(loader)), expected)
    assert open_files(source.path) == position  # right images may be luck: the workers must not move it at all


def test_a_tar_source_can_be_pickled_after_reading(tmp_path, write_images, pack):
    source = TarSource(pack(write_images(tmp_path / 'train')))
    expected = contents(source)
    copy = pickle.loads(pickle.dumps(source))
    del source  # and its open file
    assert contents(copy) == expected


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='open files are looked up in /proc')
def test_a_tar_source_closes_its_file(tmp_path, write_images, pack):
    path = pack(write_images(tmp_path / 'train'))
    source = TarSource(path)
    assert not open_files(path)
    source.load(0)
    assert open_files(path)
    del source
    assert not open_files(path)


# Splits, and what is wrong with them


@pytest.mark.parametrize(('suffix', 'kind'), [(None, FolderSource), ('.tar', TarSource), ('', TarSource)])
def test_a_split_is_a_folder_or_a_tar_file(tmp_path, write_images, pack, suffix, kind):
    expected = contents(FolderSource(write_images(tmp_path / 'made' / 'train')))
    (tmp_path / 'root').mkdir()
    if suffix is None:
        (tmp_path / 'made' / 'train').rename(tmp_path / 'root' / 'train')
    else:
        pack(tmp_path / 'made' / 'train').rename(tmp_path / 'root' / f'train{suffix}')
    source = open_split(tmp_path / 'root', 'train')
    assert type(source) is kind
    assert contents(source) == expected


def test_missing_folder(pets, refused):
    with refused(f'data.root: {pets}s', 'no such folder', f'did you mean {pets}?'):
        open_split(f'{pets}s', 'train')


def test_missing_folder_in_a_missing_folder(tmp_path, refused):
    with refused('data.root: ', 'no such folder', 'name the folder that holds train/ and val/'):
        open_split(tmp_path / 'no' / 'where', 'train')


def test_a_file_in_place_of_the_folder(pets, pack, refused):
    tar = pack(pets / 'train')
    with refused(f'data.root: {tar}', 'no such folder', 'name the folder that holds train/ and val/'):
        open_split(tar, 'train')


def test_missing_split(pets, refused):
    with refused(f'data.root: {pets}', 'neither vla/ nor vla.tar', 'did you mean val? it holds: train, val'):
        open_split(pets, 'vla')


def test_empty_root(tmp_path, refused):
    with refused(f'data.root: {tmp_path}', 'neither train/ nor train.tar', 'it holds: nothing'):
        open_split(tmp_path, 'train')


def test_empty_split(tmp_path, refused):
    (tmp_path / 'train').mkdir()
    with refused(f'images: {tmp_path}/train', 'no folder with images', 'one folder a class'):
        open_split(tmp_path, 'train')


def test_images_without_class_folders(tmp_path, noise, pack, refused):
    (tmp_path / 'train').mkdir()
    noise(0).save(tmp_path / 'train' / '0.png')
    tar = pack(tmp_path / 'train')
    with refused(f'images: {tmp_path}/train', 'no folder with images', 'one folder a class'):
        FolderSource(tmp_path / 'train')
    with refused(f'images: {tar}', 'no folder with images', 'one folder a class'):
        TarSource(tar)


@pytest.mark.parametrize('tar', [False, True])
def test_folders_of_the_system_are_no_classes(tmp_path, write_images, pack, tar):
    folder = write_images(tmp_path / 'train')
    classes = FolderSource(folder).classes
    for path in ('__MACOSX/fox/._a.png', 'lost+found/a', '.cache/a.png', 'cat/__MACOSX/._a.png'):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b'no image')
    source = TarSource(pack(folder)) if tar else FolderSource(folder)
    assert source.classes == classes
    assert not any('MACOSX' in source.name(index) for index in range(len(source.labels)))


def test_empty_class(tmp_path, write_images, refused):
    folder = write_images(tmp_path / 'train')
    (folder / 'fox').mkdir()
    with refused(f'images: {folder}', 'no image in class fox', 'each with images'):
        FolderSource(folder)


@pytest.mark.parametrize('tar', [False, True])
@pytest.mark.filterwarnings('ignore:.*no image ending')
def test_class_without_images(tmp_path, write_images, pack, refused, tar):
    folder = write_images(tmp_path / 'train')
    (folder / 'fox').mkdir()
    (folder / 'fox' / 'notes.txt').write_text('What does the fox say?')
    path = pack(folder) if tar else folder
    with refused(f'images: {path}', 'no image in class fox', 'each with images'):
        (TarSource if tar else FolderSource)(path)


@pytest.mark.parametrize('mode', ['w:gz', 'w:bz2', 'w:xz'])
def test_compressed_tar_file(tmp_path, write_images, pack, refused, mode):
    path = pack(write_images(tmp_path / 'train'), mode=mode)
    with refused(f'tar file: {path}', 'uncompressed', 'without compression'):
        TarSource(path)


@pytest.mark.parametrize('data', [b'', b'not a tar file', bytes(range(256)) * 64])
def test_no_tar_file(tmp_path, refused, data):
    (tmp_path / 'train.tar').write_bytes(data)
    with refused(f'tar file: {tmp_path}/train.tar', 'cannot be read as', 'make it anew'):
        open_split(tmp_path, 'train')


def test_truncated_tar_file(tmp_path, write_images, pack, refused):
    path = pack(write_images(tmp_path / 'train'))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + last.size // 2)
    with refused(f'tar file: {path}', 'cannot be read as', 'make it anew'):
        TarSource(path)


def test_tar_file_damaged_in_the_middle(tmp_path, write_images, pack, refused):
    # tarfile takes what is before the damage for the whole
    path = pack(write_images(tmp_path / 'train'))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[5].offset
    with path.open('r+b') as file:
        file.seek(offset)
        file.write(b'x' * 100)
    with refused(f'tar file: {path}', f'damaged at byte {offset}', 'make it anew'):
        TarSource(path)


def test_tar_file_cut_off_between_two_images(tmp_path, write_images, pack, refused):
    path = pack(write_images(tmp_path / 'train'))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[5].offset
    os.truncate(path, offset)
    with refused(f'tar file: {path}', 'its end is missing', 'make it anew'):
        TarSource(path)


def test_empty_tar_file(tmp_path, refused):
    tarfile.open(tmp_path / 'train.tar', 'w').close()
    with refused(f'images: {tmp_path}/train.tar', 'no folder with images', 'one folder a class'):
        open_split(tmp_path, 'train')


# Classes of the splits


@pytest.mark.parametrize('tar', [False, True])
def test_a_class_that_training_lacks(pets, write_images, pack, refused, tar):
    write_images(pets / 'val', {'dogg': 1})
    if tar:
        pack(pets / 'val')
        (pets / 'val').rename(pets / 'unpacked')
    with refused('class dogg in val', 'have 3 classes, and this is none', 'did you mean dog?'):
        ImageNetDataModule(root=str(pets)).open('val')


def test_several_classes_that_training_lacks(pets, write_images, refused):
    write_images(pets / 'val', {'yak': 1, 'zebra': 1})
    with refused('class yak in val, and 1 more', 'none of them', 'remove it, or train with images of it'):
        ImageNetDataModule(root=str(pets)).open('val')


def test_a_class_that_validation_lacks(tmp_path, write_images):
    # cat is not there: dog and eel must not move up
    write_images(tmp_path / 'train')
    write_images(tmp_path / 'val', {'dog': 2, 'eel': 1})
    source = ImageNetDataModule(root=str(tmp_path)).open('val')
    assert source.classes == ['cat', 'dog', 'eel']
    assert list(source.labels) == [1, 1, 2]
    assert [Path(source.name(index)).parent.name for index in range(3)] == ['dog', 'dog', 'eel']


# Images to predict


def test_images_of_a_folder_in_order(tmp_path, write_images):
    folder = write_images(tmp_path / 'some', {'b': 2, 'a/c': 1})
    (folder / 'notes.txt').write_text('left out')
    Image.open(folder / 'b' / '0.png').save(folder / 'Z.JPG')
    with pytest.warns(UserWarning, match='1 files have no image ending and are left out: notes.txt'):
        source = ImageFolder(folder)
    assert [source.name(index) for index in source.labels] == ['Z.JPG', 'a/c/0.png', 'b/0.png', 'b/1.png']
    np.testing.assert_array_equal(source.load(3), Image.open(folder / 'b' / '1.png'))


def test_one_image(tmp_path, write_images):
    file = write_images(tmp_path / 'some', {'b': 2}) / 'b' / '1.png'
    source = ImageFolder(file)
    assert [source.name(index) for index in source.labels] == ['1.png']
    np.testing.assert_array_equal(source.load(0), Image.open(file))


def test_missing_images(pets, refused):
    with refused(f'data.images: {pets}/vla', 'no such folder or file', f'did you mean {pets}/val?'):
        ImageFolder(pets / 'vla')
    with refused('data.images: memory://pets', 'from this machine', 'copy them'):
        ImageFolder('memory://pets')


def test_no_images(tmp_path, refused):
    (tmp_path / 'notes.txt').write_text('')
    with refused(f'data.images: {tmp_path}', 'no image in it', '.jpg'):
        ImageFolder(tmp_path)


@pytest.mark.parametrize('tar', [False, True])
def test_hidden_folders_within_a_class_are_left_out(tmp_path, write_images, pack, tar):
    folder = write_images(tmp_path / 'train', {'cat': 2, 'cat/.thumbnails': 1, 'cat/in': 1, 'dog': 1})
    source = TarSource(pack(folder)) if tar else FolderSource(folder)
    assert [path.removeprefix('./') for path in source.paths] == ['cat/0.png', 'cat/1.png', 'cat/in/0.png', 'dog/0.png']


# Memory


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='no Linux')
@pytest.mark.parametrize(('kind', 'limit'), [(Texts, range(0, 4)), (list, range(10, 10 ** 6))])
def test_memory_of_a_worker_stays_flat(kind, limit):
    """A forked process copies what it reads of a list of texts, as each reading counts; not of arrays."""
    paths = kind(f'n{number % 1000:08}/n{number % 1000:08}_{number}.JPEG' for number in range(300_000))
    with multiprocessing.get_context('fork').Pool(1, initializer=_paths.append, initargs=(paths,)) as pool:
        before, after = pool.apply(memory_of_reading, ())
    assert (after - before) // 2 ** 20 in limit


_paths = []


def memory_of_reading():
    """Return this process's own memory in bytes before and after it has read all paths."""
    def own():
        fields = dict(line.split()[:2] for line in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
        return 1024 * int(fields['Private_Dirty:'])

    own()
    before = own()
    for index in range(len(_paths[0])):
        _paths[0][index]
    return before, own()


def test_link_to_a_folder_that_it_lies_in(pets, refused):
    (pets / 'train' / 'cat' / 'cat').symlink_to('../cat')
    with refused(f'images: {pets}/train/cat/cat', 'a link to a folder that it lies in', 'remove the link'):
        FolderSource(pets / 'train')


def test_link_to_a_folder_whose_name_begins_its_own_is_followed(pets):
    (pets / 'train' / 'cat-like').mkdir()
    (pets / 'train' / 'cat-like' / 'cats').symlink_to('../cat')
    assert 'cat-like/cats/0.png' in FolderSource(pets / 'train').paths


def test_link_to_images_elsewhere_is_followed(pets, tmp_path, write_images):
    write_images(tmp_path / 'more', {'new': 2})
    before = len(FolderSource(pets / 'train').labels)
    (pets / 'train' / 'cat' / 'more').symlink_to(tmp_path / 'more')
    assert len(FolderSource(pets / 'train').labels) == before + 2


def test_folder_that_cannot_be_listed(pets, refused, monkeypatch):
    (pets / 'train' / 'cat' / 'locked').mkdir()
    scandir = os.scandir

    def refusing(path='.'):
        if str(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refusing)
    with refused(f'images: {pets}/train/cat/locked', 'cannot be listed (Permission denied)', 'let it be read'):
        FolderSource(pets / 'train')
