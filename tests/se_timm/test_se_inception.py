"""SE-Inception-v3 and SE-Inception-ResNet-v2: what they are beside timm's networks."""
import functools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import IMAGENET, NETWORKS, extra_weights
from se_timm.se_inception import CHANNELS

V3, RESNET = 'se_inception_v3', 'se_inception_resnet_v2'
TIMM = {V3: 'inception_v3', RESNET: 'inception_resnet_v2'}
BLOCKS = {  # prefix of a residual block -> number and channels
    'repeat': (10, 320), 'repeat_1': (20, 1088), 'repeat_2': (9, 2080), 'block8': (1, 2080),
}
OF_STAGES = {
    (5,): ['Mixed_5b', 'Mixed_5c', 'Mixed_5d'], (7,): ['Mixed_7a', 'Mixed_7b', 'Mixed_7c'],
    (6, 7): ['Mixed_6a', 'Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e', 'Mixed_7a', 'Mixed_7b', 'Mixed_7c'],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(name, **arguments):
    return timm.create_model(name, device='meta', **arguments)


def images(size=107):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def blocks(net):
    return {key: module for key, module in net.named_modules() if isinstance(module, SqueezeExcite)}


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('name', TIMM)
def test_size(name):
    assert parameters(on_meta(name)) == NETWORKS[name].parameters
    assert parameters(on_meta(name, se=False)) == parameters(on_meta(TIMM[name]))


@pytest.mark.parametrize('name', TIMM)
def test_default_image_is_that_of_timms_network(name):
    ours, theirs = (timm.get_pretrained_cfg(each) for each in (name, TIMM[name]))
    for key in ('input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std', 'first_conv', 'classifier'):
        assert getattr(ours, key) == getattr(theirs, key)


# timm's networks


@functools.lru_cache(maxsize=1)
def timms(name, arguments=()):
    torch.manual_seed(0)
    return timm.create_model(name, **dict(arguments)).eval()


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]:
        assert torch.equal(a, b)


@pytest.mark.parametrize(('name', 'arguments', 'size'), [
    (V3, {}, 107), (V3, {'aux_logits': True}, 299), (RESNET, {}, 107),
], ids=str)
def test_plain_twin_is_timms_network(name, arguments, size, randomise):
    theirs = randomise(timms(TIMM[name], tuple(arguments.items())))
    ours = timm.create_model(name, se=False, **arguments).eval()
    assert blocks(ours) == {}
    assert [type(module) for module in ours.modules()][1:] == [type(module) for module in theirs.modules()][1:]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert_equal(ours(images(size)), theirs(images(size)))


@pytest.mark.parametrize('name', TIMM)
def test_keys_are_timms_and_those_of_se(name):
    keys = set(on_meta(name).state_dict())
    assert {key for key in keys if '.se.' not in key} == set(on_meta(TIMM[name]).state_dict())
    assert {key.rpartition('.se.')[0] for key in keys if '.se.' in key} == {
        key.removesuffix('.se') for key in blocks(on_meta(name))}


@pytest.mark.parametrize('name', TIMM)
def test_network_with_open_gates_is_timms(name, randomise):
    net, theirs = timm.create_model(name).eval(), randomise(timms(TIMM[name]))
    missing, unexpected = net.load_state_dict(theirs.state_dict(), strict=False)
    assert all('.se.' in key for key in missing)
    assert unexpected == []
    with torch.no_grad():
        assert not torch.allclose(net(images()), theirs(images()))
        for block in blocks(net).values():
            nn.init.zeros_(block.fc2.weight)
            nn.init.constant_(block.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
        assert torch.equal(net(images()), theirs(images()))


def test_initial_values_are_timms():
    given = timm.create_model(V3).state_dict()  # the seed is the fixture's, and that of the other network
    torch.manual_seed(0)
    expected = timm.create_model(TIMM[V3]).state_dict()
    assert all(torch.equal(given[key], value) for key, value in expected.items())


# Inception-v3


def test_se_gates_each_of_the_eleven_modules_of_inception_v3():
    net = on_meta(V3)
    outputs = {}
    for name in CHANNELS:
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output.shape[1]))
    net.eval()(torch.empty(1, 3, 299, 299, device='meta'))
    assert {key.removesuffix('.se'): block.fc1.in_channels for key, block in blocks(net).items()} == outputs == CHANNELS
    assert len(CHANNELS) == sum(key.startswith('Mixed') for key, _ in net.named_children()) == 11


