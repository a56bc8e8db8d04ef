"""SE-BN-Inception (Hu et al., https://arxiv.org/abs/1709.01507), whose plain network timm does not have.

That is the network of Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, here in the layout of the authors' release
(https://github.com/hujie-frank/SENet, models/SE-BN-Inception.prototxt): no convolution has a bias, max pools are in
ceil mode and without padding, and SE gates the concatenated output of each of the ten Inception modules, of those that
halve the map too. The file's 11,931,622 parameters, 7,038 of them biases of SE, are the network's.
"""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import ConvNormAct
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from .classifier_network import ClassifierNetwork
from .entry_points import create, imagenet_cfg
from .placement import check_se_arguments
from .squeeze_excite import SqueezeExcite

__all__ = ['SEBNInception']

STAGES = (3, 4, 5)
POOLS: dict[str, type[nn.Module]] = {'avg': nn.AvgPool2d, 'max': nn.MaxPool2d}


class HalvingMaxPool(nn.Module):
    """A 3x3 max pool of stride 2, `(N, C, H, W)` to `(N, C, ceil(H / 2), ceil(W / 2))`.

    On even sizes this is Caffe's pool, in ceil mode and without padding. On odd ones that is a pixel smaller than the
    output of a padded convolution, with which it could not be concatenated: one row and column more let it go on.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float('-inf')), 3, stride=2, ceil_mode=True)


class InceptionModule(nn.Module):
    """A 1x1 convolution, a 3x3, two 3x3 and a pool with a 1x1, side by side; then SE on the channels of all.

    `(N, in_channels, H, W)` to `(N, out_channels, H, W)`.

    Args:
        in_channels: Channels of the input.
        conv1x1: Channels of the 1x1 convolution.
        reduce3x3: Of the 1x1 before the 3x3.
        conv3x3: Of the 3x3.
        reduce3x3dbl: Of the 1x1 before the two 3x3.
        conv3x3dbl: Of each of the two 3x3.
        proj: Of the 1x1 after the pool.
        pool: `'avg'` or `'max'`, of 3x3 pixels.
    """

    def __init__(
            self, in_channels: int, conv1x1: int, reduce3x3: int, conv3x3: int, reduce3x3dbl: int, conv3x3dbl: int,
            proj: int, pool: str = 'avg', **dd: Any,
    ) -> None:
        super().__init__()
        self.out_channels = conv1x1 + conv3x3 + conv3x3dbl + proj
        self.branch1x1 = ConvNormAct(in_channels, conv1x1, 1, **dd)
        self.branch3x3 = nn.Sequential(
            ConvNormAct(in_channels, reduce3x3, 1, **dd), ConvNormAct(reduce3x3, conv3x3, 3, **dd))
        self.branch3x3dbl = nn.Sequential(
            ConvNormAct(in_channels, reduce3x3dbl, 1, **dd), ConvNormAct(reduce3x3dbl, conv3x3dbl, 3, **dd),
            ConvNormAct(conv3x3dbl, conv3x3dbl, 3, **dd))
        self.branch_pool = nn.Sequential(POOLS[pool](3, stride=1, padding=1), ConvNormAct(in_channels, proj, 1, **dd))
        self.se: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.branch1x1(x), self.branch3x3(x), self.branch3x3dbl(x), self.branch_pool(x)]
        return self.se(torch.cat(branches, 1))


class HalvingModule(nn.Module):
    """An `InceptionModule` of stride 2: it has no 1x1 convolution, and none after the pool, which is a max pool.

    `(N, in_channels, H, W)` to `(N, conv3x3 + conv3x3dbl + in_channels, ceil(H / 2), ceil(W / 2))`.
    """

    def __init__(
            self, in_channels: int, reduce3x3: int, conv3x3: int, reduce3x3dbl: int, conv3x3dbl: int, **dd: Any,
    ) -> None:
        super().__init__()
        self.out_channels = conv3x3 + conv3x3dbl + in_channels
        self.branch3x3 = nn.Sequential(
            ConvNormAct(in_channels, reduce3x3, 1, **dd), ConvNormAct(reduce3x3, conv3x3, 3, stride=2, **dd))
        self.branch3x3dbl = nn.Sequential(
            ConvNormAct(in_channels, reduce3x3dbl, 1, **dd), ConvNormAct(reduce3x3dbl, conv3x3dbl, 3, **dd),
            ConvNormAct(conv3x3dbl, conv3x3dbl, 3, stride=2, **dd))
        self.branch_pool = HalvingMaxPool()
        self.se: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(torch.cat([self.branch3x3(x), self.branch3x3dbl(x), self.branch_pool(x)], 1))


# The modules, in their order, and what they are made with; the digit of a name is the stage.
MODULES: dict[str, partial[Any]] = {
    'inception_3a': partial(InceptionModule, conv1x1=64, reduce3x3=64, conv3x3=64, reduce3x3dbl=64, conv3x3dbl=96,
                            proj=32),
    'inception_3b': partial(InceptionModule, conv1x1=64, reduce3x3=64, conv3x3=96, reduce3x3dbl=64, conv3x3dbl=96,
                            proj=64),
    'inception_3c': partial(HalvingModule, reduce3x3=128, conv3x3=160, reduce3x3dbl=64, conv3x3dbl=96),
    'inception_4a': partial(InceptionModule, conv1x1=224, reduce3x3=64, conv3x3=96, reduce3x3dbl=96, conv3x3dbl=128,
                            proj=128),
    'inception_4b': partial(InceptionModule, conv1x1=192, reduce3x3=96, conv3x3=128, reduce3x3dbl=96, conv3x3dbl=128,
                            proj=128),
    'inception_4c': partial(InceptionModule, conv1x1=160, reduce3x3=128, conv3x3=160, reduce3x3dbl=128, conv3x3dbl=160,
                            proj=128),
    'inception_4d': partial(InceptionModule, conv1x1=96, reduce3x3=128, conv3x3=192, reduce3x3dbl=160, conv3x3dbl=192,
                            proj=128),
    'inception_4e': partial(HalvingModule, reduce3x3=128, conv3x3=192, reduce3x3dbl=192, conv3x3dbl=256),
    'inception_5a': partial(InceptionModule, conv1x1=352, reduce3x3=192, conv3x3=320, reduce3x3dbl=160, conv3x3dbl=224,
                            proj=128),
    'inception_5b': partial(InceptionModule, conv1x1=352, reduce3x3=192, conv3x3=320, reduce3x3dbl=192, conv3x3dbl=224,
                            proj=128, pool='max'),
}
LAYERS = ('conv1', 'pool1', 'conv2_reduce', 'conv2', 'pool2', *MODULES)
LAST_OF_ITS_SIZE = ('conv1', 'conv2', 'inception_3b', 'inception_4d', 'inception_5b')


def stage_of(module: str) -> int:
    """Return the stage of one of `MODULES`."""
    return int(module[-2])


class SEBNInception(ClassifierNetwork):
    """BN-Inception with SE after every Inception module; see the module's docstring.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Args:
        se: False builds the plain twin, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        stages: The stages that carry SE, 3 to 5: `inception_3a` to `3c`, `4a` to `4e`, `5a` and `5b`.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of the class, and does not know these
        inception_3a: nn.Module
        inception_3b: nn.Module
        inception_3c: nn.Module
        inception_4a: nn.Module
        inception_4b: nn.Module
        inception_4c: nn.Module
        inception_4d: nn.Module
        inception_4e: nn.Module
        inception_5a: nn.Module
        inception_5b: nn.Module

    def __init__(
            self,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            stages: Sequence[int] = STAGES,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        stages = check_se_arguments(se, 'standard', stages, STAGES)
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = ConvNormAct(in_chans, 64, 7, stride=2, **dd)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2_reduce = ConvNormAct(64, 64, 1, **dd)
        self.conv2 = ConvNormAct(64, 192, 3, **dd)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        channels = self.conv2.out_channels
        for name, make in MODULES.items():
            module = make(channels, **dd)
            channels = module.out_channels
            if se and stage_of(name) in stages:
                module.se = SqueezeExcite(channels, reduction, squeeze, excitation, bias, **dd)
            self.add_module(name, module)
        self.feature_info = [
            dict(num_chs=self.get_submodule(name).out_channels, reduction=2 ** level, module=name)
            for level, name in enumerate(LAST_OF_ITS_SIZE, start=1)]
        self.add_head(channels, global_pool, dd)
        self.init_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups: the first convolution, then stages (`coarse`) or layers."""
        layers = [(rf'^{name}\.', (index,)) for index, name in enumerate(LAYERS[1:])]
        return dict(stem=r'^conv1', blocks=r'^(?:conv|inception_)(\d)' if coarse else layers)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features and the last outputs of each size that `indices` names, as timm's networks do.

        Args:
            x: Images, `(N, in_chans, H, W)`.
            indices: The last n if an int, all if None; 0 and 1 are the convolutions `conv1` and `conv2`, 2 to 4 the
                modules `inception_3b`, `4d` and `5b`.
            norm: Without effect: there is no final norm.
            stop_early: Stop at the last wanted output.
            output_fmt: Only `'NCHW'`.
            intermediates_only: Return the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(LAST_OF_ITS_SIZE), indices)
        wanted = [LAST_OF_ITS_SIZE[index] for index in take_indices]
        intermediates = []
        for name in layers_up_to(max_index) if stop_early else LAYERS:
            layer = self.get_submodule(name)
            x = checkpoint(layer, x) if self.grad_checkpointing and not torch.jit.is_scripting() else layer(x)
            if name in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what comes after the last output that `indices` names, and return the absolute indices.

        `prune_norm` has no effect: there is no final norm.
        """
        take_indices, max_index = feature_take_indices(len(LAST_OF_ITS_SIZE), indices)
        removed = LAYERS[len(layers_up_to(max_index)):]
        for name in removed:
            self.set_submodule(name, nn.Identity())
        if removed:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or removed:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map, `(N, C, H / 32, W / 32)`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.get_submodule(name) for name in LAYERS], x)
        x = self.pool2(self.conv2(self.conv2_reduce(self.pool1(self.conv1(x)))))
        x = self.inception_3c(self.inception_3b(self.inception_3a(x)))
        x = self.inception_4e(self.inception_4d(self.inception_4c(self.inception_4b(self.inception_4a(x)))))
        return self.inception_5b(self.inception_5a(x))


def layers_up_to(index: int) -> tuple[str, ...]:
    """Return the layers up to the output with this index."""
    return LAYERS[:LAYERS.index(LAST_OF_ITS_SIZE[index]) + 1]


default_cfgs = generate_default_cfgs({'se_bn_inception.untrained': imagenet_cfg(first_conv='conv1.conv')})


@register_model
def se_bn_inception(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-BN-Inception (Table 2): 11,931,622 parameters."""
    return create(SEBNInception, 'se_bn_inception', pretrained, kwargs)
