"""Copies of networks without values."""
from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ['meta_copy']


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy on the meta device, for which nothing is allocated."""
    tensors: dict[int, Any] = {id(buffer): buffer.to('meta') for buffer in net.buffers()}
    tensors |= {id(weight): nn.Parameter(weight.detach().to('meta'), False) for weight in net.parameters()}
    return copy.deepcopy(net, tensors)
