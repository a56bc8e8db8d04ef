"""Where labelled images come from: class folders, and a tar file of the same layout."""
from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from se_timm.errors import InputError, message, nearby

from ..files import is_url
from .compact import Texts
from .decode import UnreadableImage, decode
from .index_cache import tell
from .tars import Place, TarFiles, places_in

__all__ = [
    'EXTENSIONS', 'IMAGES', 'LABELS', 'FolderSource', 'ImageFolder', 'Source', 'TarSource', 'below_common_folder',
    'check_labels', 'first_files', 'is_hidden',
]

# what the image and its class are called in samples of other libraries, first come first
IMAGES = ('image', 'img', 'images', 'jpg', 'picture')
LABELS = ('label', 'labels', 'class', 'cls', 'target', 'fine_label')
OTHERS = ('lost+found', '__MACOSX')  # of the system, at the top of a disk and in zip files
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


class Source(ABC):
    """Images with labels: `labels[i]` is an index into `classes`.

    Attributes:
        classes: Their names, each once.
        labels: A sequence of integers.
        numbers: What the classes are called where they are stored as numbers, in the order of `classes`; else None.
    """

    classes: list[str]
    labels: Any
    numbers: list[str] | None = None

    @abstractmethod
    def name(self, index: int) -> str:
        """Return how messages call image `index`, for example its path."""

    @abstractmethod
    def read(self, index: int) -> bytes | Image.Image:
        """Return the file of image `index`, or the image as RGB; raise `OSError` if that is not possible."""

    def file(self, index: int) -> str | None:
        """Return the path of the file on the disk that image `index` is read from; None if it is not known."""
        return None

    def load(self, index: int) -> Image.Image:
        """Return image `index` as RGB; raise `UnreadableImage` or `OSError` if that is not possible."""
        content = self.read(index)
        return decode(content) if isinstance(content, bytes) else content


def read_file(path: str) -> bytes:
    """Return the content of a file; unbuffered it takes half the time."""
    with open(path, 'rb', buffering=0) as file:
        return file.read()


def first_files(source: Source, count: int = 4) -> Iterator[bytes]:
    """Yield some files of `source`; none where it holds images, or the files are out of reach."""
    for index in range(min(count, len(source.labels))):
        try:
            content = source.read(index)
        except (UnreadableImage, OSError):  # whoever asks for that image will say so
            continue
        if isinstance(content, bytes):
            yield content


