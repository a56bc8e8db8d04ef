"""SE-ShuffleNet (Table 3 of the paper): ShuffleNet v1 of Zhang et al., https://arxiv.org/abs/1707.01083, with SE.

timm has no ShuffleNet. Where the text leaves something open, it is here as in the authors' release
(https://github.com/megvii-model/ShuffleNet-Series): the first 1x1 convolution of stage 2 has no groups, all widths
within a unit are a quarter of its output, and the shortcut comes first in the concatenation.

The paper does not say where SE stands in a unit. It is here where it is in the other residual networks, at the end of
the residual branch: before the sum, and in the units of stride 2, where the branch has C_out - C_in channels, before
the concatenation. What Table 3 prints agrees, if it cuts numbers off: it has 1.8 M for the 1,865,728 parameters of the
plain network, and 2.4 M for the 2,484,533 with SE. On the outputs of the units there would be 2.59 M.

Its 140 M multiply-adds seem to be those of ShuffleNet 1x in general: convolutions and classifier have 137.5 M with the
three groups, and 134 to 143 M with others. SE adds 0.61 M by its layers and 1.60 M by the multiplication of the
branches' outputs, which makes the printed 142 M of 140 M.
"""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .entry_points import create, imagenet_cfg
from .errors import message
from .placement import PlacedSE, check_each_stage, check_se_arguments, places
from .squeeze_excite import se_maker
from .staged_network import STAGES, StagedNetwork

__all__ = ['SEShuffleNetV1']

STEM_WIDTH = 24
LAYERS = (4, 8, 4)


class ShuffleUnit(PlacedSE, nn.Module):
    """A grouped 1x1 convolution, channel shuffle, a depthwise 3x3 with the stride, and a grouped 1x1 convolution.

    `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`. The input is added, or, with stride 2, its
    3x3 averages come before the branch, which then has `out_channels - in_channels` channels. SE at `'identity'` gates
    these averages.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        groups: Of the 1x1 convolutions, and of the shuffle.
        first_groups: Of the first convolution, where it has others.
        stride: Of the unit, 1 or 2.
    """

    made_of = 'shuffle units'

    def __init__(
            self, in_channels: int, out_channels: int, groups: int, first_groups: int, stride: int, dd: dict[str, Any],
    ) -> None:
        super().__init__()
        width = out_channels // 4
        self.concatenates = stride == 2
        branch = out_channels - in_channels if self.concatenates else out_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=first_groups, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, branch, 1, groups=groups, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(branch, **dd)
        self.se: nn.Module = nn.Identity()
        self.placement = 'standard'
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1) if self.concatenates else nn.Identity()
        self.act3 = nn.ReLU(inplace=True)
        self.places = {**places(in_channels, out_channels), 'standard': branch, 'identity': in_channels}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's output."""
        y = self.act1(self.bn1(self.conv1(self.excite_at('pre', x))))
        y = self.bn2(self.conv2(self.shuffle(y)))
        y = self.excite_at('standard', self.bn3(self.conv3(y)))
        shortcut = self.excite_at('identity', self.downsample(x))
        y = torch.cat([shortcut, y], dim=1) if self.concatenates else shortcut + y
        return self.excite_at('post', self.act3(y))


class SEShuffleNetV1(StagedNetwork):
    """ShuffleNet v1 with SE: a 3x3/2 convolution, a 3x3/2 max pool, then three stages of 4, 8 and 4 units.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Args:
        groups: Groups of the 1x1 convolutions, g.
        channels: Of the three stages; Zhang et al. say which for each g (their Table 1).
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'`, `'pre'`, `'post'` or `'identity'`, as in `SEResNet`.
        stages: The stages that carry SE, 2 to 4 as Zhang et al. number them; stage 1 is the stem.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            groups: int,
            channels: tuple[int, int, int],
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            placement: str = 'standard',
            stages: Sequence[int] = STAGES,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        stages = check_se_arguments(se, placement, stages, STAGES)
        check_each_stage(STAGES, channels=channels)
        if groups < 1 or any(size % groups for each in channels for size in (each, each // 4, each - STEM_WIDTH)):
            raise ValueError(message(
                f'groups: {groups} with channels: {channels}', 'the 1x1 convolutions cannot be divided into groups',
                f'let groups divide {STEM_WIDTH}, and the channels and a quarter of them be multiples of groups'))
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 3, stride=2, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.add_stem(STEM_WIDTH, 'maxpool', reduction=4)
        make_se = se_maker(reduction, squeeze, excitation, bias, dd)
        in_channels, first_groups = STEM_WIDTH, 1
        for stage, layers, out_channels in zip(STAGES, LAYERS, channels, strict=True):
            units = []
            for number in range(layers):
                stride = 1 if number else 2
                units.append(ShuffleUnit(in_channels, out_channels, groups, first_groups, stride, dd))
                in_channels, first_groups = out_channels, groups
                if se and stage in stages:
                    units[-1].insert_se(make_se, placement)
            self.add_stage(out_channels, list(units), stride=2)
        self.add_classifier(nn.Identity(), global_pool, dd)
        self.init_weights()

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return convolution, batch norm, ReLU and max pool of `x`."""
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


default_cfgs = generate_default_cfgs({'se_shufflenetv1_g3.untrained': imagenet_cfg()})


@register_model
def se_shufflenetv1_g3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ShuffleNet v1 1x, g = 3 (Table 3): 2,484,533 parameters."""
    return create(
        SEShuffleNetV1, 'se_shufflenetv1_g3', pretrained, kwargs, dict(groups=3, channels=(240, 480, 960)),
        feature_cfg=dict(out_indices=(0, 1, 2, 3)))
