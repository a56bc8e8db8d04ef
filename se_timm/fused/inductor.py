"""The four passes on the CPU, each compiled to one loop by Inductor."""
from __future__ import annotations

import functools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import algebra
from .function import Passes

__all__ = ['COMPILED', 'available', 'compiled']


@functools.cache
def available() -> bool:
    """Return whether there is a C++ compiler, without which Inductor cannot compile for the CPU."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except (exc.InvalidCxxCompiler, RuntimeError):
        return False


@functools.cache
def _variant(function: Callable[..., Any], key: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `function`, to be compiled for arguments that are as `key` says.

    Each variant is a function with a code object of its own. Dynamo keeps what it has compiled at the code object: at
    one that all shapes of a network share it would reach its recompile limit, and run the rest uncompiled.
    """
    code = function.__code__.replace(co_name=f'{function.__name__}_{abs(hash(key)):x}')
    return torch.compile(types.FunctionType(code, function.__globals__), dynamic=False, fullgraph=True)


def _describe(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, of tensors and hashable values, compiled for each kind of arguments that it gets."""
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        # Dynamo warns of the `.grad` of tensors with a history; the passes have no gradient of their own
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return _variant(function, tuple(map(_describe, args)))(*args)

    return run


COMPILED = Passes(*(compiled(getattr(algebra, name)) for name in Passes._fields))
