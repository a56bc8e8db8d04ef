"""State-dict key maps between this package and the places where SE networks' weights come from.

Our keys are those of timm's `ResNet` with SE (`layer1.0.se.fc1.weight`). The others are:

- Cadene's, which timm's `legacy_se*` networks share: `layer0.conv1`, `se_module`, `last_linear`, and in the stem of
  SENet-154 `layer0.conv1, bn1, conv2, bn2, conv3, bn3`;
- moskomule/senet.pytorch's: `se.fc.0`, `se.fc.2`, linear layers without biases, v1.5 topology.
"""
from __future__ import annotations

import re

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .errors import message
from .placement import PlacedSE
from .residual_blocks import is_identity
from .squeeze_excite import SqueezeExcite

__all__ = ['checkpoint_filter_fn', 'from_cadene', 'from_moskomule', 'to_cadene', 'to_moskomule']

StateDict = dict[str, torch.Tensor]

# (Cadene's prefix, ours), for a stem of one convolution and for SENet-154's of three
_STEM = (('layer0.conv1.', 'conv1.'), ('layer0.bn1.', 'bn1.'))
_DEEP_STEM = (
    ('layer0.conv1.', 'conv1.0.'), ('layer0.bn1.', 'conv1.1.'), ('layer0.conv2.', 'conv1.3.'),
    ('layer0.bn2.', 'conv1.4.'), ('layer0.conv3.', 'conv1.6.'), ('layer0.bn3.', 'bn1.'),
)
_BODY = (('.se_module.', '.se.'), ('last_linear.', 'fc.'))
_CADENE = ('layer0.', '.se_module.', 'last_linear.')  # what tells its keys from ours
_MOSKOMULE = (('.se.fc.0.', '.se.fc1.'), ('.se.fc.2.', '.se.fc2.'))


def from_cadene(state_dict: StateDict) -> StateDict:
    """Return the weights of a Cadene or timm `legacy_se*` network under our keys."""
    stem = _DEEP_STEM if any(re.match(r'layer0\.(conv|bn)[23]\.', key) for key in state_dict) else _STEM
    return {_rename(key, stem + _BODY): value for key, value in state_dict.items()}


def to_cadene(state_dict: StateDict) -> StateDict:
    """Return our weights under Cadene's keys, which timm's `legacy_se*` networks load.

    They compute the same if ours was built as they are: in the paper's topology, SE-ResNet-18 and -34 with
    `relu_before_se=True`.
    """
    stem = _DEEP_STEM if 'conv1.6.weight' in state_dict else _STEM
    back = tuple((ours, theirs) for theirs, ours in stem + _BODY)
    return {_rename(key, back): value for key, value in state_dict.items()}


def from_moskomule(state_dict: StateDict) -> StateDict:
    """Return the weights of a moskomule/senet.pytorch network under our keys, linear layers as 1x1 convolutions."""
    return {
        _rename(key, _MOSKOMULE): value[:, :, None, None] if '.se.fc.' in key and value.ndim == 2 else value
        for key, value in state_dict.items()
    }


def to_moskomule(state_dict: StateDict) -> StateDict:
    """Return our weights (of a network with `bias=False`) under moskomule/senet.pytorch's keys.

    Raises:
        ValueError: If the SE layers have biases, which that network has not.
    """
    if biases := [key for key in state_dict if re.search(r'\.se\.fc[12]\.bias$', key)]:
        raise ValueError(message(
            f'to_moskomule: weights with {biases[0]}', 'the SE layers of moskomule/senet.pytorch have no biases',
            'train with bias=False'))
    back = tuple((ours, theirs) for theirs, ours in _MOSKOMULE)
    return {
        _rename(key, back): value.flatten(1) if re.search(r'\.se\.fc[12]\.weight$', key) else value
        for key, value in state_dict.items()
    }


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Return `state_dict` under our keys, whichever of the known layouts it has. For timm's `pretrained_filter_fn`.

    Raises:
        ValueError: If the weights belong to a network that computes something else than `model`.
    """
    state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if any(name in key for key in state_dict for name in _CADENE):
        if any('.se_module.' in key for key in state_dict):
            _check_relu(model)
        _check_network(model, 'paper', "weights in Cadene's layout")
        return from_cadene(state_dict)
    if any('.se.fc.' in key for key in state_dict):
        _check_network(model, 'v1.5', 'weights in the layout of moskomule/senet.pytorch')
        _check_bias(model)
        return from_moskomule(state_dict)
    return state_dict


def _rename(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Return `key` with the first matching pair applied; a pair with a leading dot may match inside the key."""
    for old, new in pairs:
        if key.startswith(old) or (old.startswith('.') and old in key):
            return key.replace(old, new, 1)
    return key


def _check_network(model: nn.Module, topology: str, weights: str) -> None:
    """Refuse weights whose shapes fit, but which were trained in another topology, or with another SE, than `model`."""
    own = getattr(model, 'topology', topology)  # the CIFAR networks have but one
    _check_equal(weights, 'topology', own, topology)
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)] if topology == 'paper' else []
    strides = any(block.conv1.stride != (1, 1) for block in blocks)
    _check_equal(weights, 'stride_in_1x1', strides, any(block.conv2.groups == 1 for block in blocks))
    for module in model.modules():
        if isinstance(module, PlacedSE) and not is_identity(module.se):
            _check_equal(weights, 'placement', module.placement, 'standard')
        if isinstance(module, SqueezeExcite):
            _check_equal(weights, 'squeeze', module.squeeze, 'avg')
            _check_equal(weights, 'excitation', type(module.gate).__name__.lower(), 'sigmoid')


def _check_equal(weights: str, name: str, own: object, trained: object) -> None:
    if own != trained:
        raise ValueError(message(
            weights, f'they were trained with {name}={trained!r}, and this network has {own!r}',
            f'build the network with {name}={trained!r}'))


def _check_relu(model: nn.Module) -> None:
    """Refuse timm's SE-ResNet-18/34 weights for a network without the further ReLU that they were trained with."""
    basic = any(isinstance(module, BasicBlock) for module in model.modules())
    if basic and not any(getattr(module, 'relu_before_se', False) for module in model.modules()):
        raise ValueError(message(
            'weights of timm\'s legacy_seresnet18 or legacy_seresnet34',
            'they were trained with a further ReLU before each SE block, which the paper\'s network does not have',
            'build the network by the tag of these weights: se_resnet18.in1k or se_resnet34.in1k',
        ))


def _check_bias(model: nn.Module) -> None:
    if any(name.endswith('.se.fc1.bias') for name, _ in model.named_parameters()):
        raise ValueError(message(
            'weights in the layout of moskomule/senet.pytorch',
            'their SE layers have no biases, and this network has',
            "build it with bias=False, for ImageNet also with topology='v1.5'",
        ))
