"""The four passes as one differentiable function."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import message
from . import algebra

__all__ = ['GATES', 'REFERENCE', 'Gate', 'Passes', 'fused_tail']


class Passes(NamedTuple):
    """The four passes over memory; see `algebra`, whose functions these are or compute the same as."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    apply: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor]]
    grad: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Passes(algebra.moments, algebra.apply, algebra.reduce, algebra.grad)


class Gate(NamedTuple):
    """Weights of the two layers of the excitation, as matrices, and its last non-linearity (a key of `GATES`)."""

    fc1: Tensor
    bias1: Tensor | None
    fc2: Tensor
    bias2: Tensor | None
    excitation: str


# last non-linearity -> itself, and its derivative as a function of its value
GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    'sigmoid': (torch.sigmoid, lambda s: s * (1 - s)),
    'tanh': (torch.tanh, lambda s: 1 - s * s),
    'relu': (torch.relu, lambda s: (s > 0).to(s.dtype)),
    'hard_sigmoid': (F.hardsigmoid, lambda s: ((s > 0) & (s < 1)).to(s.dtype) / 6),
}


INPUTS = 15  # of `FusedTail`


class FusedTail(torch.autograd.Function):
    """See `fused_tail`. The gradients are derived in the module `algebra` and the comments of `backward`."""

    @staticmethod
    def forward(
            x: Tensor, shortcut: Tensor | None, gamma: Tensor | None, beta: Tensor | None, given_mu: Tensor | None,
            given_variance: Tensor | None, fc1: Tensor | None, bias1: Tensor | None, fc2: Tensor | None,
            bias2: Tensor | None, keep: Tensor | None, excitation: str, relu: bool, eps: float, passes: Passes,
    ) -> tuple[Tensor, ...]:
        dtype, pixels = algebra.sum_dtype(x), x.shape[2] * x.shape[3]
        mean, squares = passes.moments(x)
        if given_mu is None or given_variance is None:
            mu, variance = algebra.combine(mean, squares, pixels)
        else:  # copies: an input cannot be saved as an output
            mu, variance = given_mu.to(dtype, copy=True), given_variance.to(dtype, copy=True)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if gamma is None else inverse * gamma.to(dtype)
        shift = torch.zeros_like(mu) if beta is None else beta.to(dtype)
        hidden = gates = mean.new_ones(())
        a, b = scale.expand_as(mean), shift.expand_as(mean)
        if fc1 is not None and fc2 is not None:
            hidden, gates = excite(scale * (mean - mu) + shift, fc1, bias1, fc2, bias2, excitation)
            a, b = a * gates, b * gates
        if keep is not None:
            a, b = a * keep[:, None], b * keep[:, None]
        y = passes.apply(x, shortcut, mu, a, b, relu)
        return y, mu, variance, mean, scale, inverse, hidden, gates, a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, shortcut, gamma, beta, given_mu, _, fc1, bias1, fc2, bias2, keep, excitation, relu, _, passes = inputs
        y, *vectors = output
        ctx.mark_non_differentiable(*vectors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y if relu else None, gamma, beta, fc1, bias1, fc2, bias2, keep, *vectors)
        ctx.excitation, ctx.batch_statistics, ctx.passes = excitation, given_mu is None, passes
        ctx.shortcut = None if shortcut is None else shortcut.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * INPUTS
        if torch.is_grad_enabled():  # what follows is not recorded, and a second derivative would silently lack it
            raise RuntimeError(message(
                'a second derivative (create_graph=True, or torch.func) of the fused residual tail',
                'it has none', 'take the backend reference'))
        with torch.autocast(dy.device.type, enabled=False):
            return FusedTail._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, y, gamma, beta, fc1, bias1, fc2, bias2, keep,
         mu, _, mean, scale, inverse, hidden, gates, a) = ctx.saved_tensors
        x, y = x.detach(), None if y is None else y.detach()  # Dynamo warns of the `.grad` of others
        pixels = x.shape[2] * x.shape[3]
        g1, g2 = ctx.passes.reduce(dy, y, x, mu)
        # with u = scale (x - mu) + shift and y = relu(keep s u + shortcut), the gradient of u is keep s g + dz / pixels
        kept = g1.new_ones(()) if keep is None else keep[:, None]
        shift = torch.zeros_like(mu) if beta is None else beta.to(mu.dtype)
        dz = torch.zeros_like(mean)
        d_fc1 = d_bias1 = d_fc2 = d_bias2 = None
        if fc1 is not None:
            ds = kept * (scale * g2 + shift * g1)
            z = scale * (mean - mu) + shift
            dz, d_fc1, d_bias1, d_fc2, d_bias2 = excite_backward(
                ds, z, hidden, gates, fc1, fc2, ctx.excitation)
        d_beta = (kept * gates * g1 + dz).sum(0)
        d_gamma = (kept * gates * g2 + dz * (mean - mu)).sum(0) * inverse
        b, c = scale * dz / pixels, torch.zeros_like(mu)
        if ctx.batch_statistics:  # mu and sigma depend on x
            count = len(x) * pixels
            b = b - scale * d_beta / count
            c = scale * inverse * d_gamma / count
        dx, d_shortcut = ctx.passes.grad(dy, y, x, mu, a, b, c)
        return (
            dx, None if ctx.shortcut is None else d_shortcut.to(ctx.shortcut), like(d_gamma, gamma), like(d_beta, beta),
            None, None, like(d_fc1, fc1), like(d_bias1, bias1), like(d_fc2, fc2), like(d_bias2, bias2),
            *(None,) * 5)


