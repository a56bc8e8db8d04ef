"""The four steps between the passes on CUDA, each one Triton kernel or two.

They are of vectors only, some hundred kilobytes each; but written in torch they are sixty launches, for which a host
may need longer than the GPU for the whole tail. Sums are taken in the same order in every run, matrices are multiplied
by tensor cores in three parts of TF32, which is as exact as float32, and two runs give the same bits. Steps of moments
that processes share, and of hidden layers beyond `LARGEST_HIDDEN`, are those of `vectors`, in plain torch.

The module can be imported without Triton.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import vectors
from .launch import jit, launch, power_of_two, tl
from .vectors import Excited, Gate, GateGradient, Normalised, Terms, Vectors

__all__ = ['VECTORS', 'excite', 'excite_backward', 'normalise', 'terms', 'track']

WARPS = 4
IMAGES, CHANNELS = 256, 8  # of a tile of `_normalise`: 32 bytes of a row are what a GPU loads at least
# images, channels and hidden units of a tile along the gate: tensor cores take 16 at least
HIDE = (16, 32, 16)
EXCITE = (16, 32)
WEIGH = (16, 32, 32)
TERMS = (32, 16)
UNROLL = 4  # tiles whose loads are under way together, in the loop over the channels
LARGEST_HIDDEN = 128  # of a hidden layer that stays in registers; beyond it torch computes


# Kernels


@jit
def _tanh(x: tl.tensor) -> tl.tensor:
    away = tl.exp(-2 * tl.abs(x))
    value = (1 - away) / (1 + away)
    square = x * x  # near zero that cancels; there the series
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -value, value))


@jit
def _gate(logits: tl.tensor, EXCITATION: tl.constexpr) -> tl.tensor:
    """Return the last non-linearity of the gate; NaN stays."""
    if EXCITATION == 'sigmoid':
        return 1 / (1 + tl.exp(-logits))
    if EXCITATION == 'identity_sigmoid':
        return 2 / (1 + tl.exp(-logits))
    if EXCITATION == 'tanh':
        return _tanh(logits)
    if EXCITATION == 'identity_tanh':
        return 1 + _tanh(logits)
    if EXCITATION == 'hard_sigmoid':
        value = logits / 6 + 0.5
        return tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))
    if EXCITATION == 'identity_relu':
        logits += 1
    return tl.where(logits < 0, 0.0, logits)


@jit
def _slope(gates: tl.tensor, EXCITATION: tl.constexpr) -> tl.tensor:
    """Return the derivative of the last non-linearity, from its value."""
    if EXCITATION == 'sigmoid':
        return gates * (1 - gates)
    if EXCITATION == 'identity_sigmoid':
        return gates * (1 - gates / 2)
    if EXCITATION == 'tanh':
        return 1 - gates * gates
    if EXCITATION == 'identity_tanh':
        return 1 - (gates - 1) * (gates - 1)
    if EXCITATION == 'hard_sigmoid':
        return tl.where((gates > 0) & (gates < 1), 1.0 / 6, 0.0)
    return tl.where(gates > 0, 1.0, 0.0)


@jit
def _normalise(
        mean: tl.tensor, squares: tl.tensor, gamma: tl.tensor, beta: tl.tensor, mu: tl.tensor, variance: tl.tensor,
        inverse: tl.tensor, scale: tl.tensor, z: tl.tensor, eps: tl.tensor, pixels: tl.tensor, images: tl.tensor,
        channels: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, lanes = tl.arange(0, BLOCK_N), c < channels
    first = tl.load(mean + c, mask=lanes, other=0)  # of the first image: what is added up is small beside a large mean
    away = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    for start in tl.range(0, images, BLOCK_N):
        inside = (start + n < images)[:, None] & lanes[None, :]
        value = tl.load(mean + (start + n)[:, None] * channels + c[None, :], mask=inside, other=0)
        away += tl.where(inside, value - first[None, :], 0.0)
    centre = first + tl.sum(away, 0) / images
    total = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    for start in tl.range(0, images, BLOCK_N):
        inside = (start + n < images)[:, None] & lanes[None, :]
        offsets = (start + n)[:, None] * channels + c[None, :]
        away = tl.load(mean + offsets, mask=inside, other=0) - centre[None, :]
        total += tl.where(inside, tl.load(squares + offsets, mask=inside, other=0) + pixels * away * away, 0.0)
    spread = tl.sum(total, 0) / images / pixels
    reciprocal = 1 / tl.sqrt(spread + eps)
    factor = reciprocal
    if gamma is not None:
        factor = reciprocal * tl.load(gamma + c, mask=lanes, other=0).to(tl.float32)
    tl.store(mu + c, centre, mask=lanes)
    tl.store(variance + c, spread, mask=lanes)
    tl.store(inverse + c, reciprocal, mask=lanes)
    tl.store(scale + c, factor, mask=lanes)
    if z is not None:
        shift = tl.full((BLOCK_C,), 0, tl.float32)
        if beta is not None:
            shift = tl.load(beta + c, mask=lanes, other=0).to(tl.float32)
        for start in tl.range(0, images, BLOCK_N):
            inside = (start + n < images)[:, None] & lanes[None, :]
            offsets = (start + n)[:, None] * channels + c[None, :]
            value = tl.load(mean + offsets, mask=inside, other=0) - centre[None, :]
            tl.store(z + offsets, factor[None, :] * value + shift[None, :], mask=inside)


@jit
def _hide(
        z: tl.tensor, fc1: tl.tensor, bias1: tl.tensor, hidden: tl.tensor, images: tl.tensor, channels: tl.tensor,
        width: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
) -> None:
    blocks = (width + BLOCK_R - 1) // BLOCK_R
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, units = n < images, r < width
    total = tl.full((BLOCK_N, BLOCK_R), 0, tl.float32)
    for start in tl.range(0, channels, BLOCK_C, loop_unroll_factor=UNROLL):
        c = start + tl.arange(0, BLOCK_C)
        lanes = c < channels
        value = tl.load(z + n[:, None] * channels + c[None, :], mask=rows[:, None] & lanes[None, :], other=0)
        weight = tl.load(fc1 + r[None, :] * channels + c[:, None], mask=lanes[:, None] & units[None, :], other=0)
        total = tl.dot(value, weight.to(tl.float32), total, input_precision='tf32x3')
    if bias1 is not None:
        total += tl.load(bias1 + r, mask=units, other=0).to(tl.float32)[None, :]
    total = tl.where(total < 0, 0.0, total)  # NaN stays
    tl.store(hidden + n[:, None] * width + r[None, :], total, mask=rows[:, None] & units[None, :])


@jit
def _excite(
        hidden: tl.tensor, fc2: tl.tensor, bias2: tl.tensor, scale: tl.tensor, beta: tl.tensor, keep: tl.tensor,
        shortcut_beta: tl.tensor, gates: tl.tensor, a: tl.tensor, b: tl.tensor, images: tl.tensor,
        channels: tl.tensor, width: tl.tensor, EXCITATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_R: tl.constexpr,
) -> None:
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    rows, lanes, units = n < images, c < channels, r < width
    value = tl.load(hidden + n[:, None] * width + r[None, :], mask=rows[:, None] & units[None, :], other=0)
    weight = tl.load(fc2 + c[None, :] * width + r[:, None], mask=units[:, None] & lanes[None, :], other=0)
    logits = tl.dot(value, weight.to(tl.float32), input_precision='tf32x3')
    if bias2 is not None:
        logits += tl.load(bias2 + c, mask=lanes, other=0).to(tl.float32)[None, :]
    factor = _gate(logits, EXCITATION)
    offsets, inside = n[:, None] * channels + c[None, :], rows[:, None] & lanes[None, :]
    tl.store(gates + offsets, factor, mask=inside)
    if keep is not None:
        factor *= tl.load(keep + n, mask=rows, other=0).to(tl.float32)[:, None]
    shift = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    if beta is not None:
        shift = factor * tl.load(beta + c, mask=lanes, other=0).to(tl.float32)[None, :]
    if shortcut_beta is not None:
        shift += tl.load(shortcut_beta + c, mask=lanes, other=0).to(tl.float32)[None, :]
    tl.store(a + offsets, factor * tl.load(scale + c, mask=lanes, other=0)[None, :], mask=inside)
    tl.store(b + offsets, shift, mask=inside)


@jit
def _of_logits(
        g1: tl.tensor, g2: tl.tensor, gates: tl.tensor, offsets: tl.tensor, inside: tl.tensor, scale: tl.tensor,
        beta: tl.tensor, kept: tl.tensor, EXCITATION: tl.constexpr,
) -> tl.tensor:
    """Return the gradient of the logits in a tile; computed wherever it is needed, which is less than to keep it."""
    value = scale[None, :] * tl.load(g2 + offsets, mask=inside, other=0)
    value += beta[None, :] * tl.load(g1 + offsets, mask=inside, other=0)
    value *= kept[:, None] * _slope(tl.load(gates + offsets, mask=inside, other=0), EXCITATION)
    return tl.where(inside, value, 0.0)


@jit
def _vector_or(
        vector: tl.tensor, at: tl.tensor, inside: tl.tensor, default: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """Return values of a vector that may not be given."""
    value = tl.full((SIZE,), default, tl.float32)
    if vector is not None:
        value = tl.load(vector + at, mask=inside, other=0).to(tl.float32)
    return value


@jit
def _excite_backward(
        g1: tl.tensor, g2: tl.tensor, scale: tl.tensor, beta: tl.tensor, fc2: tl.tensor, gates: tl.tensor,
        hidden: tl.tensor, keep: tl.tensor, d_hidden: tl.tensor, images: tl.tensor, channels: tl.tensor,
        width: tl.tensor, EXCITATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
) -> None:
    blocks = (width + BLOCK_R - 1) // BLOCK_R
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, units = n < images, r < width
    kept = _vector_or(keep, n, rows, 1, BLOCK_N)
    total = tl.full((BLOCK_N, BLOCK_R), 0, tl.float32)
    for start in tl.range(0, channels, BLOCK_C, loop_unroll_factor=UNROLL):
        c = start + tl.arange(0, BLOCK_C)
        lanes = c < channels
        value = _of_logits(
            g1, g2, gates, n[:, None] * channels + c[None, :], rows[:, None] & lanes[None, :],
            tl.load(scale + c, mask=lanes, other=0), _vector_or(beta, c, lanes, 0, BLOCK_C), kept, EXCITATION)
        weight = tl.load(fc2 + c[:, None] * width + r[None, :], mask=lanes[:, None] & units[None, :], other=0)
        total = tl.dot(value, weight.to(tl.float32), total, input_precision='tf32x3')
    offsets, inside = n[:, None] * width + r[None, :], rows[:, None] & units[None, :]
    total = tl.where(tl.load(hidden + offsets, mask=inside, other=0) <= 0, 0.0, total)
    tl.store(d_hidden + offsets, total, mask=inside)


@jit
def _weigh(
        g1: tl.tensor, g2: tl.tensor, mean: tl.tensor, mu: tl.tensor, scale: tl.tensor, beta: tl.tensor,
        gates: tl.tensor, hidden: tl.tensor, keep: tl.tensor, d_hidden: tl.tensor, d_fc1: tl.tensor,
        d_bias1: tl.tensor, d_fc2: tl.tensor, d_bias2: tl.tensor, images: tl.tensor, channels: tl.tensor,
        width: tl.tensor, EXCITATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_R: tl.constexpr,
) -> None:
    """Multiply what went into the two layers by the gradients of what came out."""
    blocks = (width + BLOCK_R - 1) // BLOCK_R
    c = tl.program_id(0) // blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes, units = c < channels, r < width
    centre = tl.load(mu + c, mask=lanes, other=0)[None, :]
    factor = tl.load(scale + c, mask=lanes, other=0)
    shift = _vector_or(beta, c, lanes, 0, BLOCK_C)
    one = tl.full((BLOCK_R, BLOCK_C), 0, tl.float32)
    two = tl.full((BLOCK_C, BLOCK_R), 0, tl.float32)
    of_units = tl.full((BLOCK_N, BLOCK_R), 0, tl.float32)
    of_channels = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    for start in tl.range(0, images, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        rows = n < images
        offsets, inside = n[:, None] * channels + c[None, :], rows[:, None] & lanes[None, :]
        squeezed = factor[None, :] * (tl.load(mean + offsets, mask=inside, other=0) - centre) + shift[None, :]
        squeezed = tl.where(inside, squeezed, 0.0)
        logits = _of_logits(g1, g2, gates, offsets, inside, factor, shift, _vector_or(keep, n, rows, 1, BLOCK_N),
                            EXCITATION)
        offsets, inside = n[:, None] * width + r[None, :], rows[:, None] & units[None, :]
        gradient = tl.load(d_hidden + offsets, mask=inside, other=0)
        one = tl.dot(tl.trans(gradient), squeezed, one, input_precision='tf32x3')
        two = tl.dot(tl.trans(logits), tl.load(hidden + offsets, mask=inside, other=0), two, input_precision='tf32x3')
        of_units += gradient
        of_channels += logits
    tl.store(d_fc1 + r[:, None] * channels + c[None, :], one, mask=units[:, None] & lanes[None, :])
    tl.store(d_fc2 + c[:, None] * width + r[None, :], two, mask=lanes[:, None] & units[None, :])
    # one program of each (a mask by & of a vector and a number is none to the interpreter of Triton 3.9)
    tl.store(d_bias1 + r, tl.sum(of_units, 0), mask=r < tl.where(tl.program_id(0) < blocks, width, 0))
    tl.store(d_bias2 + c, tl.sum(of_channels, 0), mask=c < tl.where(tl.program_id(0) % blocks == 0, channels, 0))


@jit
def _terms(
        g1: tl.tensor, g2: tl.tensor, mean: tl.tensor, fc1: tl.tensor, gates: tl.tensor, keep: tl.tensor,
        d_hidden: tl.tensor, mu: tl.tensor, inverse: tl.tensor, scale: tl.tensor, d_beta: tl.tensor,
        d_gamma: tl.tensor, b: tl.tensor, c_vector: tl.tensor, pixels: tl.tensor, images: tl.tensor,
        channels: tl.tensor, width: tl.tensor, BATCH_STATISTICS: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = c < channels
    centre = tl.load(mu + c, mask=lanes, other=0)[None, :]
    first = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    second = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    if gates is not None:
        r = tl.arange(0, BLOCK_R)
        units = r < width
        weight = tl.load(fc1 + r[:, None] * channels + c[None, :], mask=units[:, None] & lanes[None, :], other=0)
        weight = weight.to(tl.float32)
    for start in tl.range(0, images, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        rows = n < images
        offsets, inside = n[:, None] * channels + c[None, :], rows[:, None] & lanes[None, :]
        one = tl.load(g1 + offsets, mask=inside, other=0)
        two = tl.load(g2 + offsets, mask=inside, other=0)
        if keep is not None:
            kept = tl.load(keep + n, mask=rows, other=0).to(tl.float32)[:, None]
            one *= kept
            two *= kept
        if gates is not None:
            factor = tl.load(gates + offsets, mask=inside, other=0)
            gradient = tl.load(d_hidden + n[:, None] * width + r[None, :],
                               mask=rows[:, None] & units[None, :], other=0)
            dz = tl.where(inside, tl.dot(gradient, weight, input_precision='tf32x3'), 0.0)
            away = tl.where(inside, tl.load(mean + offsets, mask=inside, other=0) - centre, 0.0)
            one = one * factor + dz
            two = two * factor + dz * away
        first += one
        second += two
    reciprocal = tl.load(inverse + c, mask=lanes, other=0)
    factor = tl.load(scale + c, mask=lanes, other=0)
    beta_sum, gamma_sum = tl.sum(first, 0), tl.sum(second, 0) * reciprocal
    tl.store(d_beta + c, beta_sum, mask=lanes)
    tl.store(d_gamma + c, gamma_sum, mask=lanes)
    common = tl.full((BLOCK_C,), 0, tl.float32)
    slope = tl.full((BLOCK_C,), 0, tl.float32)
    if BATCH_STATISTICS:
        common = factor * beta_sum / images / pixels
        slope = factor * reciprocal * gamma_sum / images / pixels
    tl.store(c_vector + c, slope, mask=lanes)
    if gates is None:
        tl.store(b + c, -common, mask=lanes)
    else:
        for start in tl.range(0, images, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            rows = n < images
            gradient = tl.load(d_hidden + n[:, None] * width + r[None, :],
                               mask=rows[:, None] & units[None, :], other=0)
            dz = tl.dot(gradient, weight, input_precision='tf32x3')  # once more: less than to keep it
            tl.store(b + n[:, None] * channels + c[None, :], factor[None, :] * dz / pixels - common[None, :],
                     mask=rows[:, None] & lanes[None, :])


@jit
def _track(
        running_mean: tl.tensor, running_variance: tl.tensor, batches: tl.tensor, mean: tl.tensor, variance: tl.tensor,
        momentum: tl.tensor, values: tl.tensor, channels: tl.tensor, BLOCK_C: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = c < channels
    old = tl.load(running_mean + c, mask=lanes, other=0)
    tl.store(running_mean + c, old + momentum * (tl.load(mean + c, mask=lanes, other=0) - old), mask=lanes)
    unbiased = tl.load(variance + c, mask=lanes, other=0) * (values / (values - 1.0))
    old = tl.load(running_variance + c, mask=lanes, other=0)
    tl.store(running_variance + c, old + momentum * (unbiased - old), mask=lanes)
    if batches is not None:
        tl.store(batches, tl.load(batches) + 1, mask=tl.program_id(0) == 0)


# Steps


def _vector(value: Tensor | None) -> Tensor | None:
    """Return a vector or a matrix without gaps, from an address divisible by 16: elsewhere sums have another order."""
    if value is None:
        return None
    value = value if value.is_contiguous() else value.contiguous()
    return value.clone() if value.data_ptr() % 16 else value


def normalise(
        mean: Tensor, squares: Tensor, pixels: int, gamma: Tensor | None, beta: Tensor | None, eps: float, group: Any,
        squeeze: bool,
) -> tuple[Normalised, Tensor | None]:
    """As `vectors.normalise`."""
    if group is not None:
        return vectors.normalise(mean, squares, pixels, gamma, beta, eps, group, squeeze)
    images, channels = mean.shape
    mu, variance, inverse, scale = (mean.new_empty(channels) for _ in range(4))
    z = mean.new_empty(images, channels) if squeeze else None
    launch(_normalise, -(-channels // CHANNELS), WARPS, _vector(mean), _vector(squares), _vector(gamma), _vector(beta),
           mu, variance, inverse, scale, z, float(eps), pixels, images, channels, min(power_of_two(images), IMAGES),
           CHANNELS)
    return Normalised(mu, variance, inverse, scale, None), z


def excite(
        z: Tensor | None, gate: Gate | None, scale: Tensor, beta: Tensor | None, keep: Tensor | None,
        shortcut_beta: Tensor | None, images: int,
) -> Excited:
    """As `vectors.excite`."""
    if z is None or gate is None or len(gate.fc1) > LARGEST_HIDDEN:
        return vectors.excite(z, gate, scale, beta, keep, shortcut_beta, images)
    channels, width = len(scale), len(gate.fc1)
    gates, a, b = (scale.new_empty(images, channels) for _ in range(3))
    hidden = scale.new_empty(images, width)
    block_n, block_c, block_r = HIDE
    launch(_hide, -(-images // block_n) * -(-width // block_r), WARPS, _vector(z), _vector(gate.fc1),
           _vector(gate.bias1), hidden, images, channels, width, *HIDE, UNROLL)
    block_n, block_c = EXCITE
    launch(_excite, -(-images // block_n) * -(-channels // block_c), WARPS, hidden, _vector(gate.fc2),
           _vector(gate.bias2), scale, _vector(beta), _vector(keep), _vector(shortcut_beta), gates, a, b, images,
           channels, width, gate.excitation, *EXCITE, max(power_of_two(width), 16))
    return Excited(gates, hidden, a, b)


def excite_backward(
        g1: Tensor, g2: Tensor, norm: Normalised, beta: Tensor | None, gate: Gate, gates: Tensor, hidden: Tensor,
        keep: Tensor | None,
) -> GateGradient:
    """As `vectors.excite_backward`, but for the gradient of the logits, which `terms` computes itself."""
    (images, channels), width = gates.shape, len(gate.fc1)
    if norm.values is not None or width > LARGEST_HIDDEN:
        return vectors.excite_backward(g1, g2, norm, beta, gate, gates, hidden, keep)
    d_hidden = g1.new_empty(images, width)
    block_n, _, block_r = HIDE
    launch(_excite_backward, -(-images // block_n) * -(-width // block_r), WARPS, _vector(g1), _vector(g2), norm.scale,
           _vector(beta), _vector(gate.fc2), _vector(gates), _vector(hidden), _vector(keep), d_hidden, images, channels,
           width, gate.excitation, *HIDE, UNROLL)
    return GateGradient(None, d_hidden)


def terms(
        g1: Tensor, g2: Tensor, mean: Tensor | None, beta: Tensor | None, gate: Gate | None, gates: Tensor | None,
        hidden: Tensor | None, keep: Tensor | None, gradient: GateGradient | None, norm: Normalised, pixels: int,
        batch_statistics: bool, group: Any,
) -> Terms:
    """As `vectors.terms`."""
    (images, channels), width = g1.shape, 1 if hidden is None else hidden.shape[1]
    if group is not None or width > LARGEST_HIDDEN:
        return vectors.terms(
            g1, g2, mean, beta, gate, gates, hidden, keep, gradient, norm, pixels, batch_statistics, group)
    d_beta, d_gamma, c = (g1.new_empty(channels) for _ in range(3))
    b = g1.new_empty(channels) if gradient is None else g1.new_empty(images, channels)
    weights: tuple[Tensor, ...] = ()
    if gate is not None and gradient is not None:
        weights = tuple(g1.new_empty(shape) for shape in ((width, channels), width, (channels, width), channels))
        _, block_c, block_r = WEIGH
        launch(_weigh, -(-channels // block_c) * -(-width // block_r), WARPS, _vector(g1), _vector(g2), _vector(mean),
               norm.mu, norm.scale, _vector(beta), _vector(gates), _vector(hidden), _vector(keep), gradient.d_hidden,
               *weights, images, channels, width, gate.excitation, *WEIGH)
    launch(_terms, -(-channels // TERMS[1]), WARPS, _vector(g1), _vector(g2), None if gate is None else _vector(mean),
           None if gate is None else _vector(gate.fc1), _vector(gates), _vector(keep),
           None if gradient is None else _vector(gradient.d_hidden), norm.mu, norm.inverse, norm.scale, d_beta,
           d_gamma, b, c, pixels, images, channels, width, batch_statistics, *TERMS, max(power_of_two(width), 16))
    return Terms(d_beta, d_gamma, b.expand(images, channels), c, *weights)


def track(
        running_mean: Tensor, running_variance: Tensor, batches: Tensor | None, mean: Tensor, variance: Tensor,
        momentum: float, values: int,
) -> None:
    """Move running statistics, float32 `(C,)` without gaps, towards those of a batch, and count it.

    Args:
        running_mean: Changed in place, as the following two.
        running_variance: See `running_mean`.
        batches: Number of batches, `()`.
        mean: Of the batch, `(C,)`.
        variance: Of the batch, biased, `(C,)`.
        momentum: How far.
        values: Of each channel of the batch.
    """
    block = min(power_of_two(len(mean)), 256)
    launch(_track, -(-len(mean) // block), WARPS, running_mean, running_variance, batches, mean, variance,
           float(momentum), float(values), len(mean), block)
    torch.autograd.graph.increment_version(
        [value for value in (running_mean, running_variance, batches) if value is not None])


VECTORS = Vectors(normalise, excite, excite_backward, terms)
