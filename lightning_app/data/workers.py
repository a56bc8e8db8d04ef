"""The processes that load images: how they are started, and what they make of signals to all processes of a job."""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

__all__ = ['STOP_SIGNALS', 'Loader', 'cores', 'deaf', 'handled', 'heed_the_parent', 'start_method', 'start_server']

# SLURM's and others' notice (`--signal=SIGUSR1@90`), the request of an operating system or of torchrun, and Ctrl-C
STOP_SIGNALS = ('SIGUSR1', 'SIGTERM', 'SIGINT')
FORK_MAY_HANG = sys.version_info < (3, 10, 15) or (3, 11) <= sys.version_info < (3, 11, 10)

SECONDS = 5  # after which a worker looks whether its parent is still there, as torch's do


class Loader(DataLoader[Any]):
    """A loader whose workers go on when a job is asked to stop, as the training needs them for the step it finishes.

    Terminals send `STOP_SIGNALS` to all processes of a group, and SLURM to all of a job. The training itself still ends
    its workers by SIGTERM.

    Lightning knows by `state_dict` that it can go on within an epoch; where that is, the sampler has from the
    checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, 'worker_init_fn': heed_the_parent})

    def __iter__(self) -> Any:
        """Return the batches of an epoch."""
        with deaf():  # from their first moment, in all threads
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is kept in images, as batches depend on the number of processes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def start_method(processes: int) -> str:
    """Return how one of so many processes starts its workers: as Python does, where that does not hang.

    Collectives run in threads of their own. In Python before 3.10.15 and 3.11.10, a process that is forked while such a
    thread makes itself known to Python waits for ever (CPython issue 112275), as Gloo's do after each collective.
    """
    usual = multiprocessing.get_context().get_start_method()
    return 'forkserver' if usual == 'fork' and processes > 1 and FORK_MAY_HANG else usual


def start_server() -> None:
    """Start what workers are forked from by `forkserver`, unless it runs; returns at once, while it still imports."""
    from multiprocessing import forkserver  # there is none on Windows

    forkserver.set_forkserver_preload([str(__package__)])
    resource_tracker.ensure_running()  # which unblocks signals
    with deaf():
        forkserver.ensure_running()


@contextmanager
def deaf() -> Iterator[None]:
    """Let this thread, and what it starts, hear none of `STOP_SIGNALS`; they are delivered to it afterwards."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in STOP_SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


@contextmanager
def handled(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Let a function hear the signals of these names, such as `STOP_SIGNALS`; do nothing outside of the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other one may say what signals do
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGUSR1
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)  # None if it was not set by Python


def heed_the_parent(*_: Any) -> None:
    """Let a worker, started `deaf`, end with its parent, or by SIGTERM from it; on macOS by SIGTERM from anyone.

    (macOS does not say from where a signal comes.)
    """
    if hasattr(signal, 'sigtimedwait'):
        threading.Thread(target=_wait_for_end, daemon=True).start()
    elif hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _wait_for_end() -> None:
    """End this worker when its parent says so, or is gone: torch looks for a parent too, which may be the server."""
    parent = multiprocessing.parent_process()
    while parent and parent.is_alive():
        heard = signal.sigtimedwait([signal.SIGTERM], SECONDS)
        if heard and heard.si_pid == parent.pid:
            break
    os._exit(0)