def like(value: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of its parameter; None where there is no parameter."""
    return None if value is None or parameter is None else value.to(parameter.dtype)


def excite(
        z: Tensor, fc1: Tensor, bias1: Tensor | None, fc2: Tensor, bias2: Tensor | None, excitation: str,
) -> tuple[Tensor, Tensor]:
    """Return the hidden layer `(N, C // r)` and the gates `(N, C)` of the squeezed `z (N, C)`, in the dtype of `z`."""
    hidden = F.linear(z, fc1.to(z.dtype), None if bias1 is None else bias1.to(z.dtype)).relu()
    return hidden, GATES[excitation][0](F.linear(hidden, fc2.to(z.dtype), None if bias2 is None else bias2.to(z.dtype)))


def excite_backward(
        ds: Tensor, z: Tensor, hidden: Tensor, gates: Tensor, fc1: Tensor, fc2: Tensor, excitation: str,
) -> tuple[Tensor, ...]:
    """Return the gradients of `z`, `fc1`, its bias, `fc2` and its bias, from that of the gates."""
    d2 = ds * GATES[excitation][1](gates)
    d1 = (d2 @ fc2.to(z.dtype)) * (hidden > 0)
    return d1 @ fc1.to(z.dtype), d1.t() @ z, d1.sum(0), d2.t() @ hidden, d2.sum(0)


def fused_tail(
        x: Tensor, shortcut: Tensor | None, gamma: Tensor | None, beta: Tensor | None, *, gate: Gate | None = None,
        statistics: tuple[Tensor, Tensor] | None = None, keep: Tensor | None = None, relu: bool = True,
        eps: float = 1e-5, passes: Passes = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `relu(keep * s * batch_norm(x) + shortcut)`, and the mean and biased variance that were used.

    Args:
        x: Output of the last convolution, `(N, C, H, W)`.
        shortcut: As `x`; none by default.
        gamma: Weight of the batch norm, `(C,)`, or None.
        beta: Bias of the batch norm, `(C,)`, or None.
        gate: The excitation; where not given, `s` is 1.
        statistics: Mean and variance `(C,)` to normalise by; those of the batch where not given.
        keep: Factor of each image's branch, `(N,)`, as from drop path.
        relu: Whether the ReLU follows.
        eps: Added to the variance.
        passes: What computes the four passes.

    Raises:
        RuntimeError: For a second derivative.
    """
    mu, variance = statistics or (None, None)
    fc1, bias1, fc2, bias2, excitation = gate or (None, None, None, None, '')
    with torch.autocast(x.device.type, enabled=False):
        y, mu, variance, *_ = FusedTail.apply(
            x, shortcut, gamma, beta, mu, variance, fc1, bias1, fc2, bias2, keep, excitation, relu, eps, passes)
    return y, mu, variance
