"""The four passes on CUDA, each one Triton kernel.

Every kernel works on tiles of `BLOCK_P` pixels by `BLOCK_C` channels of one image, and one program on one tile after
the other along the pixels. Channels-last and contiguous memory differ by two strides only, of which one is 1: Triton
lays the threads along that axis, so that one source serves both without uncoalesced loads, and the tile is long along
it (`TILES`). A small map takes more channels into its tile, so that threads are not left without work.

What bounds these passes is memory: each tensor is read once, 16 bytes a thread where shape and dtype allow, and two or
more such loads of each tensor are under way in every thread.

Sums: each cell of the tile takes those of its own pixels, and the cells are added up once, at the end. `moments` keeps
mean and squared deviations in each cell (Welford), and joins the cells by Chan's formula. Where images and channels are
too few to fill the GPU, several programs share the pixels of an image, and what each finds is joined afterwards. All
this depends on shapes, dtypes and the number of multiprocessors alone, and nothing is added in the order of arrival:
two runs give the same bits.

The module can be imported without Triton.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import message
from .launch import jit, launch, power_of_two, tl

__all__ = ['apply', 'grad', 'moments', 'reduce']


# Tunables


class Tile(NamedTuple):
    """How much of a tensor one program of a pass takes at once. All sizes in bytes, and powers of two."""

    size: int  # of the tile, at most
    channels_last: int  # of the channels of a pixel, at most while there are pixels enough
    contiguous: int  # of the pixels of a channel, likewise
    warps: int
    unroll: int = 1  # tiles whose loads are under way together, in the loop of a pass with sums


# The best on an H200 over the tails of ResNet-50 (bfloat16, channels-last, batch 256), of those that were tried: 2 to
# 16 KiB, 128 to 512 bytes of a pixel, 4 and 8 warps. The passes with sums hold two float32 for each element besides.
# 128 bytes are one line of the cache; pixels come in longer rows, as their number is seldom a power of two. Compiled
# for sm_90, no kernel spills registers.
TILES = {
    'moments': Tile(4096, 128, 512, warps=4, unroll=2),
    'apply': Tile(8192, 256, 512, warps=8),
    'reduce': Tile(2048, 128, 512, warps=4),
    'grad': Tile(8192, 128, 512, warps=4),
}
PROGRAMS = 8  # of a pass with sums, for each multiprocessor: where there are fewer, pixels are shared
SPLITS = 128  # programs that share the pixels of an image, at most: one tile of `_merge` holds what they found
MERGE_CHANNELS, MERGE_WARPS = 32, 4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Kernels: pixels, channels and share, and what follows, are `Plan.arguments`; in capitals what Triton compiles in.
# Triton looks up annotations too, and does not know typing's of Python 3.10.


@jit
def _place(
        pixels: tl.tensor, channels: tl.tensor, share: tl.tensor, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> tl.tuple:
    """Return where this program works.

    Returns:
        Number of its image; number of its part, of all parts of all images; its first pixel; the pixel where it ends;
        pixels of the tile; its channels; which of these exist; the position of the tile in a tensor; positions in the
        tile; the distance from one tile to the next.
    """
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    splits = (pixels + share - 1) // share
    part = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C
    image = (part // splits).to(tl.int64)
    first = part % splits * share
    p, lane = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    # divided and multiplied, a size is known to be a multiple; Triton itself looks for multiples of 16 only
    if CHANNELS_LAST:
        row = channels // WIDTH * WIDTH
        offsets = p[:, None] * row + lane[None, :]
        place = (image * pixels + first) * row + channel
        step = row * BLOCK_P
    else:
        row = pixels // WIDTH * WIDTH
        offsets = p[:, None] + lane[None, :] * row
        place = (image * channels + channel) * row + first
        step = BLOCK_P
    stop = tl.minimum(first + share, pixels)
    c = channel + lane
    return image, part.to(tl.int64), first, stop, p, c, c < _bound(channels, CHANNELS_LAST, WIDTH), place, offsets, step


@jit
def _bound(size: tl.tensor, IS_ROW: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Return the size, known to be a multiple of `WIDTH` if it is that of a row: so may be masks, and vectors stay."""
    if IS_ROW:
        size = size // WIDTH * WIDTH
    return size


@jit
def _chan(count: tl.tensor, mean: tl.tensor, squares: tl.tensor) -> tl.tuple:
    """Return mean and squared deviations of all cells of each channel, from those of each cell (Chan et al., 1979)."""
    count = count.to(tl.float32)[:, None]
    total = tl.sum(mean * count, 0) / tl.sum(count, 0)
    away = mean - total[None, :]
    return total, tl.sum(squares + count * away * away, 0)


