"""The end of a training in three lines."""
from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ['ResultLine']


class ResultLine(Callback):
    """Prints the best validation result, where its checkpoint lies, and the command that evaluates it."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the result if it is the best so far."""
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or 'val/top1' not in metrics:
            return
        if not self.best or metrics['val/top1'] > self.best['top1']:
            self.best = {'top1': float(metrics['val/top1']), 'top5': float(metrics['val/top5']),
                         'epoch': trainer.current_epoch}

    def state_dict(self) -> dict[str, float]:
        """Return the best result, which a resumed training goes on with."""
        return dict(self.best)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over the best result of the training that is resumed."""
        self.best = dict(state_dict)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the result."""
        if not trainer.is_global_zero or not self.best:
            return
        print(f'\nbest: top-1 {self.best["top1"]:.2f} %, top-5 {self.best["top5"]:.2f} %, epoch {self.best["epoch"]}')
        unreadable = getattr(getattr(trainer.datamodule, 'training', None), 'unreadable', None)  # type: ignore[attr-defined]
        if unreadable is not None and unreadable.item():
            print(f'unreadable training images replaced, in all epochs: {unreadable.item()} (named in the log)')
        path = getattr(trainer.checkpoint_callback, 'best_model_path', '')
        if path:
            print(f'checkpoint: {path}\nevaluate:   python -m lightning_app validate --ckpt_path {path}')
