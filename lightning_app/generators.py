"""The generators of random numbers, which a training seeds at each of its steps, as they were before it."""
from __future__ import annotations

from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ['GeneratorsRestored']


class GeneratorsRestored(Callback):
    """Lets what comes after a training, such as the next network of an ensemble, depend on no training before it."""

    def __init__(self) -> None:
        self.kept = ExitStack()

    def __reduce__(self) -> tuple[type, tuple[()]]:  # a copy, as of processes that are spawned, has kept nothing
        return type(self), ()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the states of Python, NumPy and torch, and of the device; other GPUs are other processes'."""
        self.kept.enter_context(isolate_rng(include_cuda=False))
        if (device := trainer.strategy.root_device).type == 'cuda':
            self.kept.enter_context(torch.random.fork_rng([device]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let them go on from there."""
        self.kept.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let them go on from there."""
        self.kept.close()
