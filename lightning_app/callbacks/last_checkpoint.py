"""The newest checkpoints of a training, to resume from, written also when it is asked to stop."""
from __future__ import annotations

import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from se_timm.errors import InputError, message

from ..checkpoints import step_checkpoint, step_checkpoints, step_of, written
from ..folders import has_own_folder
from ..resume import begins_anew
from ..steps import ended_step, epochs_done, is_logging_step, log_interval, validates
from .stop_signals import Stopped, StopSignals

__all__ = ['LastCheckpoint']


class LastCheckpoint(Checkpoint):
    """Keeps the newest checkpoints to resume from, in `checkpoints/last-step=N.ckpt` of the run's folder.

    One is written at the end of each epoch, every `every_n_steps` steps in it, before a step that a validation follows,
    and when the training is asked to stop: after SIGUSR1, SIGTERM or SIGINT (Ctrl-C) to any of its processes, the next
    step is finished, the checkpoint written, and all processes end; SLURM is asked to start the job again after
    SIGUSR1. On GPUs several processes agree on that at the next logging step. In a validation they end at once: it is
    repeated with the step before it.

    It comes after other checkpoint callbacks, whose state it saves: from Python list it last, the command line does.

    Args:
        every_n_steps: Optimiser steps between two checkpoints; none within an epoch where null.
        keep: How many are kept: with two, one is left if the newest is damaged.
        handle_signals: Take the signals; else they end the training where it is.
    """

    def __init__(self, every_n_steps: int | None = 1000, keep: int = 2, handle_signals: bool = True) -> None:
        for name, value in (('every_n_steps', every_n_steps), ('keep', keep)):
            if value is not None and value < 1:
                raise InputError(message(
                    f'LastCheckpoint: {name} {value}', 'it is a number of ' + ('steps' if 'steps' in name else 'files'),
                    'take a number from 1' + (', or null' if 'steps' in name else '')))
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.signals = StopSignals() if handle_signals else None
        self.after_validation = False
        self.written: dict[Path, int] = {}  # checkpoint -> when one of that name was written before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the order of the callbacks."""
        if stage != 'fit':
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        behind = callbacks[callbacks.index(self) + 1:]
        if others := [type(callback).__name__ for callback in behind if isinstance(callback, Checkpoint)]:
            raise InputError(message(
                f'trainer.callbacks: {others[0]} after LastCheckpoint', 'its state would be saved before it changes',
                'list LastCheckpoint last'))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the folder; have Lightning install these handlers of signals, not its own, which are collective."""
        self._check_folder(trainer)
        if self.signals:
            connector: Any = trainer._signal_connector
            signals = self.signals

            def install() -> None:
                del connector.register_signal_handlers  # the next time its own again
                signals.install()

            connector.register_signal_handlers = install

    def _check_folder(self, trainer: Trainer) -> None:
        """Refuse a folder with the checkpoints of another training; on the command line each has its own."""
        folder = Path(trainer.default_root_dir)
        if begins_anew(trainer):
            self.written = {}  # by this callback in another training
        others = set(step_checkpoints(folder)) - self.written.keys()
        if others and trainer.ckpt_path is None and not has_own_folder(trainer):
            raise InputError(message(
                f'default_root_dir: {folder}', f'it holds {min(others).name} of another training, and LastCheckpoint '
                'removes those that are not the newest', 'give the Trainer another one, or go on by ckpt_path'))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out Lightning's notice of a signal: a collective and a wait for the device at every batch."""
        if self.signals:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning does the same, and say so if `trainer.max_time` was too short."""
        if self.signals:
            self.signals.restore()
        if out_of_time(trainer):
            self.tell('trainer.max_time', trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back after a training that had nothing left to do, too: it has no `on_train_end`."""
        if self.signals:
            self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and leave what follows, such as an evaluation, without a checkpoint."""
        self.after_validation = False
        if self.signals:
            self.signals.restore()

    def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time to, or if the training shall stop."""
        if not ended_step(trainer, batch_idx):
            return  # gradients of half a step are in no checkpoint
        number = self._asked_to_stop(trainer, is_logging_step(trainer, batch_idx))
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # the validation belongs to the epoch
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        ends = trainer.should_stop  # by trainer.max_time, for example, after a validation that may take long
        if not (due or ends or number or validates_soon(trainer, batch_idx)):
            return
        if validates(trainer, batch_idx + 1):
            self.after_validation = True  # else a training that goes on from here would leave it out
            return
        log_step(trainer)
        self.save(trainer)
        if number:
            self.leave(trainer, number)

    def on_validation_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
            dataloader_idx: int = 0) -> None:
        """End the training if it shall stop."""
        if within_epoch_by_time(trainer):
            return
        if number := self._asked_to_stop(trainer, batch_idx % log_interval(trainer) == 0):
            self.leave(trainer, number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it was time to before a validation within an epoch, and end the training if it shall stop."""
        asks = self.after_validation or within_epoch_by_time(trainer)
        number = self._asked_to_stop(trainer, True) if asks else 0
        if self.after_validation or number:
            self.after_validation = False
            self.save(trainer)
        if number:
            self.leave(trainer, number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and end the training if it shall stop."""
        self.save(trainer)
        last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        if not last and (number := self._asked_to_stop(trainer, True)):
            self.leave(trainer, number)

    def _asked_to_stop(self, trainer: Trainer, synchronised: bool) -> int:
        """Return the signal on which all processes agree that they end, 0 if none.

        Args:
            trainer: The trainer.
            synchronised: Now the host waits for the device anyway; on GPUs processes agree at no other moment.
        """
        if self.signals is None:
            return 0
        on_host = trainer.strategy.root_device.type == 'cpu'
        return self.signals.agreed(trainer) if trainer.world_size == 1 or on_host or synchronised else 0

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint, and remove those that are too old. Collective."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        path = step_checkpoint(folder, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()  # a training that goes on from here does not log again what is before
        self.written[path] = written(path)
        trainer.save_checkpoint(path, weights_only=False)
        there = step_checkpoints(folder) if trainer.is_global_zero else []
        # later ones are of a training that was abandoned for this one
        kept = [file for file in there if file.name <= path.name][-self.keep:]
        # this one may not be written, on a full disk, or not yet
        if any(file in self.written and written(file) != self.written[file] for file in kept):
            for file in set(there) - set(kept):
                file.unlink()

    def leave(self, trainer: Trainer, number: int) -> None:
        """End this process: with status 0 if SLURM starts the job again, else that of the signal."""
        name = signal.Signals(number).name
        requeued = name == 'SIGUSR1' and 'SLURM_JOB_ID' in os.environ
        if requeued and trainer.is_global_zero:
            requeue()
        self.tell(name, trainer)
        # a process that Lightning started and that ends before the first one with a status makes it kill that
        child = trainer.strategy.launcher is not None and not trainer.is_global_zero
        raise Stopped(0 if requeued or child else 128 + number)

    def tell(self, reason: str, trainer: Trainer) -> None:
        """Say why and where the training stopped, and how it goes on."""
        saved = step_checkpoints(Path(trainer.default_root_dir))
        how = 'the same command with --ckpt_path auto' if has_own_folder(trainer) else 'fit with it as ckpt_path'
        rank_zero_info(f'{reason}: stopped at step {trainer.global_step}, ' + (
            f'the checkpoint is of step {step_of(saved[-1])}; {how} goes on from there'
            if saved else 'before there was a checkpoint to go on from'))


def out_of_time(trainer: Trainer) -> bool:
    """Return whether the training ends because its time is over, before what else would end it."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    over = any((timer.time_remaining() or math.inf) < 0 for timer in timers)
    return over and trainer.global_step != trainer.max_steps and epochs_done(trainer) != trainer.max_epochs


def within_epoch_by_time(trainer: Any) -> bool:
    """Return whether a validation is one of those by time, before whose step no checkpoint is written."""
    ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return trainer.val_check_batch is None and not trainer.sanity_checking and not ends_epoch


def validates_soon(trainer: Any, batch_idx: int) -> bool:
    """Return whether a validation, or the end of the epoch, follows the next optimiser step, or comes within it."""
    last = min(batch_idx + 1 + trainer.accumulate_grad_batches, trainer.num_training_batches)
    return last == trainer.num_training_batches or any(
        validates(trainer, batches) for batches in range(batch_idx + 2, last + 1))


def log_step(trainer: Any) -> None:
    """Let Lightning log the step now and not again, as it otherwise does after the checkpoint that is behind it."""
    connector = trainer._logger_connector
    connector.update_train_step_metrics()
    connector.update_train_step_metrics = lambda: delattr(connector, 'update_train_step_metrics')


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array, task = os.environ.get('SLURM_ARRAY_JOB_ID'), os.environ.get('SLURM_ARRAY_TASK_ID')
    job = f'{array}_{task}' if array else os.environ['SLURM_JOB_ID']
    try:
        subprocess.run(['scontrol', 'requeue', job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f'SLURM did not requeue job {job} ({getattr(error, "stderr", None) or error}); start it again')
