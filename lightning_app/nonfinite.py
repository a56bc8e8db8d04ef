"""Training steps that are not finite: counted, and where some are allowed undone, without waiting for the device."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

__all__ = ['NonfiniteSteps']


class NonfiniteSteps:
    """Counts the optimiser steps whose loss, or where some are allowed gradient, is not finite.

    An allowed one is undone: weights, the optimiser's state and batch norm's statistics stay what they were, but for
    the steps that some of timm's optimisers count in their parameter groups (`lamb`, `adan`, `lookahead_*`). torch's
    fused optimisers leave it out on the device; for others the host has to ask at each step, as with a GradScaler.

    Args:
        net: The network, on its device.
        allowed: How many steps are undone; where none are, they are only counted, as the training ends.
        count: Steps that a training which is resumed has counted.

    Attributes:
        count: The steps so far, int64, on the device.
    """

    def __init__(self, net: nn.Module, allowed: int, count: int = 0) -> None:
        device = next(net.parameters()).device
        self.parameters = list(net.parameters())
        self.undo = allowed > 0
        self.count = torch.tensor(count, device=device)
        self.found = torch.zeros((), device=device)
        norms = [module for module in net.modules() if isinstance(module, _BatchNorm)] if self.undo else []
        self.statistics = by_dtype(buffer for norm in norms for buffer in norm.buffers())
        self.kept: list[Tensor] = []

    def begin(self) -> None:
        """Remember batch norm's statistics; before the first batch of an optimiser step."""
        self.found.zero_()
        self.kept = [flat(buffers) for buffers in self.statistics]

    def note(self, loss: Tensor) -> None:
        """Look at the loss of a batch."""
        self.found = torch.maximum(self.found, (~torch.isfinite(loss.detach())).float())

    def end(self, optimizer: Optimizer, scaled: bool) -> None:
        """Count, and undo; after the backward pass, before the optimiser's step.

        Args:
            optimizer: The optimiser.
            scaled: A GradScaler leaves out steps by itself, and makes gradients infinite that are none of ours.
        """
        if self.undo:
            if not scaled:
                self._skip(optimizer)
            for buffers, kept in zip(self.statistics, self.kept, strict=True):
                restore(buffers, kept, self.found)
        self.count += self.found.to(self.count.dtype)

    def _skip(self, optimizer: Optimizer) -> None:
        """Leave the step out if its gradient, the same in all processes, is not finite."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        nonfinite = (~torch.isfinite(get_total_norm(gradients))).float()
        self.found = torch.maximum(self.found, nonfinite)
        if getattr(optimizer, '_step_supports_amp_scaling', False):
            optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # what a GradScaler tells them
        elif nonfinite.item():
            optimizer.zero_grad(set_to_none=True)  # torch's and timm's optimisers leave such parameters alone


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in a list for each dtype."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def flat(tensors: list[Tensor]) -> Tensor:
    """Return a copy of all values: one operation for many small tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def restore(tensors: list[Tensor], kept: Tensor, found: Tensor) -> None:
    """Set the tensors to the values `kept` if `found` is not 0."""
    values = torch.where(found > 0, kept, flat(tensors))
    parts = values.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
