"""Where a run writes, and which run a training goes on with."""
from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from se_timm.errors import InputError, message

from .checkpoints import newest_whole, of_run, of_runs

if TYPE_CHECKING:
    from jsonargparse import Namespace

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    'LAUNCH', 'NEWEST', 'base_folder', 'checkpoint_to_resume', 'evaluation_folder', 'give_back', 'has_own_folder',
    'held', 'launch_id', 'number_in', 'rank', 'run_folder', 'run_of', 'whole_run',
]

NEWEST = ('last', 'auto')  # in place of a checkpoint, see `checkpoint_to_resume`
LAUNCH = 'launch.txt'  # in a run's folder, see `launch_id`
SECONDS = 20  # in which workers of a training that was killed notice it: until then they hold the folder


def base_folder(config: Namespace) -> Path:
    """Return the folder of the runs of a config."""
    return Path(config.trainer.default_root_dir or f'runs/{config.model.name}')


def is_run(folder: Path) -> bool:
    """Return whether a training was begun in a folder by the command line; others may have a `config.yaml`, too."""
    mark = folder / LAUNCH
    # `held` opens it before the training begins; beside those of a base there may be folders that cannot be read
    return os.path.isfile(mark) and mark.stat().st_size > 0


def whole_run(ckpt_path: str | None) -> Path | None:
    """Return the folder of the run that a checkpoint lies in; None if it was taken out of it, or there is none."""
    folder = Path(ckpt_path or '').resolve().parent
    return next(filter(is_run, (folder, folder.parent)), None) if ckpt_path else None


def run_of(ckpt_path: str) -> Path:
    """Return the folder of the run that wrote the checkpoint; that of the file, if it was taken out of it."""
    folder = Path(ckpt_path).resolve().parent
    return whole_run(ckpt_path) or (folder.parent if folder.name == 'checkpoints' else folder)


def has_own_folder(trainer: Any) -> bool:
    """Return whether the folder is this training's alone, as that of one which the command line has begun."""
    return is_run(Path(trainer.default_root_dir))


def run_folder(config: Namespace) -> Path:
    """Return the folder of a training: that of the run it resumes, else the next free `version_N` in that of the runs.

    A run goes on elsewhere if its folder is not in the one that `trainer.default_root_dir` names.
    """
    base, run = base_folder(config), whole_run(config.ckpt_path)
    if run and (config.trainer.default_root_dir is None or base.resolve() in run.parents):
        return run
    if interrupted := restarted_run(base):
        return interrupted
    return claimed(base, 'version_')


def rank() -> int:
    """Return the global rank of this process, as Lightning knows it before any process group exists."""
    return int(getattr(rank_zero_only, 'rank', 0) or 0)


def number_in(variable: str, otherwise: int = 0) -> int:
    """Return the number in a variable of torchrun or SLURM, or `otherwise` where that is not set, or empty."""
    return int(os.environ.get(variable) or otherwise)


def writes() -> bool:
    """Return whether this process writes to the folder of its training; all but the first do not."""
    return rank() == 0 and number_in('NODE_RANK') == 0


