"""Copies of networks, with values or without, and without what users hang on them."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import message

__all__ = ['bare', 'copied', 'does_not_run', 'full_copy', 'meta_copy']


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy on the meta device, for which nothing is allocated."""
    tensors: dict[int, Any] = {id(buffer): buffer.to('meta') for buffer in net.buffers()}
    tensors |= {id(weight): nn.Parameter(weight.detach().to('meta'), False) for weight in net.parameters()}
    tensors |= {id(each): each.detach().to('meta') for each in cached(net)}
    return copy.deepcopy(net, tensors)


def full_copy(net: nn.Module) -> nn.Module:
    """Return a copy with all values."""
    return copy.deepcopy(net, {id(each): each.detach().clone() for each in cached(net)})


def cached(net: nn.Module) -> Iterator[Tensor]:
    """Yield what modules keep, by name, of what they have computed: timm its attention biases, until the next `train`.

    `deepcopy` by itself copies no tensor with a graph.
    """
    for module in net.modules():
        for kept in vars(module).values():
            if isinstance(kept, dict):
                yield from (each for each in kept.values() if isinstance(each, Tensor) and not each.is_leaf)


def copied(caller: str, net: nn.Module, make: Callable[[nn.Module], nn.Module] = full_copy) -> nn.Module:
    """Return a copy of `net`.

    Args:
        caller: The function that the user has called.
        net: What shall be copied.
        make: Copies.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        return make(net)
    except Exception as error:  # of any module's own making
        raise ValueError(message(
            f'{caller}({type(net).__name__})', f'it cannot be copied, and the work is done on a copy ({error})',
            'take out what cannot be: old weight norms and pruning of torch.nn.utils, activations that are kept',
        )) from error


def does_not_run(caller: str, net: nn.Module, size: Sequence[int], failure: Exception) -> ValueError:
    """Return the error for a network that `caller` cannot try on an image of (channels, height, width)."""
    return ValueError(message(
        f'{caller}({type(net).__name__})',
        f'it does not run on an image of {tuple(size)} ({type(failure).__name__}: {failure})',
        'say input_size=(channels, height, width) of its images'))


def bare(net: nn.Module) -> nn.Module:
    """Return `net` in evaluation mode and without its hooks: whatever they do, they are the user's."""
    for module in net.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return net.eval()
