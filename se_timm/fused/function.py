"""The four passes as one differentiable function."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import message
from . import algebra
from .vectors import PLAIN, Gate, Normalised, Vectors, normalise_by, squeezed

__all__ = [
    'REFERENCE', 'Gate', 'Half', 'Moments', 'Norm', 'Passes', 'as_written', 'check_values', 'fused_tail', 'like',
    'moments_of', 'normalised_by', 'without_autocast',
]


class Passes(NamedTuple):
    """The four passes over memory; see `algebra`, whose functions these are or compute the same as."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    apply: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grad: Callable[..., Tensor]


Half = Callable[[Callable[..., Any]], Callable[..., Any]]
REFERENCE = Passes(algebra.moments, algebra.apply, algebra.reduce, algebra.grad)


class Moments(NamedTuple):
    """Mean and biased variance `(C,)` that a batch norm normalised by, and the number M of values they are of.

    The number is a tensor `()` where processes share the batch.
    """

    mean: Tensor
    variance: Tensor
    values: Tensor | int


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


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast on that type of device."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`; what stands in its place may compile it."""
    return function


class Settings(NamedTuple):
    """What `FusedTail` takes beside tensors."""

    excitation: str
    relu: bool
    passes: Passes
    vectors: Vectors
    half: Half
    eps: float
    group: Any
    shortcut_eps: float
    shortcut_group: Any
    shortcut_norm: bool


def moments_of(norm: Normalised, x: Tensor) -> Moments:
    """Return the moments that `norm` normalised `x` by."""
    return Moments(norm.mu, norm.variance, len(x) * x.shape[2] * x.shape[3] if norm.values is None else norm.values)


def normalised_by(given_mu: Tensor, given_variance: Tensor, gamma: Tensor | None, eps: float, x: Tensor) -> Normalised:
    """Return how to normalise `x` by given statistics: by copies, since an input cannot be saved as an output."""
    mu, variance = (value.to(algebra.sum_dtype(x), copy=True) for value in (given_mu, given_variance))
    return normalise_by(mu, variance, gamma, eps)


