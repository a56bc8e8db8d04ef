"""Shake-Shake networks: sizes, blocks, the mixture of branches, arguments."""
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import CIFAR10, CIFAR100, NETWORKS
from se_timm.se_shakeshake import Shake, ShiftedShortcut

NAMES = timm.list_models(module='se_shakeshake')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(name, **arguments):
    return timm.create_model(name, device='meta', **arguments)


def small(**arguments):
    return timm.create_model('se_shakeshake26_2x96d_cifar', width=16, **arguments)


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(('name', 'plain'), [
    ('se_shakeshake26_2x96d_cifar', 26.2), ('se_shakeeven29_2x4x64d_cifar', 34.4)])
def test_size(name, plain):
    assert cost(on_meta(name), (3, 32, 32)).parameters == NETWORKS[name].parameters
    assert round(cost(on_meta(name, se=False), (3, 32, 32)).parameters / 1e6, 1) == plain


def test_narrow_network_has_the_published_size():
    # Shake-Shake-26 2x32d of osmr/imgclsmob
    assert cost(on_meta('se_shakeshake26_2x96d_cifar', se=False, width=32), (3, 32, 32)).parameters == 2_923_162


def test_paper_names_them():
    assert [table.rows[3].name for table in (CIFAR10, CIFAR100)] == NAMES[::-1]


def test_mixture_has_a_gradient_of_its_own():
    a, b = (torch.randn(64, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = Shake('shake').train()(a, b)
    alpha = ((y - b) / (a - b))[:, 0, 0, 0]
    torch.testing.assert_close(y, alpha[:, None, None, None] * a + (1 - alpha[:, None, None, None]) * b)
    da, db = torch.autograd.grad(y.sum(), (a, b))
    backward = da[:, 0, 0, 0]
    torch.testing.assert_close(da + db, torch.ones_like(da))
    torch.testing.assert_close(da, backward[:, None, None, None].expand_as(da))
    for drawn in (alpha, backward):
        assert 0 <= drawn.min() < 0.1
        assert 0.9 < drawn.max() <= 1
    assert abs(torch.corrcoef(torch.stack([alpha.detach(), backward]))[0, 1]) < 0.4


def test_even_mixture_has_the_gradient_of_the_mean():
    a, b = (torch.randn(8, 2, 3, 3, requires_grad=True) for _ in range(2))
    y = Shake('even').train()(a, b)
    assert not torch.allclose(y, (a + b) / 2)
    for gradient in torch.autograd.grad(y.sum(), (a, b)):
        assert torch.equal(gradient, torch.full_like(gradient, 0.5))


def test_evaluation_takes_the_mean():
    a, b = (torch.randn(8, 2, 3, 3) for _ in range(2))
    assert torch.equal(Shake('shake').eval()(a, b), 0.5 * (a + b))


def test_shortcut_sees_every_other_pixel_and_those_between():
    shortcut = ShiftedShortcut(1, 2, 2, {}).eval()
    for conv in (shortcut.conv1, shortcut.conv2):
        nn.init.ones_(conv.weight)
    x = torch.arange(1., 17).view(1, 1, 4, 4)
    y = shortcut(x) * (1 + shortcut.bn.eps) ** 0.5
    torch.testing.assert_close(y[0, 0], torch.tensor([[1., 3.], [9., 11.]]))
    torch.testing.assert_close(y[0, 1], torch.tensor([[0., 0.], [0., 6.]]))


@pytest.mark.parametrize('placement', ['standard', 'pre', 'post', 'identity'])
def test_block_computes_what_its_placement_means(placement, randomise):
    net = randomise(small(placement=placement))
    for block in (net.layer1[0], net.layer1[1], net.layer2[0]):
        def at(place, value, block=block):
            return block.se(value) if block.placement == place else value

        x = torch.randn(2, block.places['pre'], 8, 8)
        y = at('pre', x)
        y = at('standard', (block.branch1(y) + block.branch2(y)) / 2)
        torch.testing.assert_close(block(x), at('post', y + at('identity', block.downsample(x))))


def test_network_ends_in_a_relu():
    net = small().eval()
    x = net.layer3(net.layer2(net.layer1(net.bn1(net.conv1(images())))))
    assert torch.equal(net.forward_features(images()), F.relu(x))


def test_input_of_a_block_is_left_alone():
    net = small().train()
    x = torch.randn(2, 16, 8, 8)
    before = x.clone()
    net.layer1[0](x)
    assert torch.equal(x, before)


@pytest.mark.parametrize('name', NAMES)
def test_plain_twin_is_the_network_less_its_se(name):
    net, plain = on_meta(name), on_meta(name, se=False)
    assert not any(isinstance(module, SqueezeExcite) for module in plain.modules())
    assert {key for key in net.state_dict() if '.se.' not in key} == set(plain.state_dict())
    blocks = sum(len(stage) for stage in (net.layer1, net.layer2, net.layer3))
    assert sum(isinstance(module, SqueezeExcite) for module in net.modules()) == blocks == (12 if '26' in name else 9)


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(placement='3x3'), ValueError, "placement: '3x3'", 'take one of standard, pre, post, identity'),
    (dict(shake='shack'), ValueError, "shake: 'shack'", 'did you mean shake'),
    (dict(stages=(5,)), ValueError, 'stages: \\[5\\]', 'name some of'),
    (dict(widht=2), TypeError, 'argument of se_shakeshake26_2x96d_cifar', 'width'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        timm.create_model('se_shakeshake26_2x96d_cifar', **arguments)
