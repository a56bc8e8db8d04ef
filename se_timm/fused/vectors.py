"""What is computed between the passes, of vectors: batch statistics, gates, and their gradients; in plain torch.

All vectors are float32 (float64 for float64), `(N, C)` or `(C,)`; weights and biases have dtypes of their own.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import algebra
from .algebra import cast
from .processes import joint_moments, joint_sums

__all__ = [
    'EXCITATIONS', 'PLAIN', 'Excited', 'Gate', 'GateGradient', 'Normalised', 'Terms', 'Vectors', 'excite',
    'excite_backward', 'normalise', 'normalise_by', 'squeezed', 'terms']

# last non-linearity -> itself, and its derivative as a function of its value
EXCITATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    'sigmoid': (torch.sigmoid, lambda s: s * (1 - s)),
    'tanh': (torch.tanh, lambda s: 1 - s * s),
    'relu': (torch.relu, lambda s: (s > 0).to(s.dtype)),
    'hard_sigmoid': (F.hardsigmoid, lambda s: ((s > 0) & (s < 1)).to(s.dtype) / 6),
    # those of `se_timm.squeeze_excite.IdentityGate`
    'identity_sigmoid': (lambda t: 2 * torch.sigmoid(t), lambda s: s * (1 - s / 2)),
    'identity_tanh': (lambda t: 1 + torch.tanh(t), lambda s: 1 - (s - 1) * (s - 1)),
    'identity_relu': (lambda t: torch.relu(1 + t), lambda s: (s > 0).to(s.dtype)),
}


class Normalised(NamedTuple):
    """How a batch norm normalises: `scale (x - mu) + beta`, all `(C,)`; `inverse` is 1 / sigma.

    `values ()` is the number M of values that the moments are of, where processes share them; None where it is that of
    the batch, or where the moments are not of a batch.
    """

    mu: Tensor
    variance: Tensor
    inverse: Tensor
    scale: Tensor
    values: Tensor | None


class Gate(NamedTuple):
    """Weights of the two layers of the excitation, as matrices, and its last non-linearity, a key of `EXCITATIONS`."""

    fc1: Tensor
    bias1: Tensor | None
    fc2: Tensor
    bias2: Tensor | None
    excitation: str


class Excited(NamedTuple):
    """The gates, and the terms `a` and `b` of the pass `apply`, `(N, C)`; and the hidden layer `(N, C // r)`.

    Gates and hidden layer are None without a gate.
    """

    gates: Tensor | None
    hidden: Tensor | None
    a: Tensor
    b: Tensor


class GateGradient(NamedTuple):
    """Gradients of the logits `(N, C)`, None where `terms` computes it, and of the hidden layer `(N, C // r)`."""

    d_logits: Tensor | None
    d_hidden: Tensor


class Terms(NamedTuple):
    """Gradients of all weights and biases, and the terms `b (N, C)` and `c (C,)` of the pass `grad`."""

    d_beta: Tensor
    d_gamma: Tensor
    b: Tensor
    c: Tensor
    d_fc1: Tensor | None = None
    d_bias1: Tensor | None = None
    d_fc2: Tensor | None = None
    d_bias2: Tensor | None = None


class Vectors(NamedTuple):
    """The four steps between the passes: the functions of this module, or what computes the same."""

    normalise: Callable[..., tuple[Normalised, Tensor | None]]
    excite: Callable[..., Excited]
    excite_backward: Callable[..., GateGradient]
    terms: Callable[..., Terms]


def normalise_by(
        mu: Tensor, variance: Tensor, gamma: Tensor | None, eps: float, values: Tensor | None = None) -> Normalised:
    """Return how to normalise by a mean and a biased variance `(C,)`."""
    inverse = torch.rsqrt(variance + eps)
    # a tensor of its own: Dynamo takes none that a function returns twice
    scale = inverse.clone() if gamma is None else inverse * cast(gamma, mu.dtype)
    return Normalised(mu, variance, inverse, scale, values)


def normalise(
        mean: Tensor, squares: Tensor, pixels: int, gamma: Tensor | None, beta: Tensor | None, eps: float, group: Any,
        squeeze: bool,
) -> tuple[Normalised, Tensor | None]:
    """Return how to normalise by the moments of a batch, and if `squeeze` the mean of each normalised channel `(N, C)`.

    Args:
        mean: Mean of each channel of each image, `(N, C)`.
        squares: Sum of squared deviations, `(N, C)`.
        pixels: Pixels of an image.
        gamma: Weight `(C,)` of the batch norm.
        beta: Its bias `(C,)`.
        eps: Added to the variance.
        group: Process group that shares the moments; None for this process alone.
        squeeze: Whether the means are needed.
    """
    mu, variance = algebra.combine(mean, squares, pixels)
    values = None
    if group is not None:
        mu, variance, values = joint_moments(mu, variance, mu.new_full((), len(mean) * pixels), group)
    norm = normalise_by(mu, variance, gamma, eps, values)
    return norm, squeezed(mean, norm.mu, norm.scale, beta) if squeeze else None


def squeezed(mean: Tensor, mu: Tensor, scale: Tensor, beta: Tensor | None) -> Tensor:
    """Return the mean of each channel of each image `(N, C)` after batch norm, from that before it."""
    z = scale * (mean - mu)
    return z if beta is None else z + cast(beta, mean.dtype)


def excite(
        z: Tensor | None, gate: Gate | None, scale: Tensor, beta: Tensor | None, keep: Tensor | None,
        shortcut_beta: Tensor | None, images: int,
) -> Excited:
    """Return the gates of `z`, and what the pass `apply` takes of them.

    Args:
        z: The squeezed, `(N, C)`; None without a gate.
        gate: The excitation, if there is one.
        scale: See `Normalised`.
        beta: Bias `(C,)` of the batch norm.
        keep: Factor of each image's branch, `(N,)`.
        shortcut_beta: Bias `(C,)` of the shortcut's batch norm.
        images: N.
    """
    a = scale.expand(images, -1)
    b = torch.zeros_like(scale) if beta is None else cast(beta, scale.dtype)
    gates = hidden = None
    if gate is not None:
        assert z is not None
        hidden = linear(z, gate.fc1, gate.bias1).relu()
        gates = EXCITATIONS[gate.excitation][0](linear(hidden, gate.fc2, gate.bias2))
        a, b = a * gates, b * gates
    if keep is not None:
        a, b = a * keep[:, None], b * keep[:, None]
    if shortcut_beta is not None:
        b = b + cast(shortcut_beta, scale.dtype)
    return Excited(gates, hidden, a, b.expand(images, -1))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x weight^T + bias` in the dtype of `x`."""
    return F.linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype))


