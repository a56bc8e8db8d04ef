"""A progress bar that costs no synchronisation, and a line for each validation."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ['ProgressBar']


class ProgressBar(TQDMProgressBar):
    """Loss and images/s beside the bar, and the accuracy after each validation.

    The values are those of the last logging step, which have been read from the device already. Lightning's own way,
    `self.log(..., prog_bar=True)`, waits for the device at every step, even with the bar switched off.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar."""
        shown = {'loss': ('train/loss', '.3f'), 'images/s': ('train/images_per_second', '.0f')}
        logged = trainer.logged_metrics
        return {title: format(float(logged[key]), spec) for title, (key, spec) in shown.items() if key in logged}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's result."""
        super().on_validation_end(trainer, pl_module)
        metrics = trainer.callback_metrics
        if trainer.is_global_zero and not trainer.sanity_checking and 'val/top1' in metrics:
            where = f'epoch {trainer.current_epoch}: ' if trainer.state.fn == TrainerFn.FITTING else ''
            self.print(f'{where}top-1 {metrics["val/top1"]:.2f} %, top-5 {metrics["val/top5"]:.2f} %, '
                       f'loss {metrics["val/loss"]:.4f}')
