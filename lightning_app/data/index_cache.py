"""What was found in large files, kept so that it need not be looked for again."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from ..files import replaced
from .locking import locked

__all__ = ['cached_arrays', 'folder', 'tell']

FORM = 2  # to be raised when what is kept changes

NOTES = 'notes'  # among the arrays: what there is to tell
_notes: list[list[str]] = []  # of what is being looked for


def folder() -> Path:
    """Return where it is kept: `$XDG_CACHE_HOME/se_timm`, or `~/.cache/se_timm`."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'se_timm'


def cached_arrays(kind: str, paths: Sequence[str], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` does, from the cache if these files, by size and time of change, have been looked at before.

    Of several processes one looks, and the others wait. Where nothing can be written, each looks for itself. What it
    found worth telling is told each time.

    Args:
        kind: What is looked for.
        paths: The files.
        find: Looks; returns arrays by name.
    """
    described = [(os.path.abspath(path), status.st_size, status.st_mtime_ns)
                 for path, status in ((path, os.stat(path)) for path in paths)]
    digest = hashlib.sha256(repr((FORM, kind, described)).encode('utf-8', 'surrogateescape')).hexdigest()
    try:
        file = folder() / f'{kind}-{digest[:24]}.npz'
    except RuntimeError:  # there is no home
        arrays = _found(find)
    else:
        with locked(file):
            arrays = _load(file) or _save(file, _found(find))
    for text in arrays.pop(NOTES).tolist():
        tell(text)
    return arrays


def tell(text: str) -> None:
    """Warn of something about the data; while it is looked for to be kept, keep this with it."""
    if _notes:
        _notes[-1].append(text)
    else:
        rank_zero_warn(text)


def _found(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    _notes.append([])
    try:
        return {**find(), NOTES: np.array(_notes[-1], dtype=str)}
    finally:
        _notes.pop()


def _load(file: Path) -> dict[str, Any] | None:
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


def _save(file: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    with suppress(OSError), replaced(file) as unfinished:
        np.savez(unfinished, **arrays)
    return arrays
