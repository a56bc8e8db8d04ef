"""The four passes as one differentiable function."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import message
from . import algebra
from .processes import joint_moments, joint_sums

__all__ = ['GATES', 'REFERENCE', 'Gate', 'Half', 'Moments', 'Norm', 'Passes', 'as_written', 'fused_tail']


class Passes(NamedTuple):
    """The four passes over memory; see `algebra`, whose functions these are or compute the same as."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    apply: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grad: Callable[..., Tensor]


Half = Callable[[Callable[..., Any]], Callable[..., Any]]
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


class Moments(NamedTuple):
    """Mean and biased variance `(C,)` that a batch norm normalised by, and the number M of values they are of, `()`."""

    mean: Tensor
    variance: Tensor
    values: Tensor


class Norm(NamedTuple):
    """A batch norm: weight and bias `(C,)` or None, what it normalises by, epsilon, and the processes it is shared by.

    Attributes:
        gamma: Weight `(C,)`.
        beta: Bias `(C,)`.
        statistics: Mean and variance `(C,)` to normalise by; where not given, those of the batch.
        eps: Added to the variance.
        group: Process group over whose joint batch the statistics are taken; where not given, this process's batch.
    """

    gamma: Tensor | None
    beta: Tensor | None
    statistics: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5
    group: Any = None


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`; what stands in its place may compile it."""
    return function


class Settings(NamedTuple):
    """What `FusedTail` takes beside tensors."""

    excitation: str
    relu: bool
    passes: Passes
    half: Half
    eps: float
    group: Any
    shortcut_eps: float
    shortcut_group: Any
    shortcut_norm: bool


class Normalised(NamedTuple):
    """How a batch norm normalises: `scale (x - mu) + shift`, all `(C,)`; `inverse` is 1 / sigma, `values ()` is M."""

    mu: Tensor
    variance: Tensor
    inverse: Tensor
    scale: Tensor
    values: Tensor


def normalise(
        mean: Tensor | None, squares: Tensor | None, pixels: int, gamma: Tensor | None, given_mu: Tensor | None,
        given_variance: Tensor | None, eps: float, group: Any, dtype: torch.dtype,
) -> Normalised:
    """Return how to normalise by the moments of a batch, or by given statistics."""
    if given_mu is not None and given_variance is not None:  # copies: an input cannot be saved as an output
        mu, variance = given_mu.to(dtype, copy=True), given_variance.to(dtype, copy=True)
        values = mu.new_ones(())
    else:
        assert mean is not None
        assert squares is not None
        mu, variance = algebra.combine(mean, squares, pixels)
        values = mu.new_full((), len(mean) * pixels)
        if group is not None:
            mu, variance, values = joint_moments(mu, variance, values, group)
    inverse = torch.rsqrt(variance + eps)
    return Normalised(mu, variance, inverse, inverse if gamma is None else inverse * gamma.to(dtype), values)


def forward_half(
        x: Tensor, shortcut: Tensor | None, gamma: Tensor | None, beta: Tensor | None, given_mu: Tensor | None,
        given_variance: Tensor | None, fc1: Tensor | None, bias1: Tensor | None, fc2: Tensor | None,
        bias2: Tensor | None, keep: Tensor | None, shortcut_gamma: Tensor | None, shortcut_beta: Tensor | None,
        shortcut_mu: Tensor | None, shortcut_variance: Tensor | None, settings: Settings,
) -> tuple[Tensor, ...]:
    """Return the output of the tail, and the vectors that `FusedTail` keeps for `backward_half`."""
    dtype, pixels, passes = algebra.sum_dtype(x), x.shape[2] * x.shape[3], settings.passes
    mean, squares = passes.moments(x)
    norm = normalise(
        mean, squares, pixels, gamma, given_mu, given_variance, settings.eps, settings.group, dtype)
    shift = torch.zeros_like(norm.mu) if beta is None else beta.to(dtype)
    hidden, gates = mean.new_ones(()), mean.new_ones(())
    a, b = norm.scale.expand_as(mean), shift.expand_as(mean)
    if fc1 is not None and fc2 is not None:
        z = norm.scale * (mean - norm.mu) + shift
        hidden, gates = excite(z, fc1, bias1, fc2, bias2, settings.excitation)
        a, b = a * gates, b * gates
    if keep is not None:
        a, b = a * keep[:, None], b * keep[:, None]
    other = Normalised(*(mean.new_ones(()) for _ in Normalised._fields))
    if settings.shortcut_norm:
        assert shortcut is not None
        m, v = passes.moments(shortcut) if shortcut_mu is None else (None, None)
        other = normalise(m, v, pixels, shortcut_gamma, shortcut_mu, shortcut_variance,
                          settings.shortcut_eps, settings.shortcut_group, dtype)
        b = b if shortcut_beta is None else b + shortcut_beta.to(dtype)
        y = passes.apply(x, shortcut, norm.mu, a, b, other.mu, other.scale, settings.relu)
    else:
        y = passes.apply(x, shortcut, norm.mu, a, b, None, None, settings.relu)
    return y, mean, hidden, gates, a, *norm, *other


def backward_half(
        dy: Tensor, x: Tensor, shortcut: Tensor | None, y: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        fc1: Tensor | None, bias1: Tensor | None, fc2: Tensor | None, bias2: Tensor | None, keep: Tensor | None,
        shortcut_gamma: Tensor | None, shortcut_beta: Tensor | None, mean: Tensor, hidden: Tensor, gates: Tensor,
        a: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of `forward_half`.

    Args:
        dy: Gradient of the output.
        x: As the following, what `FusedTail` keeps; the shortcut only where it has a batch norm, `y` only after a ReLU.
        rest: The two `Normalised`, the settings, whether each batch norm took the statistics of the batch, and the
            dtype of the shortcut, None if there was none.
    """
    *vectors, settings, batch_statistics, shortcut_dtype = rest
    norm, other = Normalised(*vectors[:5]), Normalised(*vectors[5:])
    g1, g2, g = settings.passes.reduce(dy, y, x, norm.mu)
    g = dy if y is None else g
    # with u = scale (x - mu) + shift and y = relu(keep s u + shortcut), the gradient of u is keep s g + dz / pixels
    kept = g1.new_ones(()) if keep is None else keep[:, None]
    dz = torch.zeros_like(mean)
    d_fc1 = d_bias1 = d_fc2 = d_bias2 = None
    if fc1 is not None and fc2 is not None:
        shift = torch.zeros_like(norm.mu) if beta is None else beta.to(mean.dtype)
        z = norm.scale * (mean - norm.mu) + shift
        dz, d_fc1, d_bias1, d_fc2, d_bias2 = excite_backward(
            kept * (norm.scale * g2 + shift * g1), z, hidden, gates, fc1, fc2, settings.excitation)
    d_beta = (kept * gates * g1 + dz).sum(0)
    d_gamma = (kept * gates * g2 + dz * (mean - norm.mu)).sum(0) * norm.inverse
    b, c = statistics_terms(norm, d_beta, d_gamma, batch_statistics[0], settings.group)
    b = norm.scale * dz / (x.shape[2] * x.shape[3]) + b
    dx = settings.passes.grad(g, x, norm.mu, a, b, c)
    d_shortcut, d_shortcut_gamma, d_shortcut_beta = g, None, None
    if shortcut is not None:  # it has a batch norm of its own
        d_shortcut_beta, sums = g1.sum(0), settings.passes.reduce(g, None, shortcut, other.mu)[1]
        d_shortcut_gamma = sums.sum(0) * other.inverse
        b, c = statistics_terms(other, d_shortcut_beta, d_shortcut_gamma, batch_statistics[1], settings.shortcut_group)
        d_shortcut = settings.passes.grad(g, shortcut, other.mu, other.scale.expand_as(mean), b.expand_as(mean), c)
    return (
        dx, None if shortcut_dtype is None else d_shortcut.to(shortcut_dtype), like(d_gamma, gamma), like(d_beta, beta),
        None, None, like(d_fc1, fc1), like(d_bias1, bias1), like(d_fc2, fc2), like(d_bias2, bias2), None,
        like(d_shortcut_gamma, shortcut_gamma), like(d_shortcut_beta, shortcut_beta), None, None, None)


INPUTS = 16  # of `FusedTail`


class FusedTail(torch.autograd.Function):
    """See `fused_tail`. The gradients are derived in the module `algebra` and the comments of `backward`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return inputs[-1].half(forward_half)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (x, shortcut, gamma, beta, given_mu, _, fc1, bias1, fc2, bias2, keep,
         shortcut_gamma, shortcut_beta, given_shortcut_mu, _, settings) = inputs
        y, *vectors = output
        ctx.mark_non_differentiable(*vectors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, shortcut if settings.shortcut_norm else None, y if settings.relu else None, gamma, beta, fc1, bias1,
            fc2, bias2, keep, shortcut_gamma, shortcut_beta, *vectors)
        ctx.settings, ctx.batch_statistics = settings, (given_mu is None, given_shortcut_mu is None)
        ctx.shortcut = None if shortcut is None else shortcut.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * INPUTS
        if torch.is_grad_enabled():  # what follows is not recorded, and a second derivative would silently lack it
            raise RuntimeError(message(
                'a second derivative (create_graph=True, or torch.func) of the fused residual tail',
                'it has none', "take the backend 'reference'"))
        with torch.autocast(dy.device.type, enabled=False):
            return ctx.settings.half(backward_half)(
                dy, *ctx.saved_tensors, ctx.settings, ctx.batch_statistics, ctx.shortcut)


def statistics_terms(
        norm: Normalised, d_beta: Tensor, d_gamma: Tensor, batch_statistics: bool, group: Any,
) -> tuple[Tensor, Tensor]:
    """Return `b` and `c (C,)` of the pass `grad`, as far as mu and sigma depend on the input."""
    if not batch_statistics:
        return torch.zeros_like(norm.mu), torch.zeros_like(norm.mu)
    if group is not None:
        d_beta, d_gamma = joint_sums(d_beta, d_gamma, group)
    return -norm.scale * d_beta / norm.values, norm.scale * norm.inverse * d_gamma / norm.values


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
        x: Tensor, shortcut: Tensor | None, norm: Norm, *, gate: Gate | None = None, keep: Tensor | None = None,
        shortcut_norm: Norm | None = None, relu: bool = True, passes: Passes = REFERENCE, half: Half = as_written,
) -> tuple[Tensor, Moments, Moments | None]:
    """Return `relu(keep * s * batch_norm(x) + shortcut)`, and the moments that each batch norm normalised by.

    Args:
        x: Output of the last convolution, `(N, C, H, W)`.
        shortcut: As `x`; none where not given.
        norm: The batch norm.
        gate: The excitation; where not given, `s` is 1.
        keep: Factor of each image's branch, `(N,)`, as from drop path.
        shortcut_norm: A batch norm that the shortcut passes first, as in a projection.
        relu: Whether the ReLU follows.
        passes: What computes the four passes.
        half: What runs the forward and the backward half: as they are, or compiled, which only plain torch can be.

    Raises:
        ValueError: Where the batch is empty, or where statistics are taken of one value.
        RuntimeError: For a second derivative, here or in the backward pass.
    """
    for each in (norm, *([] if shortcut_norm is None else [shortcut_norm])):
        check_values(x, each)
    mu, variance = norm.statistics or (None, None)
    fc1, bias1, fc2, bias2, excitation = gate or (None, None, None, None, '')
    other = shortcut_norm or Norm(None, None)
    shortcut_mu, shortcut_variance = other.statistics or (None, None)
    settings = Settings(excitation, relu, passes, half, norm.eps, norm.group, other.eps, other.group,
                        shortcut_norm is not None)
    with torch.autocast(x.device.type, enabled=False):
        y, _, _, _, _, *vectors = FusedTail.apply(
            x, shortcut, norm.gamma, norm.beta, mu, variance, fc1, bias1, fc2, bias2, keep,
            other.gamma, other.beta, shortcut_mu, shortcut_variance, settings)
    own, others = Normalised(*vectors[:5]), Normalised(*vectors[5:])
    return (y, Moments(own.mu, own.variance, own.values),
            None if shortcut_norm is None else Moments(others.mu, others.variance, others.values))


def check_values(x: Tensor, norm: Norm) -> None:
    """Raise `ValueError` where there is nothing to take statistics of."""
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if values == 0:
        raise ValueError(message(
            f'a batch of shape {tuple(x.shape)}', 'it holds no pixels to normalise',
            'leave out empty batches, as drop_last=True does'))
    if values == 1 and norm.statistics is None and norm.group is None:
        raise ValueError(message(
            f'a batch of shape {tuple(x.shape)} in training', 'one value per channel has no variance',
            'train with more images or larger ones, or put the batch norm into eval mode'))
