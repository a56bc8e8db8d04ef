"""SE in any network that is there already, and out of it again."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import ConvMlp, GatherExcite, create_attn
from torch import nn

from .errors import message, unknown
from .gated import Gated, GatedCall
from .insertion_points import Point, known_points, named_points
from .residual_blocks import is_identity
from .squeeze_excite import SqueezeExcite

__all__ = ['KINDS', 'Insertion', 'Place', 'add_se', 'added', 'remove_se']

# 'se' is ours; the others are timm's attention that keeps the shape, by the names of `timm.layers.create_attn`
KINDS = ('se', 'ese', 'eca', 'ecam', 'ceca', 'ge', 'gc', 'gca', 'cbam', 'lcbam', 'coord', 'scoord', 'ela', 'strip')
# classes that are, or have, channel attention of a block's own
GATES = (
    'SEModule', 'SqueezeExcite', 'SqueezeExcitation', 'SqueezeExciteCl', 'EffectiveSEModule', 'EcaModule', 'CecaModule',
    'GatherExcite', 'GlobalContext', 'CbamModule', 'LightCbamModule', 'CoordAttn', 'SimpleCoordAttn',
    'EfficientLocalAttn', 'StripAttn')
FOR_NONE = 'stands_for_none'  # attribute of what was put in: there was None before, else a module
NOT_RUN = {True: 'its block adds no shortcut', False: 'it does not run in a forward pass'}
OWN_ARGUMENTS = ('at', 'kind', 'identity_start', 'input_size', 'inplace')
SE_ARGUMENTS = tuple(
    name for name in inspect.signature(SqueezeExcite).parameters
    if name not in ('channels', 'identity_start', 'device', 'dtype'))


class Place(NamedTuple):
    """A gate that was added.

    Attributes:
        where: `'slot'`: in the block's place for attention; `'before'` or `'after'` the module of this name.
        channels: C.
        layout: `'NCHW'`, `'NHWC'` or `'NLC'`.
        parameters: Of the gate.
    """

    where: str
    channels: int
    layout: str
    parameters: int


class Insertion(NamedTuple):
    """What `add_se` did.

    Attributes:
        net: The network with its gates.
        places: Name of the module that a gate stands at -> the gate.
        left: Name of a residual block, or of its end, that has no gate -> the reason.
        config: The arguments of `add_se` that make the same of the same network.
    """

    net: nn.Module
    places: dict[str, Place]
    left: dict[str, str]
    config: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Return the number of parameters of all gates."""
        return sum(place.parameters for place in self.places.values())

    @property
    def share(self) -> float:
        """Return the parameters of all gates as a share of the whole network's."""
        return self.parameters / sum(parameter.numel() for parameter in self.net.parameters())

    def __str__(self) -> str:
        lines = [f'{self.config["kind"]}: {len(self.places)} gates, {self.parameters:,} parameters, '
                 f'{100 * self.share:.2f} % of the whole']
        lines += [f'{name}: {place.where}, {place.channels} channels ({place.layout}), {place.parameters:,} parameters'
                  for name, place in self.places.items()]
        return '\n'.join([*lines, *(f'left: {name}: {reason}' for name, reason in self.left.items())])


