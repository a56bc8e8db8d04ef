"""The four passes give what the composition of `nn` modules gives: outputs, every gradient, statistics."""
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from se_timm import SqueezeExcite
from se_timm.fused.function import Gate, Norm, fused_tail
from se_timm.fused.vectors import EXCITATIONS

C = 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tail(nn.Module):
    """Batch norm, SE, drop path, add and ReLU as modules, and the same by `fused_tail`."""

    def __init__(self, excitation='sigmoid', bias=True, relu=True, affine=True, train=True, keep=None):
        super().__init__()
        self.bn = nn.BatchNorm2d(C, affine=affine).train(train)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.se = excitation and SqueezeExcite(
            C, 4, excitation=excitation.removeprefix('identity_'), bias=bias,
            identity_start=excitation.startswith('identity_'))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        self.relu, self.keep, self.excitation = relu, keep, excitation

    def reference(self, x, shortcut=None):
        x = self.bn(x)
        if self.se is not None:
            x = self.se(x)
        if self.keep is not None:
            x = x * self.keep[:, None, None, None]
        if shortcut is not None:
            x = x + shortcut
        return x.relu() if self.relu else x

    def forward(self, x, shortcut=None, **options):
        gate = None
        if self.se is not None:
            fc1, fc2 = self.se.fc1, self.se.fc2
            gate = Gate(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, self.excitation)
        statistics = None if self.bn.training else (self.bn.running_mean, self.bn.running_var)
        norm = Norm(self.bn.weight, self.bn.bias, statistics, self.bn.eps)
        self.result = fused_tail(x, shortcut, norm, gate=gate, keep=self.keep, relu=self.relu, **options)
        return self.result[0]


def inputs(shape=(3, C, 5, 7), dtype=torch.float64, mean=1.0, std=3.0):
    x, shortcut, dy = (torch.randn(shape, dtype=dtype) for _ in range(3))
    return (x * std + mean).to(dtype).requires_grad_(), shortcut.requires_grad_(), dy


def gradients(function, tail, x, shortcut, dy):
    values = [x, *([] if shortcut is None else [shortcut]), *tail.parameters()]
    y = function(x, shortcut)
    return y.detach(), torch.autograd.grad(y, values, dy)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


KEEP = torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)
CASES = [
    *(dict(excitation=excitation, relu=relu, train=train)
      for excitation in [*EXCITATIONS, None] for relu in (True, False) for train in (True, False)),
    *(dict(excitation=excitation, affine=affine, bias=bias, keep=keep)
      for excitation in ('sigmoid', None) for affine in (True, False) for bias in (True, False)
      for keep in (KEEP, None)),
]


@pytest.mark.parametrize('options', CASES, ids=lambda options: ' '.join(
    f'{name}={"given" if isinstance(value, torch.Tensor) else value}' for name, value in options.items()))
@pytest.mark.parametrize('with_shortcut', [True, False], ids=['shortcut', 'alone'])
def test_as_the_modules(options, with_shortcut):
    tail = Tail(**options).double()
    x, shortcut, dy = inputs()
    shortcut = shortcut if with_shortcut else None
    expected_y, expected = gradients(tail.reference, tail, x, shortcut, dy)
    y, found = gradients(tail, tail, x, shortcut, dy)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        # torch's own gradient of hard sigmoid is that of a float32 constant
        torch.testing.assert_close(value, wanted, rtol=1e-6 if options['excitation'] == 'hard_sigmoid' else 1e-9,
                                   atol=1e-6 if options['excitation'] == 'hard_sigmoid' else 1e-10)


@pytest.mark.parametrize('shape', [(1, C, 2, 2), (2, C, 1, 1), (1, C, 1, 2), (5, C, 3, 1), (2, C, 13, 17)])
def test_small_and_odd_maps(shape):
    tail = Tail().double()
    expected = gradients(tail.reference, tail, *(values := inputs(shape)))
    found = gradients(tail, tail, *values)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_gradcheck():
    tail = Tail(relu=False).double()
    x, shortcut, _ = inputs((2, C, 2, 3))
    assert torch.autograd.gradcheck(lambda *values: tail(values[0], values[1]), (x, shortcut, *tail.parameters()))


def test_statistics_are_those_of_the_batch():
    tail = Tail().double()
    x, shortcut, _ = inputs()
    tail(x, shortcut)
    mu, variance, values = tail.result[1]
    assert values == x.numel() // C
    torch.testing.assert_close(mu, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0), rtol=1e-12, atol=1e-12)
    assert not mu.requires_grad
    assert not variance.requires_grad


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_error_in_half_precision_is_that_of_the_modules(dtype, memory_format):
    tail = Tail()
    x, shortcut, dy = (value.detach().to(memory_format=memory_format) for value in inputs((4, C, 9, 8), dtype))
    exact = [value.double().requires_grad_() for value in (x, shortcut, dy)]
    low = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in (x, shortcut, dy)]
    y, found = gradients(tail, tail, *low)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        low_y, low_found = gradients(tail.reference, tail, *low)
    expected_y, expected = gradients(tail.double().reference, tail, *exact)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert found[0].is_contiguous(memory_format=memory_format)
    for value, modules, wanted in zip((y, *found), (low_y, *low_found), (expected_y, *expected), strict=True):
        error, allowed = ((each.double() - wanted).abs().max() for each in (value, modules))
        assert error <= 2 * allowed + 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(('mean', 'std'), [(1e3, 1.0), (-1e3, 1e-1), (0.0, 1e-3), (0.0, 1e4)])
