"""Tar files that are read in place: nothing is unpacked."""
from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from se_timm.errors import InputError, message

from .index_cache import tell

__all__ = ['Place', 'TarFiles', 'places_in']

SPARSE = -1  # length of a file whose holes are left out
PADDING = 1 << 20  # read at once of what follows the end
LINKS = 40  # one after the other at most, as in Linux
OPEN_FILES = 128  # at most, in a process: systems allow 1024, loaders need some


class Place(NamedTuple):
    """Where the data of a file are: offset and length in a tar file, in bytes."""

    offset: int
    length: int


def places_in(path: str | Path) -> dict[str, Place]:
    """Return the place of each file in a tar file by its name, those of links included; say which lead to none.

    Raises:
        InputError: If it is no tar file, is compressed, damaged or cut off.
    """
    try:
        with tarfile.open(path, 'r:') as tar:
            places = _places(tar, path)
            _check_end(tar)
    except tarfile.TarError as error:
        raise InputError(message(
            f'tar file: {path}', f'it cannot be read as an uncompressed tar file ({error})',
            'make it anew with tar cf, without compression, so that images can be read in place')) from error
    return places


def _places(tar: tarfile.TarFile, path: str | Path) -> dict[str, Place]:
    places, links = {}, {}
    for member in tar:
        if member.issparse():
            places[member.name] = Place(member.offset_data, SPARSE)
        elif member.isfile():
            places[member.name] = Place(member.offset_data, member.size)
        elif member.islnk():
            links[member.name] = member.linkname
        elif member.issym():
            links[member.name] = os.path.join(os.path.dirname(member.name), member.linkname)
    return {**places, **_linked(places, links, path)} if links else places


def _linked(places: dict[str, Place], links: dict[str, str], path: str | Path) -> dict[str, Place]:
    """Return the place of each link, over others where it leads to one; say which lead to no file of the tar file."""
    normal = {os.path.normpath(name): place for name, place in places.items()}
    targets = {os.path.normpath(name): os.path.normpath(target) for name, target in links.items()}
    found = {}
    for name in links:
        end = os.path.normpath(name)
        for _ in range(LINKS):
            if end not in targets:
                break
            end = targets[end]
        if end in normal:
            found[name] = normal[end]
    if lost := [name for name in links if name not in found]:
        tell(f'{path}: {len(lost)} links lead to no file in it, and what they stand for is left out: '
             f'{lost[0]}; make it anew with tar -h to have that')
    return found


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise `ReadError` if the reading of `tar` stopped at anything but its end; tarfile stops there in silence."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(tarfile.NUL):
        raise tarfile.ReadError(f'it is damaged at byte {tar.offset}')
    if not block:
        raise tarfile.ReadError('its end is missing')
    while block := tar.fileobj.read(PADDING):
        if block.strip(tarfile.NUL):
            raise tarfile.ReadError('more follows its end, such as another one that cat has appended; tar -A does it')


class TarFiles:
    """Tar files that are read by position, which shares no file offset between worker processes.

    (A `TarFile` that is opened before a fork does, and returns broken images.)

    Args:
        paths: The tar files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, int] = OrderedDict()  # file descriptors, the one used last at the end

    def read(self, number: int, place: Place) -> bytes:
        """Return what is at `place` in the tar file of this number; raise `OSError` if that is not all of a file."""
        if place.length == SPARSE:
            raise OSError('it is kept without its holes, as by tar -S; make the tar file anew without that')
        return os.pread(self._descriptor(number), place.length, place.offset)

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self.paths[number], os.O_RDONLY)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_open': OrderedDict()}  # file descriptors mean nothing in another process

    def __del__(self) -> None:
        for descriptor in getattr(self, '_open', {}).values():
            os.close(descriptor)
