"""One process at a time, where files can be locked."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ['locked']


@contextmanager
def locked(file: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of a file, which need not be there; where there can be none, go on without.

    Args:
        file: The lock lies beside it.
        timeout: How long to wait for another process, in seconds; for ever where negative.

    Raises:
        Timeout: filelock's, if another process still has it.
    """
    lock = FileLock(f'{file}.lock', timeout)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:  # an OSError
        raise
    except (OSError, NotImplementedError):  # a full disk, a lock of another user, a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()  # nothing where it is not held
