"""SE in any network that is there already, and out of it again."""
from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from timm.layers import ConvMlp, GatherExcite, create_attn, get_act_layer, make_divisible
from torch import nn

from .dry_run import NO_SHORTCUT, End, observe
from .errors import check_module, check_switches, message, unknown
from .gated import REPARAMETERISE, Gated, GatedCall
from .insertion_points import Point, known_points, named_points
from .meta import full_copy
from .residual_blocks import is_identity
from .squeeze_excite import SqueezeExcite

__all__ = ['KINDS', 'Insertion', 'Place', 'add_se', 'added', 'holders', 'remove_se', 'size_of']

# 'se' is ours; the others are timm's attention that keeps the shape, by the names of `timm.layers.create_attn`
KINDS = ('se', 'ese', 'eca', 'ecam', 'ceca', 'ge', 'gc', 'gca', 'cbam', 'lcbam', 'coord', 'scoord', 'ela', 'strip')
# classes that are, or have, channel attention of a block's own
GATES = (
    'SEModule', 'SqueezeExcite', 'SqueezeExcitation', 'SqueezeExciteCl', 'EffectiveSEModule', 'EcaModule', 'CecaModule',
    'GatherExcite', 'GlobalContext', 'CbamModule', 'LightCbamModule', 'CoordAttn', 'SimpleCoordAttn',
    'EfficientLocalAttn', 'StripAttn')
# attribute of what was put in: the module or None that was there, or that it holds it, or that there was nothing
REPLACED = '_se_timm_replaced'
EXEMPT = 'no_weight_decay'  # a method of timm's networks
INNER, NOTHING = 'inner', 'nothing'
OWN_ARGUMENTS = ('at', 'kind', 'identity_start', 'input_size', 'inplace')
SE_ARGUMENTS = tuple(
    name for name in inspect.signature(SqueezeExcite).parameters
    if name not in ('channels', 'identity_start', 'device', 'dtype'))


class Place(NamedTuple):
    """A gate that was added.

    Attributes:
        where: `'slot'`: in the block's place for attention; `'before'` or `'after'` the module of this name; `'end'`:
            the last of a sequence.
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
    its place for attention) or at the module before or after which the gate stands; to timm's layer decay, those of a
    gate at the end of a stage are parts of the head. How many channels there are is found by a run of a copy, on the
    meta device where that can be.

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
    arguments = check_arguments(kind, arguments, identity_start, inplace)
    patterns = patterns_of(at)
    points, left = choose_points(net, patterns)
    ends = {**left, **observe(net, points, size_of(net, input_size))}
    check_ends(net, patterns, ends)
    gates = {point: make_gate(net, point, end, kind, arguments) for point, end in ends.items() if not end.problem}
    if not inplace:
        net = full_copy(net)
    for point in sorted(gates, key=lambda point: -str(point).count('.')):  # the inner ones first: they change no names
        insert(net, point, gates[point], ends[point])
    own, kept = vars(net).get(EXEMPT), getattr(type(net), EXEMPT, None)
    if callable(own) or (own is None and callable(kept) and kept(net) != exempt(net)):
        replace_method(net, EXEMPT, exempt, net)
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
    check_module('remove_se', net)
    gates = added(net)
    if not gates:
        raise ValueError(message(
            f'remove_se({type(net).__name__})', 'it has no gate that add_se put there',
            "SE that a network was made with is left out where it is made: se=False for this package's networks"))
    names = [plain_name(net, name) for name in gates]
    for name in reversed(gates):  # the inner ones first
        take_out(net, net.get_submodule(name))
    for module in net.modules():
        put_back_methods(module)
    return names


def added(net: nn.Module) -> dict[str, nn.Module]:
    """Return the gates that `add_se` put in, by the names of the modules that hold or are them."""
    return {name: module.se if isinstance(module, Gated) else module
            for name, module in net.named_modules() if REPLACED in vars(module)}


# What is given


def check_network(net: Any) -> None:
    """Raise `ValueError` for what no gate can be put into."""
    check_module('add_se', net)
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


def patterns_of(at: Any) -> list[str | type[nn.Module]] | None:
    """Return the patterns of `at`.

    Raises:
        ValueError: For what is neither names nor classes.
    """
    if at is None:
        return None
    patterns: list[Any] = (
        [at] if isinstance(at, (str, type, nn.Module)) or not isinstance(at, Iterable) else list(at))
    if not patterns:
        raise ValueError(message(
            f'at: {at!r}', 'it names nothing', 'leave it out for the end of each residual block, or name modules'))
    for each in patterns:
        if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
            raise ValueError(message(
                f'at: {each!r:.60}', f'it is a {type(each).__name__}', "give names of modules, as in at='layer4.*', or "
                'classes'))
    return patterns


def check_arguments(kind: str, arguments: dict[str, Any], identity_start: bool, inplace: bool) -> dict[str, Any]:
    """Return the arguments of the gate.

    Raises:
        ValueError: If there is no such kind, or argument of SE, or no such start.
    """
    if kind not in KINDS:
        raise ValueError(unknown('kind', kind, KINDS))
    check_switches(identity_start=identity_start, inplace=inplace)
    if kind == 'se':
        for name in arguments:
            if name not in SE_ARGUMENTS:
                raise ValueError(unknown('argument of add_se', name, [*SE_ARGUMENTS, *OWN_ARGUMENTS]))
        check_switches(bias=arguments.get('bias', True))
    elif identity_start:
        raise ValueError(message(
            f'identity_start=True with kind={kind!r}', "the gates of timm's attention do not begin with one",
            "take kind='se', or leave identity_start out"))
    plain = {name: int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
             for name, value in arguments.items()}  # numpy's cannot be written to a file
    return {**plain, **({'identity_start': True} if identity_start else {})}


def size_of(net: nn.Module, input_size: Sequence[int] | None) -> tuple[int, ...]:
    """Return channels, height and width of an image: those given, or the network's own.

    Raises:
        ValueError: For anything else.
    """
    if input_size is None:
        cfg = getattr(net, 'default_cfg', None)
        channels, *pixels = (isinstance(cfg, dict) and cfg.get('input_size')) or (3, 224, 224)
        return (getattr(net, 'in_chans', channels), *pixels)
    if not isinstance(input_size, (list, tuple)) or len(input_size) != 3 or not all(
            isinstance(each, Integral) and int(each) > 0 for each in input_size):
        raise ValueError(message(
            f'input_size: {input_size!r}', 'it is not channels, height and width', 'give them as in (3, 224, 224)'))
    return tuple(map(int, input_size))


def config_of(
        patterns: Sequence[str | type[nn.Module]] | None, kind: str, input_size: Sequence[int] | None,
        arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `add_se`, as they can be written to a file."""
    return {
        **({} if patterns is None else {'at': [each if isinstance(each, str) else each.__name__ for each in patterns]}),
        **({} if input_size is None else {'input_size': [int(each) for each in input_size]}), 'kind': kind, **arguments}


