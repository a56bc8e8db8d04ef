"""Where files lie, and files that are whole or not there."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from se_timm.errors import InputError, message

__all__ = ['is_url', 'replaced', 'writing']


def is_url(path: str | Path) -> bool:
    """Return whether a file or folder is not one of this machine, but something like `s3://bucket/imagenet`."""
    return '://' in str(path)


@contextmanager
def writing(given: str, remedy: str) -> Iterator[None]:
    """Raise `InputError` for what was given if what is written meanwhile cannot be."""
    try:
        yield
    except OSError as error:
        why, name = error.strerror or str(error), error.filename
        if isinstance(name, str) and name not in given:
            why += f': {name}'
        raise InputError(message(given, f'it cannot be written ({why})', remedy)) from error


@contextmanager
def replaced(path: Path, name: str | None = None) -> Iterator[Path]:
    """Yield the path of an unfinished file, which is renamed to `path` at the end, or removed at an error.

    Args:
        path: Of the file; an older one stays until then.
        name: Of the unfinished file, in the same folder; that of the file after a point where not given.
    """
    unfinished = path.with_name(name or f'.{path.name}')
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()  # it may fill the disk
        raise
