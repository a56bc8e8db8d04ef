"""SE-ResNets for 32x32 images: the CIFAR networks of He et al. (https://arxiv.org/abs/1512.03385, Sec. 4.2) with SE."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from .entry_points import create
from .errors import unknown
from .placement import check_each_stage, check_se_arguments
from .se_resnet import SEBasicBlock
from .squeeze_excite import se_maker
from .staged_network import STAGES, StagedNetwork
from .weights import checkpoint_filter_fn

__all__ = ['SEResNetCifar', 'cifar_cfg']

WIDTHS = (16, 32, 64)
SHORTCUTS = ('projection', 'padding')


class PaddingShortcut(nn.Module):
    """The parameter-free shortcut of He et al. (option A): every second pixel, new channels filled with zeros.

    `(N, C, H, W)` to `(N, out_channels, ceil(H / 2), ceil(W / 2))`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class SEResNetCifar(StagedNetwork):
    """ResNet for 32x32 images with SE: a 3x3 convolution, then three stages of 16, 32 and 64 channels.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Args:
        layers: Number of blocks in each of the three stages; the depth is `2 * sum(layers) + 2`.
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'`, `'pre'`, `'post'` or `'identity'`, as in `SEResNet`.
        stages: The stages that carry SE, 2 to 4; stage 1 is the stem, as in the ImageNet networks.
        shortcut: `'projection'` (1x1 convolution and batch norm), or `'padding'` (parameter-free, as He et al.).
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
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            placement: str = 'standard',
            stages: Sequence[int] = STAGES,
            shortcut: str = 'projection',
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
        if shortcut not in SHORTCUTS:
            raise ValueError(unknown('shortcut', shortcut, SHORTCUTS))
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.add_stem(WIDTHS[0], 'act1')
        make_se = se_maker(reduction, squeeze, excitation, bias, dd)
        drop_paths = torch.linspace(0, drop_path_rate, sum(layers), device='cpu').split(layers)
        in_channels = WIDTHS[0]
        for index, (channels, stage, rates) in enumerate(zip(WIDTHS, STAGES, drop_paths, strict=True)):
            stride = 2 if index else 1
            blocks = _make_stage(in_channels, channels, stride, rates.tolist(), shortcut, dd)
            if se and stage in stages:
                for block in blocks:
                    block.insert_se(make_se, placement)
            self.add_stage(channels, list(blocks), stride)
            in_channels = channels
        self.add_classifier(nn.Identity(), global_pool, dd)
        self.init_weights()

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return convolution, batch norm and ReLU of `x`."""
        return self.act1(self.bn1(self.conv1(x)))


def _make_stage(
        in_channels: int, channels: int, stride: int, drop_paths: list[float], shortcut: str, dd: dict[str, Any],
) -> list[SEBasicBlock]:
    blocks: list[SEBasicBlock] = []
    for rate in drop_paths:
        downsample = None
        if in_channels != channels:
            downsample = PaddingShortcut(in_channels, channels) if shortcut == 'padding' else nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False, **dd), nn.BatchNorm2d(channels, **dd))
        blocks.append(SEBasicBlock(
            in_channels, channels, stride if not blocks else 1, downsample,
            drop_path=DropPath(rate) if rate > 0 else None, **dd))
        in_channels = channels
    return blocks


def cifar_cfg(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a network for 32x32 images of ten classes."""
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0,
        'interpolation': 'bilinear', 'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:1709.01507',
        **overrides,
    }


default_cfgs = generate_default_cfgs({
    'se_resnet20_cifar.untrained': cifar_cfg(),
    'se_resnet32_cifar.untrained': cifar_cfg(),
    'se_resnet56_cifar.untrained': cifar_cfg(),
    'se_resnet110_cifar.untrained': cifar_cfg(),
})


def _create(variant: str, pretrained: bool, blocks: int, kwargs: dict[str, Any]) -> nn.Module:
    return create(
        SEResNetCifar, variant, pretrained, kwargs, dict(layers=(blocks, blocks, blocks)),
        feature_cfg=dict(out_indices=(0, 1, 2, 3)), pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def se_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-20 for 32x32 images: 274,847 parameters."""
    return _create('se_resnet20_cifar', pretrained, 3, kwargs)


@register_model
def se_resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-32 for 32x32 images."""
    return _create('se_resnet32_cifar', pretrained, 5, kwargs)


@register_model
def se_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-56 for 32x32 images: 862,889 parameters."""
    return _create('se_resnet56_cifar', pretrained, 9, kwargs)


@register_model
def se_resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-110 for 32x32 images (Tables 4 and 5): 1,744,952 parameters."""
    return _create('se_resnet110_cifar', pretrained, 18, kwargs)