# Where


def choose_points(net: nn.Module, patterns: Sequence[Any] | None) -> tuple[list[Point], dict[Point, End]]:
    """Return the points that may get gates, and those that do not, with the reason."""
    points = known_points(net) if patterns is None else named_points(net, patterns)
    left = {}
    for point in points:
        block = net.get_submodule(point.block)
        has_gate = patterns is None and any(type(module).__name__ in GATES for module in block.modules())
        if has_gate or (point.kind == 'slot' and not is_identity(getattr(block, point.child))):
            left[point] = End('its block has channel attention of its own')
        elif not point.has_shortcut:
            left[point] = End(NO_SHORTCUT)
    return [point for point in points if point not in left], left


def check_ends(net: nn.Module, patterns: Sequence[Any] | None, ends: dict[Point, End]) -> None:
    """Raise `ValueError` if no gate is left, or one that was named cannot be.

    Of blocks that were named, those without a shortcut are left.
    """
    problems = {point: end.problem for point, end in ends.items() if end.problem}
    impossible = {point: problem for point, problem in problems.items() if problem != NO_SHORTCUT}
    if patterns is not None and (impossible or (problems and len(problems) == len(ends))):
        point, problem = next(iter((impossible or problems).items()))
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


def make_gate(net: nn.Module, point: Point, end: End, kind: str, arguments: dict[str, Any]) -> nn.Module:
    """Return the gate for a point, on the device of its block.

    Raises:
        ValueError: If it cannot be made.
    """
    block = net.get_submodule(point.block)
    none = torch.empty(())
    weight = next(itertools.chain(block.parameters(), net.parameters()), none)
    real = (each for each in itertools.chain(block.parameters(), net.parameters()) if each.is_floating_point())
    dd: dict[str, Any] = {'device': weight.device, 'dtype': end.dtype or next(real, none).dtype}
    try:
        if kind == 'se':
            return SqueezeExcite(end.channels, **arguments, **dd)
        make = gather_excite if kind == 'ge' else partial(create_attn, kind)
        return make(end.channels, **arguments).to(**dd)
    except (AssertionError, TypeError, ValueError) as error:
        given, *rest = str(error).splitlines()
        raise ValueError('\n'.join([f'{given} at {point}', *rest]) if rest else message(
            f'{kind} at {point}', f'timm cannot make it with {arguments} for {end.channels} channels ({error})',
            'correct its arguments')) from error