def test_modules_of_inception_v3_are_gated_after_the_concatenation(randomise):
    net = randomise(timm.create_model(V3)).double()
    theirs = timm.create_model(TIMM[V3]).double().eval()
    theirs.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key})
    for name, channels in CHANNELS.items():
        module, plain = net.get_submodule(name), theirs.get_submodule(name)
        x = torch.randn(2, next(module.parameters()).shape[1], 9, 9, dtype=torch.float64)
        u = plain(x)
        hidden = F.relu(u.mean((2, 3)) @ module.se.fc1.weight.flatten(1).T + module.se.fc1.bias)
        gates = torch.sigmoid(hidden @ module.se.fc2.weight.flatten(1).T + module.se.fc2.bias)
        assert gates.shape == (2, channels)
        torch.testing.assert_close(module(x), u * gates[:, :, None, None])


def test_size_is_moskomules():
    """Its SE layers have the channels of the modules' inputs, and no biases."""
    net, plain = on_meta(V3, placement='pre', bias=False), on_meta(V3, se=False)
    assert [block.fc1.in_channels for block in blocks(net).values()] == [
        192, 256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048]
    assert parameters(net) == 24_965_832
    assert parameters(net) - parameters(plain) == 1_131_264
    assert parameters(on_meta(V3, placement='pre', bias=False, aux_logits=True)) == 28_366_256 - 73_728
    assert extra_weights([(1, 768)], 16) == 73_728  # of the layer at its auxiliary classifier


def test_modules_of_inception_v3_are_gated_before_their_branches(randomise):
    net = randomise(timm.create_model(V3, placement='pre')).double()
    theirs = timm.create_model(TIMM[V3]).double().eval()
    theirs.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key})
    for name in CHANNELS:
        module, plain = net.get_submodule(name), theirs.get_submodule(name)
        x = torch.randn(2, next(module.parameters()).shape[1], 9, 9, dtype=torch.float64)
        torch.testing.assert_close(module(x), plain(module.se(x)))


def test_auxiliary_classifier_sees_the_gated_output_of_stage_6(randomise):
    net = randomise(timm.create_model(V3, aux_logits=True, num_classes=5))
    with torch.no_grad():
        logits, aux = net(images(299))
        before = net.forward_preaux(images(299))
        assert torch.equal(aux, net.AuxLogits(before))
        assert torch.equal(logits, net.forward_head(net.forward_postaux(before)))
    assert logits.shape == aux.shape == (2, 5)
    net.reset_classifier(3)
    assert [out.shape for out in net(images(299))] == [(2, 3), (2, 3)]


@pytest.mark.slow
def test_auxiliary_classifier_learns():
    net = timm.create_model(V3, aux_logits=True, num_classes=5).train()
    logits, aux = net(images(299))
    (logits.sum() + aux.square().sum()).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('stages', OF_STAGES)
def test_stages_of_inception_v3(stages):
    net = on_meta(V3, stages=stages)
    assert [key.removesuffix('.se') for key in blocks(net)] == OF_STAGES[stages]


# Inception-ResNet-v2


def test_se_gates_each_of_the_forty_residual_branches():
    net = on_meta(RESNET)
    found = {key.removesuffix('.conv2d.se'): block for key, block in blocks(net).items()}
    assert list(found) == [f'{prefix}.{index}' for prefix in list(BLOCKS)[:3] for index in range(BLOCKS[prefix][0])] + [
        'block8']
    assert all(block.fc1.in_channels == BLOCKS[key.partition('.')[0]][1] for key, block in found.items())
    weights = extra_weights(list(BLOCKS.values()), 16)
    assert parameters(on_meta(RESNET, bias=False)) - parameters(on_meta(RESNET, se=False)) == weights == 8_495_360