def add_se(
        net: nn.Module,
        at: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
        *,
        kind: str = 'se',
        identity_start: bool = False,
        input_size: Sequence[int] | None = None,
        inplace: bool = True,
        **arguments: Any,
) -> Insertion:
    """Put SE into any network, where the paper would: at the end of each residual branch, before the sum.

    Known are the blocks of `se_timm.insertion_points.KNOWN`, and all that have stochastic depth, of any rate, whose
    module stands at that end. A block with channel attention of its own is left. In networks without residual blocks,
    name modules by `at`. The parameters that were there keep their keys; those of the gates are `se.*` at the block (in
    its place for attention) or at the module before or after which the gate stands. How many channels there are is
    found by a run of a copy, on the meta device where that can be.

    Args:
        net: A network of timm, torchvision or one's own, in plain PyTorch; not compiled or wrapped yet.
        at: Names of modules as of `named_modules()`, in which a `*` stands for one part (`'layer*.*'`), names of
            classes, or classes. A residual block that is known gets its gate at the end of the branch, another module
            at its output: maps `(N, C, H, W)` or `(N, H, W, C)`, or tokens `(N, L, C)`.
        kind: `'se'`, or timm's attention that keeps the shape: `'eca'`, `'ge'`, `'cbam'`, ...
        identity_start: Begin with gates of exactly one, so that the network computes what it computed, to the bit,
            until it is trained; see `SqueezeExcite`. A departure from the paper.
        input_size: Channels, height and width of an image; by default those of the network's configuration, else
            `(3, 224, 224)`.
        inplace: Change `net`, else a copy.
        **arguments: Of `SqueezeExcite` (`reduction`, `squeeze`, `excitation`, `bias`), or of timm's attention.

    Returns:
        What was added and what was left and why.

    Raises:
        ValueError: If nothing can be added, or not what was asked for. The network is then as it was.
    """
    check_network(net)
    arguments = check_arguments(kind, arguments, identity_start)
    patterns = [at] if isinstance(at, (str, type)) else at if at is None else list(at)
    ends = observe(net, *choose_points(net, patterns), size_of(net, input_size))
    check_ends(net, patterns, ends)
    gates = {point: make_gate(net, point, end.channels, kind, arguments)
             for point, end in ends.items() if not end.problem}
    if not inplace:
        net = copy.deepcopy(net)
    for point in sorted(gates, key=lambda point: -str(point).count('.')):  # the inner ones first: they change no names
        insert(net, point, gates[point], ends[point])
    return Insertion(
        net,
        {str(point): Place(point.kind, ends[point].channels, ends[point].layout, parameters_of(gate))
         for point, gate in gates.items()},
        {str(point): end.problem for point, end in ends.items() if end.problem},
        config_of(patterns, kind, input_size, arguments))


def remove_se(net: nn.Module) -> list[str]:
    """Take out what `add_se` put in, in place: the network is again what it was before, with its present parameters.

    Returns:
        The names under which the gates stood.

    Raises:
        ValueError: If there is none. SE that a network was made with stays.
    """
    gates = added(net)
    if not gates:
        raise ValueError(message(
            f'remove_se({type(net).__name__})', 'add_se put nothing into it', 'SE that a network was made with is left '
            "out where it is made: se=False for this package's networks"))
    for name in reversed(gates):  # the inner ones first
        parent, _, child = name.rpartition('.')
        block, gate = net.get_submodule(parent), net.get_submodule(name)
        was_none = getattr(gate, FOR_NONE)
        if was_none:
            delattr(block, child)
        setattr(block, child, None if was_none else gate.inner if isinstance(gate, Gated) else nn.Identity())
    return list(gates)


def added(net: nn.Module) -> dict[str, nn.Module]:
    """Return the gates that `add_se` put in, by the names of the modules that hold or are them."""
    return {name: module.se if isinstance(module, Gated) else module for name, module in net.named_modules()
            if isinstance(module, Gated) or hasattr(module, FOR_NONE)}


# What is given


def check_network(net: Any) -> None:
    """Raise `ValueError` for what no gate can be put into."""
    if not isinstance(net, nn.Module):
        raise ValueError(message(
            f'add_se({net!r:.60})', f'it is a {type(net).__name__}, not an nn.Module', 'give the network itself'))
    for is_so, reason, remedy in (
            (any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()),
             'TorchScript cannot be changed', 'add SE to the module before torch.jit.script or torch.jit.trace'),
            (type(net).__name__ == 'OptimizedModule' or any(
                module._compiled_call_impl is not None for module in net.modules()),
             'it is compiled', 'add SE before torch.compile, or to the module that was compiled'),
            (isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or any(
                type(module).__name__ == 'FullyShardedDataParallel' for module in net.modules()),
             'its parameters are spread over processes or devices already', 'add SE before that'),
            (added(net), f'it has {len(added(net))} added gates already', 'call remove_se first'),
    ):
        if is_so:
            raise ValueError(message(f'add_se({type(net).__name__})', reason, remedy))


def check_arguments(kind: str, arguments: dict[str, Any], identity_start: bool) -> dict[str, Any]:
    """Return the arguments of the gate.

    Raises:
        ValueError: If there is no such kind, or argument of SE, or no such start.
    """
    if kind not in KINDS:
        raise ValueError(unknown('kind', kind, KINDS))
    if kind == 'se':
        for name in arguments:
            if name not in SE_ARGUMENTS:
                raise ValueError(unknown('argument of add_se', name, [*SE_ARGUMENTS, *OWN_ARGUMENTS]))
        return {**arguments, **({'identity_start': True} if identity_start else {})}
    if identity_start:
        raise ValueError(message(
            f'identity_start=True with kind={kind!r}', "the gates of timm's attention do not begin with one",
            "take kind='se', or leave identity_start out"))
    return arguments


