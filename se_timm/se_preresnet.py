"""Pre-activation ResNets and Wide ResNets with SE, for 32x32 images (Tables 4 and 5 of the paper).

He et al., https://arxiv.org/abs/1603.05027: batch norm and ReLU stand before each convolution, and once more after the
last block; and Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146: fewer and wider blocks. The first batch norm
and ReLU of a block that changes the shape act on its projection too.

A residual branch ends in a convolution here, so that SE, which stands at its end as in the other networks (the paper:
"before summation with the identity branch"), has no batch norm before it, and there is no tail to be fused.
"""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .entry_points import create
from .placement import PlacedSE, check_each_stage, check_se_arguments, places
from .se_cifar import cifar_cfg
from .squeeze_excite import se_maker
from .staged_network import STAGES, StagedNetwork

__all__ = ['SEPreResNetCifar']

STEM_WIDTH = 16


class PreActBlock(PlacedSE, nn.Module):
    """What the pre-activation blocks share; a subclass gives `branch(y)`, all after the first batch norm and ReLU.

    `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`. SE at `'pre'` is after the
    first ReLU of the branch.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the block.
        drop_path: Stochastic depth of the branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.se: nn.Module = nn.Identity()
        self.placement = 'standard'
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.projects = in_channels != out_channels or stride != 1
        self.downsample = nn.Identity() if not self.projects else nn.Conv2d(
            in_channels, out_channels, 1, stride=stride, bias=False, **dd)
        self.places = places(in_channels, out_channels)

    def branch(self, y: torch.Tensor) -> torch.Tensor:
        """Return the output of the last convolution, for that of the first ReLU."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y = self.act1(self.bn1(x))
        shortcut = self.downsample(y) if self.projects else x
        y = self.drop_path(self.excite_at('standard', self.branch(self.excite_at('pre', y))))
        return self.excite_at('post', y + self.excite_at('identity', shortcut))


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions, the first with the stride; see `PreActBlock`."""

    def __init__(self, in_channels: int, width: int, stride: int, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__(in_channels, width, stride, drop_path, dd)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)

    def branch(self, y: torch.Tensor) -> torch.Tensor:
        """Return the output of the last convolution, for that of the first ReLU."""
        return self.conv2(self.act2(self.bn2(self.conv1(y))))


class PreActBottleneck(PreActBlock):
    """A 1x1 convolution, a 3x3 with the stride, and a 1x1 to four times the width; see `PreActBlock`."""

    def __init__(self, in_channels: int, width: int, stride: int, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__(in_channels, 4 * width, stride, drop_path, dd)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.act3 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False, **dd)
        self.places['3x3'] = width

    def branch(self, y: torch.Tensor) -> torch.Tensor:
        """Return the output of the last convolution, for that of the first ReLU."""
        y = self.excite_at('3x3', self.conv2(self.act2(self.bn2(self.conv1(y)))))
        return self.conv3(self.act3(self.bn3(y)))


class SEPreResNetCifar(StagedNetwork):
    """Pre-activation ResNet for 32x32 images with SE: a 3x3 convolution, then three stages.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Args:
        layers: Number of blocks in each of the three stages.
        bottleneck: Blocks of three convolutions, whose output is four times as wide, or of two.
        width: Times the channels of the stages, 16, 32 and 64.
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'`, `'pre'`, `'post'`, `'identity'`, or in bottlenecks `'3x3'`, as in `SEResNet`.
        stages: The stages that carry SE, 2 to 4; stage 1 is the stem, as in the ImageNet networks.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, growing linearly to this rate at the last block.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            layers: tuple[int, int, int],
            bottleneck: bool = False,
            width: int = 1,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            placement: str = 'standard',
            stages: Sequence[int] = STAGES,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        stages = check_se_arguments(se, placement, stages, STAGES)
        check_each_stage(STAGES, layers=layers)
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 3, padding=1, bias=False, **dd)
        self.add_stem(STEM_WIDTH, 'conv1')
        make_se = se_maker(reduction, squeeze, excitation, bias, dd)
        drop_paths = torch.linspace(0, drop_path_rate, sum(layers), device='cpu').split(layers)
        in_channels = STEM_WIDTH
        block = PreActBottleneck if bottleneck else PreActBasicBlock
        for index, (stage, rates) in enumerate(zip(STAGES, drop_paths, strict=True)):
            inner = 16 * width * 2 ** index
            channels = inner * (4 if bottleneck else 1)
            stride = 2 if index else 1
            blocks = []
            for number, rate in enumerate(rates.tolist()):
                blocks.append(block(in_channels, inner, 1 if number else stride, rate, dd))
                in_channels = channels
                if se and stage in stages:
                    blocks[-1].insert_se(make_se, placement)
            self.add_stage(channels, list(blocks), stride)
        self.add_classifier(nn.Sequential(nn.BatchNorm2d(in_channels, **dd), nn.ReLU(inplace=True)), global_pool, dd)
        self.init_weights()

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first convolution of `x`."""
        return self.conv1(x)


default_cfgs = generate_default_cfgs({
    'se_preresnet110_cifar.untrained': cifar_cfg(),
    'se_preresnet164_cifar.untrained': cifar_cfg(),
    'se_wrn16_8_cifar.untrained': cifar_cfg(),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    return create(
        SEPreResNetCifar, variant, pretrained, kwargs, defaults, feature_cfg=dict(out_indices=(0, 1, 2, 3)))


@register_model
def se_preresnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation SE-ResNet-110 for 32x32 images (Tables 4 and 5): 1,744,760 parameters."""
    return _create('se_preresnet110_cifar', pretrained, dict(layers=(18, 18, 18)), kwargs)


@register_model
def se_preresnet164_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation SE-ResNet-164 for 32x32 images (Tables 4 and 5), of bottlenecks: 1,905,362 parameters."""
    return _create('se_preresnet164_cifar', pretrained, dict(layers=(18, 18, 18), bottleneck=True), kwargs)


@register_model
def se_wrn16_8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-WRN-16-8 for 32x32 images (Tables 4 and 5): 11.0 M parameters without SE."""
    return _create('se_wrn16_8_cifar', pretrained, dict(layers=(2, 2, 2), width=8), kwargs)
