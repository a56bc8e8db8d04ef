"""SE-ResNet, SE-ResNeXt and SENet-154 (Hu et al., https://arxiv.org/abs/1709.01507), on timm's `ResNet`.

Two topologies, chosen by the tag of the model's name:

- the paper's, as in the authors' release (https://github.com/hujie-frank/SENet): stride 2 in the first 1x1 convolution
  of SE-ResNet and in the 3x3 of SE-ResNeXt and SENet-154, 3x3/2 max pool in ceil mode without padding. Default, and
  the tag `in1k` (the authors' weights, which timm hosts as `legacy_*.in1k`);
- timm's "v1.5": stride 2 in the 3x3 everywhere, padded max pool, last batch norm of a branch initialised to zero. Tag
  `v1_5` without weights, or any tag of timm's own SE networks: `se_resnet50.ra2_in1k`, `se_resnext50_32x4d.racm_in1k`.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .entry_points import check_keywords, check_weights_exist, imagenet_cfg
from .errors import message, unknown
from .placement import PlacedSE, check_se_arguments, places
from .residual_blocks import BLOCKS, Step, Tail, present
from .residual_tail import ResidualTail
from .squeeze_excite import se_maker
from .weights import checkpoint_filter_fn

__all__ = ['SE_DEFAULTS', 'TIMM_NAMES', 'SEBasicBlock', 'SEBottleneck', 'SEResNet']

TOPOLOGIES = ('auto', 'paper', 'v1.5')
STAGES = (2, 3, 4, 5)
# The arguments that make the block what the released networks have: weights cannot be had for any other.
SE_DEFAULTS: dict[str, Any] = {
    'se': True, 'reduction': 16, 'squeeze': 'avg', 'excitation': 'sigmoid', 'bias': True, 'placement': 'standard',
    'stages': STAGES,
}


class SEBasicBlock(ResidualTail, PlacedSE, BasicBlock):
    """timm's two-layer residual block with a place for SE; `insert_se` fills it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.se = self.se or nn.Identity()
        self.placement = 'standard'
        self.places = places(self.conv1.in_channels, self.conv2.out_channels)
        self.relu_before_se = False

    def body(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input of the last convolution."""
        x = self.excite_at('pre', x)
        return self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))

    @torch.jit.unused
    def tail(self) -> Tail | str:
        """Return the modules that follow, or in words why they are no `Tail`."""
        se, problem = self.tail_se()
        if self.relu_before_se:  # also where the SE behind it was taken out
            problem = 'a further ReLU stands after its last batch norm'
        return problem or Tail(self.conv2, self.bn2, se, present(self.drop_path), self.downsample, self.act2)

    @torch.jit.unused
    def steps(self) -> list[Step] | str:
        """Return the steps of the body, or in words what else there is in it."""
        return self.se_of_body() or BLOCKS[BasicBlock].steps(self)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the block, each module in its turn."""
        shortcut = x
        x = self.bn2(self.conv2(self.body(x)))
        if self.relu_before_se:
            x = self.act2(x)
        x = self.excite_at('standard', x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += self.excite_at('identity', shortcut)
        return self.excite_at('post', self.act2(x))


class SEBottleneck(ResidualTail, PlacedSE, Bottleneck):
    """timm's three-layer residual block with a place for SE; `insert_se` fills it.

    `'identity'` gates the shortcut after its projection, and `'3x3'` acts after the batch norm and ReLU of the 3x3
    convolution; the paper leaves both open.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.se = self.se or nn.Identity()
        self.placement = 'standard'
        self.places = places(self.conv1.in_channels, self.conv3.out_channels, self.conv2.out_channels)

    def stride_in_1x1(self) -> None:
        """Move the stride from the 3x3 to the first 1x1 convolution, as in the authors' SE-ResNets."""
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    def body(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input of the last convolution."""
        x = self.excite_at('pre', x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        return self.excite_at('3x3', x)

    @torch.jit.unused
    def tail(self) -> Tail | str:
        """Return the modules that follow, or in words why they are no `Tail`."""
        se, problem = self.tail_se()
        return problem or Tail(self.conv3, self.bn3, se, present(self.drop_path), self.downsample, self.act3)

    @torch.jit.unused
    def steps(self) -> list[Step] | str:
        """Return the steps of the body, or in words what else there is in it."""
        return self.se_of_body() or BLOCKS[Bottleneck].steps(self)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the block, each module in its turn."""
        shortcut = x
        x = self.bn3(self.conv3(self.body(x)))
        x = self.excite_at('standard', x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += self.excite_at('identity', shortcut)
        return self.excite_at('post', self.act3(x))


class SEResNet(ResNet):
    """timm's `ResNet` with the paper's SE blocks and either topology.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`. Everything of timm's contract is inherited.

    Args:
        block: `SEBasicBlock` or `SEBottleneck`.
        layers: Number of blocks in each of the four stages.
        se: False builds the plain twin: the same network without SE, the other SE arguments then having no effect.
        reduction: Reduction ratio r.
        squeeze: As `excitation` and `bias`, see `SqueezeExcite`.
        excitation: Last non-linearity of the gate.
        bias: Biases in the two layers of the gate.
        placement: `'standard'` (before the sum), `'pre'`, `'post'`, `'identity'` (Table 14), `'3x3'` (Table 15).
        stages: The stages that carry SE, 2 to 5 as the paper numbers them (Table 13); stage 1 is the stem.
        topology: `'paper'` or `'v1.5'`, see the module's docstring.
        stride_in_1x1: Stride 2 in the first 1x1 of a bottleneck; by default that of the paper's topology, and only
            there to be had.
        relu_before_se: A further ReLU between the last batch norm and SE. Not in the paper: timm's weights of the two
            networks with basic blocks were trained so (huggingface/pytorch-image-models PR 771). For basic blocks with
            the standard placement.
        **resnet_args: Arguments of `timm.models.ResNet`.

    Raises:
        ValueError: For an argument that the network cannot honour.
    """

    if TYPE_CHECKING:
        maxpool: nn.Module

    def __init__(
            self,
            block: type[SEBasicBlock] | type[SEBottleneck],
            layers: tuple[int, ...],
            *,
            se: bool = True,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            placement: str = 'standard',
            stages: Sequence[int] = STAGES,
            topology: str = 'paper',
            stride_in_1x1: bool | None = None,
            relu_before_se: bool = False,
            **resnet_args: Any,
    ) -> None:
        stages = check_se_arguments(se, placement, stages, STAGES)
        if topology not in TOPOLOGIES[1:]:
            raise ValueError(unknown('topology', topology, TOPOLOGIES[1:]))
        if se and (resnet_args.get('block_args') or {}).get('attn_layer'):
            raise ValueError(message(
                f"block_args: attn_layer={resnet_args['block_args']['attn_layer']!r}",
                'the block has one place for attention, and SE stands there',
                "say se=False as well, or take timm's own resnet with this attention",
            ))
        if stride_in_1x1 and (topology != 'paper' or block is SEBasicBlock):
            raise ValueError(message(
                'stride_in_1x1=True',
                'it is of the bottlenecks of the paper\'s topology'
                + (', and this network is made of basic blocks' if block is SEBasicBlock else
                   f', and this network has the topology {topology!r}'),
                "leave it out, or take a network of 50 layers or more with topology='paper'",
            ))
        if stride_in_1x1 and resnet_args.get('aa_layer'):
            raise ValueError(message(
                'stride_in_1x1=True with aa_layer', 'the stride is then that of the anti-aliasing after the 3x3',
                'leave one of them out'))
        if se and relu_before_se and (block is not SEBasicBlock or placement != 'standard'):
            raise ValueError(message(
                f'relu_before_se=True with {f"placement={placement!r}" if block is SEBasicBlock else "bottlenecks"}',
                'it stands between the last batch norm of a basic block and its SE', 'leave it out'))
        super().__init__(block, layers, **resnet_args)
        self.topology = topology
        if topology == 'paper':
            self._take_paper_topology(stride_in_1x1 is not False)
        if se:
            make_se = se_maker(reduction, squeeze, excitation, bias, resnet_args)
            for stage in stages:
                for residual_block in getattr(self, f'layer{stage - 1}'):
                    residual_block.insert_se(make_se, placement)
                    if relu_before_se:
                        residual_block.relu_before_se = True

    def _take_paper_topology(self, stride_in_1x1: bool) -> None:
        if isinstance(self.maxpool, nn.MaxPool2d):  # otherwise the user asked timm for another stem
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        if stride_in_1x1:
            for module in self.modules():
                if isinstance(module, SEBottleneck):
                    module.stride_in_1x1()


# Our network -> timm's name of it in the paper's topology and in v1.5 (None where timm has none). In v1.5 timm rounds
# hidden widths up to multiples of 8, which are others in SE-ResNet-18 and -34.
TIMM_NAMES: dict[str, tuple[str | None, str]] = {
    'se_resnet18': ('legacy_seresnet18', 'seresnet18'),
    'se_resnet34': ('legacy_seresnet34', 'seresnet34'),
    'se_resnet50': ('legacy_seresnet50', 'seresnet50'),
    'se_resnet101': ('legacy_seresnet101', 'seresnet101'),
    'se_resnet152': ('legacy_seresnet152', 'seresnet152'),
    'se_resnext50_32x4d': ('legacy_seresnext50_32x4d', 'seresnext50_32x4d'),
    'se_resnext101_32x4d': ('legacy_seresnext101_32x4d', 'seresnext101_32x4d'),
    'se_resnext101_64x4d': (None, 'seresnext101_64x4d'),
    'se_senet154': ('legacy_senet154', 'senet154'),
}
# Networks whose weights in the paper's topology are of another network (the further ReLU), or do not exist: their
# default is the paper's network, and its tag says that it has no weights.
UNTRAINED = ('se_resnet18', 'se_resnet34', 'se_resnext101_64x4d')
PAPER_TAGS = ('in1k', 'untrained')


def _cfg(name: str) -> dict[str, Any]:
    return imagenet_cfg(first_conv='conv1.0' if name == 'se_senet154' else 'conv1')


def _timm_cfg(name: str, timm_name: str) -> dict[str, Any]:
    """Return timm's configuration of `timm_name` (with its tag) for our network `name`, whose stem has other keys."""
    cfg = timm.models.get_pretrained_cfg(timm_name)
    own = {key: _cfg(name)[key] for key in ('first_conv', 'classifier')}
    return {**dataclasses.asdict(cfg), **own, 'architecture': None, 'tag': None}


def _default_cfgs() -> dict[str, dict[str, Any]]:
    cfgs = {}
    for name, (legacy_name, v15_name) in TIMM_NAMES.items():
        if legacy_name:
            cfgs[f'{name}.in1k'] = _timm_cfg(name, f'{legacy_name}.in1k')
        for weights in timm.list_pretrained(f'{v15_name}.*'):
            cfgs[f'{name}.{weights.split(".", 1)[1]}'] = _timm_cfg(name, weights)
        cfgs[f'{name}.v1_5'] = _cfg(name)
        if name in UNTRAINED:  # last, else timm prefers the first tag with weights to the starred one
            cfgs[f'{name}.untrained*'] = _cfg(name)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())

def check_weights_fit(variant: str, given: dict[str, Any], trained_with: dict[str, Any] = SE_DEFAULTS) -> None:
    """Raise `ValueError` if an argument contradicts what the weights of `variant` were trained with."""
    for name, trained in trained_with.items():
        value = given.get(name, trained)
        several = isinstance(trained, tuple) and isinstance(value, Iterable)
        if (tuple(sorted(set(value))) if several else value) != trained:
            raise ValueError(message(
                f'{name}={value!r} with pretrained=True for {variant}',
                f'its weights were trained with {name}={trained!r}',
                f'leave {name} out, or build without pretrained=True and load what fits yourself',
            ))


def _resolve_topology(variant: str, topology: str, tag: str | None, named: bool) -> tuple[str, str | None]:
    """Return the topology to build and the tag that goes with it; a tag of the user's own says nothing of it."""
    if topology not in TOPOLOGIES:
        raise ValueError(unknown('topology', topology, TOPOLOGIES))
    if topology == 'v1.5' and not named:
        return topology, 'v1_5'
    if tag not in default_cfgs[variant].cfgs:
        if named and tag and topology == 'auto':
            raise ValueError(message(
                f'{variant} with the tag {tag}', 'the tag says the topology, and this is none that is known',
                "say topology='paper' or topology='v1.5', as the network had when it was trained"))
        return 'paper' if topology == 'auto' else topology, tag
    by_tag = 'paper' if tag in PAPER_TAGS else 'v1.5'
    if topology not in ('auto', by_tag):
        raise ValueError(message(
            f'topology={topology!r} with the tag {tag}',
            f'the weights {variant}.{tag} belong to the topology {by_tag!r}',
            f"leave topology out, or leave the tag out: create_model('{variant}', topology={topology!r})",
        ))
    return by_tag, tag


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    """Build `variant`: the tag decides the topology, since timm resolves it before the arguments are seen."""
    kwargs = {**defaults, **given}
    check_keywords(variant, kwargs, SEResNet, ResNet)
    overlay, given_cfg = kwargs.pop('pretrained_cfg_overlay', None), kwargs.pop('pretrained_cfg', None)
    cfg = resolve_pretrained_cfg(variant, given_cfg, overlay)
    topology, tag = _resolve_topology(variant, kwargs.pop('topology', 'auto'), cfg.tag, named=bool(given_cfg))
    if tag != cfg.tag:
        cfg = resolve_pretrained_cfg(variant, tag, overlay)
    if pretrained:
        check_weights_exist(variant, cfg)
        if cfg.source not in ('local-dir', 'hf-hub') and not (cfg.file or cfg.state_dict):
            check_weights_fit(variant, kwargs)
            stride = topology == 'paper' and kwargs['block'] is SEBottleneck and defaults.get('stride_in_1x1', True)
            check_weights_fit(variant, given, {'stride_in_1x1': stride})
    kwargs.setdefault('zero_init_last', topology == 'v1.5')
    if kwargs['block'] is SEBasicBlock:
        kwargs.setdefault('relu_before_se', tag == 'in1k' and kwargs.get('placement', 'standard') == 'standard')
    return build_model_with_cfg(
        SEResNet, variant, pretrained, pretrained_cfg=dataclasses.asdict(cfg), topology=topology,
        pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def se_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-18: 11,778,592 parameters. Not in the paper; the block is the paper's."""
    return _create('se_resnet18', pretrained, dict(block=SEBasicBlock, layers=(2, 2, 2, 2)), kwargs)


@register_model
def se_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-34: 21,958,868 parameters. Not in the paper; the block is the paper's."""
    return _create('se_resnet34', pretrained, dict(block=SEBasicBlock, layers=(3, 4, 6, 3)), kwargs)


@register_model
def se_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-50 (Table 1): 28,088,024 parameters."""
    return _create('se_resnet50', pretrained, dict(block=SEBottleneck, layers=(3, 4, 6, 3)), kwargs)


@register_model
def se_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-101 (Table 2): 49,326,872 parameters."""
    return _create('se_resnet101', pretrained, dict(block=SEBottleneck, layers=(3, 4, 23, 3)), kwargs)


@register_model
def se_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-152 (Table 2): 66,821,848 parameters."""
    return _create('se_resnet152', pretrained, dict(block=SEBottleneck, layers=(3, 8, 36, 3)), kwargs)


@register_model
def se_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNeXt-50, 32x4d (Table 1): 27,559,896 parameters."""
    defaults = dict(block=SEBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4, stride_in_1x1=False)
    return _create('se_resnext50_32x4d', pretrained, defaults, kwargs)


@register_model
def se_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNeXt-101, 32x4d (Table 2): 48,955,416 parameters."""
    defaults = dict(block=SEBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4, stride_in_1x1=False)
    return _create('se_resnext101_32x4d', pretrained, defaults, kwargs)


@register_model
def se_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNeXt-101, 64x4d: 88,232,984 parameters. In the paper only without SE (Table 8)."""
    defaults = dict(block=SEBottleneck, layers=(3, 4, 23, 3), cardinality=64, base_width=4, stride_in_1x1=False)
    return _create('se_resnext101_64x4d', pretrained, defaults, kwargs)


@register_model
def se_senet154(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SENet-154 (appendix of the paper): 115,088,984 parameters, dropout 0.2 before the classifier."""
    defaults = dict(
        block=SEBottleneck, layers=(3, 8, 36, 3), cardinality=64, base_width=4, stride_in_1x1=False, stem_type='deep',
        down_kernel_size=3, block_reduce_first=2, drop_rate=0.2)
    return _create('se_senet154', pretrained, defaults, kwargs)