def test_cost_of_se_is_the_difference_of_the_papers_figures():
    counted, plain = (cost(on_meta(RESNET, se=se), (3, 299, 299)) for se in (True, False))
    (pair,) = [pair for pair in IMAGENET.rows if pair.name == RESNET]
    assert round(plain.multiply_adds / 1e9, 2) == 13.16
    added = (counted.multiply_adds - plain.multiply_adds) / 1e9
    assert round(added, 2) == round(pair.se_cost.gflops - pair.plain_cost.gflops, 2) == 0.01


@pytest.mark.parametrize('name', ['repeat.0', 'repeat_1.0', 'repeat_2.0', 'block8'])
def test_se_acts_before_the_scale_and_the_sum(name):
    block = residual_network().get_submodule(name)
    x = torch.randn(2, block.conv2d.out_channels, 5, 5)
    branches = [branch(x) for key, branch in block.named_children() if key.startswith('branch')]
    y = F.conv2d(torch.cat(branches, 1), block.conv2d.weight, block.conv2d.bias)
    se = block.conv2d.se
    hidden = F.relu(y.mean((2, 3)) @ se.fc1.weight.flatten(1).T + se.fc1.bias)
    gates = torch.sigmoid(hidden @ se.fc2.weight.flatten(1).T + se.fc2.bias)[:, :, None, None]
    expected = x + block.scale * gates * y
    torch.testing.assert_close(block(x), expected if name == 'block8' else F.relu(expected))


@functools.lru_cache(maxsize=1)
def residual_network():
    torch.manual_seed(0)
    return timm.create_model(RESNET).eval()


@pytest.mark.parametrize(('stages', 'count'), [((5,), 10), ((6,), 20), ((7,), 10), ((5, 7), 20)])
def test_stages_of_inception_resnet_v2(stages, count):
    assert len(blocks(on_meta(RESNET, stages=stages))) == count


# Both


@pytest.mark.parametrize('name', TIMM)
@pytest.mark.parametrize('arguments', [dict(reduction=4), dict(squeeze='max'), dict(excitation='tanh')], ids=str)
def test_arguments_reach_every_block(name, arguments):
    for block in blocks(on_meta(name, **arguments)).values():
        assert str(block) == str(SqueezeExcite(block.fc1.in_channels, device='meta', **arguments))


@pytest.mark.parametrize('name', TIMM)
def test_timms_arguments_are_taken(name):
    net = on_meta(name, drop_rate=0.5, norm_eps=1e-5, act_layer='silu', global_pool='avgmax')
    assert net.head_drop.p == 0.5
    assert {module.eps for module in net.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-5}
    assert any(isinstance(module, nn.SiLU) for module in net.modules())
    assert net.global_pool.pool_type == 'avgmax'


@pytest.mark.parametrize(('name', 'arguments', 'error', 'given', 'remedy'), [
    (V3, dict(stages=(4,)), ValueError, 'stages: \\[4\\]', 'name some of \\[5, 6, 7\\]'),
    (RESNET, dict(stages=()), ValueError, 'stages: \\[\\]', 'name some of'),
    (V3, dict(placement='post'), ValueError, "placement: 'post'", 'take one of standard, pre'),
    (V3, dict(placement='before'), ValueError, "placement: 'before'", 'valid'),
    (V3, dict(se='no'), ValueError, "se: 'no'", 'True for SE'),
    (RESNET, dict(reduction=1000), ValueError, 'reduction: 1000', 'whole number'),
    (V3, dict(squeeze='mean'), ValueError, "squeeze: 'mean'", 'valid'),
    (V3, dict(aux_logit=True), TypeError, "argument of se_inception_v3: 'aux_logit'", 'did you mean aux_logits'),
    (V3, dict(timm_args=1), TypeError, "argument of se_inception_v3: 'timm_args'", 'valid'),
    (RESNET, dict(placement='pre'), TypeError, 'argument of se_inception_resnet_v2', 'valid'),
    (RESNET, dict(aux_logits=True), TypeError, 'argument of se_inception_resnet_v2', 'valid'),
    (V3, dict(aux_logits=True, features_only=True), ValueError, 'aux_logits=True with features_only', 'leave one'),
    (V3, dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
    (RESNET, dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(name, arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        on_meta(name, **arguments)