def excite_backward(
        g1: Tensor, g2: Tensor, norm: Normalised, beta: Tensor | None, gate: Gate, gates: Tensor, hidden: Tensor,
        keep: Tensor | None,
) -> GateGradient:
    """Return the gradients along the gate.

    Args:
        g1: From the pass `reduce`, as is `g2`, `(N, C)`.
        g2: See `g1`.
        norm: How was normalised.
        beta: Bias `(C,)` of the batch norm.
        gate: The excitation.
        gates: See `Excited`, as for `hidden`.
        hidden: See `gates`.
        keep: Factor of each image's branch, `(N,)`.
    """
    ds = norm.scale * g2
    if beta is not None:
        ds = ds + cast(beta, ds.dtype) * g1
    if keep is not None:
        ds = ds * keep[:, None]
    d_logits = ds * EXCITATIONS[gate.excitation][1](gates)
    d_hidden = torch.ops.aten.threshold_backward(d_logits @ cast(gate.fc2, ds.dtype), hidden, 0)
    return GateGradient(d_logits, d_hidden)


def terms(
        g1: Tensor, g2: Tensor, mean: Tensor | None, beta: Tensor | None, gate: Gate | None, gates: Tensor | None,
        hidden: Tensor | None, keep: Tensor | None, gradient: GateGradient | None, norm: Normalised, pixels: int,
        batch_statistics: bool, group: Any,
) -> Terms:
    """Return what is to be known before the pass `grad`. The gradient of the norm's output is `keep s g + dz / pixels`.

    Args:
        g1: From the pass `reduce`, as is `g2`, `(N, C)`.
        g2: See `g1`.
        mean: Mean of each channel of each image `(N, C)`; needed with a gate, as is what follows.
        beta: Bias `(C,)` of the batch norm.
        gate: The excitation, if there is one.
        gates: See `Excited`, as for `hidden`.
        hidden: See `gates`.
        keep: Factor of each image's branch, `(N,)`.
        gradient: See `excite_backward`.
        norm: How was normalised.
        pixels: Pixels of an image.
        batch_statistics: Whether by the moments of the batch, which depend on the input themselves.
        group: Process group that shares them.
    """
    factor = None if gates is None else gates if keep is None else gates * keep[:, None]
    if factor is None and keep is not None:
        factor = keep[:, None]
    d_beta, d_gamma = (g1, g2) if factor is None else (factor * g1, factor * g2)
    b: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    if gradient is not None:
        assert mean is not None
        assert hidden is not None
        assert gate is not None
        d_logits, d_hidden = gradient
        assert d_logits is not None
        dz = d_hidden @ cast(gate.fc1, d_hidden.dtype)
        d_beta, d_gamma = d_beta + dz, d_gamma + dz * (mean - norm.mu)
        b = norm.scale * dz / pixels
        weights = (d_hidden.t() @ squeezed(mean, norm.mu, norm.scale, beta), d_hidden.sum(0),
                   d_logits.t() @ hidden, d_logits.sum(0))
    d_beta, d_gamma = d_beta.sum(0), d_gamma.sum(0) * norm.inverse
    c = torch.zeros_like(norm.mu)
    if batch_statistics:
        sums = (d_beta, d_gamma) if group is None else joint_sums(d_beta, d_gamma, group)
        values = len(g1) * pixels if norm.values is None else norm.values
        first = norm.scale * sums[0] / values
        b = -first if b is None else b - first
        c = norm.scale * norm.inverse * sums[1] / values
    return Terms(d_beta, d_gamma, (torch.zeros_like(norm.mu) if b is None else b).expand_as(g1), c, *weights)


PLAIN = Vectors(normalise, excite, excite_backward, terms)
