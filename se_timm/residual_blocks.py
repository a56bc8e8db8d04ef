"""What the residual blocks of timm, and ours, are made of: everything before the last convolution, and the tail."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.layers import ConvNormAct
from timm.models import regnet, resnet, senet
from torch import Tensor, nn

__all__ = ['BLOCKS', 'HOOKED', 'Block', 'OwnBlock', 'Step', 'Tail', 'block_of', 'is_hooked', 'is_identity', 'present']

HOOKED = 'one of its modules has hooks, which the fused function would not call'


class Tail(NamedTuple):
    """The modules at the end of a residual block: `act(drop_path(se(norm(conv(.)))) + downsample(shortcut))`.

    `None` stands for a module that is not there.
    """

    conv: nn.Module
    norm: nn.Module
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None
    act: nn.Module | None


class Step(NamedTuple):
    """A convolution, its batch norm and its activation."""

    conv: nn.Module
    norm: nn.Module
    act: nn.Module


class Block(NamedTuple):
    """How to read the blocks of one class.

    Attributes:
        body: `(block, x)` to the input of the last convolution.
        tail: Returns the tail of a block, or in words why this block does not end in one.
        steps: Returns the steps that `body` consists of, or in words what else there is in it.
    """

    body: Callable[[Any, Tensor], Tensor]
    tail: Callable[[Any], Tail | str]
    steps: Callable[[Any], list[Step] | str]


class OwnBlock:
    """A class of blocks that has `body`, `tail` and `steps` itself: this package's, and timm's with the fused tail.

    Attributes:
        own_forward: Whether a subclass from elsewhere has a `forward` of its own.
        untold: A method of such a subclass which may do what its `tail`, inherited, does not tell; else an empty text.
    """

    own_forward = False
    untold = ''

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__module__.startswith(f'{__package__}.'):
            methods = vars(cls)
            cls.own_forward |= 'forward' in methods
            if 'tail' not in methods:
                cls.untold = next((name for name in ('reference', 'body', 'steps') if name in methods), cls.untold)


def is_hooked(module: nn.Module) -> bool:
    """Return whether something outside of its class takes part in the call of `module`."""
    return 'forward' in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_identity(module: nn.Module | None) -> bool:
    """Return whether `module` gives back what it gets: it is not there, or an `nn.Identity` without hooks."""
    return module is None or (type(module) is nn.Identity and not is_hooked(module))


def present(module: nn.Module | None) -> nn.Module | None:
    """Return `module`, or None for an identity."""
    return None if is_identity(module) else module


def _basic_body(block: Any, x: Tensor) -> Tensor:
    return block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))


def _basic_steps(block: Any) -> list[Step] | str:
    if not is_identity(block.drop_block) or not is_identity(block.aa):
        return 'it has DropBlock or anti-aliasing'
    return [Step(block.conv1, block.bn1, block.act1)]


def _basic_tail(block: Any) -> Tail | str:
    return Tail(block.conv2, block.bn2, present(block.se), present(block.drop_path), block.downsample, block.act2)


def _bottleneck_body(block: Any, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    return block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))


def _bottleneck_steps(block: Any) -> list[Step] | str:
    first = _basic_steps(block)
    return first if isinstance(first, str) else [*first, Step(block.conv2, block.bn2, block.act2)]


def _bottleneck_tail(block: Any) -> Tail | str:
    return Tail(block.conv3, block.bn3, present(block.se), present(block.drop_path), block.downsample, block.act3)


def _legacy_body(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    return block.relu(block.bn2(block.conv2(x)))


def _legacy_steps(block: Any) -> list[Step] | str:
    return [Step(block.conv1, block.bn1, block.relu), Step(block.conv2, block.bn2, block.relu)]


def _legacy_tail(block: Any) -> Tail | str:
    return Tail(block.conv3, block.bn3, present(block.se_module), None, block.downsample, block.relu)


def _legacy_basic_tail(block: Any) -> Tail | str:
    return 'a ReLU stands between its last batch norm and SE'


def _regnet_body(block: Any, x: Tensor) -> Tensor:
    return block.se(block.conv2(block.conv1(x)))


def _regnet_steps(block: Any) -> list[Step] | str:
    return 'it is a RegNet, whose convolutions, batch norms and ReLUs are not apart'


def _regnet_tail(block: Any) -> Tail | str:
    """Return the tail; a RegNetY has its SE in the body, after the batch norm and ReLU of the 3x3 convolution."""
    if block.downsample is None:
        return 'it has no shortcut'
    last = block.conv3
    if type(last) is not ConvNormAct:  # a subclass, or the gate after it, may do anything else in `forward`
        return f'its last convolution is a {type(last).__name__}'
    if is_hooked(last):
        return HOOKED
    if not is_identity(getattr(last, 'aa', None)):
        return 'its last convolution is followed by anti-aliasing'
    return Tail(last.conv, last.bn, None, present(block.drop_path), present(block.downsample), present(block.act3))


_LEGACY = Block(_legacy_body, _legacy_tail, _legacy_steps)
# by exact class: a subclass may do anything else in `forward`; ours give `body` and `tail` themselves
BLOCKS: dict[type, Block] = {
    resnet.BasicBlock: Block(_basic_body, _basic_tail, _basic_steps),
    resnet.Bottleneck: Block(_bottleneck_body, _bottleneck_tail, _bottleneck_steps),
    senet.SEBottleneck: _LEGACY,
    senet.SEResNetBottleneck: _LEGACY,
    senet.SEResNeXtBottleneck: _LEGACY,
    senet.SEResNetBlock: Block(_legacy_body, _legacy_basic_tail, _legacy_steps),
    regnet.Bottleneck: Block(_regnet_body, _regnet_tail, _regnet_steps),
}


def block_of(module: nn.Module) -> Block | None:
    """Return how to read `module` as a residual block, or None if it is not one that is known."""
    cls: Any = type(module)
    if issubclass(cls, OwnBlock):
        return None if cls.own_forward or cls.untold else Block(cls.body, cls.tail, cls.steps)
    return BLOCKS.get(cls)
