"""Training speed, measured without waiting for the device."""
from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..classifier import is_logging_step

__all__ = ['Throughput']


class Throughput(Callback):
    """Logs `train/images_per_second`: images of all processes over the steps since the last logging step.

    Validation, checkpoints and the first step of an epoch (which starts the workers) are not counted. The clock is read
    when metrics are logged, at which moment Lightning reads them from the device anyway.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._images = 0

    def on_save_checkpoint(
            self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget what lies before the checkpoint."""
        self._start = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what lies before the epoch."""
        self._start = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what lies before and in the validation."""
        self._start = None

    def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch; at a logging step, log the speed."""
        if self._start is None:  # the clock starts after the first step
            self._start, self._images = time.perf_counter(), 0
            return
        self._images += len(batch[0]) * trainer.world_size
        if is_logging_step(trainer, batch_idx):
            now = time.perf_counter()
            pl_module.log('train/images_per_second', self._images / (now - self._start))
            self._start, self._images = now, 0
