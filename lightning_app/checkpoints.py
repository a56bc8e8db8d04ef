"""Checkpoint files: written so that neither a crash nor a full disk costs an older one, and checked before use."""
from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from se_timm.errors import InputError, meant, message, nearest

from .files import is_url, replaced

__all__ = [
    'CheckpointFiles', 'best_of', 'checkpoints_near', 'damage', 'describe', 'load_checkpoint', 'mapped', 'newest_whole',
    'of_run', 'of_runs', 'step_checkpoint', 'step_checkpoints', 'step_of', 'written',
]

FIRST = b'PK\x03\x04'  # of a ZIP archive, as torch writes
STEP = r'last-step=\d{8,}'  # the names of those from which a run goes on
UNFINISHED = '.unfinished'  # one in a folder: whatever a killed process leaves, the next write replaces


class CheckpointFiles(TorchCheckpointIO):
    """Writes each checkpoint beside its place, to the disk, and renames it; checks a file when it is loaded.

    A checkpoint that cannot be written, such as on a full disk, costs a warning, not the training: `failed` names it,
    and nothing is removed until one was written again. Other storage than local folders is Lightning's business.
    """

    def __init__(self) -> None:
        self.failed: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; called on rank 0 only."""
        if storage_options is not None or is_url(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        self.failed = None
        try:
            write(checkpoint, Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter, in the course of the former
            if (reason := disk_error(error)) is None:
                raise
            self.failed = Path(path)
            rank_zero_warn(f'checkpoint {path}: not written ({reason}); older ones are kept, the training goes on')

    def load_checkpoint(
            self, path: Any, map_location: Any = 'cpu', weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint in `path`.

        Raises:
            InputError: If the file is damaged.
        """
        if not is_url(path):
            check_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file, unless the one that replaces it could not be written."""
        if self.failed is None:
            super().remove_checkpoint(path)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` such that `path` is at every moment the old file or the new one, also if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, UNFINISHED) as unfinished, open(unfinished, 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk; Windows knows no such thing."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of the operating system in whose course `error` was raised, None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, None if it is whole: torch keeps a checksum of each of its parts."""
    try:
        with open(path, 'rb') as start:
            if (first := start.read(len(FIRST))) and not FIRST.startswith(first):
                return 'it does not begin as one: it is a file of another kind, or altered'
        with zipfile.ZipFile(path) as file:
            altered = file.testzip()
    except Exception as error:  # zipfile raises many kinds, depending on where the file was cut or altered
        return f'it is cut off or altered ({str(error) or type(error).__name__})'
    return f'it was altered: the checksum of {altered} is another' if altered else None


def check_whole(path: Path) -> None:
    """Raise `InputError` if the file is damaged, with the newest beside it that is not."""
    if not path.is_file():
        raise InputError(message(
            f'ckpt_path: {path}', 'it is a folder' if path.is_dir() else 'there is no such file',
            checkpoints_near(path) or 'name a checkpoint, such as runs/.../best.ckpt'))
    if reason := damage(path):
        other = newest_whole(file for file in path.parent.glob('*.ckpt') if file != path)
        raise InputError(message(
            f'ckpt_path: {path}', f'it cannot be read as a checkpoint: {reason}',
            f'take another checkpoint of the run, such as {other}' if other else
            'take another checkpoint of the run; beside it there is none that is whole'))


def checkpoints_near(path: Path) -> str:
    """Return the question whether a file near a missing one, or in a folder, was meant; nothing where there is none."""
    found = [str(file) for suffix in {path.suffix, '.ckpt'} - {''} for depth in ('', '*/', '*/*/')  # not all of a disk
             for file in (path if path.is_dir() else path.parent).glob(f'{depth}*{suffix}')]
    close = nearest(str(path), found) or found[:3]
    return meant(close)


