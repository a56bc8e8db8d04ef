"""What a network costs: parameters and multiply-adds."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .meta import bare, meta_copy

__all__ = ['Cost', 'cost']


class Cost(NamedTuple):
    """Parameters and multiply-adds (of convolutions and fully connected layers, for one image) of a network."""

    parameters: int
    multiply_adds: int

    def __str__(self) -> str:
        return f'{self.parameters / 1e6:.2f} M parameters, {self.multiply_adds / 1e9:.2f} G multiply-adds'


def cost(net: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Cost:
    """Count `net` on one image of `input_size` (channels, height, width), as the paper counts: GFLOPs of Table 2.

    The count runs on the meta device, on a copy without hooks: no arithmetic is done and `net` is not touched.
    """
    meta = bare(meta_copy(net))
    dtype = next((weight.dtype for weight in meta.parameters()), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *input_size, device='meta', dtype=dtype))
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2)