def test_precision_for_any_mean_and_scale(mean, std):
    # against float64, within ten times the error of float32 batch norm itself
    tail = Tail(excitation=None, relu=False)
    x, _, dy = (value.detach() for value in inputs((4, C, 14, 14), torch.float32, mean, std))
    x.requires_grad_()
    y, found = gradients(tail, tail, x, None, dy)
    modules_y, modules = gradients(tail.reference, tail, x, None, dy)
    exact_y, exact = gradients(tail.double().reference, tail, x.detach().double().requires_grad_(), None, dy.double())
    for value, other, wanted in zip((y, *found), (modules_y, *modules), (exact_y, *exact), strict=True):
        scale = wanted.abs().max()
        assert (value - wanted).abs().max() <= 10 * (other - wanted).abs().max() + 1e-6 * scale


def test_two_runs_give_the_same_bits():
    tail = Tail()
    values = inputs((4, C, 9, 8), torch.float32)
    first, second = (gradients(tail, tail, *values) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_autocast_takes_what_a_convolution_gives():
    tail = Tail()
    x, shortcut, _ = inputs((2, C, 4, 4), torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        y = tail(x.bfloat16(), shortcut.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in tail.parameters()} == {torch.float32}


# Derivatives that the passes do not have


def test_second_derivative_is_refused():
    tail = Tail().double()
    x, shortcut, dy = inputs()
    y = tail(x, shortcut)
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.func.grad(lambda value: (tail(value, shortcut) * dy).sum())(x.detach())


def test_forward_mode_is_refused():
    tail = Tail().double()
    x, shortcut, dy = inputs()
    with pytest.raises(RuntimeError, match='jvp'):
        torch.func.jvp(lambda value: tail(value, shortcut), (x.detach(),), (dy,))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match='jvp'):
        tail(forward_ad.make_dual(x.detach(), dy), shortcut)


def test_vmap_is_refused():
    tail = Tail().double()
    x, shortcut, _ = inputs()
    with pytest.raises(RuntimeError, match='vmap'):
        torch.func.vmap(lambda value: tail(value, shortcut))(torch.stack([x, x]))


# The batch norm of a projection


@pytest.mark.parametrize('train', [True, False], ids=['training', 'frozen'])
@pytest.mark.parametrize('relu', [True, False], ids=['relu', 'linear'])
@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
def test_batch_norm_of_the_shortcut(train, relu, affine):
    tail = Tail(relu=relu).double()
    other = nn.BatchNorm2d(C, affine=affine, eps=1e-3).double().train(train)
    other.running_mean.normal_()
    other.running_var.uniform_(0.5, 2)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    x, shortcut, dy = inputs()
    values = [x, shortcut, *tail.parameters(), *other.parameters()]
    expected_y = tail.reference(x, other(shortcut))
    expected = torch.autograd.grad(expected_y, values, dy)
    statistics = None if train else (other.running_mean, other.running_var)
    y = tail(x, shortcut, shortcut_norm=Norm(other.weight, other.bias, statistics, other.eps))
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, values, dy), expected, rtol=1e-9, atol=1e-10)
    if train:
        torch.testing.assert_close(tail.result[2].mean, shortcut.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)


# Batches without statistics


@pytest.mark.parametrize('train', [True, False], ids=['batch', 'given'])
@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@pytest.mark.parametrize('excitation', ['sigmoid', None], ids=['se', 'none'])
def test_compiles_with_and_without_each_part(excitation, affine, train):
    torch._dynamo.reset()
    torch.manual_seed(0)
    tail = Tail(excitation, affine=affine, train=train)
    x, shortcut, dy = inputs((2, C, 3, 2))
    compiled = torch.compile(tail, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(gradients(compiled, tail, x, shortcut, dy), gradients(tail, tail, x, shortcut, dy))


def test_given_statistics_are_not_shared():
    tail = Tail(train=False)
    x, shortcut, _ = inputs()
    statistics = tail.bn.running_mean.double(), tail.bn.running_var.double()
    results = [fused_tail(x, shortcut, Norm(None, None, statistics, group=group))[0] for group in (None, 'any')]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match='it holds no pixels'):
        Tail()(torch.zeros(0, C, 4, 4))


def test_single_value_is_refused_in_training_only():
    x = torch.randn(1, C, 1, 1)
    with pytest.raises(ValueError, match='one value per channel'):
        Tail()(x)
    frozen = Tail(train=False)
    torch.testing.assert_close(frozen(x), frozen.reference(x))


def test_backward_pass_within_autocast_is_the_one_without():
    """Gates are computed in float32, and so are their gradients, wherever `backward` is called."""
    tail, (x, shortcut, dy) = Tail(), inputs((4, C, 5, 7), torch.float32)
    found = []
    for within in (False, True):
        y = tail(x, shortcut)
        with torch.autocast('cpu', torch.bfloat16, enabled=within):
            found.append(torch.autograd.grad(y, (x, shortcut, *tail.parameters()), dy))
    assert all(map(torch.equal, *found))
