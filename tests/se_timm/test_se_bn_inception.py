"""SE-BN-Inception: its size, its modules, its arguments."""
import itertools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import IMAGENET, NETWORKS, extra_weights
from se_timm.se_bn_inception import HalvingMaxPool, HalvingModule, InceptionModule

# of models/SE-BN-Inception.prototxt of the authors' release
CHANNELS = {
    'inception_3a': 256, 'inception_3b': 320, 'inception_3c': 576, 'inception_4a': 576, 'inception_4b': 576,
    'inception_4c': 608, 'inception_4d': 608, 'inception_4e': 1056, 'inception_5a': 1024, 'inception_5b': 1024,
}
HIDDEN = (16, 20, 36, 36, 36, 38, 38, 66, 64, 64)
WEIGHTS, BIASES = 639_360, 7_038


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def create(**arguments):
    return timm.create_model('se_bn_inception', **arguments)


def on_meta(**arguments):
    return create(device='meta', **arguments)


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def blocks(net):
    return {key.removesuffix('.se'): module for key, module in net.named_modules() if isinstance(module, SqueezeExcite)}


def test_size_is_that_of_the_authors_file():
    counted, plain = cost(on_meta()), cost(on_meta(se=False))
    assert counted.parameters == NETWORKS['se_bn_inception'].parameters == 11_931_622
    assert plain.parameters == 11_931_622 - WEIGHTS - BIASES
    assert plain.multiply_adds / 1e9 == pytest.approx(2.0326, abs=5e-5)
    assert counted.multiply_adds - plain.multiply_adds == WEIGHTS
    (pair,) = [pair for pair in IMAGENET.rows if pair.name == 'se_bn_inception']
    assert plain.multiply_adds / 1e9 == pytest.approx(pair.plain_cost.gflops, rel=0.01)
    assert counted.multiply_adds / 1e9 == pytest.approx(pair.se_cost.gflops, rel=0.01)


def test_se_gates_each_of_the_ten_modules():
    found = blocks(on_meta())
    assert {key: block.fc1.in_channels for key, block in found.items()} == CHANNELS
    assert tuple(block.fc1.out_channels for block in found.values()) == HIDDEN
    assert sum(p.numel() for block in found.values() for p in block.parameters()) == WEIGHTS + BIASES
    assert extra_weights([(1, channels) for channels in CHANNELS.values()], 16) == WEIGHTS


def test_no_convolution_has_a_bias_but_those_of_the_gates():
    net = on_meta()
    biased = {key for key, module in net.named_modules() if isinstance(module, nn.Conv2d) and module.bias is not None}
    assert biased == {f'{key}.se.{layer}' for key in CHANNELS for layer in ('fc1', 'fc2')}
    assert not any(layer.bias is not None for block in blocks(on_meta(bias=False)).values()
                   for layer in (block.fc1, block.fc2))


