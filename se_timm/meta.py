"""Copies of networks without values, and without what users hang on them."""
from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ['bare', 'meta_copy']


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy on the meta device, for which nothing is allocated."""
    tensors: dict[int, Any] = {id(buffer): buffer.to('meta') for buffer in net.buffers()}
    tensors |= {id(weight): nn.Parameter(weight.detach().to('meta'), False) for weight in net.parameters()}
    return copy.deepcopy(net, tensors)


def bare(net: nn.Module) -> nn.Module:
    """Return `net` in evaluation mode and without its hooks: whatever they do, they are the user's."""
    for module in net.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return net.eval()
