"""Data in object stores and on web servers: what a split needs is copied once, into a cache."""
from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_info

from se_timm.errors import InputError, message

from .index_cache import folder
from .locking import locked

__all__ = ['is_url', 'local_copy', 'names_at']

AT_ONCE = 64  # files that are asked for together; what runs side by side is the library's


def is_url(root: str | Path) -> bool:
    """Return whether a root is something like `s3://bucket/imagenet`."""
    return '://' in str(root)


def names_at(url: str, key: str) -> list[str]:
    """Return the sorted names of what is directly below a URL.

    Raises:
        InputError: If that cannot be had.
    """
    store, path = connected(url, key)
    try:
        return sorted(os.path.basename(entry['name'].rstrip('/')) for entry in store.ls(path, detail=True))
    except Exception as error:  # of each store's own library
        raise out_of_reach(url, key, error) from error


def local_copy(url: str, names: Iterable[str], key: str) -> Path:
    """Return a folder with copies of what has these names below a URL; only what is not in the cache is fetched.

    Of several processes one fetches, and the others wait.

    Args:
        url: Of a folder, with a scheme that fsspec knows: `s3://`, `gs://`, `az://`, `https://`, ...
        names: Of files or folders directly below it.
        key: What messages call the URL.

    Raises:
        InputError: If it cannot be had.
    """
    copy = folder() / 'copies' / hashlib.sha256(url.encode()).hexdigest()[:16]
    store, path = connected(url, key)
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with locked(copy):
            found = {file: size for name in names for file, size in files_below(store, f'{path}/{name}').items()}
            missing = {file: copy / os.path.relpath(file, path) for file, size in found.items()
                       if not same_size(copy / os.path.relpath(file, path), size)}
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
    return store, path.rstrip('/')


def files_below(store: Any, path: str) -> dict[str, int | None]:
    """Return the size of each file at or below a path, in bytes; None where the store does not say."""
    return {file: entry.get('size') for file, entry in store.find(path, detail=True).items()}


def same_size(file: Path, size: int | None) -> bool:
    """Return whether a copy is there, and of this size."""
    return file.is_file() and size in (None, file.stat().st_size)


def fetch(store: Any, files: dict[str, Path]) -> None:
    """Copy files; each has its name once it is whole."""
    for target in {target.parent for target in files.values()}:
        target.mkdir(parents=True, exist_ok=True)
    pairs = iter(files.items())
    with TqdmCallback(tqdm_kwargs={'unit': ' files', 'disable': None}) as bar:
        bar.set_size(len(files))
        while some := list(itertools.islice(pairs, AT_ONCE)):
            partial = [f'{target}.partial' for _, target in some]
            store.get([file for file, _ in some], partial)
            for source, (_, target) in zip(partial, some, strict=True):
                os.replace(source, target)
            bar.relative_update(len(some))


def out_of_reach(url: str, key: str, error: Exception) -> InputError:
    """Return the error of a URL that cannot be read."""
    return InputError(message(
        f'{key}: {url}', f'it cannot be had ({type(error).__name__}: {error})',
        f'see that it is there, that you may read it, and that there is room in {folder()}'))