def claimed(base: Path, prefix: str) -> Path:
    """Return a new folder in `base`, see `next_free`, that no other training which begins at the same time has.

    Processes that do not write may name another: they are told where to read by those that do.
    """
    while writes():
        folder = next_free(base, prefix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # in between
            continue
        return folder
    return next_free(base, prefix)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the folder of a run: two trainings in it would write over each other's checkpoints.

    By a lock of the file that it has anyway, which filelock would empty. Yields whether another had to be waited for.

    Raises:
        InputError: If another training still has it, or nothing can be written there.
    """
    if not writes() or not hasattr(fcntl, 'flock'):
        yield False
        return
    with marked(folder) as mark:
        waited, begun = False, time.monotonic()
        while not locks(mark):
            if time.monotonic() > begun + SECONDS:
                raise InputError(message(
                    f'ckpt_path: of the run {folder}',
                    f'another training is writing to it ({(folder / LAUNCH).read_text()})',
                    'wait until it has ended, or end it; without ckpt_path a training has a folder of its own'))
            waited = True
            time.sleep(0.2)
        try:
            yield waited
        finally:
            with suppress(OSError):
                fcntl.flock(mark, fcntl.LOCK_UN)  # workers that end a little later have it, too


def marked(folder: Path) -> IO[str]:
    """Open the file that stands for a run; raise `InputError` if that cannot be."""
    try:
        return open(folder / LAUNCH, 'a')
    except OSError as error:
        raise InputError(message(
            f'ckpt_path: of the run {folder}', f'nothing can be written there ({error.strerror})',
            'name a folder for this training by --trainer.default_root_dir')) from error


def locks(mark: IO[str]) -> bool:
    """Lock an open file; return False if another process has. Where files cannot be locked, all may have it."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of a file system without locks
        pass
    return True


def give_back(folder: Path, above: Path) -> None:
    """Remove the folder of a training that has written nothing, and those that were made for it below `above`."""
    with suppress(OSError):
        if not (folder / LAUNCH).stat().st_size:
            (folder / LAUNCH).unlink()
    whole = folder.absolute()
    for each in itertools.takewhile(lambda each: each != above.absolute(), (whole, *whole.parents)):
        with suppress(OSError):  # not empty, or not there
            each.rmdir()


def evaluation_folder(config: Namespace, subcommand: str) -> Path:
    """Return the folder of an evaluation: the next free `validate_N` or `test_N` in that of the run."""
    base = run_of(config.ckpt_path) if config.ckpt_path else base_folder(config)
    return next_free(base, f'{subcommand}_')


def next_free(base: Path, prefix: str) -> Path:
    """Return the folder in `base` that is `prefix` and the number after the largest there is."""
    numbers = [int(path.name.removeprefix(prefix)) for path in base.glob(f'{prefix}*')
               if path.name.removeprefix(prefix).isdigit()]
    return base / f'{prefix}{max(numbers, default=-1) + 1}'


def checkpoint_to_resume(base: Path, ckpt_path: str | None) -> str | None:
    """Return the checkpoint from which a training goes on, None for a new one.

    Args:
        base: Folder of the config's runs.
        ckpt_path: What was given: a file, `last` (the newest of the runs that is whole), `auto` (the same, if there is
            one), or nothing: a run that SLURM or torchrun start again goes on by itself.

    Raises:
        InputError: If there is no `last`.
    """
    if (restarted := restarted_run(base)) and (newest := newest_whole(of_run(restarted))):
        return str(newest)  # it has gone on from ckpt_path before
    if ckpt_path not in NEWEST:
        return ckpt_path
    newest = newest_whole(of_runs(base))
    if newest is None and ckpt_path == 'last':
        raise InputError(message(
            'ckpt_path: last', f'there is no checkpoint of a run below {base}',
            'name a checkpoint, such as runs/.../best.ckpt, or say auto, which begins a new training if there is none'))
    if newest is None:
        tell_of_renamed(base)
    return str(newest) if newest else None


def tell_of_renamed(base: Path) -> None:
    """Say so if a run with checkpoints is called otherwise than those that are looked for."""
    others = (folder for folder in sorted(base.glob('*')) if not folder.match('version_*') and is_run(folder))
    if renamed := next(filter(of_run, others), None):
        rank_zero_info(f'ckpt_path: auto begins a new training: {renamed} is a run, but is called otherwise than '
                       'version_N; give one of its checkpoints to go on from there')


def restarted_run(base: Path) -> Path | None:
    """Return the folder of the run that SLURM or torchrun has started again in this process; None if they have not."""
    counts = ['SLURM_RESTART_COUNT']
    if number_in('GROUP_WORLD_SIZE', 1) == 1:  # torchrun counts on each machine for itself
        counts.append('TORCHELASTIC_RESTART_COUNT')
    if not any(map(number_in, counts)):
        return None
    files = [file for file in base.glob(f'version_*/{LAUNCH}') if file.read_text() == launch_id()]
    return max(files, key=lambda file: file.stat().st_mtime_ns).parent if files else None


def launch_id() -> str:
    """Return what SLURM or torchrun call the job of this process, which stays when they start it again."""
    if job := os.environ.get('SLURM_JOB_ID'):
        return f'slurm {job}'
    if (job := os.environ.get('TORCHELASTIC_RUN_ID')) and job != 'none':
        return f'torchrun {job}'
    return f'parent {os.getppid()} on {platform.node()}'  # torchrun without an id
