"""The generators of random numbers, which a training seeds at each of its steps, as they were before it."""
from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ['GeneratorsRestored']


class GeneratorsRestored(Callback):
    """Lets what comes after a training, such as the next network of an ensemble, depend on no training before it."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.device: torch.device | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the states of Python, NumPy and torch, and of the device."""
        self.states = _collect_rng_states(include_cuda=False)
        device = trainer.strategy.root_device
        if device.type == 'cuda':
            self.device, self.states['device'] = device, torch.cuda.get_rng_state(device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let them go on from there."""
        if 'device' in self.states:
            torch.cuda.set_rng_state(self.states.pop('device'), self.device or 'cuda')
        if self.states:
            _set_rng_states(self.states)
        self.states = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let them go on from there."""
        self.on_fit_end(trainer, pl_module)
