"""A forward pass of a copy of a network, and what it shows of the places where gates shall stand."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .insertion_points import Point
from .meta import bare, copied, does_not_run, full_copy, meta_copy

__all__ = ['NO_SHORTCUT', 'End', 'layout_of', 'observe']

NO_SHORTCUT = 'its block adds no shortcut'
CUBE = 'cube'  # layout of maps with as many channels as rows and columns, until the others tell
CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# modules that in evaluation may hand the weights of their children to one function, and call none of them
FUSED_BY_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


class End(NamedTuple):
    """What a forward pass showed of a point.

    Attributes:
        problem: Why there can be no gate, or an empty text.
        channels: C.
        layout: One of `gated.LAYOUTS`.
        dtype: Of what is to be gated; None where that is the choice of an autocast.
        is_plain: The module is called with one tensor.
    """

    problem: str
    channels: int = 0
    layout: str = ''
    dtype: torch.dtype | None = None
    is_plain: bool = True


class Call(NamedTuple):
    """What was seen of a call: what is to be gated, if the module was called with one tensor, and if under autocast."""

    seen: Any
    is_plain: bool
    by_autocast: bool


def observe(net: nn.Module, points: list[Point], size: tuple[int, ...]) -> dict[Point, End]:
    """Return what a forward pass of a copy shows of `points`.

    Args:
        net: The network; it is not changed, and its hooks are not run.
        points: The places.
        size: Channels, height and width of an image.

    Raises:
        ValueError: If the network cannot be copied, or does not run.
    """
    calls = attempt(net, points, size)
    return resolved(net, {point: end_of(net, point, calls[point], size) for point in points})


def attempt(net: nn.Module, points: list[Point], size: tuple[int, ...]) -> dict[Point, list[Call]]:
    """Return the calls at each point of a pass on the meta device, or where that fails, of one with values."""
    for make in (meta_copy, full_copy):
        one = bare(copied('add_se', net, make))
        try:
            return record(one, points, size)
        except Exception as exception:  # not every network runs without values
            failure = exception
    raise does_not_run('add_se', net, size, failure) from failure


def record(net: nn.Module, points: list[Point], size: tuple[int, ...]) -> dict[Point, list[Call]]:
    """Run `net` once, and return what was seen at each point in each call."""
    calls: dict[Point, list[Call]] = {point: [] for point in points}

    def hook(point: Point) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            sees_input = point.kind in ('slot', 'before')
            seen = args[0] if sees_input else output
            calls[point].append(Call(seen, len(args) == 1 and not kwargs, is_cast(seen)))
        return see

    for point in points:
        watched(net, point).register_forward_hook(hook(point), with_kwargs=True)
    weight = next((weight for weight in net.parameters() if weight.is_floating_point()), torch.empty(()))
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        net(torch.zeros(1, *size, device=weight.device, dtype=weight.dtype))
    return calls


def is_cast(seen: Any) -> bool:
    """Return whether an autocast is on that may have chosen the dtype; without values, on meta, none does."""
    return isinstance(seen, torch.Tensor) and not seen.is_meta and torch.is_autocast_enabled(seen.device.type)


def watched(net: nn.Module, point: Point) -> Any:
    """Return the module whose call shows what is at a point; where there is none, an identity is put there."""
    block: Any = net.get_submodule(point.block)
    if point.kind == 'end':  # of a sequence, over which one may iterate in place of calling it
        return block[-1]
    if getattr(block, point.child) is None:
        setattr(block, point.child, nn.Identity())
    return getattr(block, point.child)


def end_of(net: nn.Module, point: Point, calls: list[Call], size: tuple[int, ...]) -> End:
    """Return what the calls show of a point."""
    if len(calls) != 1:
        return End(f'it runs {len(calls)} times in a forward pass, which would share a gate' if calls else
                   NO_SHORTCUT if point.kind == 'before' else 'it does not run in a forward pass')
    seen, is_plain, by_autocast = calls[0]
    if not isinstance(seen, torch.Tensor):
        return End(f'it gives a {type(seen).__name__}, not a tensor')
    if point.kind in ('before', 'end') and not is_plain:
        return End('it is called with more than a tensor')
    if seen.shape[:1] != (1,):
        return End(f'of one image it gives {tuple(seen.shape)}, whose first dimension is not the batch')
    if problem := structure_problem(net, point):
        return End(problem)
    layout = layout_of(seen, size, watched(net, point) if point.kind in ('after', 'end') else None)
    if not layout:
        return End(f'it gives {tuple(seen.shape)}: neither maps (N, C, H, W), (N, H, W, C) nor tokens (N, L, C)')
    return End('', seen.shape[1 if layout == 'NCHW' else -1], layout, None if by_autocast else seen.dtype, is_plain)


def structure_problem(net: nn.Module, point: Point) -> str:
    """Return in words what of the network's structure keeps a gate from a point, or an empty text."""
    names = str(point).split('.')
    if any(isinstance(net.get_submodule('.'.join(names[:depth])), FUSED_BY_TORCH) for depth in range(1, len(names))):
        return 'it is a part of a layer of torch that in evaluation does not call its parts'
    holder = {'after': str(point), 'end': point.block}.get(point.kind)
    if holder is not None and hasattr(net.get_submodule(holder), 'se'):
        return 'it has a child called se'
    return ''


def layout_of(seen: torch.Tensor, size: tuple[int, ...], module: nn.Module | None = None) -> str:
    """Return where the channels of `seen` are; of maps, height and width are in the proportion of the image's.

    A `module` of torch's that gives them tells more: its step may be another along height than along width.
    """
    if isinstance(module, CHANNELS_FIRST):
        return 'NCHW' if seen.ndim == 4 else ''
    if seen.ndim != 4:
        return 'NLC' if seen.ndim == 3 else ''
    slack = 0 if size[1] == size[2] else max(size[1:])  # a pixel, for what was rounded
    first, second, third = seen.shape[1:]
    channels_first = abs(second * size[2] - third * size[1]) <= slack
    channels_last = abs(first * size[2] - second * size[1]) <= slack
    if channels_first and channels_last:
        return CUBE
    return 'NCHW' if channels_first else 'NHWC' if channels_last else ''


def resolved(net: nn.Module, ends: dict[Point, End]) -> dict[Point, End]:
    """Return `ends` with the layouts of cubes: that of the same place in blocks of the same class, else of all maps."""
    def place(point: Point) -> tuple[type, str]:
        return type(net.get_submodule(point.block)), point.child

    maps = {point: end.layout for point, end in ends.items() if end.layout in ('NCHW', 'NHWC')}
    result = {}
    for point, end in ends.items():
        if end.layout == CUBE:
            alike = {layout for other, layout in maps.items() if place(other) == place(point)} or set(maps.values())
            end = end._replace(layout=alike.pop()) if len(alike) == 1 else End(
                f'it gives {end.channels} channels of as many rows and columns, of which it cannot be told which are '
                'which; another input_size may tell')
        result[point] = end
    return result
