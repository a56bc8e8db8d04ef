"""Where a training is: its epochs, batches and optimiser steps, and what follows after one."""
from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

__all__ = [
    'batches_done', 'ended_step', 'epochs_done', 'is_logging_step', 'log_interval', 'logs_next_step',
    'tell_of_last_step', 'validates',
]

LOG_INTERVAL = 50  # Lightning's default


def epochs_done(trainer: Trainer) -> int:
    """Return the epochs that are done; not one that ended early, by `trainer.max_time`, for example."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    early = epochs.ready == epochs.processed and 0 < batches.processed < trainer.num_training_batches
    return epochs.processed - early


def batches_done(trainer: Trainer) -> int:
    """Return the batches of the running epoch that are done; 0 where one has ended and the next has not begun."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.processed if epochs.ready != epochs_done(trainer) else 0


def validates(trainer: Any, batches: int) -> bool:
    """Return whether a validation within the epoch follows after so many of its batches."""
    loop = trainer.fit_loop
    return validates_after(trainer, trainer.current_epoch, loop.total_batch_idx - loop.batch_idx, batches)


def validates_after(trainer: Any, epoch: int, before: int, batches: int) -> bool:
    """Return whether a validation follows after so many batches of an epoch; `before` it others had so many."""
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None:  # counted over the epochs
        batches += before
    elif (epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    return bool(trainer.enable_validation and every and every != float('inf') and batches % every == 0)


def tell_of_last_step(trainer: Any, changes: bool) -> None:
    """Say so if `trainer.max_steps` ends the training before its epochs, over which the learning rate `changes`."""
    batches, epochs, last = trainer.num_training_batches, trainer.max_epochs or 0, trainer.max_steps
    steps = 0 if math.isinf(batches) else -(-batches // trainer.accumulate_grad_batches)
    if 0 < last < epochs * steps and not trainer.fast_dev_run:
        epoch, step = divmod(last - 1, steps)
        done = min((step + 1) * trainer.accumulate_grad_batches, batches)
        within = trainer.enable_validation and not validates_after(trainer, epoch, epoch * batches, done)
        rank_zero_info(
            f'trainer.max_steps: {last} ends the training before the {epochs * steps} steps of trainer.max_epochs: '
            f'{epochs}' + ', over which the learning rate goes' * changes
            + '; what is trained after the last validation is not evaluated' * bool(within))


def log_interval(trainer: Any) -> int:
    """Return the number of steps between two logging steps: after these the host waits for the device anyway.

    With 0 Lightning logs none, but signals and losses that are not finite are looked for all the same.
    """
    return int(trainer.log_every_n_steps) or LOG_INTERVAL


def logs_next_step(trainer: Any) -> bool:
    """Return before the end of an optimiser step whether metrics are logged after it."""
    return (trainer.global_step + 1) % log_interval(trainer) == 0


def ended_step(trainer: Any, batch_idx: int) -> bool:
    """Return at the end of a training batch whether it ended an optimiser step."""
    last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_logging_step(trainer: Any, batch_idx: int) -> bool:
    """Return at the end of a training batch whether it ended an optimiser step after which metrics are logged."""
    return ended_step(trainer, batch_idx) and trainer.global_step % log_interval(trainer) == 0
