"""Exponential moving average of the weights."""
from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

__all__ = ['WeightEMA']


class WeightEMA(WeightAveraging):
    """Averages the weights with a decay that grows from 0.1 to `decay`; validates and saves the average.

    Checkpoints hold the average as `state_dict` and the weights themselves as `current_model_state`. The average starts
    with the first step: Lightning's own `EMAWeightAveraging(update_starting_at_step=...)` validates and saves the
    untrained weights until that step.

    Args:
        decay: Largest decay; after n steps it is `min(decay, (1 + n) / (10 + n))`, as in TensorFlow and timm.
    """

    def __init__(self, decay: float = 0.9998) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            warm = (1 + count) / (10 + count)
            keep = min(decay, float(warm)) if not isinstance(warm, Tensor) else warm.clamp(max=decay)
            return averaged * keep + current * (1 - keep)

        super().__init__(avg_fn=average)
        self.decay = decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Update after each optimiser step."""
        return step_idx is not None
