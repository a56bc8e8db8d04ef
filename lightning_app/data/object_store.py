"""Data in object stores and on web servers: what a split needs is copied into a cache, and again what has changed."""
from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Container, Iterator, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_info

from se_timm.errors import InputError, message

from .index_cache import folder
from .locking import locked

__all__ = ['local_copy', 'names_at']

AT_ONCE = 64  # files that are asked for together; what runs side by side is the library's
Entry = dict[str, Any]  # of a file or folder, as fsspec lists it
MODIFIED = ('LastModified', 'last_modified', 'mtime', 'modified', 'created')  # what stores call it


class Stored(NamedTuple):
    """A file in a store.

    Attributes:
        size: In bytes; None where the store does not say.
        modified: When it was written, in seconds since 1970; None where the store does not say.
    """

    size: int | None
    modified: int | None

    @classmethod
    def of(cls, entry: Entry) -> Stored:
        """Return what an entry in a list of files says."""
        times = [entry[name] for name in MODIFIED if isinstance(entry.get(name), int | float | datetime)]
        return cls(entry.get('size'), seconds(times[0]) if times else None)

    def equals(self, copy: Path) -> bool:
        """Return whether a copy is of this size and time."""
        found = copy.stat()
        return self.size in (None, found.st_size) and self.modified in (None, int(found.st_mtime))


def seconds(time: float | datetime) -> int:
    """Return a time in seconds since 1970; of a day and hour without a time zone, those of UTC."""
    if isinstance(time, datetime):
        time = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()
    return int(time)


def names_at(url: str, key: str) -> list[str]:
    """Return the sorted names of what is directly below a URL.

    Raises:
        InputError: If that cannot be had.
    """
    store, path = connected(url, key)
    try:
        return sorted(entries_at(store, path))
    except Exception as error:  # of each store's own library
        raise out_of_reach(url, key, error) from error


def local_copy(url: str, names: Sequence[str], key: str) -> Path:
    """Return a folder with copies of what has these names below a URL; only what is new or has changed is fetched.

    What is gone from below these names is removed from the copies. Of several processes one fetches, and others wait.

    Args:
        url: Of a folder, with a scheme that fsspec knows: `s3://`, `gs://`, `az://`, `https://`, ...
        names: Of files or folders directly below it.
        key: What messages call the URL.

    Raises:
        InputError: If it cannot be had.
    """
    copy = folder() / 'copies' / hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
    store, path = connected(url, key)
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with locked(copy):
            entries = entries_at(store, path)
            found = {copy / place: entry for name in names if name in entries
                     for place, entry in files_below(store, name, entries[name])}
            for name in names:
                remove_others(copy / name, found.keys())
            missing = {target: entry for target, entry in found.items() if not is_current(store, entry, target)}
            if missing:
                rank_zero_info(f'{url}: {len(missing)} files are copied to {copy}')
                fetch(store, missing)
    except Exception as error:  # of each store's own library
        raise out_of_reach(url, key, error) from error
    return copy


def connected(url: str, key: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        InputError: If there is no such file system, or its library is not installed.
    """
    try:
        store, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(message(
            f'{key}: {url}', f'it cannot be opened ({error})',
            'see the scheme before ://; s3:// needs pip install s3fs, gs:// gcsfs, az:// adlfs')) from error
    store.invalidate_cache()  # of what was listed earlier in this process
    return store, path.rstrip('/') or path  # of which nothing is left at the top of some stores


def entries_at(store: Any, path: str) -> dict[str, Entry]:
    """Return what is directly below a path, by name.

    Each is listed by itself: the library's `find` leaves out, without a word, folders that it fails to list.
    """
    entries = {name_of(store, entry): entry for entry in store.ls(path, detail=True)
               if entry['name'].rstrip('/') != path.rstrip('/')  # of itself, some stores have an entry
               and not is_of_list(store, entry)}
    return {name: entry for name, entry in entries.items() if name not in ('', '.', '..')}


def is_of_list(store: Any, entry: Entry) -> bool:
    """Return whether an entry is of the list that a web server makes of a folder, such as a link that sorts it."""
    return 'http' in store.protocol and '/?' in entry['name']


def name_of(store: Any, entry: Entry) -> str:
    """Return the last part of the name of an entry; web servers have it as in a URL."""
    name = os.path.basename(entry['name'].rstrip('/'))
    plain = unquote(name) if 'http' in store.protocol else name
    return name if '/' in plain else plain


def files_below(store: Any, place: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """Yield what is at a place if it is a file, or all files below it, each with its place."""
    kind = entry['type']
    if kind != 'directory' and (kind == 'file' or not store.isdir(entry['name'])):  # links are neither
        yield place, entry
        return
    for name, each in entries_at(store, entry['name'].rstrip('/')).items():
        yield from files_below(store, f'{place}/{name}', each)


def is_current(store: Any, entry: Entry, copy: Path) -> bool:
    """Return whether there is a copy of a file, of the same size and time as far as the store says."""
    if not copy.is_file():
        return False
    stored = Stored.of(entry)
    if stored != (None, None):
        return stored.equals(copy)
    info = store.info(entry['name'])  # a web server tells of single files only
    try:
        changed = parsedate_to_datetime(info['Last-Modified']).timestamp()
    except (KeyError, ValueError):  # of older fsspec, or of some servers
        changed = 0
    return Stored(info.get('size'), None).equals(copy) and changed <= copy.stat().st_mtime


def fetch(store: Any, files: dict[Path, Entry]) -> None:
    """Copy files; each has its name once it is whole, and the time of the stored one."""
    for parent in {target.parent for target in files}:
        parent.mkdir(parents=True, exist_ok=True)
    pairs = iter(files.items())
    with TqdmCallback(tqdm_kwargs={'unit': ' files', 'disable': None}) as bar:
        bar.set_size(len(files))
        while some := list(itertools.islice(pairs, AT_ONCE)):
            partial = [f'{target}.partial' for target, _ in some]
            store.get([entry['name'] for _, entry in some], partial)
            for source, (target, entry) in zip(partial, some, strict=True):
                if not os.path.isfile(source):
                    raise FileNotFoundError(f'{entry["name"]} is no file')
                if (modified := Stored.of(entry).modified) is not None:
                    os.utime(source, (modified, modified))
                os.replace(source, target)
            bar.relative_update(len(some))


def remove_others(place: Path, kept: Container[Path]) -> None:
    """Remove what is at or below `place`, other than the files to be kept; folders that are empty then, too."""
    if place.is_file() and place not in kept:
        place.unlink()
    for parent, _, names in os.walk(place, topdown=False):
        for file in (Path(parent, name) for name in names):
            if file not in kept:
                file.unlink()
        if not os.listdir(parent):
            os.rmdir(parent)


def out_of_reach(url: str, key: str, error: Exception) -> InputError:
    """Return the error of a URL that cannot be read."""
    return InputError(message(
        f'{key}: {url}', f'it cannot be had ({type(error).__name__}: {error})',
        f'see that it is there, that you may read it, and that there is room in {folder()}'))
