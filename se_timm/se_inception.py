"""SE-Inception-v3 and SE-Inception-ResNet-v2 (Hu et al., https://arxiv.org/abs/1709.01507), on timm's networks.

`se=False` is timm's network, whose weights it takes:

    net = timm.create_model('se_inception_v3', se=False)
    net.load_state_dict(timm.create_model('inception_v3.tf_in1k', pretrained=True).state_dict())
"""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.inception_resnet_v2 import Block8, Block17, Block35, InceptionResnetV2
from timm.models.inception_v3 import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, InceptionV3
from torch import nn

from .entry_points import create
from .errors import message
from .placement import PlacedSE, check_se_arguments
from .squeeze_excite import SqueezeExcite, se_maker

__all__ = ['SEInceptionResnetV2', 'SEInceptionV3']

STAGES = (5, 6, 7)
PLACEMENTS = ('standard', 'pre')  # of Inception-v3
STEM_WIDTH = 192  # of Inception-v3: channels of the input of its first module


def excite(module: Any, classes: dict[type, type], se: SqueezeExcite, placement: str = 'standard') -> None:
    """Give `module`, one of timm's, an SE block; its class becomes the one of `classes` that applies the block.

    The module stays the object that timm built, so that its parameters keep their keys and initial values.
    """
    module.__class__ = classes[type(module)]
    module.se = se
    module.placement = placement


class ConcatSE(PlacedSE):
    """Mixed into a module of Inception-v3: SE on the concatenation of its branches, or on its input."""

    if TYPE_CHECKING:  # TorchScript reads annotations of the class, and does not know these
        _forward: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.excite_at('standard', torch.cat(self._forward(self.excite_at('pre', x)), 1))


class SEInceptionA(ConcatSE, InceptionA):
    """timm's `InceptionA` with SE."""


class SEInceptionB(ConcatSE, InceptionB):
    """timm's `InceptionB` with SE."""


class SEInceptionC(ConcatSE, InceptionC):
    """timm's `InceptionC` with SE."""


class SEInceptionD(ConcatSE, InceptionD):
    """timm's `InceptionD` with SE."""


class SEInceptionE(ConcatSE, InceptionE):
    """timm's `InceptionE` with SE."""


class SEConv2d(nn.Conv2d):
    """A convolution, then SE."""

    if TYPE_CHECKING:
        se: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(self._conv_forward(x, self.weight, self.bias))


MODULES: dict[type, type] = {
    InceptionA: SEInceptionA, InceptionB: SEInceptionB, InceptionC: SEInceptionC, InceptionD: SEInceptionD,
    InceptionE: SEInceptionE,
}
# The modules of Inception-v3 and the channels of their outputs; the digit of a name is the stage.
CHANNELS = {
    'Mixed_5b': 256, 'Mixed_5c': 288, 'Mixed_5d': 288, 'Mixed_6a': 768, 'Mixed_6b': 768, 'Mixed_6c': 768,
    'Mixed_6d': 768, 'Mixed_6e': 768, 'Mixed_7a': 1280, 'Mixed_7b': 2048, 'Mixed_7c': 2048,
}
# The residual blocks of Inception-ResNet-v2 by stages, of which each begins with `mixed_5b`, `6a` or `7a`.
RESIDUAL = {5: ('repeat',), 6: ('repeat_1',), 7: ('repeat_2', 'block8')}


