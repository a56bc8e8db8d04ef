"""Training speed, measured without waiting for the device."""
from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from ..metrics import DATA_WAIT, SPEED
from ..steps import is_logging_step

__all__ = ['Throughput']


class Throughput(Callback):
    """Logs the speed of the training, and how much of its time goes by until the data are there.

    `train/images_per_second` counts the images of all processes over the steps since the last logging step;
    `train/data_wait` is the share of that time, in percent, between the end of a batch and the arrival of the next on
    the device, in this process. If it is more than a few, more or faster workers make the training faster.

    Validation, checkpoints, with the step after them, and the first step of an epoch (which starts the workers) are not
    counted; where nothing else lies between two logging steps, both are NaN. The clock is read when metrics are logged,
    at which moment Lightning reads them from the device anyway.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._ended = 0.0
        self._stopped: float | None = None
        self._left_out = False
        self._images = 0
        self._waited = 0.0

    def _stop(self) -> None:
        if self._stopped is None:
            self._stopped = time.perf_counter()

    def _go_on(self) -> float:
        """Leave out the time in which the clock stood, if it did; return what it shows now."""
        now = time.perf_counter()
        if self._stopped is not None and self._start is not None:
            self._start += now - self._stopped
        self._stopped = None
        return now

    def on_save_checkpoint(
            self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock: nothing tells when the checkpoint is written, so that it goes on after the next step."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on: from now on the next batch is waited for."""
        self._ended = self._go_on()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what lies before the epoch."""
        self._start = self._stopped = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how long the batch was waited for."""
        self._left_out = self._stopped is not None
        if not self._left_out:
            self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch; at a logging step, log the speed."""
        now = self._ended = self._go_on()
        if self._start is None:  # the clock starts after the first step
            self._begin(now)
            return
        self._images += 0 if self._left_out else images_in(batch) * trainer.world_size
        if is_logging_step(trainer, batch_idx):
            # Lightning logs a value again where there is none
            seconds = now - self._start if self._images else math.nan
            pl_module.log_dict({SPEED: self._images / seconds, DATA_WAIT: 100 * self._waited / seconds})
            self._begin(now)

    def _begin(self, now: float) -> None:
        self._start, self._images, self._waited = now, 0, 0.0


def images_in(batch: Any) -> int:
    """Return the number of images: that of labels, as there may be several versions of each image."""
    return len(batch[1]) if isinstance(batch, (list, tuple)) and len(batch) > 1 else extract_batch_size(batch)
