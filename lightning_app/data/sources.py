"""Where labelled images come from: class folders, and tar files of the same layout."""
from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from se_timm.errors import InputError, message, nearest

from .decode import decode

__all__ = ['FolderSource', 'ImageFolder', 'Source', 'TarSource', 'open_split']

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


class Source(Protocol):
    """Images with labels: `labels[i]` is an index into `classes`."""

    classes: list[str]
    labels: Any  # sequence of int

    def name(self, index: int) -> str:
        """Return how messages call image `index`, for example its path."""
        ...

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB; raise `UnreadableImage` if that is not possible."""
        ...


class FolderSource:
    """Images in class folders, `root/CLASS/.../FILE`; classes and files in sorted order, as torchvision's ImageFolder.

    Raises:
        InputError: If the folder holds no class folders, or a class folder no images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        with os.scandir(root) as entries:
            self.classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
        files = [(f'{name}/{file}', label) for label, name in enumerate(self.classes)
                 for file in _files_below(Path(root, name))]
        self.paths, self.labels = _only_images(self.root, files, self.classes)

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.root, self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB."""
        return decode(Path(self.root, self.paths[index]).read_bytes())


class TarSource:
    """Images in a tar file with members `[.../]CLASS/.../FILE`, read in place; nothing is unpacked.

    The positions of the members are read once. Files are then read by position, which shares no file offset between
    worker processes (a `TarFile` that is opened before a fork does, and returns broken images).

    Raises:
        InputError: If the file is no tar file, is damaged or cut off, or holds no images in class folders.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            with tarfile.open(path, 'r:') as tar:
                members = _places(tar)
                _check_end(tar)
        except tarfile.TarError as error:
            raise InputError(message(
                f'tar file: {path}', f'it cannot be read as an uncompressed tar file ({error})',
                'make it anew with tar cf, without compression, so that images can be read in place',
            )) from error
        inside = _below_common_folder(members)
        self.classes = sorted({parts[0] for parts in inside.values()})
        index = {name: label for label, name in enumerate(self.classes)}
        # in the order of a folder: by class, then by the path below it
        names = sorted(inside, key=lambda name: (index[inside[name][0]], '/'.join(inside[name][1:])))
        self.paths, self.labels = _only_images(
            self.path, [(name, index[inside[name][0]]) for name in names], self.classes)
        self.places = [members[name] for name in self.paths]
        self._file: int | None = None

    def name(self, index: int) -> str:
        """Return tar file and member name of image `index`."""
        return f'{self.path}:{self.paths[index]}'

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        offset, size = self.places[index]
        return decode(os.pread(self._file, size, offset))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_file': None}  # file descriptors mean nothing in another process

    def __del__(self) -> None:
        if getattr(self, '_file', None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class ImageFolder:
    """All images below a folder (or one image file), in sorted order, without labels. For prediction.

    Raises:
        InputError: If there is no such folder or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.exists():
            raise InputError(message(
                f'data.images: {root}', 'there is no such folder or file', _nearby(root, 'name a folder of images')))
        self.root = str(root if root.is_dir() else root.parent)
        files = _files_below(root) if root.is_dir() else [root.name]
        self.paths = [file for file in files if file.lower().endswith(EXTENSIONS)]
        self.labels = range(len(self.paths))
        self.classes: list[str] = []
        if not self.paths:
            raise InputError(message(
                f'data.images: {root}', 'there is no image in it', f'name a folder with {", ".join(EXTENSIONS)} files'))

    def name(self, index: int) -> str:
        """Return the path of image `index`, relative to the folder."""
        return self.paths[index]

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB."""
        return decode(Path(self.root, self.paths[index]).read_bytes())


def open_split(root: str | Path, split: str, key: str = 'data.root') -> FolderSource | TarSource:
    """Return the images of `root/split/` or `root/split.tar`.

    Args:
        root: Folder that holds the splits.
        split: Name of the split, such as `train`.
        key: What messages call `root`.

    Raises:
        InputError: If there is neither.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(message(
            f'{key}: {root}', 'there is no such folder',
            _nearby(root, 'name the folder that holds train/ and val/, or train.tar and val.tar')))
    if (root / split).is_dir():
        return FolderSource(root / split)
    for name in (f'{split}.tar', split):
        if (root / name).is_file():
            return TarSource(root / name)
    found = sorted(entry.name for entry in root.iterdir())
    close = nearest(split, found)
    raise InputError(message(
        f'{key}: {root}', f'it holds neither {split}/ nor {split}.tar',
        (f'did you mean {" or ".join(close)}? ' if close else '') +
        f'it holds: {", ".join(found[:8]) or "nothing"}; name the splits by data.train_split and data.val_split'))


def _places(tar: tarfile.TarFile) -> dict[str, tuple[int, int]]:
    """Return offset and size of the data of each file in `tar`, those of links included."""
    places, links = {}, {}
    for member in tar:
        if member.isfile():
            places[member.name] = (member.offset_data, member.size)
        elif member.islnk():
            links[member.name] = member.linkname
        elif member.issym():
            links[member.name] = os.path.normpath(os.path.join(os.path.dirname(member.name), member.linkname))
    places.update({name: places[target] for name, target in links.items() if target in places})
    return places


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise `ReadError` if the reading of `tar` stopped at anything but its end; tarfile stops there in silence."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(tarfile.NUL):
        raise tarfile.ReadError(f'it is damaged at byte {tar.offset}')
    if not block:
        raise tarfile.ReadError('its end is missing')


def _below_common_folder(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each file its class, folders and name; folders that hold all classes and hidden files are left out."""
    inside = {name: PurePosixPath(name).parts for name in names}
    inside = {name: parts for name, parts in inside.items()
              if len(parts) > 1 and not any(part.startswith('.') for part in parts)}
    images = [parts for name, parts in inside.items() if name.lower().endswith(EXTENSIONS)]  # a README is no class
    level = 0
    while len({parts[level] for parts in images}) == 1 and min(map(len, images)) > level + 2:
        level += 1
    return {name: parts[level:] for name, parts in inside.items() if len(parts) > level + 1}


def _nearby(path: Path, remedy: str) -> str:
    """Return `remedy` with the nearest name beside the missing `path`."""
    parent = path.parent
    close = nearest(path.name, (entry.name for entry in parent.iterdir())) if parent.is_dir() else []
    return f'did you mean {parent / close[0]}? {remedy}' if close else remedy


def _files_below(root: Path) -> list[str]:
    """Return the paths of all files below `root`, relative to it, sorted."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        relative = os.path.relpath(folder, root)
        found += [file if relative == '.' else f'{relative}/{file}' for file in files if not file.startswith('.')]
    return sorted(found)


def _only_images(
        where: str, files: Iterable[tuple[str, int]], classes: list[str]) -> tuple[list[str], list[int]]:
    """Return the paths and labels of the images among `files`, and say what was left out."""
    files = list(files)
    images = [(path, label) for path, label in files if path.lower().endswith(EXTENSIONS)]
    if len(images) < len(files):
        example = next(path for path, _ in files if not path.lower().endswith(EXTENSIONS))
        rank_zero_warn(f'{where}: {len(files) - len(images)} files have no image ending and are left out: {example}')
    empty = sorted(set(range(len(classes))) - {label for _, label in images})
    if not images or empty:
        what = f'no image in class {classes[empty[0]]}' if empty else 'no folder with images'
        raise InputError(message(
            f'images: {where}', f'there is {what}', 'it must hold one folder a class, each with images'))
    return [path for path, _ in images], [label for _, label in images]
