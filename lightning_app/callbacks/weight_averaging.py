"""Exponential moving average of the weights."""
from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from se_timm.errors import InputError, message

__all__ = ['WeightEMA']

TRUE = {'16-true': '16-mixed', 'bf16-true': 'bf16-mixed', '64-true': '32-true'}  # not float32, and what is to be taken


class Average(AveragedModel):
    """torch's averaged model, updated by a few operations over all tensors, and without a wait for the device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self.count = 0  # torch asks its tensor `n_averaged` at each update, for which the host must wait

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the average, and go on counting where it was."""
        result = super().load_state_dict(*args, **kwargs)
        self.count = int(self.n_averaged)
        return result

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights and buffers of `model` into the average; those that are integers are copied."""
        keep = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        both = [(average.detach(), tensor.detach())
                for average, tensor in zip(tensors(self.module), tensors(model), strict=True)]
        floating = [pair for pair in both if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [tensor for _, tensor in floating], 1 - keep)
        for average, tensor in both:
            if not average.is_floating_point():
                average.copy_(tensor)
        self.count += 1
        self.n_averaged += 1


def tensors(module: nn.Module) -> itertools.chain[Tensor]:
    """Return the parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())


class WeightEMA(WeightAveraging):
    """Averages the weights with a decay that grows up to `decay`; validates and saves the average.

    Checkpoints hold the average as `state_dict` and the weights themselves as `current_model_state`. The average starts
    with the first step: Lightning's own `EMAWeightAveraging(update_starting_at_step=...)` validates and saves the
    untrained weights until that step.

    Args:
        decay: Largest decay. The first step's weights are taken as they are; after n steps the decay is
            `min(decay, (1 + n) / (10 + n))`, as in TensorFlow.
    """

    def __init__(self, decay: float = 0.9998) -> None:
        if not 0 <= decay < 1:
            raise InputError(message(
                f'WeightEMA: decay {decay}', 'it is the share of the older average in the new one',
                'take a number from 0 and below 1, such as 0.9998'))
        super().__init__()
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average at the start of a training, and forget that of one before it.

        Raises:
            InputError: If the weights have other digits than float32.
        """
        if stage == 'fit':
            if trainer.precision in TRUE:
                raise InputError(message(
                    f'trainer.precision: {trainer.precision}, with WeightEMA',
                    'an average of weights is taken in float32, and in fewer digits it would not move',
                    f'take {TRUE[trainer.precision]}, or leave out WeightEMA'))
            self._average_model = Average(pl_module, self.decay).to(pl_module.device)
            self._latest_update_step = trainer.global_step
        else:  # what is evaluated is the given network, or that of the checkpoint
            self._average_model = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a training go on with weights and average; an evaluation has the average, which is the `state_dict`."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Update after each optimiser step."""
        return step_idx is not None
