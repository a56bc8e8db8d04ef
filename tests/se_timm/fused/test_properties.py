"""Hypothesis over shapes, dtypes and options: the fused tail is the composition of `nn` modules in float64."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from se_timm import SqueezeExcite
from se_timm.fused.function import REFERENCE, Gate, Norm, fused_tail
from se_timm.fused.vectors import EXCITATIONS

# half precisions: one rounding of the output, and one of each gradient
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def build_norm(channels, affine, training):
    norm = nn.BatchNorm2d(channels, affine=affine).double().train(training)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return norm


def as_norm(norm, dtype):
    statistics = None if norm.training else (norm.running_mean.to(dtype), norm.running_var.to(dtype))
    weight, bias = ((None, None) if norm.weight is None else (norm.weight.to(dtype), norm.bias.to(dtype)))
    return Norm(weight, bias, statistics, norm.eps)


@st.composite
def tails(draw):
    """Return a tail as modules in float64, its arguments, and the options by which they were drawn."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if shape[0] * shape[2] * shape[3] < 3:  # the variance of two values is a sign, of one it is nothing
        shape = (3, *shape[1:])
    channels = shape[1]
    options = {
        'excitation': draw(st.sampled_from([*EXCITATIONS, None])), 'bias': draw(st.booleans()),
        'relu': draw(st.booleans()),
        'affine': draw(st.booleans()), 'training': draw(st.booleans()), 'drop': draw(st.booleans()),
        'shortcut': draw(st.sampled_from(['none', 'plain', 'norm'])),
        'dtype': draw(st.sampled_from(list(TOLERANCE))), 'last': draw(st.booleans()),
    }
    norm = build_norm(channels, options['affine'], options['training'])
    other = build_norm(channels, options['affine'], options['training']) if options['shortcut'] == 'norm' else None
    kind = options['excitation']
    se = kind and SqueezeExcite(
        channels, draw(st.integers(1, channels)), excitation=kind.removeprefix('identity_'), bias=options['bias'],
        identity_start=kind.startswith('identity_')).double()
    if kind and kind.startswith('identity_'):
        nn.init.normal_(se.fc2.weight)
    memory_format = torch.channels_last if options['last'] else torch.contiguous_format
    x, shortcut, dy = (torch.randn(shape).to(options['dtype']).contiguous(memory_format=memory_format)
                       for _ in range(3))
    keep = torch.randint(0, 2, shape[:1]) * 1.25 if options['drop'] else None
    return options, norm, other, se or None, x, None if options['shortcut'] == 'none' else shortcut, dy, keep


def reference(options, norm, other, se, x, shortcut, keep):
    y = norm(x)
    y = y if se is None else se(y)
    y = y if keep is None else y * keep.double()[:, None, None, None]
    if shortcut is not None:
        y = y + (shortcut if other is None else other(shortcut))
    return y.relu() if options['relu'] else y


def fused(options, norm, other, se, x, shortcut, keep):
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = None
    if se is not None:
        gate = Gate(*(None if each is None else each.to(dtype) for each in (
            se.fc1.weight.flatten(1), se.fc1.bias, se.fc2.weight.flatten(1), se.fc2.bias)), options['excitation'])
    return fused_tail(
        x, shortcut, as_norm(norm, dtype), gate=gate, keep=None if keep is None else keep.to(dtype),
        shortcut_norm=None if other is None else as_norm(other, dtype), relu=options['relu'])[0]


@settings(max_examples=150, deadline=None, derandomize=True, print_blob=True)
@given(tails())
def test_as_the_modules_in_float64(case):
    options, norm, other, se, x, shortcut, dy, keep = case
    wide = [each if each is None else each.double().requires_grad_() for each in (x, shortcut)]
    narrow = [each if each is None else each.clone().requires_grad_() for each in (x, shortcut)]
    expected_y = reference(options, norm, other, se, *wide, keep)
    y = fused(options, norm, other, se, *narrow, keep)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    # values that rounding takes over the kink of the ReLU have another gradient
    clear = expected_y.abs() > TOLERANCE[x.dtype] if options['relu'] else torch.ones_like(expected_y, dtype=torch.bool)
    dy = dy * clear
    parameters = [p for module in (norm, other, se) if module is not None for p in module.parameters()]
    values = [each for each in wide if each is not None]
    expected = torch.autograd.grad(expected_y, [*values, *parameters], dy.double(), allow_unused=True)
    found = torch.autograd.grad(y, [*(each for each in narrow if each is not None), *parameters], dy, allow_unused=True)
    if options['excitation'] in ('relu', 'identity_relu', 'hard_sigmoid') and x.dtype != torch.float64:
        found, expected = [], []  # kinks of the gates, which rounding moves for a whole channel
    for value, wanted in zip((y, *found), (expected_y, *expected), strict=True):
        tolerance = TOLERANCE[x.dtype] if options['excitation'] != 'hard_sigmoid' else max(TOLERANCE[x.dtype], 1e-6)
        assert (value.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item()) * 4


def test_the_test_can_fail(monkeypatch):
    wrong = REFERENCE._replace(grad=lambda *args: 1.01 * REFERENCE.grad(*args))
    monkeypatch.setitem(fused_tail.__kwdefaults__, 'passes', wrong)
    with pytest.raises(AssertionError):
        test_as_the_modules_in_float64()