def mapped(path: str | Path) -> Any:
    """Return what lies in a file of torch's, its tensors mapped, not read; nothing is checked, and any error raised."""
    return torch.load(path, map_location='cpu', weights_only=True, mmap=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the checkpoint of a training that lies in `path`, its tensors mapped from the file.

    Raises:
        InputError: If there is no such file, it is damaged, or it is something else.
    """
    check_whole(Path(path))
    foreign = InputError(message(
        f'ckpt_path: {path}', 'it is no checkpoint of a training with Lightning',
        'bare weights of a network are given by --model.network.checkpoint_path'))
    try:
        checkpoint = mapped(path)
    except Exception as error:  # torch raises several kinds for a foreign file
        raise foreign from error
    if not isinstance(checkpoint, dict) or not {'state_dict', 'pytorch-lightning_version'} <= checkpoint.keys():
        raise foreign
    return checkpoint


def describe(path: str) -> dict[str, Any]:
    """Return what a checkpoint tells of itself: `network`, `epoch`, `global_step`, `file` and its metrics.

    Of one that holds objects of a module of the user's, which load with its code alone: `network` and `file`.
    """
    try:
        checkpoint = mapped(path)
    except pickle.UnpicklingError:
        return {'network': 'model', 'file': Path(path).name}
    hparams = checkpoint.get('hyper_parameters', {})
    return {'network': hparams.get('name', 'model'), 'epoch': checkpoint['epoch'],
            'global_step': checkpoint['global_step'], 'file': Path(path).name, **checkpoint.get('metrics', {})}


def best_of(callback: Any) -> str:
    """Return in words which checkpoint of a `ModelCheckpoint` is the best so far, or without metric the newest."""
    path, score = (getattr(callback, name, None) for name in ('best_model_path', 'best_model_score'))
    if not path:
        return 'no checkpoint had been written'
    if score is None:
        return f'the newest checkpoint is {path}'
    return f'the best checkpoint is {path}, of {callback.monitor} {score:.4g}'


def of_run(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, those that Lightning writes for SLURM included."""
    return [*folder.glob('checkpoints/*.ckpt'), *folder.glob('hpc_ckpt_*.ckpt')]


def of_runs(base: Path) -> list[Path]:
    """Return the checkpoints of all runs in `base`."""
    return [path for folder in base.glob('version_*') for path in of_run(folder)]


def step_checkpoint(folder: Path, step: int) -> Path:
    """Return where a run has its checkpoint of a step, from which it goes on."""
    return folder / 'checkpoints' / f'last-step={step:08d}.ckpt'


def step_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints from which a run goes on, by their step."""
    return sorted(path for path in folder.glob('checkpoints/last-step=*.ckpt')
                  if re.fullmatch(STEP, path.stem))


def step_of(checkpoint: Path) -> int:
    """Return the step of one of these checkpoints."""
    return int(checkpoint.stem.rpartition('=')[2])


def written(path: Path) -> int:
    """Return when a file was written; -1 where there is none, or none any more."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def age(path: Path) -> tuple[bool, int, int]:
    """Return what is larger for the newer of two checkpoints of a run.

    Those of its last moment come first: the best may be of a training that was abandoned for this one.
    """
    if re.fullmatch(STEP, path.stem):
        return True, step_of(path), written(path)
    try:
        step = int(mapped(path)['global_step'])
    except Exception:  # of many kinds: it is damaged, or foreign
        step = -1
    return path.name.startswith('hpc_ckpt_'), step, written(path)


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """Return the newest of the checkpoints that is whole, None if there is none; damaged ones are named and left.

    Of the run that was last written to that is the one of the last step: in a copy of a run, times are of any order.
    """
    runs: dict[Path, list[Path]] = {}
    for path in paths:
        runs.setdefault(path.parents[path.parent.name == 'checkpoints'], []).append(path)
    newest_first = sorted(runs.values(), key=lambda run: max(map(written, run)), reverse=True)
    for path in (path for run in newest_first for path in sorted(run, key=age, reverse=True)):
        if (reason := damage(path)) is None:
            return path
        if path.exists():
            rank_zero_warn(f'checkpoint {path}: passed over, as {reason}')
    return None