def size_of(net: nn.Module, input_size: Sequence[int] | None) -> tuple[int, ...]:
    """Return channels, height and width of an image: those given, or the network's own.

    Raises:
        ValueError: For anything else.
    """
    if input_size is None:
        cfg = getattr(net, 'default_cfg', None)
        channels, *pixels = (isinstance(cfg, dict) and cfg.get('input_size')) or (3, 224, 224)
        return (getattr(net, 'in_chans', channels), *pixels)
    if isinstance(input_size, str) or len(input_size) != 3 or not all(
            isinstance(each, int) and each > 0 for each in input_size):
        raise ValueError(message(
            f'input_size: {input_size!r}', 'it is not channels, height and width', 'give them as in (3, 224, 224)'))
    return tuple(input_size)


def config_of(
        patterns: Sequence[str | type[nn.Module]] | None, kind: str, input_size: Sequence[int] | None,
        arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `add_se`, as they can be written to a file."""
    return {
        **({} if patterns is None else {'at': [each if isinstance(each, str) else each.__name__ for each in patterns]}),
        **({} if input_size is None else {'input_size': list(input_size)}), 'kind': kind, **arguments}


# Where


class End(NamedTuple):
    """What a forward pass showed of a point.

    Attributes:
        problem: Why there can be no gate, or an empty text.
        channels: C.
        layout: One of `LAYOUTS`.
        is_plain: The module is called with one tensor.
    """

    problem: str
    channels: int = 0
    layout: str = ''
    is_plain: bool = True


def choose_points(net: nn.Module, patterns: Sequence[Any] | None) -> tuple[list[Point], dict[Point, End]]:
    """Return the points that may get gates, and those that do not, with the reason."""
    points = known_points(net) if patterns is None else named_points(net, patterns)
    left = {}
    for point in points:
        block = net.get_submodule(point.block)
        has_gate = patterns is None and any(type(module).__name__ in GATES for module in block.modules())
        if has_gate or (point.kind == 'slot' and not is_identity(getattr(block, point.child))):
            left[point] = End('its block has channel attention of its own')
    return [point for point in points if point not in left], left


def observe(
        net: nn.Module, points: list[Point], left: dict[Point, End], size: tuple[int, ...]) -> dict[Point, End]:
    """Return what a forward pass of a copy shows of `points`, after those that are left.

    Raises:
        ValueError: If the network does not run.
    """
    for copied in (meta_copy, copy.deepcopy):  # not every network runs without values
        try:
            calls = record(copied(net).eval(), points, size)
            break
        except Exception as exception:
            error = exception
    else:
        raise ValueError(message(
            f'add_se({type(net).__name__})',
            f'it does not run on an image of {size} ({type(error).__name__}: {error})',
            'say input_size=(channels, height, width) of its images')) from error
    return {**left, **{point: end_of(net, point, calls[point], size) for point in points}}


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy on the meta device, for which nothing is allocated."""
    tensors: dict[int, Any] = {id(buffer): buffer.to('meta') for buffer in net.buffers()}
    tensors |= {id(weight): nn.Parameter(weight.detach().to('meta'), False) for weight in net.parameters()}
    return copy.deepcopy(net, tensors)


def record(net: nn.Module, points: list[Point], size: tuple[int, ...]) -> dict[Point, list[tuple[Any, bool]]]:
    """Run `net` once; return of each point what was seen there in each call, and whether it was called with one tensor.
    """
    calls: dict[Point, list[tuple[Any, bool]]] = {point: [] for point in points}

    def hook(point: Point) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[point].append((output if point.kind == 'after' else args[0], len(args) == 1 and not kwargs))
        return see

    for point in points:
        block = net.get_submodule(point.block)
        if getattr(block, point.child) is None:
            setattr(block, point.child, nn.Identity())
        getattr(block, point.child).register_forward_hook(hook(point), with_kwargs=True)
    weight = next(net.parameters(), torch.empty(()))
    with torch.no_grad():
        net(torch.zeros(1, *size, device=weight.device, dtype=weight.dtype))
    return calls


def end_of(net: nn.Module, point: Point, calls: list[tuple[Any, bool]], size: tuple[int, ...]) -> End:
    """Return what the calls show of a point."""
    if len(calls) != 1:
        return End(f'it runs {len(calls)} times in a forward pass, which would share a gate' if calls else
                   NOT_RUN[point.kind == 'before'])
    seen, is_plain = calls[0]
    if not isinstance(seen, torch.Tensor):
        return End(f'it gives a {type(seen).__name__}, not a tensor')
    if point.kind == 'before' and not is_plain:
        return End('it is called with more than a tensor')
    if point.kind == 'after' and hasattr(net.get_submodule(str(point)), 'se'):
        return End('it has a child called se')
    layout = layout_of(seen, size)
    if not layout:
        return End(f'it gives {tuple(seen.shape)}: neither maps (N, C, H, W), (N, H, W, C) nor tokens (N, L, C)')
    return End('', seen.shape[1 if layout == 'NCHW' else -1], layout, is_plain)


def layout_of(seen: torch.Tensor, size: tuple[int, ...]) -> str:
    """Return where the channels of `seen` are; of maps, height and width are in the proportion of the image's."""
    if seen.ndim != 4:
        return 'NLC' if seen.ndim == 3 else ''
    slack = 0 if size[1] == size[2] else max(size[1:])  # a pixel, for what was rounded
    first, second, third = seen.shape[1:]
    if abs(second * size[2] - third * size[1]) <= slack:
        return 'NCHW'  # if all three are the same, too
    return 'NHWC' if abs(first * size[2] - second * size[1]) <= slack else ''


def check_ends(net: nn.Module, patterns: Sequence[Any] | None, ends: dict[Point, End]) -> None:
    """Raise `ValueError` if no gate is left, or one that was named."""
    problems = {point: end.problem for point, end in ends.items() if end.problem}
    if patterns is not None and problems:
        point, problem = next(iter(problems.items()))
        more = f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''
        raise ValueError(message(f'at: {point}{more}', problem, 'name other modules'))
    if len(problems) < len(ends):
        return
    reason = f'none of its {len(ends)} residual branches can have one: {next(iter(problems.values()))}' if ends else (
        'it has no residual block of a kind that is known')
    raise ValueError(message(
        f'add_se({type(net).__name__})', reason,
        "name the modules whose outputs shall be gated by at=, as in at='layer*.*' or at='InceptionBlock'"))


# The gates


def make_gate(net: nn.Module, point: Point, channels: int, kind: str, arguments: dict[str, Any]) -> nn.Module:
    """Return the gate of `channels` for a point, on the device and in the dtype of its block.

    Raises:
        ValueError: If it cannot be made.
    """
    block = net.get_submodule(point.block)
    weight = next((w for module in (block, net) for w in module.parameters() if w.is_floating_point()), None)
    dd: dict[str, Any] = {} if weight is None else {'device': weight.device, 'dtype': weight.dtype}
    try:
        if kind == 'se':
            return SqueezeExcite(channels, **arguments, **dd)
        make = gather_excite if kind == 'ge' else partial(create_attn, kind)
        return make(channels, **arguments).to(**dd)
    except (AssertionError, TypeError, ValueError) as error:
        given, *rest = str(error).splitlines()
        raise ValueError('\n'.join([f'{given} at {point}', *rest]) if rest else message(
            f'{kind} at {point}', f'timm cannot make it with {arguments} for {channels} channels ({error})',
            'correct its arguments')) from error


def gather_excite(channels: int, use_mlp: bool = True, **arguments: Any) -> nn.Module:
    """Return timm's `GatherExcite`; timm 1.0.31 cannot make its two layers, as it gives keywords by position."""
    gate = GatherExcite(channels, use_mlp=False, **arguments)
    if use_mlp:
        gate.mlp = ConvMlp(channels, max(channels // 16, 1), act_layer=nn.ReLU)
    return gate


def insert(net: nn.Module, point: Point, gate: nn.Module, end: End) -> None:
    """Put a gate to a point."""
    block = net.get_submodule(point.block)
    old = getattr(block, point.child)
    gate.train(block.training)
    if point.kind != 'slot':
        inner = nn.Identity().train(block.training) if old is None else old
        gate = (Gated if end.is_plain else GatedCall)(inner, gate, point.kind == 'before', end.layout)
    setattr(gate, FOR_NONE, old is None)
    setattr(block, point.child, gate)


def parameters_of(gate: nn.Module) -> int:
    """Return the number of parameters of a gate."""
    return sum(parameter.numel() for parameter in gate.parameters())
