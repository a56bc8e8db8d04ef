"""Shared memory for batches that a worker uses again, once the training has let go of the batch before.

PyTorch's loader takes fresh shared memory for each batch: a page fault for every 4 kB, and all is given back to the
system afterwards by the training.
"""
from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ['Inline', 'Lent', 'stack']

SPARE = 1  # pieces of memory that a worker keeps though nobody uses them
# The last byte of a piece says who has it. The worker writes it when it is FREE, the training when it is LENT.
FREE, LENT = 0, 1

_pieces: list[Tensor] = []  # of this worker, bytes


def stack(images: Sequence[Tensor]) -> Tensor:
    """Return `torch.stack(images)`; in a worker in shared memory that it has back only if it passes it on by `Lent`."""
    if get_worker_info() is None:
        return torch.stack(list(images))
    dtype, shape = images[0].dtype, (len(images), *images[0].shape)
    size = math.prod(shape) * dtype.itemsize
    return torch.stack(list(images), out=piece(size)[:size].view(dtype).view(shape))


def piece(size: int) -> Tensor:
    """Return memory for so many bytes and one more, and say that it is lent."""
    used: list[Tensor] = []
    free: list[Tensor] = []
    for each in _pieces:  # looked at once, as the training may give one back at any time
        (free if each[-1] == FREE else used).append(each)
    chosen, *spare = [each for each in free if len(each) > size] or [
        torch.empty(size + 1, dtype=torch.uint8).share_memory_()]
    chosen[-1] = LENT
    _pieces[:] = [*used, chosen, *spare[:SPARE]]
    return chosen


class Lent:
    """What `stack` has made in a worker, or a view of it, on its way: it arrives as a tensor.

    The worker has the memory back when no tensor there makes use of it any more.

    Args:
        batch: The tensor.
    """

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        memory = torch.empty(0, dtype=torch.uint8).set_(self.batch.untyped_storage())
        return received, (memory, self.batch.dtype, tuple(self.batch.shape), self.batch.stride())


def received(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return a lent tensor; its memory is given back with the last tensor that makes use of it."""
    whole = memory.numpy()
    content = whole[:math.prod(shape) * dtype.itemsize]
    # PyTorch does not tell when memory of a tensor is let go of, but holds the array that it is from as long
    weakref.finalize(content, give_back, whole, os.getpid()).atexit = False
    return torch.from_numpy(content).view(dtype).as_strided(shape, stride)


def give_back(memory: npt.NDArray[np.uint8], process: int) -> None:
    """Say that a piece is free; not in a process that was forked meanwhile, whose parent still has it.

    As an array: a tensor that was received in inference mode may not be written to after it.
    """
    if os.getpid() == process:
        memory[-1] = FREE


class Inline:
    """A small tensor on its way, in the message itself: memory of its own takes longer to pass on.

    Args:
        tensor: It arrives as such.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return torch.from_numpy, (self.tensor.numpy(),)