def gather_excite(
        channels: int, use_mlp: bool = True, rd_ratio: float = 1 / 16, rd_channels: int | None = None,
        rd_divisor: int = 1, act_layer: Any = nn.ReLU, **arguments: Any) -> nn.Module:
    """Return timm's `GatherExcite`; timm 1.0.31 cannot make its two layers, as it gives keywords by position."""
    gate = GatherExcite(channels, use_mlp=False, act_layer=act_layer, **arguments)
    if use_mlp:
        hidden = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.)
        gate.mlp = ConvMlp(channels, hidden, act_layer=get_act_layer(act_layer))
    return gate


def insert(net: nn.Module, point: Point, gate: nn.Module, end: End) -> None:
    """Put a gate to a point."""
    block = net.get_submodule(point.block)
    gate.train(block.training)
    old = getattr(block, point.child, None)
    if point.kind in ('before', 'after'):
        inner = nn.Identity().train(block.training) if old is None else old
        gate = (Gated if end.is_plain else GatedCall)(inner, gate, point.kind == 'before', end.layout)
    elif end.layout != 'NCHW':  # at the end of a sequence
        gate = Gated(nn.Identity().train(block.training), gate, layout=end.layout)
    for holder, child in [(block, point.child)] if old is None else holders(net, old):
        setattr(holder, child, gate)
    vars(gate)[REPLACED] = NOTHING if point.kind == 'end' else old if point.kind == 'slot' or old is None else INNER
    names = point.block.split('.')
    for depth in range(len(names) + 1):
        refuse_reparameterisation(net.get_submodule('.'.join(names[:depth])))


def take_out(net: nn.Module, gate: Any) -> None:
    """Take out a gate, or the module that has it, and put back what stood there."""
    replaced = vars(gate)[REPLACED]
    for holder, child in holders(net, gate):
        if replaced is None or replaced == NOTHING:
            delattr(holder, child)
        if replaced != NOTHING:
            setattr(holder, child, gate.inner if replaced == INNER else replaced)


def holders(net: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules that have `module` as a child, and the names under which they have it."""
    return [(holder, name) for holder in net.modules() for name, child in holder._modules.items() if child is module]


def plain_name(net: nn.Module, name: str) -> str:
    """Return the name that a module had before there were gates around others."""
    parts = name.split('.')
    return '.'.join(part for depth, part in enumerate(parts)
                    if not isinstance(net.get_submodule('.'.join(parts[:depth])), Gated))


def exempt(net: nn.Module, own: Callable[[], set[str]] | None = None) -> set[str]:
    """Return which parameters a network keeps from weight decay, as `named_parameters` has them.

    Some of timm's networks take the names of the state dict, in which there is no `inner`; timm's optimisers do not.

    Args:
        net: The network.
        own: What tells the names, where it is not the method of its class.
    """
    kept: set[str] = own() if own else getattr(type(net), EXEMPT)(net)
    present = {plain_name(net, name): name for name, _ in net.named_parameters()}
    return {present.get(name, name) for name in kept}


def refuse_reparameterisation(block: nn.Module) -> None:
    """Let the methods of a block by which it makes one layer of several raise an error: a gate would be lost."""
    for name in REPARAMETERISE:
        if callable(vars(block).get(name, getattr(type(block), name, None))):  # and no child of that name
            replace_method(block, name, _refused, type(block).__name__, name)


def replace_method(module: nn.Module, name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Put a method to a module, which keeps as `own` what the module itself, not its class, has under the name."""
    own = vars(module).get(name)
    if not is_put(own):
        vars(module)[name] = partial(function, *arguments, own=own)


def is_put(method: Any) -> bool:
    """Return whether a method was put to a module by `replace_method`."""
    return any(getattr(method, 'func', None) is function for function in (_refused, exempt))


def put_back_methods(module: nn.Module) -> None:
    """Take out the methods that were put to a module and are still there."""
    for name in (*REPARAMETERISE, EXEMPT):
        method: Any = vars(module).get(name)
        if not is_put(method):
            continue
        del vars(module)[name]
        if (own := method.keywords.get('own')) is not None:
            vars(module)[name] = own


def _refused(block: str, method: str, *args: Any, own: Any = None, **kwargs: Any) -> None:
    raise ValueError(message(
        f'{block}.{method}()', 'it would lose the gates that add_se put there',
        'do that before add_se, or after remove_se'))


def parameters_of(gate: nn.Module) -> int:
    """Return the number of parameters of a gate."""
    return sum(parameter.numel() for parameter in gate.parameters())
