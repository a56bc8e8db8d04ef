"""The four passes as operators of torch: `torch.ops.se_timm.tail_{moments,apply,reduce,grad}`.

They are functional: moments are returned, and running statistics are updated by the caller, so that processes can share
them in between. Each has a schema, kernels (the CPU's of `inductor`, Triton's on CUDA), a shape function for meta and
fake tensors, and a rule for autograd. Under autocast they take what they are given: activations may be of a half
precision beside float32 vectors, and all sums are float32 whatever the dtype of `x`.

`tail_moments` and `tail_apply` have gradients, which together cost one pass more than those of `fused_tail`. The rules
are autograd functions, not `torch.library.register_autograd`: with that, forward-mode derivatives are silently zero.
Here they, `torch.func.grad` and second derivatives are errors; `vmap` runs image by image.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import message
from . import algebra, kernels, launch
from .function import REFERENCE, Passes
from .inductor import COMPILED
from .inductor import available as compiler_available

__all__ = ['OPERATORS', 'TRITON', 'backend_passes']

SCHEMAS = {
    'moments': '(Tensor x) -> (Tensor, Tensor)',
    'apply': '(Tensor x, Tensor? shortcut, Tensor mu, Tensor a, Tensor b, Tensor? shortcut_mu, Tensor? shortcut_scale, '
             'bool relu) -> Tensor',
    'reduce': '(Tensor dy, Tensor? y, Tensor x, Tensor mu) -> (Tensor, Tensor, Tensor)',
    'grad': '(Tensor g, Tensor x, Tensor mu, Tensor a, Tensor b, Tensor c) -> Tensor',
}


TRITON = Passes(kernels.moments, kernels.apply, kernels.reduce, kernels.grad)


def backend_passes(x: Tensor) -> Passes:
    """Return what computes the passes on the device and in the dtype of `x`: Triton, Inductor, or plain torch."""
    if x.device.type == 'cuda' and x.dtype != torch.float64 and not launch.problem():
        return TRITON
    if x.device.type == 'cpu' and compiler_available():
        return COMPILED
    return REFERENCE


def _vectors(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=algebra.sum_dtype(x))


SHAPES: dict[str, Callable[..., Any]] = {
    'moments': lambda x: (_vectors(x), _vectors(x)),
    'apply': lambda x, *_: torch.empty_like(x),
    'reduce': lambda dy, y, x, mu: (
        _vectors(x), _vectors(x), dy.new_empty(0) if y is None else torch.empty_like(x, dtype=dy.dtype)),
    'grad': lambda g, x, *_: torch.empty_like(x),
}


class Moments(torch.autograd.Function):
    """Gradient of `moments`: with `m` the mean and `v` the sum of squares, `dx = dm / P + 2 dv (x - m)`, P pixels."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.se_timm.tail_moments(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_squares: Tensor) -> Tensor:
        refuse_second_derivative('moments')
        x, mean = ctx.saved_tensors
        centred = x - mean[:, :, None, None]
        pixels = x.shape[2] * x.shape[3]
        return (d_mean[:, :, None, None] / pixels + 2 * d_squares[:, :, None, None] * centred).to(x.dtype)


class Apply(torch.autograd.Function):
    """Gradients of `apply`, from the passes `reduce` and `grad`."""

    @staticmethod
    def forward(
            x: Tensor, shortcut: Tensor | None, mu: Tensor, a: Tensor, b: Tensor, shortcut_mu: Tensor | None,
            shortcut_scale: Tensor | None, relu: bool,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.se_timm.tail_apply(x, shortcut, mu, a, b, shortcut_mu, shortcut_scale, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, relu = inputs
        ctx.save_for_backward(*tensors, output if relu else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative('apply')
        x, shortcut, mu, a, _, shortcut_mu, shortcut_scale, y = ctx.saved_tensors
        ops = torch.ops.se_timm
        d_b, d_a, g = ops.tail_reduce(dy, y, x, mu)
        g = dy if y is None else g
        dx = ops.tail_grad(g, x, mu, a, torch.zeros_like(a), torch.zeros_like(mu))
        d_shortcut, d_shortcut_mu, d_shortcut_scale = g, None, None
        if shortcut is not None and shortcut_mu is not None:
            d_shortcut = g * shortcut_scale[:, None, None]
            d_shortcut_mu = -(shortcut_scale * d_b).sum(0)
            d_shortcut_scale = ops.tail_reduce(g, None, shortcut, shortcut_mu)[1].sum(0)
        return (dx, None if shortcut is None else d_shortcut.to(shortcut.dtype), -(a * d_b).sum(0), d_a, d_b,
                d_shortcut_mu, d_shortcut_scale, None)


def refuse_second_derivative(name: str) -> None:
    """Raise `RuntimeError` in a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(message(
            f'a second derivative of torch.ops.se_timm.tail_{name}', 'it has none',
            "take the backend 'reference', or the functions of se_timm.fused.algebra"))


def _without_gradient(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            refuse_second_derivative(name)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.se_timm, f'tail_{name}')(*args)

    return run


def _kernel(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        x = args[0] if name in ('moments', 'apply') else args[2] if name == 'reduce' else args[1]
        return getattr(backend_passes(x), name)(*args)

    return run


AUTOGRAD: dict[str, Callable[..., Any]] = {
    'moments': Moments.apply, 'apply': Apply.apply, 'reduce': _without_gradient('reduce'),
    'grad': _without_gradient('grad'),
}


def _register() -> torch.library.Library:
    library = torch.library.Library('se_timm', 'DEF')
    for name, schema in SCHEMAS.items():
        operator = f'tail_{name}'
        library.define(operator + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        for key in ('CPU', 'CUDA'):
            library.impl(operator, _kernel(name), key)
        library.impl(operator, AUTOGRAD[name], 'Autograd')
        torch.library.register_fake(f'se_timm::{operator}', SHAPES[name], lib=library)
    return library


LIBRARY = _register()  # the registrations live as long as this does
OPERATORS = Passes(*(getattr(torch.ops.se_timm, f'tail_{name}').default for name in Passes._fields))