class FolderSource(Source):
    """Images in class folders, `root/CLASS/.../FILE`; classes in sorted order, and files by their paths in these.

    That is the order of torchvision's ImageFolder, but where class folders hold folders: it takes these one by one.

    Raises:
        InputError: If the folder holds no class folders, or a class folder no images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        with os.scandir(root) as entries:
            seen = [entry for entry in entries if not is_hidden(entry.name)]
        self.classes = sorted(entry.name for entry in seen if entry.is_dir())
        files = [(f'{name}/{file}', label) for label, name in enumerate(self.classes)
                 for file in _files_below(Path(root, name))]
        paths, labels = _only_images(self.root, files, self.classes)
        _say_above(self.root, sorted(entry.name for entry in seen if _is_image(entry.name) and entry.is_file()))
        self.paths, self.labels = Texts(paths), np.array(labels)

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.root, self.paths[index])

    file = name

    def read(self, index: int) -> bytes:
        """Return the file of image `index`."""
        return read_file(os.path.join(self.root, self.paths[index]))


class TarSource(Source):
    """Images in a tar file with members `[.../]CLASS/.../FILE`, read in place; nothing is unpacked.

    Args:
        path: The file.
        members: The places of its members, if they are known.

    Raises:
        InputError: If the file is no tar file, is damaged or cut off, or holds no images in class folders.
    """

    def __init__(self, path: str | Path, members: dict[str, Place] | None = None) -> None:
        self.path = str(path)
        members = members or places_in(path)
        inside = below_common_folder(members, self.path)
        self.classes = sorted({parts[0] for parts in inside.values()})
        index = {name: label for label, name in enumerate(self.classes)}
        # in the order of a folder: by class, then by the path below it
        names = sorted(inside, key=lambda name: (index[inside[name][0]], '/'.join(inside[name][1:])))
        paths, labels = _only_images(
            self.path, [(name, index[inside[name][0]]) for name in names], self.classes)
        self.paths, self.labels = Texts(paths), np.array(labels)
        self.places = np.array([members[name] for name in paths])
        self._tar = TarFiles([self.path])

    def name(self, index: int) -> str:
        """Return tar file and member name of image `index`."""
        return f'{self.path}:{self.paths[index]}'

    def file(self, index: int) -> str:
        """Return the path of the tar file."""
        return self.path

    def read(self, index: int) -> bytes:
        """Return the file of image `index`."""
        return self._tar.read(0, Place(*self.places[index].tolist()))


class ImageFolder(Source):
    """All images below a folder, in sorted order, or one file, whatever its ending; without labels. For prediction.

    Raises:
        InputError: If there is no such folder or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        if is_url(root):
            raise InputError(message(
                f'data.images: {root}', 'images for prediction are read from this machine', 'copy them to a folder'))
        root = Path(root)
        if not root.exists():
            raise InputError(message(
                f'data.images: {root}', 'there is no such folder or file', nearby(root, 'name a folder of images')))
        self.root = str(root if root.is_dir() else root.parent)
        files = _files_below(root) if root.is_dir() else []
        self.paths = Texts(filter(_is_image, files) if root.is_dir() else [root.name])
        self.labels = range(len(self.paths))
        self.classes: list[str] = []
        if not self.paths:
            raise InputError(message(
                f'data.images: {root}', 'there is no image in it', f'name a folder with {", ".join(EXTENSIONS)} files'))
        _say_left_out(self.root, files)

    def name(self, index: int) -> str:
        """Return the path of image `index`, relative to the folder."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """Return the file of image `index`."""
        return read_file(os.path.join(self.root, self.paths[index]))


def check_labels(given: str, labels: Any) -> None:
    """Raise `InputError` for a set without images, or with labels below 0, which say that there is none."""
    if len(labels) == 0 or labels.min() < 0:
        raise InputError(message(
            given, 'some of its labels are missing' if len(labels) else 'it is empty',
            'take a split with labels; test splits often have none'))


def below_common_folder(names: Iterable[str], where: str) -> dict[str, tuple[str, ...]]:
    """Return for each file its class, folders and name; folders that hold all classes and hidden files are left out.

    Images that lie beside those folders or the class folders are of no class: they are left out, and said to be.

    Args:
        names: The paths of the files.
        where: What messages call what holds them.
    """
    inside = {name: PurePosixPath(name).parts for name in names}
    inside = {name: parts for name, parts in inside.items() if not any(map(is_hidden, parts))}
    images = {name: parts for name, parts in inside.items() if _is_image(name)}  # a README is no class
    level = _class_level(images.values())
    above = [name for name, parts in images.items() if len(parts) <= level + 1]
    if len(above) < len(images):  # else there are no class folders at all, as errors say
        _say_above(where, above)
    return {name: parts[level:] for name, parts in inside.items() if len(parts) > level + 1}


def _class_level(images: Iterable[tuple[str, ...]]) -> int:
    """Return which part of the paths of images is their class: the first that is not one folder around class folders.

    A single folder is a class, though, if it holds images itself, and not several folders with some, nor one with more.
    """
    level, deeper = 0, [parts for parts in images if len(parts) > 1]
    while len({parts[level] for parts in deeper}) == 1:
        count, deeper = len(deeper), [parts for parts in deeper if len(parts) > level + 2]
        if len({parts[level + 1] for parts in deeper}) <= 1 and 2 * len(deeper) <= count:
            break
        level += 1
    return level


def _files_below(root: Path) -> list[str]:
    """Return the paths of all files below `root`, relative to it, sorted.

    Raises:
        InputError: If a folder cannot be listed, or contains itself by a link.
    """
    def refuse(error: OSError) -> None:
        raise InputError(message(
            f'images: {error.filename}', f'it cannot be listed ({error.strerror})', 'let it be read, or take it away'))

    found = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in folders:
            check_link(folder, name)
        relative = os.path.relpath(folder, root)
        found += [file if relative == '.' else f'{relative}/{file}' for file in files if not is_hidden(file)]
    return sorted(found)


def check_link(folder: str, name: str) -> None:
    """Raise `InputError` for a link to a folder above: all images of that would be there again and again."""
    path = os.path.join(folder, name)
    if os.path.islink(path) and f'{os.path.realpath(folder)}/'.startswith(f'{os.path.realpath(path)}/'):
        raise InputError(message(
            f'images: {path}', 'it is a link to a folder that it lies in, and its images would be there many times',
            'remove the link'))


def _only_images(
        where: str, files: Iterable[tuple[str, int]], classes: list[str]) -> tuple[list[str], list[int]]:
    """Return the paths and labels of the images among `files`, and say what was left out."""
    files = list(files)
    _say_left_out(where, [path for path, _ in files])
    images = [(path, label) for path, label in files if _is_image(path)]
    empty = sorted(set(range(len(classes))) - {label for _, label in images})
    if not images or empty:
        what = f'no image in class {classes[empty[0]]}' if empty else 'no folder with images'
        remedy = ': put some there, or remove that one' if empty else ''
        raise InputError(message(
            f'images: {where}', f'there is {what}', f'it must hold one folder a class, each with images{remedy}'))
    return [path for path, _ in images], [label for _, label in images]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the user's images, by its name."""
    return name.startswith('.') or name in OTHERS


def _is_image(path: str) -> bool:
    """Return whether a path has the ending of an image."""
    return path.lower().endswith(EXTENSIONS)


def _say_left_out(where: str, files: list[str]) -> None:
    """Warn of files that have no ending of an image."""
    if others := [path for path in files if not _is_image(path)]:
        tell(f'{where}: {len(others)} files have no image ending and are left out: {others[0]}')


def _say_above(where: str, images: list[str]) -> None:
    """Warn of images that lie in no class folder."""
    if images:
        tell(f'{where}: {len(images)} images lie above the class folders and are left out: {images[0]}')
