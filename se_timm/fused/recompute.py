"""Batch norm, ReLU and the convolution that follows, without keeping what lies between them for the backward pass."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import message
from .algebra import cast
from .function import Moments, Norm, Passes, check_values, like, moments_of, normalised_by, without_autocast
from .vectors import PLAIN, Normalised, Vectors

__all__ = ['Convolution', 'norm_relu_conv']


class Convolution(NamedTuple):
    """A 2-d convolution: weight `(C_out, C / groups, K, K)`, bias `(C_out,)` or None, and how it moves."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Settings(NamedTuple):
    """What `NormReluConv` takes beside tensors."""

    eps: float
    group: Any
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    passes: Passes
    vectors: Vectors

    def as_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of `aten::convolution` after the bias."""
        return self.stride, self.padding, self.dilation, False, (0, 0), self.groups


class NormReluConv(torch.autograd.Function):
    """See `norm_relu_conv`. The convolution's input is computed again, by the pass `apply`, where it is needed."""

    @staticmethod
    def forward(
            x: Tensor, gamma: Tensor | None, beta: Tensor | None, given_mu: Tensor | None,
            given_variance: Tensor | None, weight: Tensor, bias: Tensor | None, settings: Settings,
    ) -> tuple[Tensor | None, ...]:
        if given_mu is not None and given_variance is not None:
            norm = normalised_by(given_mu, given_variance, gamma, settings.eps, x)
        else:
            norm, _ = settings.vectors.normalise(
                *settings.passes.moments(x), x.shape[2] * x.shape[3], gamma, beta, settings.eps, settings.group, False)
        out = torch.ops.aten.convolution(
            activated(x, norm, beta, settings), cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype),
            *settings.as_arguments())
        return out, *norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, gamma, beta, given_mu, _, weight, bias, settings = inputs
        ctx.mark_non_differentiable(*(vector for vector in output[1:] if vector is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, beta, weight, bias, *output[1:])
        ctx.settings, ctx.batch_statistics = settings, given_mu is None

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            raise RuntimeError(message(
                'a second derivative (create_graph=True, or torch.func) of a recomputed batch norm',
                'it has none', "take the backend 'reference'"))
        with without_autocast(d_out.device.type):
            return NormReluConv._gradients(ctx, d_out)

    @staticmethod
    def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, *kept = ctx.saved_tensors
        norm, settings = Normalised(*kept), ctx.settings
        y = activated(x, norm, beta, settings)
        dy, d_weight, d_bias = torch.ops.aten.convolution_backward(
            d_out, y, cast(weight, x.dtype), None if bias is None else list(bias.shape), *settings.as_arguments(),
            (True, True, bias is not None))
        g1, g2, g = settings.passes.reduce(dy, y, x, norm.mu)
        d_beta, d_gamma, b, c, *_ = settings.vectors.terms(
            g1, g2, *(None,) * 7, norm, x.shape[2] * x.shape[3], ctx.batch_statistics, settings.group)
        dx = settings.passes.grad(g, x, norm.mu, norm.scale.expand_as(g1), b, c)
        return (dx, like(d_gamma, gamma), like(d_beta, beta), None, None, like(d_weight, weight), like(d_bias, bias),
                None)


def activated(x: Tensor, norm: Normalised, beta: Tensor | None, settings: Settings) -> Tensor:
    """Return `relu(batch_norm(x))`."""
    excited = settings.vectors.excite(None, None, norm.scale, beta, None, None, len(x))
    return settings.passes.apply(x, None, norm.mu, excited.a, excited.b, None, None, True)


def norm_relu_conv(
        x: Tensor, norm: Norm, convolution: Convolution, passes: Passes, vectors: Vectors = PLAIN,
) -> tuple[Tensor, Moments]:
    """Return `conv(relu(batch_norm(x)))`, and the moments that were normalised by.

    For the backward pass only `x` is kept: the convolution's input costs one more pass over memory there, and none of
    it in between.

    Args:
        x: Output of the convolution before, `(N, C, H, W)`.
        norm: The batch norm.
        convolution: The convolution that follows; it runs in the dtype of `x`, as under autocast.
        passes: What computes the passes.
        vectors: What computes the steps between them.

    Raises:
        ValueError: Where the batch is empty, or where statistics are taken of one value.
        RuntimeError: For a second derivative, in the backward pass.
    """
    check_values(x, norm)
    mu, variance = norm.statistics or (None, None)
    group = None if norm.statistics is not None else norm.group
    settings = Settings(norm.eps, group, *convolution[2:], passes, vectors)
    with without_autocast(x.device.type):
        out, *normalised = NormReluConv.apply(
            x, norm.gamma, norm.beta, mu, variance, convolution.weight, convolution.bias, settings)
    return out, moments_of(Normalised(*normalised), x)
