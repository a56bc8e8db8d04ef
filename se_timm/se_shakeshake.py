"""Shake-Shake networks with SE, for 32x32 images (Tables 4 and 5 of the paper).

Gastaldi, https://arxiv.org/abs/1705.07485: a block has two residual branches, which training mixes at random, in the
backward pass otherwise than in the forward pass. The paper does not say where SE stands. Here one SE block gates the
mixture: that is "the non-identity branch" before its summation with the identity, as in every other network.
"""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import nn
from torch.nn import functional as F

from .entry_points import create
from .errors import message, unknown
from .placement import PlacedSE, check_each_stage, check_se_arguments, places
from .se_cifar import cifar_cfg
from .squeeze_excite import se_maker
from .staged_network import STAGES, StagedNetwork

__all__ = ['SEShakeShakeCifar']

STEM_WIDTH = 16
SHAKES = ('shake', 'even')


@register_notrace_module  # its training and evaluation are different graphs, of which torchvision warns
class Shake(nn.Module):
    """Mix two branches `(N, C, H, W)`: `alpha a + (1 - alpha) b`, with an alpha of its own for each image.

    In training alpha is drawn uniformly from 0 to 1 in the forward pass; the backward pass has another one of its own
    (`'shake'`), or a half (`'even'`). In evaluation it is a half.

    Args:
        kind: `'shake'` or `'even'`: Shake-Shake-Image and Shake-Even-Image.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.even = kind == 'even'

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the mixture."""
        if not self.training:
            return 0.5 * (a + b)
        alpha = torch.rand_like(a[:, :1, :1, :1])
        backward = torch.full_like(alpha, 0.5) if self.even else torch.rand_like(alpha)
        # the gradient sees `backward` alone
        return backward * a + (1 - backward) * b + ((alpha - backward) * (a - b)).detach()

    def extra_repr(self) -> str:
        """Return the kind."""
        return f'even={self.even}'


class ShiftedShortcut(nn.Module):
    """The shortcut of a block that changes the shape: two 1x1 convolutions, of every other pixel and of those between.

    `(N, C, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`, each convolution giving half of them. The
    second one sees the map moved right and down by a pixel, as in the author's https://github.com/xgastaldi/shake-shake.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False, **dd)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_channels, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shortcut."""
        x = F.relu(x)
        moved = F.pad(x[:, :, :-1, :-1], (1, 0, 1, 0))
        ours, between = x[:, :, ::self.stride, ::self.stride], moved[:, :, ::self.stride, ::self.stride]
        return self.bn(torch.cat([self.conv1(ours), self.conv2(between)], 1))


def make_branch(in_channels: int, width: int, stride: int, cardinality: int, dd: dict[str, Any]) -> nn.Sequential:
    """Return a residual branch: ReLU, convolution and batch norm twice, or three times if `cardinality` is given.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
        stride: Of the first 3x3 convolution.
        cardinality: Groups of the 3x3 convolution of a bottleneck; 0 for two 3x3 convolutions.
        dd: Device and dtype.
    """
    def conv(channels: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False, **dd),
                nn.BatchNorm2d(width, **dd)]

    steps = [(in_channels, 3, stride, 1), (width, 3, 1, 1)]
    if cardinality:
        steps = [(in_channels, 1, 1, 1), (width, 3, stride, cardinality), (width, 1, 1, 1)]
    layers: list[nn.Module] = []
    for number, step in enumerate(steps):
        layers += [nn.ReLU(inplace=number > 0), *conv(*step)]  # the first one's input is needed elsewhere
    return nn.Sequential(*layers)


