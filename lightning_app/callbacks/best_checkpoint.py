"""The best checkpoints of a training."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

__all__ = ['BestCheckpoint']

SCORES = ('best_k_models', 'kth_best_model_path', 'kth_value', 'best_model_score', 'best_model_path', 'current_score')


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best by a validation metric: Lightning's `ModelCheckpoint`, with a name that does not change.

    If the disk is full, the best so far stays what it was.

    Args:
        monitor: The metric.
        mode: `max` if more is better, `min` if less is.
        keep: How many are kept; one is `best.ckpt`, several are `best-epoch=N.ckpt`.
    """

    def __init__(self, monitor: str = 'val/top1', mode: str = 'max', keep: int = 1) -> None:
        super().__init__(
            monitor=monitor, mode=mode, save_top_k=keep, filename='best' if keep == 1 else 'best-{epoch}',
            enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state, the latest score included, which Lightning leaves out."""
        super().load_state_dict(state_dict)
        self.current_score = state_dict['current_score']

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before: dict[str, Any] = {name: getattr(self, name) for name in SCORES}
        before['best_k_models'] = dict(self.best_k_models)
        super()._update_best_and_save(current, trainer, monitor_candidates)
        failed = getattr(trainer.strategy.checkpoint_io, 'failed', None)  # known to rank 0, which writes
        if trainer.strategy.broadcast(failed is not None):
            for name, value in before.items():
                setattr(self, name, value)