def test_plain_twin_is_the_network_less_its_se():
    net, plain = create(), create(se=False)
    assert blocks(plain) == {}
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    for block in blocks(net).values():
        nn.init.zeros_(block.fc2.weight)
        nn.init.constant_(block.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    assert torch.equal(net.eval()(images()), plain.eval()(images()))


def conv_bn_relu(unit, x):
    norm = unit.bn
    return F.relu(F.batch_norm(unit.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5))


def by_definition(module, x, pool):
    """Compute a module from its convolutions, and SE as Equations 2 to 4 write it."""
    branches = [conv_bn_relu(module.branch1x1, x)] if isinstance(module, InceptionModule) else []
    for branch in (module.branch3x3, module.branch3x3dbl):
        y = x
        for unit in branch:
            y = conv_bn_relu(unit, y)
        branches.append(y)
    pooled = pool(x)
    branches.append(conv_bn_relu(module.branch_pool[1], pooled) if isinstance(module, InceptionModule) else pooled)
    u = torch.cat(branches, 1)
    z = u.mean((2, 3))
    s = F.relu(z @ module.se.fc1.weight[:, :, 0, 0].T + module.se.fc1.bias)
    return u * torch.sigmoid(s @ module.se.fc2.weight[:, :, 0, 0].T + module.se.fc2.bias)[:, :, None, None]


def average(x):
    """Caffe's: the mean of nine pixels, those of the padding included."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    shifted = [padded[:, :, i:i + height, j:j + width] for i, j in itertools.product(range(3), repeat=2)]
    return sum(shifted) / 9


POOLING = {
    'inception_3a': average, 'inception_4c': average, 'inception_5a': average,
    'inception_5b': lambda x: F.max_pool2d(x, 3, 1, 1), 'inception_3c': lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    'inception_4e': lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
}


@pytest.mark.parametrize('name', POOLING)
def test_module_computes_what_the_authors_file_says(name, randomise):
    module = randomise(create()).get_submodule(name)
    x = torch.randn(2, module.branch3x3[0].in_channels, 6, 8)
    assert module(x).shape[1] == CHANNELS[name] == module.out_channels
    torch.testing.assert_close(module(x), by_definition(module, x, POOLING[name]))


def test_modules_halve_the_map_at_the_end_of_stages_3_and_4():
    net = on_meta()
    assert [key for key, module in net.named_children() if isinstance(module, HalvingModule)] == [
        'inception_3c', 'inception_4e']
    assert [(info['module'], info['num_chs'], info['reduction']) for info in net.feature_info] == [
        ('conv1', 64, 2), ('conv2', 192, 4), ('inception_3b', 320, 8), ('inception_4d', 608, 16),
        ('inception_5b', 1024, 32)]


@pytest.mark.parametrize('size', [(8, 6), (7, 8), (5, 9), (1, 2), (1, 1)])
def test_max_pool_is_caffes_on_even_sizes_and_as_large_as_a_convolution_on_all(size):
    x = torch.randn(1, 2, *size) - 10  # below zero: the padding must not be the largest value
    pooled = HalvingMaxPool()(x)
    assert pooled.shape == F.conv2d(x, torch.ones(2, 2, 3, 3), stride=2, padding=1).shape
    for i, j in itertools.product(range(pooled.shape[2]), range(pooled.shape[3])):
        assert torch.equal(pooled[:, :, i, j], x[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3].amax((2, 3)))
    if not any(side % 2 for side in size):
        assert torch.equal(pooled, F.max_pool2d(x, 3, stride=2, ceil_mode=True))


def test_pools_of_the_stem_are_caffes():
    net = on_meta()
    taps = net.forward_intermediates(torch.empty(1, 3, 224, 224, device='meta'), intermediates_only=True)
    assert [tuple(tap.shape[2:]) for tap in taps] == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    for pool in (net.pool1, net.pool2):
        assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 0, True)


@pytest.mark.parametrize(('stages', 'names'), [
    ((3,), 'abc'), ((4,), 'abcde'), ((5,), 'ab'),
])
def test_stages(stages, names):
    assert list(blocks(on_meta(stages=stages))) == [f'inception_{stages[0]}{letter}' for letter in names]


@pytest.mark.parametrize('arguments', [
    dict(reduction=4), dict(squeeze='max'), dict(excitation='tanh'), dict(stages=(5, 3)),
], ids=str)
def test_arguments_reach_every_block(arguments):
    net = on_meta(**arguments)
    made = {key: SqueezeExcite(CHANNELS[key], **{k: v for k, v in arguments.items() if k != 'stages'})
            for key in blocks(net)}
    assert [str(block) for block in blocks(net).values()] == [str(block) for block in made.values()]
    assert len(made) == (5 if 'stages' in arguments else 10)


def test_dropout_stands_before_the_classifier():
    net = create(drop_rate=1.).train()
    features = net.forward_features(images())
    assert torch.equal(net.forward_head(features), net.fc.bias.expand(2, -1))
    assert not torch.equal(net.eval().forward_head(features), net.fc.bias.expand(2, -1))


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(stages=(2,)), ValueError, 'stages: \\[2\\]', 'name some of \\[3, 4, 5\\]'),
    (dict(se='no'), ValueError, "se: 'no'", 'True for SE'),
    (dict(reduction=1000), ValueError, 'reduction: 1000', 'whole number'),
    (dict(excitation='sigmoit'), ValueError, "excitation: 'sigmoit'", 'did you mean sigmoid'),
    (dict(placement='pre'), TypeError, 'argument of se_bn_inception', 'valid'),
    (dict(reducton=4), TypeError, 'argument of se_bn_inception', 'did you mean reduction'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        on_meta(**arguments)
