"""Where SE goes in networks that were made without it."""
from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from .errors import meant, message, nearest
from .fused_blocks import FUSED

__all__ = ['KNOWN', 'Point', 'known_points', 'named_points', 'path_of']


class Point(NamedTuple):
    """A place for a gate.

    Attributes:
        block: Name of the module whose child it is.
        child: Name of that child.
        kind: `'slot'`: the child itself, made for attention and empty; `'before'` or `'after'` the child; `'end'`: a
            new child, the last of an `nn.Sequential`.
        has_shortcut: The block adds one to what the gate is for.
    """

    block: str
    child: str
    kind: str
    has_shortcut: bool = True

    def __str__(self) -> str:
        return f'{self.block}.{self.child}' if self.block else self.child


class End(NamedTuple):
    """The end of the residual branch of the blocks of one class.

    Attributes:
        child: What computes it last, or the place for attention.
        kind: See `Point`.
        only_if: Attribute that is there, and not false, where the block has a shortcut.
    """

    child: str
    kind: str = 'after'
    only_if: str = ''


def path_of(cls: type) -> str:
    """Return module and name of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


_SE = End('se', 'slot')
# by exact class: a subclass may do anything else in `forward`
KNOWN: dict[str, End] = {
    'timm.models.resnet.BasicBlock': _SE,
    'timm.models.resnet.Bottleneck': _SE,
    'timm.models.res2net.Bottle2neck': _SE,
    'timm.models.sknet.SelectiveKernelBasic': _SE,
    'timm.models.sknet.SelectiveKernelBottleneck': _SE,
    'se_timm.se_resnet.SEBasicBlock': _SE,
    'se_timm.se_resnet.SEBottleneck': _SE,
    'se_timm.se_preresnet.PreActBasicBlock': _SE,
    'se_timm.se_preresnet.PreActBottleneck': _SE,
    'se_timm.se_shakeshake.ShakeBlock': _SE,
    # stochastic depth in blocks of which some have no shortcut
    'timm.models.byobnet.BasicBlock': End('drop_path', 'before', only_if='shortcut'),
    'timm.models.byobnet.BottleneckBlock': End('drop_path', 'before', only_if='shortcut'),
    'timm.models.byobnet.DarkBlock': End('drop_path', 'before', only_if='shortcut'),
    'timm.models.byobnet.EdgeBlock': End('drop_path', 'before', only_if='shortcut'),
    'timm.models.byobnet.MobileOneBlock': End('drop_path', 'before', only_if='identity'),
    'timm.models.byobnet.RepVggBlock': End('drop_path', 'before', only_if='identity'),
    'timm.models.byobnet.SelfAttnBlock': End('drop_path', 'before', only_if='shortcut'),
    'timm.models.vovnet.OsaBlock': End('drop_path', 'before', only_if='residual'),
    'timm.models.convmixer.Residual': End('fn'),
    'timm.models.densenet.DenseLayer': End('conv2'),  # before the concatenation
    'timm.models.dla.DlaBasic': End('bn2'),
    'timm.models.dla.DlaBottleneck': End('bn3'),
    'timm.models.dla.DlaBottle2neck': End('bn3'),
    'timm.models.efficientvit_mit.ResidualBlock': End('main', only_if='shortcut'),
    'timm.models.efficientvit_msra.ResidualDrop': End('m'),
    'timm.models.ghostnet.GhostBottleneck': End('ghost2'),
    'timm.models.inception_resnet_v2.Block35': End('conv2d'),
    'timm.models.inception_resnet_v2.Block17': End('conv2d'),
    'timm.models.inception_resnet_v2.Block8': End('conv2d'),
    'timm.models.repvit.RepViTBlock': End('channel_mixer'),
    'timm.models.resnest.ResNestBottleneck': End('bn3'),  # its stochastic depth acts on the shortcut
    'timm.models.senet.SEBottleneck': End('bn3'),
    'timm.models.senet.SEResNetBlock': End('bn2'),
    'timm.models.senet.SEResNetBottleneck': End('bn3'),
    'timm.models.senet.SEResNeXtBottleneck': End('bn3'),
    'timm.models.shvit.Residual': End('m'),
    'timm.models.xception.Block': End('rep'),
    'torchvision.models.densenet._DenseLayer': End('conv2'),
    'torchvision.models.mnasnet._InvertedResidual': End('layers', only_if='apply_residual'),
    'torchvision.models.mobilenetv2.InvertedResidual': End('conv', only_if='use_res_connect'),
    'torchvision.models.mobilenetv3.InvertedResidual': End('block', only_if='use_res_connect'),
    'torchvision.models.regnet.ResBottleneckBlock': End('f'),
    'torchvision.models.resnet.BasicBlock': End('bn2'),
    'torchvision.models.resnet.Bottleneck': End('bn3'),
    'torchvision.models.shufflenetv2.InvertedResidual': End('branch2'),  # before the concatenation
}
KNOWN |= {path_of(fused): KNOWN[path_of(block)] for block, fused in FUSED.items() if path_of(block) in KNOWN}
# Stochastic depth drops residual branches, so that its module stands at the end of one, after everything that the
# branch computes. Networks have it under these names, as an identity or None where the rate is zero.
DROP_PATH = re.compile(r'(\w+_)?drop_path_?\d*|stochastic_depth')
DROP_PATH_CLASSES = ('DropPath', 'StochasticDepth', 'Identity')


def drop_paths(block: nn.Module) -> Iterator[str]:
    """Return the names under which a block has stochastic depth."""
    for name, value in {**vars(block), **block._modules}.items():
        if DROP_PATH.fullmatch(name) and (value is None or type(value).__name__ in DROP_PATH_CLASSES):
            yield name


def points_of(name: str, block: nn.Module) -> list[Point]:
    """Return the ends of the residual branches of a block; none if it is not one that is known."""
    end = KNOWN.get(path_of(type(block)))
    if end is None:
        return [Point(name, child, 'before') for child in drop_paths(block)]
    has_shortcut = not end.only_if or getattr(block, end.only_if) not in (None, False)
    point = point_at(name, end.child, getattr(block, end.child)) if end.kind == 'after' else Point(
        name, end.child, end.kind)
    return [point._replace(has_shortcut=has_shortcut)]


def point_at(block: str, child: str, module: nn.Module) -> Point:
    """Return the place after a child. A gate of a sequence is its last member: some iterate over them."""
    if type(module) is nn.Sequential and len(module):
        return Point(f'{block}.{child}' if block else child, 'se', 'end')
    return Point(block, child, 'after')


def known_points(net: nn.Module) -> list[Point]:
    """Return the ends of all residual branches that are known."""
    return [point for name, block in net.named_modules() for point in points_of(name, block)]


def matches(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    """Return whether a module is meant by `pattern`: its class, the name of that, or its own name.

    A `*` stands for a part of a name between two dots.
    """
    if not isinstance(pattern, str):
        return type(module) is pattern
    wanted, parts = pattern.split('.'), name.split('.')
    is_named = len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))
    return is_named or type(module).__name__ == pattern


def named_points(net: nn.Module, at: Sequence[str | type[nn.Module]]) -> list[Point]:
    """Return the places that the user names: the ends of blocks that are known, the outputs of other modules.

    Raises:
        ValueError: If nothing is meant by a pattern, or the network itself.
    """
    # a module may have several names
    modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    points: dict[Any, Point] = {}
    for pattern in at:
        found = {name: module for name, module in modules.items() if matches(pattern, name, module)}
        if not found:
            raise ValueError(_nothing(net, pattern, modules))
        for name, module in found.items():
            block, _, child = name.rpartition('.')
            for point in points_of(name, module) or [point_at(block, child, module)]:
                points.setdefault(place_of(net, point), point)
    return list(points.values())


def place_of(net: nn.Module, point: Point) -> Any:
    """Return what is the same for two points that are one place under several names."""
    block = net.get_submodule(point.block)
    child = getattr(block, point.child, None)
    return id(child) if isinstance(child, nn.Module) else (id(block), point.child)


def _nothing(net: nn.Module, pattern: Any, modules: dict[str, nn.Module]) -> str:
    shown = pattern if isinstance(pattern, str) else path_of(pattern)
    if matches(pattern, '', net):
        return message(f'at: {shown!r}', 'it is the network itself', 'name modules within it, such as its stages')
    classes = {type(module).__name__ for module in modules.values()}
    close = nearest(shown.rpartition('.')[2] if not isinstance(pattern, str) else shown, [*modules, *classes])
    return message(
        f'at: {shown!r}', f'no module of {type(net).__name__} has such a name or class',
        meant(close)
        + "give names as of named_modules(), in which a * stands for one part ('layer*.*'), or classes")
