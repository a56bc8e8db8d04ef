"""SE-MobileNet (Table 3 of the paper), on timm's `EfficientNet`, of which its MobileNet v1 is one.

The paper does not say where SE stands. It is here at the end of each of the 13 depthwise separable units, after the
batch norm and the activation of the pointwise convolution, as it stands at the end of an Inception module and after the
activations of VGG. What Table 3 prints agrees: 4,231,976 parameters (4.2 M there) become 4,718,044 (4.7 M), and 569 M
multiply-adds become 572 M by the 0.48 M of SE's layers and the 2.71 M of the multiplication of the units' outputs.
After the depthwise convolutions, where timm's block has a slot `se`, it would be 4.58 M parameters and 571 M.

The plain twin is timm's network, with ReLU6 for the ReLU of Howard et al. (https://arxiv.org/abs/1704.04861), and takes
its weights; they were trained on images of mean and deviation 0.5:

    net = timm.create_model('se_mobilenetv1_100', se=False)
    net.load_state_dict(timm.create_model('mobilenetv1_100', pretrained=True).state_dict())
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet, decode_arch_def, resolve_bn_args
from torch import nn

from .entry_points import create, imagenet_cfg
from .errors import message
from .placement import check_se_arguments
from .squeeze_excite import activation_and_se, se_maker

__all__ = ['SEMobileNetV1']

STAGES = (1, 2, 3, 4, 5)
# as in timm's factory, which takes no other class: depthwise separable with an activation at its end, repeats, kernel
# size, stride, channels
UNITS = [['dsa_r1_k3_s1_c64'], ['dsa_r2_k3_s2_c128'], ['dsa_r2_k3_s2_c256'], ['dsa_r6_k3_s2_c512'],
         ['dsa_r2_k3_s2_c1024']]


class SEMobileNetV1(EfficientNet):
    """timm's MobileNet v1 with SE after the last activation of each unit: `blocks.i.j.bn2.act.se`.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`. Everything of timm's contract is inherited. The activation
    belongs to timm's batch norm, `bn2.act`, and becomes `bn2.act.act` and `bn2.act.se`; the slot `se` of timm's block,
    which is before the pointwise convolution, stays empty.

    Args:
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        stages: The stages that carry SE, 1 to 5: the units that give maps of 112, 56, 28, 14 and 7 pixels.
        **efficientnet_args: Arguments of `timm.models.EfficientNet`.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            *,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            stages: Sequence[int] = STAGES,
            **efficientnet_args: Any,
    ) -> None:
        stages = check_se_arguments(se, 'standard', stages, STAGES)
        if rate := efficientnet_args.get('drop_path_rate'):
            raise ValueError(message(
                f'drop_path_rate: {rate}', 'its units have no shortcut beside which a branch could be left out',
                'leave it out; drop_rate is the dropout before the classifier'))
        super().__init__(**efficientnet_args)
        if se:
            make_se = se_maker(reduction, squeeze, excitation, bias, efficientnet_args)
            for stage in stages:
                for unit in self.blocks[stage - 1]:
                    unit.bn2.act = activation_and_se(unit.bn2.act, make_se(unit.conv_pw.out_channels))


default_cfgs = generate_default_cfgs({
    'se_mobilenetv1_100.untrained': imagenet_cfg(first_conv='conv_stem', classifier='classifier'),
})


@register_model
def se_mobilenetv1_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-MobileNet 1.0 (Table 3): 4,718,044 parameters."""
    if not kwargs.get('norm_layer') and (batch_norm := resolve_bn_args(kwargs)):  # takes them out, as in timm's network
        kwargs['norm_layer'] = partial(nn.BatchNorm2d, **batch_norm)
    return create(
        SEMobileNetV1, 'se_mobilenetv1_100', pretrained, kwargs,
        dict(block_args=decode_arch_def(UNITS), num_features=0, act_layer='relu6'), bases=(EfficientNet,),
        feature_cfg=dict(flatten_sequential=True))
