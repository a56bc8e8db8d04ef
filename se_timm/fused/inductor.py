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

__all__ = ['COMPILED', 'available']


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
def _variant(name: str, key: tuple[Any, ...]) -> Callable[..., Any]:
    """Return the pass `name`, to be compiled for arguments that are as `key` says.

    Each variant is a function with a code object of its own. Dynamo keeps what it has compiled at the code object: at
    one that all shapes of a network share it would reach its recompile limit, and run the rest uncompiled.
    """
    function = getattr(algebra, name)
    own = types.FunctionType(function.__code__.replace(co_name=f'{name}_{abs(hash(key)):x}'), function.__globals__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def _describe(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def _compiled(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(algebra, name))
    def run(*args: Any) -> Any:
        # Dynamo warns of the `.grad` of tensors with a history; the passes have no gradient of their own
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return _variant(name, tuple(map(_describe, args)))(*args)

    return run


COMPILED = Passes(*(_compiled(name) for name in Passes._fields))
