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

from .locking import locked

__all__ = ['cached_arrays']

FORM = 1  # to be raised when what is kept changes


def folder() -> Path:
    """Return where it is kept: `$XDG_CACHE_HOME/se_timm`, or `~/.cache/se_timm`."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'se_timm'


def cached_arrays(kind: str, paths: Sequence[str], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` does, from the cache if these files, by size and time of change, have been looked at before.

    Of several processes one looks, and the others wait. Where nothing can be written, each looks for itself.

    Args:
        kind: What is looked for.
        paths: The files.
        find: Looks; returns arrays by name.
    """
    described = [(os.path.abspath(path), status.st_size, status.st_mtime_ns)
                 for path, status in ((path, os.stat(path)) for path in paths)]
    digest = hashlib.sha256(repr((FORM, kind, described)).encode('utf-8', 'surrogateescape')).hexdigest()
    file = folder() / f'{kind}-{digest[:24]}.npz'
    with locked(file):
        return _load(file) or _save(file, find())


def _load(file: Path) -> dict[str, Any] | None:
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


def _save(file: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    partial = file.with_suffix('.partial.npz')
    try:
        np.savez(partial, **arrays)
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()
    return arrays
