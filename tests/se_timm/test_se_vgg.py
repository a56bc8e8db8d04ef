"""SE-VGG-16: sizes, where SE stands, arguments."""
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SEVGG, SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import IMAGENET, NETWORKS

NAME = 'se_vgg16_bn'
CHANNELS = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6  # of the 13 convolutions
SMALL = [8, 'M', 16, 16, 'M', 32]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(**arguments):
    return timm.create_model(NAME, device='meta', **arguments)


def small(**arguments):
    """A network of VGG's with three stages."""
    defaults = dict(norm_layer=nn.BatchNorm2d, num_classes=10, reduction=4, mlp_ratio=0.01)
    return SEVGG(SMALL, **{**defaults, **arguments})


def gates(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, SqueezeExcite)}


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_size_and_multiply_adds_are_the_papers():
    [row] = [pair for pair in IMAGENET.rows if pair.name == NAME]
    with_se, plain = cost(on_meta()), cost(on_meta(se=False))
    assert with_se.parameters == NETWORKS[NAME].parameters
    assert plain == cost(timm.create_model('vgg16_bn', device='meta'))
    assert plain.multiply_adds / 1e9 == pytest.approx(row.plain_cost.gflops, abs=0.005)
    # one multiplication for each value of the gated maps, of 224, 112, 56, 28 and 14 pixels
    sides = [224] * 2 + [112] * 2 + [56] * 3 + [28] * 3 + [14] * 3
    scale = sum(channels * side ** 2 for channels, side in zip(CHANNELS, sides, strict=True))
    assert (with_se.multiply_adds + scale) / 1e9 == pytest.approx(row.se_cost.gflops, abs=0.005)


def test_every_convolution_has_a_gate_after_its_activation():
    net = on_meta()
    positions = [index + 2 for index, layer in enumerate(net.features) if isinstance(layer, nn.Conv2d)]
    assert list(gates(net)) == [f'features.{index}.se' for index in positions]
    assert [gate.fc1.in_channels for gate in gates(net).values()] == CHANNELS


@pytest.mark.parametrize(('stages', 'channels'), [
    ((1,), [64, 64]), ((3, 5), [256] * 3 + [512] * 3), (2, [128, 128]), ((5, 4, 3, 2, 1), CHANNELS)])
def test_stages(stages, channels):
    assert [gate.fc1.in_channels for gate in gates(on_meta(stages=stages)).values()] == channels


def test_network_computes_what_the_paper_says(randomise):
    net = randomise(small())
    x, layers = images(), list(net.features)
    for channels in SMALL:
        if channels == 'M':
            x = F.max_pool2d(x, 2)
            layers.pop(0)
        else:
            conv, norm, activation = layers[:3]
            x = activation.se(F.relu(norm(conv(x))))
            del layers[:3]
    torch.testing.assert_close(net.forward_features(images()), x)


@pytest.mark.parametrize('norm', [None, nn.BatchNorm2d])
def test_plain_twin_is_the_network_less_its_se(norm):
    net, plain = small(norm_layer=norm).eval(), small(norm_layer=norm, se=False).eval()
    assert len(gates(net)) == 4
    assert not gates(plain)
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    for gate in gates(net).values():
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    assert torch.equal(net(images()), plain(images()))


@pytest.mark.slow
def test_plain_twin_is_timms_network():
    theirs, ours = timm.create_model('vgg16_bn').eval(), timm.create_model(NAME, se=False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(images()), theirs(images()))


def test_keys_are_timms_and_those_of_the_gates():
    ours, theirs = on_meta().state_dict(), timm.create_model('vgg16_bn', device='meta').state_dict()
    assert [key for key in ours if '.se.' not in key] == list(theirs)


@pytest.mark.slow
def test_weights_with_the_names_of_torchvision_load():
    theirs = timm.create_model('vgg16_bn')
    layers = {'pre_logits.fc1': 'classifier.0', 'pre_logits.fc2': 'classifier.3', 'head.fc': 'classifier.6'}
    renamed = {}
    for key, value in theirs.state_dict().items():
        layer, _, parameter = key.rpartition('.')
        linear = layer in layers and parameter == 'weight'
        renamed[f'{layers.get(layer, layer)}.{parameter}'] = value.flatten(1) if linear else value
    ours = timm.create_model(NAME, se=False, pretrained=True, pretrained_cfg_overlay=dict(state_dict=renamed))
    assert torch.equal(ours.eval()(images()), theirs.eval()(images()))


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(stages=(6,)), ValueError, 'stages: \\[6\\]', 'name some of \\[1, 2, 3, 4, 5\\]'),
    (dict(se=1), ValueError, 'se: 1', 'False for the plain twin'),
    (dict(reduction=65), ValueError, 'reduction: 65', 'whole number'),
    (dict(placement='pre'), TypeError, "argument of se_vgg16_bn: 'placement'", 'valid'),
    (dict(reductoin=8), TypeError, "argument of se_vgg16_bn: 'reductoin'", 'reduction'),
    (dict(cfg=[64, 'M']), TypeError, "argument of se_vgg16_bn: 'cfg'", 'valid'),
    (dict(vgg_args={}), TypeError, "argument of se_vgg16_bn: 'vgg_args'", 'valid'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        on_meta(**arguments)
