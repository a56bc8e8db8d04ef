"""SE-VGG-16 with batch norm (Table 2 of the paper), on timm's `VGG`.

The paper inserts SE "after the non-linearity following each convolution": 13 blocks. Their layers add 0.23 M
multiply-adds and the multiplication of all feature maps 13.55 M, which makes the printed 15.48 G of 15.47 G.

The plain twin is timm's network, and takes its weights:

    net = timm.create_model('se_vgg16_bn', se=False)
    net.load_state_dict(timm.create_model('vgg16_bn', pretrained=True).state_dict())
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vgg import VGG, _filter_fn, cfgs
from torch import nn

from .entry_points import create, imagenet_cfg
from .placement import check_se_arguments
from .squeeze_excite import SqueezeExcite, activation_and_se, se_maker

__all__ = ['SEVGG']

STAGES = (1, 2, 3, 4, 5)


class SEVGG(VGG):
    """timm's `VGG` with SE after each activation: `features.i` becomes `features.i.act` and `features.i.se`.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`. Everything of timm's contract is inherited; as there,
    gradient checkpointing is not supported.

    Args:
        cfg: Output channels of the convolutions, and `'M'` for max pools.
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        stages: The stages that carry SE, 1 to 5; each ends in a max pool.
        **vgg_args: Arguments of `timm.models.VGG`.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            cfg: list[Any],
            *,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            stages: Sequence[int] = STAGES,
            **vgg_args: Any,
    ) -> None:
        stages = check_se_arguments(se, 'standard', stages, STAGES)
        super().__init__(cfg, **vgg_args)
        if se:
            self._insert_se(cfg, stages, se_maker(reduction, squeeze, excitation, bias, vgg_args))

    def _insert_se(self, cfg: list[Any], stages: Sequence[int], make_se: partial[SqueezeExcite]) -> None:
        index, stage = 0, 1
        for channels in cfg:
            if channels == 'M':
                index, stage = index + 1, stage + 1
                continue
            index += 2 if self.use_norm else 1  # past the convolution and its norm
            if stage in stages:
                self.features[index] = activation_and_se(self.features[index], make_se(channels))
            index += 1


default_cfgs = generate_default_cfgs({
    'se_vgg16_bn.untrained': imagenet_cfg(first_conv='features.0', classifier='head.fc'),
})


@register_model
def se_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-VGG-16 with batch norm (Table 2): 138,596,784 parameters."""
    # as timm's own factory does, which takes no other class; its filter renames torchvision's parameters
    return create(
        SEVGG, 'se_vgg16_bn', pretrained, kwargs, dict(norm_layer=nn.BatchNorm2d), bases=(VGG,),
        model_cfg=cfgs['vgg16'], pretrained_filter_fn=_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5)))