class SEInceptionV3(InceptionV3):
    """timm's `InceptionV3` with SE on the concatenated output of each of its eleven modules, `Mixed_5b` to `Mixed_7c`.

    Input `(N, in_chans, H, W)` of at least 75 pixels, output `(N, num_classes)`; with `aux_logits` a pair, the second
    being the auxiliary classifier's. Everything of timm's contract is inherited.

    The paper has no Inception-v3 with SE, but says for all Inception networks that SE acts on the output of a module.
    https://github.com/moskomule/senet.pytorch has one, senet/se_inception.py: each module gets an SE layer without
    biases as a child, which the module's forward method does not call, and which has the channels of the module's
    input. `placement='pre', bias=False` is that network with its layers at work: it has its 24,965,832 parameters, of
    which 1,131,264 are of SE. (With `aux_logits` theirs has a further layer, of 73,728, at the auxiliary classifier.)
    But for the two ends that is one network: the input of a module is the output of the one before.

    Args:
        se: False builds the plain twin, timm's network, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'`, on the output of each module, or `'pre'`, on its input.
        stages: The stages that carry SE, 5 to 7 as the modules are named.
        **timm_args: Arguments of `timm.models.InceptionV3`.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            placement: str = 'standard',
            stages: Sequence[int] = STAGES,
            **timm_args: Any,
    ) -> None:
        stages = check_se_arguments(se, placement, stages, STAGES)
        if placement not in PLACEMENTS:
            raise ValueError(message(
                f'placement: {placement!r}', 'it is a place in a residual unit (Tables 14 and 15), and this network is '
                'made of Inception modules', f'take one of {", ".join(PLACEMENTS)}'))
        super().__init__(**timm_args)
        make_se = se_maker(reduction, squeeze, excitation, bias, timm_args)
        inputs = dict(zip(CHANNELS, (STEM_WIDTH, *CHANNELS.values()), strict=False))
        for name, channels in (inputs if placement == 'pre' else CHANNELS).items():
            if se and int(name[-2]) in stages:
                excite(self.get_submodule(name), MODULES, make_se(channels), placement)


class SEInceptionResnetV2(InceptionResnetV2):
    """timm's `InceptionResnetV2` with SE on the residual branch of each of its forty blocks.

    SE acts after the last 1x1 convolution of the branch, before the scale and the sum with the shortcut. The paper has
    SE-ResNet, where SE acts "before summation with the identity branch", and says of Inception-ResNet-v2 only that it
    follows a similar scheme. The scale, 0.1 to 0.2, belongs to that sum: it is there to make it stable.

    Input `(N, in_chans, H, W)` of at least 75 pixels, output `(N, num_classes)`. Everything of timm's contract is
    inherited. timm's network, a port of Google's, has 13.16 G multiply-adds at 299 pixels. The paper's 11.75 G (11.76 G
    with SE) must be of another implementation, which the authors did not publish, so that these figures cannot be
    reproduced; SE adds 8.5 M, in accord with the difference of the two.

    Args:
        se: False builds the plain twin, timm's network, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        stages: The stages that carry SE: 5 is `repeat`, ten blocks; 6 is `repeat_1`, twenty; 7 is `repeat_2` and
            `block8`, ten. The numbers are those of the modules before them, `mixed_5b`, `mixed_6a` and `mixed_7a`.
        **timm_args: Arguments of `timm.models.InceptionResnetV2`.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    def __init__(
            self,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            stages: Sequence[int] = STAGES,
            **timm_args: Any,
    ) -> None:
        stages = check_se_arguments(se, 'standard', stages, STAGES)
        super().__init__(**timm_args)
        make_se = se_maker(reduction, squeeze, excitation, bias, timm_args)
        for name in (name for stage in stages for name in RESIDUAL[stage] if se):
            for module in self.get_submodule(name).modules():
                if isinstance(module, (Block35, Block17, Block8)):
                    excite(module.conv2d, {nn.Conv2d: SEConv2d}, make_se(module.conv2d.out_channels))


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 299, 299), 'pool_size': (8, 8), 'interpolation': 'bicubic',
        'mean': IMAGENET_INCEPTION_MEAN, 'std': IMAGENET_INCEPTION_STD, 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1709.01507', **overrides,
    }


default_cfgs = generate_default_cfgs({
    'se_inception_v3.untrained': _cfg(crop_pct=0.875, first_conv='Conv2d_1a_3x3.conv', classifier='fc'),
    'se_inception_resnet_v2.untrained': _cfg(crop_pct=0.8975, first_conv='conv2d_1a.conv', classifier='classif'),
})


def _create(variant: str, pretrained: bool, cls: type, timm_cls: type, kwargs: dict[str, Any]) -> nn.Module:
    if kwargs.get('aux_logits') and kwargs.get('features_only'):
        raise ValueError(message(
            f'aux_logits=True with features_only=True for {variant}',
            'feature maps end before a classifier, also before the auxiliary one',
            'leave one of the two out',
        ))
    return create(cls, variant, pretrained, kwargs, bases=(timm_cls,))


@register_model
def se_inception_v3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-Inception-v3: 25,496,188 parameters. Not in the paper; see `SEInceptionV3`."""
    return _create('se_inception_v3', pretrained, SEInceptionV3, InceptionV3, kwargs)


@register_model
def se_inception_resnet_v2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-Inception-ResNet-v2 (Table 2): 64,387,444 parameters; see `SEInceptionResnetV2` for its multiply-adds."""
    return _create('se_inception_resnet_v2', pretrained, SEInceptionResnetV2, InceptionResnetV2, kwargs)
