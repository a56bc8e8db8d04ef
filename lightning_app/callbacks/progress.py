"""A progress bar that costs no synchronisation, and a line for each validation."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from ..metrics import SPEED
from ..steps import batches_done, is_logging_step

__all__ = ['ProgressBar']

RESULTS = {'val/top1': 'top-1 {:.2f} %', 'val/top5': 'top-5 {:.2f} %', 'val/loss': 'loss {:.4f}'}
SHOWN = {'loss': ('train/loss', '.3f'), 'images/s': (SPEED, '.0f')}


class ProgressBar(TQDMProgressBar):
    """Loss and images/s beside the bar, and the accuracy after each validation.

    The values are read when metrics are logged, at which step Lightning reads them from the device too. Its own way,
    `self.log(..., prog_bar=True)`, waits for the device at every step, even with the bar switched off. List this
    callback after `Throughput`, whose value it shows.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._shown: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show where in its epoch a training goes on; Lightning begins none then, and would show neither."""
        super().on_train_start(trainer, pl_module)
        if done := batches_done(trainer):
            self.on_train_epoch_start(trainer)
            self.train_progress_bar.initial = self.train_progress_bar.n = done

    def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At a logging step, read what the bar shows."""
        if is_logging_step(trainer, batch_idx):
            metrics = trainer.callback_metrics
            self._shown = {title: format(float(metrics[key]), spec) for title, (key, spec) in SHOWN.items()
                           if key in metrics}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar."""
        return self._shown

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's result."""
        super().on_validation_end(trainer, pl_module)
        metrics = trainer.callback_metrics
        if trainer.is_global_zero and not trainer.sanity_checking and 'val/top1' in metrics:
            where = f'epoch {trainer.current_epoch}: ' if trainer.state.fn == TrainerFn.FITTING else ''
            self.print(where + ', '.join(
                form.format(metrics[key]) for key, form in RESULTS.items() if key in metrics))