def forward_half(
        x: Tensor, shortcut: Tensor | None, gamma: Tensor | None, beta: Tensor | None, given_mu: Tensor | None,
        given_variance: Tensor | None, fc1: Tensor | None, bias1: Tensor | None, fc2: Tensor | None,
        bias2: Tensor | None, keep: Tensor | None, shortcut_gamma: Tensor | None, shortcut_beta: Tensor | None,
        shortcut_mu: Tensor | None, shortcut_variance: Tensor | None, settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Return the output of the tail, and what `FusedTail` keeps for `backward_half`: None for what there is not."""
    pixels, passes, vectors = x.shape[2] * x.shape[3], settings.passes, settings.vectors
    gate = None if fc1 is None or fc2 is None else Gate(fc1, bias1, fc2, bias2, settings.excitation)
    mean = squares = None
    if given_mu is None or gate is not None:
        mean, squares = passes.moments(x)
    if given_mu is not None and given_variance is not None:
        norm = normalised_by(given_mu, given_variance, gamma, settings.eps, x)
        z = None if mean is None else squeezed(mean, norm.mu, norm.scale, beta)
    else:
        norm, z = vectors.normalise(
            mean, squares, pixels, gamma, beta, settings.eps, settings.group, gate is not None)
    other: Normalised | None = None
    if settings.shortcut_norm and shortcut_mu is not None and shortcut_variance is not None:
        other = normalised_by(shortcut_mu, shortcut_variance, shortcut_gamma, settings.shortcut_eps, x)
    elif settings.shortcut_norm:
        other, _ = vectors.normalise(
            *passes.moments(shortcut), pixels, shortcut_gamma, None, settings.shortcut_eps, settings.shortcut_group,
            False)
    excited = vectors.excite(z, gate, norm.scale, beta, keep, shortcut_beta, len(x))
    y = passes.apply(x, shortcut, norm.mu, excited.a, excited.b,
                     *((None, None) if other is None else (other.mu, other.scale)), settings.relu)
    a = None if gate is None and keep is None else excited.a  # else that is the scale
    mean = None if gate is None else mean
    return y, mean, excited.hidden, excited.gates, a, *norm, *(other or (None,) * len(Normalised._fields))


def backward_half(
        dy: Tensor, x: Tensor, shortcut: Tensor | None, y: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        fc1: Tensor | None, bias1: Tensor | None, fc2: Tensor | None, bias2: Tensor | None, keep: Tensor | None,
        shortcut_gamma: Tensor | None, shortcut_beta: Tensor | None, mean: Tensor | None, hidden: Tensor | None,
        gates: Tensor | None, a: Tensor | None, *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of `forward_half`.

    Args:
        dy: Gradient of the output.
        x: As the following, what `FusedTail` keeps; the shortcut only where it has a batch norm, `y` only after a ReLU.
        rest: The two `Normalised`, the settings, whether each batch norm took the statistics of the batch, and the
            dtype of the shortcut, None if there was none.
    """
    *kept, settings, batch_statistics, shortcut_dtype = rest
    norm, other = Normalised(*kept[:5]), Normalised(*kept[5:])
    passes, vectors, pixels = settings.passes, settings.vectors, x.shape[2] * x.shape[3]
    g1, g2, g = passes.reduce(dy, y, x, norm.mu)
    g = dy if y is None else g
    gate = gradient = None
    if fc1 is not None and fc2 is not None:
        gate = Gate(fc1, bias1, fc2, bias2, settings.excitation)
        gradient = vectors.excite_backward(g1, g2, norm, beta, gate, gates, hidden, keep)
    d_beta, d_gamma, b, c, d_fc1, d_bias1, d_fc2, d_bias2 = vectors.terms(
        g1, g2, mean, beta, gate, gates, hidden, keep, gradient, norm, pixels, batch_statistics[0], settings.group)
    dx = passes.grad(g, x, norm.mu, norm.scale.expand_as(g1) if a is None else a, b, c)
    d_shortcut, d_shortcut_gamma, d_shortcut_beta = g, None, None
    if shortcut is not None:  # it has a batch norm of its own
        g2 = passes.reduce(g, None, shortcut, other.mu)[1]
        d_shortcut_beta, d_shortcut_gamma, b, c, *_ = vectors.terms(
            g1, g2, *(None,) * 7, other, pixels, batch_statistics[1], settings.shortcut_group)
        d_shortcut = passes.grad(g, shortcut, other.mu, other.scale.expand_as(g1), b, c)
    return (
        dx, None if shortcut_dtype is None else algebra.cast(d_shortcut, shortcut_dtype), like(d_gamma, gamma),
        like(d_beta, beta), None, None, like(d_fc1, fc1), like(d_bias1, bias1), like(d_fc2, fc2), like(d_bias2, bias2),
        None, like(d_shortcut_gamma, shortcut_gamma), like(d_shortcut_beta, shortcut_beta), None, None, None)


INPUTS = 16  # of `FusedTail`


class FusedTail(torch.autograd.Function):
    """See `fused_tail`. The gradients are those of the modules `algebra` and `vectors`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        return inputs[-1].half(forward_half)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        (x, shortcut, gamma, beta, given_mu, _, fc1, bias1, fc2, bias2, keep,
         shortcut_gamma, shortcut_beta, given_shortcut_mu, _, settings) = inputs
        y, *vectors = output
        ctx.mark_non_differentiable(*(vector for vector in vectors if vector is not None))
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
        with without_autocast(dy.device.type):
            return ctx.settings.half(backward_half)(
                dy, *ctx.saved_tensors, ctx.settings, ctx.batch_statistics, ctx.shortcut)


def like(value: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of its parameter; None where there is no parameter."""
    return None if value is None or parameter is None else algebra.cast(value, parameter.dtype)


def fused_tail(
        x: Tensor, shortcut: Tensor | None, norm: Norm, *, gate: Gate | None = None, keep: Tensor | None = None,
        shortcut_norm: Norm | None = None, relu: bool = True, passes: Passes = REFERENCE, vectors: Vectors = PLAIN,
        half: Half = as_written,
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
        vectors: What computes the steps between them.
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
    # given statistics are not of a batch, and not to be shared
    group, shortcut_group = (None if each.statistics is not None else each.group for each in (norm, other))
    settings = Settings(excitation, relu, passes, vectors, half, norm.eps, group, other.eps, shortcut_group,
                        shortcut_norm is not None)
    with without_autocast(x.device.type):
        y, _, _, _, _, *normalised = FusedTail.apply(
            x, shortcut, norm.gamma, norm.beta, mu, variance, fc1, bias1, fc2, bias2, keep,
            other.gamma, other.beta, shortcut_mu, shortcut_variance, settings)
    own, others = Normalised(*normalised[:5]), Normalised(*normalised[5:])
    return y, moments_of(own, x), None if shortcut_norm is None else moments_of(others, x)


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
