"""timm's residual blocks with the fused tail: the same modules and state dict, another class."""
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from timm.models import regnet, resnet, senet
from torch import Tensor

from .residual_blocks import BLOCKS, Block, Step, Tail
from .residual_tail import ResidualTail

__all__ = ['FUSED']


def by_modules(cls: Any) -> Callable[[Any, Tensor], Tensor]:
    """Return the `forward` of `cls` under the name `reference`, by which TorchScript compiles it."""
    forward = cls.forward
    function = types.FunctionType(forward.__code__, forward.__globals__, 'reference', forward.__defaults__)
    return functools.update_wrapper(function, forward, assigned=('__module__', '__annotations__', '__doc__'))


def timm_block(block: Any) -> Block:
    """Return how to read a block of one of the classes below, or of a class that was made of one."""
    return next(BLOCKS[cls] for cls in type(block).__mro__ if cls in BLOCKS)


class TimmTail(ResidualTail):
    """What the classes below share: the block is read as all the package reads timm's block of that class."""

    @torch.jit.unused
    def body(self, x: Tensor) -> Tensor:
        """Return the input of the last convolution."""
        return timm_block(self).body(self, x)

    @torch.jit.unused
    def tail(self) -> Tail | str:
        """Return the modules that follow, or in words why they are no `Tail`."""
        return timm_block(self).tail(self)

    @torch.jit.unused
    def steps(self) -> list[Step] | str:
        """Return the steps of the body, or in words what else there is in it."""
        return timm_block(self).steps(self)


class FusedBasicBlock(TimmTail, resnet.BasicBlock):
    """timm's `resnet.BasicBlock` with the fused tail."""

    reference = by_modules(resnet.BasicBlock)


class FusedBottleneck(TimmTail, resnet.Bottleneck):
    """timm's `resnet.Bottleneck` with the fused tail."""

    reference = by_modules(resnet.Bottleneck)


class FusedSENetBottleneck(TimmTail, senet.SEBottleneck):
    """timm's `senet.SEBottleneck` with the fused tail."""

    reference = by_modules(senet.SEBottleneck)


class FusedLegacyBottleneck(TimmTail, senet.SEResNetBottleneck):
    """timm's `senet.SEResNetBottleneck` with the fused tail."""

    reference = by_modules(senet.SEResNetBottleneck)


class FusedLegacyNeXtBottleneck(TimmTail, senet.SEResNeXtBottleneck):
    """timm's `senet.SEResNeXtBottleneck` with the fused tail."""

    reference = by_modules(senet.SEResNeXtBottleneck)


class FusedRegNetBottleneck(TimmTail, regnet.Bottleneck):
    """timm's `regnet.Bottleneck` with the fused tail. It has no SE: that of RegNetY is in the body."""

    reference = by_modules(regnet.Bottleneck)


FUSED: dict[type, type] = {cls.__bases__[1]: cls for cls in (
    FusedBasicBlock, FusedBottleneck, FusedSENetBottleneck, FusedLegacyBottleneck, FusedLegacyNeXtBottleneck,
    FusedRegNetBottleneck)}