class ShakeBlock(PlacedSE, nn.Module):
    """A block of two residual branches, with a place for SE; `insert_se` fills it.

    `(N, in_channels, H, W)` to `(N, width, H / stride, W / stride)`. SE at `'pre'` is before both branches.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output, and of the convolutions in between.
        stride: Of the block.
        cardinality: See `make_branch`.
        shake: See `Shake`.
        dd: Device and dtype.
    """

    made_of = 'blocks of two branches'

    def __init__(
            self, in_channels: int, width: int, stride: int, cardinality: int, shake: str, dd: dict[str, Any]) -> None:
        super().__init__()
        self.branch1 = make_branch(in_channels, width, stride, cardinality, dd)
        self.branch2 = make_branch(in_channels, width, stride, cardinality, dd)
        self.shake = Shake(shake)
        self.se: nn.Module = nn.Identity()
        self.placement = 'standard'
        self.downsample: nn.Module = nn.Identity()
        if in_channels != width or stride != 1:
            self.downsample = ShiftedShortcut(in_channels, width, stride, dd)
        self.places = places(in_channels, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y = self.excite_at('pre', x)
        y = self.excite_at('standard', self.shake(self.branch1(y), self.branch2(y)))
        return self.excite_at('post', y + self.excite_at('identity', self.downsample(x)))


class SEShakeShakeCifar(StagedNetwork):
    """Shake-Shake network for 32x32 images with SE: a 3x3 convolution, then three stages of blocks of two branches.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Args:
        layers: Number of blocks in each of the three stages.
        width: Channels of the first stage; each of the others has twice those before it.
        cardinality: Groups of the 3x3 convolution of a bottleneck; 0 for branches of two 3x3 convolutions.
        shake: `'shake'` (Shake-Shake-Image) or `'even'` (Shake-Even-Image).
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'`, `'pre'`, `'post'` or `'identity'`, as in `SEResNet`.
        stages: The stages that carry SE, 2 to 4; stage 1 is the stem, as in the ImageNet networks.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            layers: tuple[int, int, int],
            width: int = 96,
            cardinality: int = 0,
            shake: str = 'shake',
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
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        stages = check_se_arguments(se, placement, stages, STAGES)
        check_each_stage(STAGES, layers=layers)
        if shake not in SHAKES:
            raise ValueError(unknown('shake', shake, SHAKES))
        if width % 2 or (cardinality and width % cardinality):
            raise ValueError(message(
                f'width: {width} with cardinality: {cardinality}', 'half of the channels of a block come from each '
                'convolution of its shortcut, and 3x3 convolutions have groups of them',
                'take an even width that is a multiple of the cardinality'))
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, **dd)
        self.add_stem(STEM_WIDTH, 'bn1')
        make_se = se_maker(reduction, squeeze, excitation, bias, dd)
        in_channels = STEM_WIDTH
        for index, (stage, count) in enumerate(zip(STAGES, layers, strict=True)):
            channels = width * 2 ** index
            blocks = []
            stride = 2 if index else 1
            for number in range(count):
                blocks.append(ShakeBlock(in_channels, channels, 1 if number else stride, cardinality, shake, dd))
                in_channels = channels
                if se and stage in stages:
                    blocks[-1].insert_se(make_se, placement)
            self.add_stage(channels, list(blocks), stride)
        self.add_classifier(nn.Sequential(nn.ReLU()), global_pool, dd)
        self.init_weights()

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first convolution and batch norm of `x`; each path through the first block has a ReLU."""
        return self.bn1(self.conv1(x))


default_cfgs = generate_default_cfgs({
    'se_shakeshake26_2x96d_cifar.untrained': cifar_cfg(),
    'se_shakeeven29_2x4x64d_cifar.untrained': cifar_cfg(),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    return create(
        SEShakeShakeCifar, variant, pretrained, kwargs, defaults, feature_cfg=dict(out_indices=(0, 1, 2, 3)))


@register_model
def se_shakeshake26_2x96d_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-Shake-Shake-26 2x96d for 32x32 images (Table 4): 26.2 M parameters without SE."""
    return _create('se_shakeshake26_2x96d_cifar', pretrained, dict(layers=(4, 4, 4)), kwargs)


@register_model
def se_shakeeven29_2x4x64d_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-Shake-Even-29 2x4x64d for 32x32 images (Table 5, CIFAR-100): 34.4 M parameters without SE."""
    defaults = dict(layers=(3, 3, 3), width=256, cardinality=4, shake='even')
    return _create('se_shakeeven29_2x4x64d_cifar', pretrained, defaults, kwargs)
