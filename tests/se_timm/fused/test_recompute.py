"""Batch norm, ReLU and convolution without keeping what is between: the same numbers, and less memory."""
import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import fuse
from se_timm.fused import operators
from se_timm.fused.function import REFERENCE, Norm
from se_timm.fused.recompute import Convolution, norm_relu_conv

CONVOLUTIONS = {
    '1x1': dict(kernel_size=1), '3x3, stride 2': dict(kernel_size=3, stride=2, padding=1),
    'groups and dilation': dict(kernel_size=3, groups=4, dilation=2, padding=2), 'bias': dict(kernel_size=1, bias=True),
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compute in plain torch, which takes no time to compile."""
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)
    torch.manual_seed(0)


def convolution_of(conv):
    return Convolution(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@pytest.mark.parametrize('train', [True, False], ids=['training', 'frozen'])
@pytest.mark.parametrize('options', CONVOLUTIONS)
def test_as_the_modules(options, train, affine):
    norm = nn.BatchNorm2d(8, affine=affine).double().train(train)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    conv = nn.Conv2d(8, 12, **{'bias': False, **CONVOLUTIONS[options]}).double()
    for parameter in (*norm.parameters(), *conv.parameters()):
        nn.init.normal_(parameter)
    x = (torch.randn(3, 8, 7, 6, dtype=torch.float64) * 2 + 1).requires_grad_()
    values = [x, *norm.parameters(), *conv.parameters()]
    expected = conv(norm(x).relu())
    dy = torch.randn_like(expected)
    statistics = None if train else (norm.running_mean, norm.running_var)
    y, moments = norm_relu_conv(x, Norm(norm.weight, norm.bias, statistics, norm.eps), convolution_of(conv), REFERENCE)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, values, dy), torch.autograd.grad(expected, values, dy))
    torch.testing.assert_close(moments.mean, x.mean((0, 2, 3)) if train else norm.running_mean)


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y, _ = norm_relu_conv(x, Norm(None, None), convolution_of(nn.Conv2d(4, 4, 1)), REFERENCE)
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    arguments = {'drop_rate': 0.0} if name.startswith(('se_', 'legacy')) else {'zero_init_last': False}
    return timm.create_model(name, num_classes=10, **arguments).to(dtype).train()


def step(net, x, dtype=None):
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        y = net(x)
        F.cross_entropy(y, torch.arange(len(x))).backward()
    return y.detach(), {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet50', 'resnet18', 'legacy_seresnext26_32x4d'])
def test_step_of_a_network(name):
    one, other = build(name), build(name)
    report = fuse(other, 'fused', recompute=True)
    assert report.replaced
    assert report.kept == {}
    x = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(step(other, x), step(one, x), rtol=1e-7, atol=1e-7)


def test_autocast_takes_the_half_precision():
    net = build('se_resnet20_cifar', torch.float32)
    exact = copy.deepcopy(net).double()
    fuse(net, 'fused', recompute=True)
    x = torch.randn(4, 3, 32, 32)
    y, gradients, _ = step(net, x, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    torch.testing.assert_close(y.double(), step(exact, x.double())[0], rtol=0.1, atol=0.1)


def saved_bytes(net, x):
    """Return the bytes of all storages that a forward pass keeps, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(size for address, size in saved.items() if address not in parameters)


def test_memory_is_that_of_a_plain_network_and_less_when_recomputed():
    x = torch.randn(2, 3, 96, 96)
    plain, reference, fused, recomputed = (
        timm.create_model('resnet50' if index == 0 else 'seresnet50', num_classes=10) for index in range(4))
    fuse(fused, 'fused')
    fuse(recomputed, 'fused', recompute=True)
    base = saved_bytes(plain, x)
    assert saved_bytes(reference, x) > 1.15 * base
    assert saved_bytes(fused, x) <= 1.02 * base
    assert saved_bytes(recomputed, x) <= 0.88 * base


def test_what_cannot_be_recomputed_is_told():
    assert all('placement' in reason for reason in fuse(
        timm.create_model('se_resnet50', placement='3x3'), 'fused', recompute=True).kept.values())
    report = fuse(timm.create_model('regnetx_002'), 'fused', recompute=True)
    assert report.kept.keys() == report.replaced.keys()
    assert 'not recomputed: s1.b1' in str(report)


def test_recompute_needs_the_fused_backend():
    with pytest.raises(ValueError, match="recompute=True with the backend 'auto'"):
        fuse(timm.create_model('resnet18'), recompute=True)


@pytest.mark.parametrize('change', [{'padding_mode': 'circular'}, {'padding': 'same'}], ids=str)
def test_convolution_with_another_padding_is_computed_by_its_modules(change):
    one, other = build('resnet50'), build('resnet50')
    for net in (one, other):
        torch.manual_seed(0)
        net.layer1[0].conv2 = nn.Conv2d(
            64, 64, 3, **{'padding': 1, **change}, bias=False, dtype=torch.float64)
    assert fuse(other, 'fused', recompute=True).kept == {'layer1.0': 'its Conv2d is not a plain convolution'}
    x = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(step(other, x), step(one, x), rtol=1e-7, atol=1e-7)
