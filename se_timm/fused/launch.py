"""Triton, where it is installed: how kernels are declared, and launched without Triton's own overhead."""
from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import torch
from torch import Tensor

try:
    from triton import jit
    from triton import language as tl
except ImportError:
    tl = None

    def jit(function: Any) -> Any:
        """Return the function itself, that the modules can be imported."""
        return function

__all__ = ['OPTIONS', 'jit', 'launch', 'power_of_two', 'problem', 'tl']

# products are added in one step: what Triton does by itself up to 3.9, which warns that it will not from 3.10
OPTIONS = {'enable_fp_fusion': True}
OLDEST = (7, 0)  # compute capability that Triton supports
# a launch looks at every argument: by its own way Triton takes longer for that than the GPU for many a kernel
_COMPILED: dict[tuple[Any, ...], Any] = {}


@functools.cache
def problem() -> str:
    """Return in words why the kernels cannot run on this machine's GPU, or an empty text."""
    if tl is None:
        return 'Triton, which computes the fused tail on CUDA, is not installed'
    if torch.version.hip is not None:
        return 'the kernels are written for NVIDIA GPUs'
    if not any(map(shutil.which, (os.environ.get('CC') or 'gcc', 'gcc', 'clang'))):
        return 'Triton needs a C compiler, and there is neither gcc nor clang'
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        return f'Triton needs a GPU of compute capability {".".join(map(str, OLDEST))} or newer'
    return ''


def power_of_two(number: int) -> int:
    """Return the power of two that is not below `number`, as Triton wants the sizes of tiles."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    """Run a kernel on the device of the tensors; on the CPU, by Triton's interpreter.

    Args:
        kernel: A function that `jit` decorated.
        programs: Their number, which is the grid.
        warps: Of each program.
        arguments: All that the kernel takes, in its order.
    """
    index = next(value for value in arguments if isinstance(value, Tensor)).get_device()
    if index < 0:
        kernel[(programs,)](*arguments, num_warps=warps, **OPTIONS)
    elif index == torch.cuda.current_device():
        _launch(index, kernel, programs, warps, arguments)
    else:
        with torch.cuda.device(index):
            _launch(index, kernel, programs, warps, arguments)


def _launch(index: int, kernel: Any, programs: int, warps: int, arguments: tuple[Any, ...]) -> None:
    # whatever Triton compiles anew for: dtypes, addresses that 16 divides, whole numbers for some of their properties
    key = (id(kernel), index, warps, *[
        (value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else
        float if isinstance(value, float) else value for value in arguments])
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[(programs,)](*arguments, num_warps=warps, **OPTIONS)
    else:
        compiled[(programs, 1, 1)](*arguments)