@jit
def _moments(
        x: tl.tensor, means: tl.tensor, squares: tl.tensor, UNROLL: tl.constexpr,
        pixels: tl.tensor, channels: tl.tensor, share: tl.tensor, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    _, part, first, stop, p, c, lanes, place, offsets, step = _place(
        pixels, channels, share, CHANNELS_LAST, WIDTH, BLOCK_P, BLOCK_C)
    bound = _bound(pixels, not CHANNELS_LAST, WIDTH)
    mean = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
    square = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
    seen = 0.0
    for start in tl.range(first, stop, BLOCK_P, loop_unroll_factor=UNROLL):
        inside = (start + p < bound)[:, None] & lanes[None, :]
        value = tl.load(x + place + offsets, mask=inside, other=0).to(tl.float32)
        seen += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / seen)  # the same in all cells: one without a pixel in the last tile changes no more
        square += delta * (value - mean)
        place += step
    mean, square = _chan((stop - first - p + BLOCK_P - 1) // BLOCK_P, mean, square)
    tl.store(means + part * channels + c, mean, mask=lanes)
    tl.store(squares + part * channels + c, square, mask=lanes)


@jit
def _merge(
        part_means: tl.tensor, part_squares: tl.tensor, means: tl.tensor, squares: tl.tensor, pixels: tl.tensor,
        channels: tl.tensor, share: tl.tensor, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    """Join the moments of the parts of an image."""
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)
    count = tl.minimum(tl.maximum(pixels - part * share, 0), share)
    offsets = (image * ((pixels + share - 1) // share) + part[:, None]) * channels + c[None, :]
    inside = (count > 0)[:, None] & (c < channels)[None, :]
    mean = tl.load(part_means + offsets, mask=inside, other=0)
    square = tl.load(part_squares + offsets, mask=inside, other=0)
    mean, square = _chan(count, mean, square)
    tl.store(means + image * channels + c, mean, mask=c < channels)
    tl.store(squares + image * channels + c, square, mask=c < channels)


@jit
def _apply(
        x: tl.tensor, shortcut: tl.tensor, y: tl.tensor, mu: tl.tensor, a: tl.tensor, b: tl.tensor,
        shortcut_mu: tl.tensor, shortcut_scale: tl.tensor, a_row: tl.tensor, b_row: tl.tensor, RELU: tl.constexpr,
        pixels: tl.tensor, channels: tl.tensor, share: tl.tensor, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    image, _, first, _, p, c, lanes, place, offsets, _ = _place(
        pixels, channels, share, CHANNELS_LAST, WIDTH, BLOCK_P, BLOCK_C)
    inside = (first + p < _bound(pixels, not CHANNELS_LAST, WIDTH))[:, None] & lanes[None, :]
    value = tl.load(x + place + offsets, mask=inside, other=0).to(tl.float32)
    if shortcut is not None:
        added = tl.load(shortcut + place + offsets, mask=inside, other=0).to(tl.float32)
    value -= tl.load(mu + c, mask=lanes, other=0)[None, :]
    value *= tl.load(a + image * a_row + c, mask=lanes, other=0)[None, :]
    value += tl.load(b + image * b_row + c, mask=lanes, other=0)[None, :]
    if shortcut is not None:
        if shortcut_mu is not None:
            added -= tl.load(shortcut_mu + c, mask=lanes, other=0)[None, :]
            added *= tl.load(shortcut_scale + c, mask=lanes, other=0)[None, :]
        value += added
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(y + place + offsets, value, mask=inside)


@jit
def _reduce(
        dy: tl.tensor, y: tl.tensor, x: tl.tensor, g: tl.tensor, mu: tl.tensor, sums: tl.tensor, moments: tl.tensor,
        UNROLL: tl.constexpr,
        pixels: tl.tensor, channels: tl.tensor, share: tl.tensor, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    _, part, first, stop, p, c, lanes, place, offsets, step = _place(
        pixels, channels, share, CHANNELS_LAST, WIDTH, BLOCK_P, BLOCK_C)
    bound = _bound(pixels, not CHANNELS_LAST, WIDTH)
    centre = tl.load(mu + c, mask=lanes, other=0)[None, :]
    total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
    moment = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
    for start in tl.range(first, stop, BLOCK_P, loop_unroll_factor=UNROLL):
        inside = (start + p < bound)[:, None] & lanes[None, :]
        value = tl.load(dy + place + offsets, mask=inside, other=0).to(tl.float32)
        deviation = tl.load(x + place + offsets, mask=inside, other=0).to(tl.float32) - centre
        if y is not None:
            sign = tl.load(y + place + offsets, mask=inside, other=0).to(tl.float32)
            value = tl.where(sign > 0, value, 0.0)  # not where y is NaN
            tl.store(g + place + offsets, value, mask=inside)
        total += value
        moment += value * deviation
        place += step
    tl.store(sums + part * channels + c, tl.sum(total, 0), mask=lanes)
    tl.store(moments + part * channels + c, tl.sum(moment, 0), mask=lanes)


@jit
def _grad(
        g: tl.tensor, x: tl.tensor, dx: tl.tensor, mu: tl.tensor, a: tl.tensor, b: tl.tensor, c_vector: tl.tensor,
        a_row: tl.tensor, b_row: tl.tensor,
        pixels: tl.tensor, channels: tl.tensor, share: tl.tensor, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:
    image, _, first, _, p, c, lanes, place, offsets, _ = _place(
        pixels, channels, share, CHANNELS_LAST, WIDTH, BLOCK_P, BLOCK_C)
    inside = (first + p < _bound(pixels, not CHANNELS_LAST, WIDTH))[:, None] & lanes[None, :]
    value = tl.load(g + place + offsets, mask=inside, other=0).to(tl.float32)
    deviation = tl.load(x + place + offsets, mask=inside, other=0).to(tl.float32)
    deviation -= tl.load(mu + c, mask=lanes, other=0)[None, :]
    value *= tl.load(a + image * a_row + c, mask=lanes, other=0)[None, :]
    value += tl.load(b + image * b_row + c, mask=lanes, other=0)[None, :]
    value -= tl.load(c_vector + c, mask=lanes, other=0)[None, :] * deviation
    tl.store(dx + place + offsets, value, mask=inside)


# Plans


class Plan(NamedTuple):
    """How a pass is launched."""

    programs: int
    parts: int  # programs that share the pixels of an image
    tile: Tile
    arguments: tuple[Any, ...]  # the last of the kernel


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return their number; 1 without CUDA, where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _blocks(pixels: int, channels: int, channels_last: bool, elements: int, limit: int) -> tuple[int, int]:
    """Return pixels and channels of a tile of at most `elements`.

    First the axis along which memory runs, up to `limit`; then the other, as far as the tile has room; what is then
    left of it goes to the first: a map of 1 by 1 would else leave most threads without work.
    """
    row, others = (power_of_two(size) for size in ((channels, pixels) if channels_last else (pixels, channels)))
    others = min(others, elements // min(row, limit))
    row = min(row, elements // others)
    return (others, row) if channels_last else (row, others)


@functools.lru_cache(4096)
def _plan(name: str, shape: torch.Size, itemsize: int, channels_last: bool, device: torch.device) -> Plan:
    """Return how to launch the pass `name` on a tensor of this shape, which lies as `channels_last` says."""
    tile, (images, channels), pixels = TILES[name], shape[:2], shape[2] * shape[3]
    row = channels if channels_last else pixels
    width = min(row & -row, 16)  # the power of two that divides it, at most 16
    # where a row does not let 16 bytes be loaded at once, a thread loads twice as often at most
    elements = tile.size * min(2 * width * itemsize, 16) // 16 // itemsize
    limit = (tile.channels_last if channels_last else tile.contiguous) // itemsize
    block_p, block_c = _blocks(pixels, channels, channels_last, elements, limit)
    share, programs = block_p, images * -(-channels // block_c)
    if name in ('moments', 'reduce'):  # those with sums go on from tile to tile
        parts = min(max(PROGRAMS * _multiprocessors(device) // programs, 1), SPLITS)
        share *= -(-pixels // (parts * block_p))
    parts = -(-pixels // share)
    return Plan(programs * parts, parts, tile, (pixels, channels, share, channels_last, width, block_p, block_c))


def _plan_of(name: str, x: Tensor, channels_last: bool) -> Plan:
    return _plan(name, x.shape, x.element_size(), channels_last, x.device)


# Arguments


def _prepare(x: Tensor, *others: Tensor | None) -> tuple[bool, Tensor, list[Any]]:
    """Return whether the tensors lie channels-last (else contiguous), and `x` and the others, all laid so.

    Raises:
        TypeError: For a dtype other than `DTYPES`.
    """
    for value in (x, *others):
        if value is not None and value.dtype not in DTYPES:
            raise TypeError(message(
                f'a tensor of {value.dtype}', 'the Triton kernels compute in float32, from tensors of '
                + ', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES), 'take the backend reference'))
    # one channel lies the same either way
    channels_last = x.shape[1] > 1 and (
        x.is_contiguous(memory_format=torch.channels_last) or (x.stride(1) == 1 and not x.is_contiguous()))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return channels_last, _lay(x, x.shape, memory_format), [
        None if value is None else _lay(value, x.shape, memory_format) for value in others]


def _lay(value: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """Return the tensor, expanded to that shape, in that format, from an address divisible by 16.

    Elsewhere Triton compiles another kernel, without 16-byte loads, and whose sums have another order.
    """
    if value.shape != shape:
        value = value.expand(shape)
    if not value.is_contiguous(memory_format=memory_format):
        value = value.contiguous(memory_format=memory_format)
    return value.clone() if value.data_ptr() % 16 else value


def _restore(value: Tensor, x: Tensor) -> Tensor:
    """Return the result with the strides that `torch.empty_like(x)` has, which the operators promise."""
    return value if value.stride() == x.stride() else torch.empty_like(x, dtype=value.dtype).copy_(value)


def _vector(value: Tensor, channels: int) -> Tensor:
    return _lay(value, torch.Size((channels,)), torch.contiguous_format)


def _rows(value: Tensor, images: int, channels: int) -> tuple[Tensor, int]:
    """Return a vector for each image, and the distance between them: 0 where it is one and the same."""
    if images > 1 and value.ndim == 2 and value.stride(0) == 0:
        return _vector(value[0], channels), 0
    return _lay(value, torch.Size((images, channels)), torch.contiguous_format), channels


def _room(x: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return room for two results of each part of each image; not as halves of one tensor, which would outlive it."""
    shape = (x.shape[0], parts, x.shape[1])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


# Passes


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `algebra.moments`, for `x` of `DTYPES`.

    Raises:
        TypeError: For another dtype; so do all passes.
    """
    channels_last, laid, _ = _prepare(x)
    images, channels = x.shape[:2]
    mean, squares = _room(x)
    if not x.numel():
        return mean[:, 0].zero_(), squares[:, 0].zero_()
    plan = _plan_of('moments', laid, channels_last)
    found = (mean, squares) if plan.parts == 1 else _room(x, plan.parts)
    launch(_moments, plan.programs, plan.tile.warps, laid, *found, plan.tile.unroll, *plan.arguments)
    if plan.parts > 1:
        block = min(power_of_two(channels), MERGE_CHANNELS)
        launch(_merge, images * -(-channels // block), MERGE_WARPS,
                *found, mean, squares, *plan.arguments[:3], power_of_two(plan.parts), block)
    return mean[:, 0], squares[:, 0]


def apply(
        x: Tensor, shortcut: Tensor | None, mu: Tensor, a: Tensor, b: Tensor, shortcut_mu: Tensor | None,
        shortcut_scale: Tensor | None, relu: bool,
) -> Tensor:
    """As `algebra.apply`."""
    channels_last, laid, (shortcut,) = _prepare(x, shortcut)
    y = torch.empty_like(laid)
    if x.numel():
        images, channels = x.shape[:2]
        affine: list[Tensor | None] = [None, None]
        if shortcut_mu is not None and shortcut_scale is not None:
            affine = [_vector(shortcut_mu, channels), _vector(shortcut_scale, channels)]
        plan, (a, a_row), (b, b_row) = (
            _plan_of('apply', laid, channels_last), _rows(a, images, channels), _rows(b, images, channels))
        launch(_apply, plan.programs, plan.tile.warps, laid, shortcut, y, _vector(mu, channels), a, b, *affine,
               a_row, b_row, relu, *plan.arguments)
    return _restore(y, x)


def reduce(dy: Tensor, y: Tensor | None, x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `algebra.reduce`."""
    channels_last, laid, (laid_dy, y) = _prepare(x, dy, y)
    g = dy.new_empty(0) if y is None else torch.empty_like(laid, dtype=dy.dtype)
    if x.numel():
        plan = _plan_of('reduce', laid, channels_last)
        first, second = _room(x, plan.parts)
        launch(_reduce, plan.programs, plan.tile.warps, laid_dy, y, laid, g, _vector(mu, x.shape[1]), first, second,
                plan.tile.unroll, *plan.arguments)
    else:
        first, second = (value.zero_() for value in _room(x))
    if first.shape[1] == 1:
        first, second = first[:, 0], second[:, 0]
    else:
        first, second = first.sum(1), second.sum(1)
    return first, second, g if y is None else _restore(g, x)


def grad(g: Tensor, x: Tensor, mu: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As `algebra.grad`."""
    channels_last, laid, (g,) = _prepare(x, g)
    dx = torch.empty_like(laid)
    if x.numel():
        images, channels = x.shape[:2]
        plan, (a, a_row), (b, b_row) = (
            _plan_of('grad', laid, channels_last), _rows(a, images, channels), _rows(b, images, channels))
        launch(_grad, plan.programs, plan.tile.warps, g, laid, dx, _vector(mu, channels), a, b, _vector(c, channels),
               a_row, b_row, *plan.arguments)
    return _restore(dx, x)
