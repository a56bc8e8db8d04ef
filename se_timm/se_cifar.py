"""SE-ResNets for 32x32 images: the CIFAR networks of He et al. (https://arxiv.org/abs/1512.03385, Sec. 4.2) with SE."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, create_classifier, get_device_dtype
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from .errors import unknown
from .se_resnet import SEBasicBlock, check_keywords, check_se_arguments, check_weights_exist
from .squeeze_excite import SqueezeExcite
from .weights import checkpoint_filter_fn

__all__ = ['SEResNetCifar']

STAGES = (2, 3, 4)
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


class SEResNetCifar(nn.Module):
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

    if TYPE_CHECKING:  # TorchScript reads annotations of the class, and does not know these
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential

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
        super().__init__()
        stages = check_se_arguments(se, placement, stages, STAGES)
        if shortcut not in SHORTCUTS:
            raise ValueError(unknown('shortcut', shortcut, SHORTCUTS))
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [dict(num_chs=WIDTHS[0], reduction=1, module='act1')]
        make_se = partial(
            SqueezeExcite, reduction=reduction, squeeze=squeeze, excitation=excitation, bias=bias, **dd)
        drop_paths = torch.linspace(0, drop_path_rate, sum(layers), device='cpu').split(layers)
        in_channels = WIDTHS[0]
        for index, (channels, stage, rates) in enumerate(zip(WIDTHS, STAGES, drop_paths, strict=True)):
            blocks = _make_stage(in_channels, channels, 1 + (index > 0), rates.tolist(), shortcut, dd)
            if se and stage in stages:
                for block in blocks:
                    block.insert_se(make_se, placement)
            name = f'layer{index + 1}'
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=channels, reduction=2 ** index, module=name))
            in_channels = channels

        self.num_features = in_channels
        self.global_pool, self.fc = create_classifier(in_channels, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions as He et al. do (https://arxiv.org/abs/1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's parameter groups: the stem, then stages (`coarse`) or blocks."""
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features and the outputs of stem and stages that `indices` names, as timm's networks do.

        Args:
            x: Images, `(N, in_chans, H, W)`.
            indices: The last n if an int, all if None; 0 is the stem, 1 to 3 the stages.
            norm: Without effect, there is no final norm.
            stop_early: Stop at the last wanted output.
            output_fmt: Only `'NCHW'`.
            intermediates_only: Return the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        stages = [self.layer1, self.layer2, self.layer3]
        for index, stage in enumerate(stages[:max_index] if stop_early else stages, start=1):
            checkpointing = self.grad_checkpointing and not torch.jit.is_scripting()
            x = checkpoint_seq(stage, x) if checkpointing else stage(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last output that `indices` names, and return the absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        for index in range(max_index, last):
            setattr(self, f'layer{index + 1}', nn.Sequential())
        if max_index < last:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < last:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map, `(N, 64, H / 4, W / 4)`."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits of a feature map, or with `pre_logits` what the classifier sees."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


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


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0,
        'interpolation': 'bilinear', 'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:1709.01507',
        **overrides,
    }


default_cfgs = generate_default_cfgs({
    'se_resnet20_cifar.untrained': _cfg(),
    'se_resnet32_cifar.untrained': _cfg(),
    'se_resnet56_cifar.untrained': _cfg(),
    'se_resnet110_cifar.untrained': _cfg(),
})


def _create(variant: str, pretrained: bool, blocks: int, kwargs: dict[str, Any]) -> nn.Module:
    check_keywords(variant, kwargs, SEResNetCifar)
    if pretrained:
        check_weights_exist(variant, resolve_pretrained_cfg(
            variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')))
    return build_model_with_cfg(
        SEResNetCifar, variant, pretrained, layers=(blocks, blocks, blocks),
        feature_cfg=dict(out_indices=(0, 1, 2, 3)), pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


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
