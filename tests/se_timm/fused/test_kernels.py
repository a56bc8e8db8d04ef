"""The Triton kernels give what `algebra` gives: on the CPU through Triton's interpreter, on CUDA where there is a GPU.

What the interpreter cannot show, that they compile, and to 16-byte loads, is tested by compiling them for a Hopper GPU.
"""
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from se_timm.fused import algebra, kernels, launch
from se_timm.fused.function import REFERENCE, Gate, Norm, Passes, fused_tail
from se_timm.fused.vectors import PLAIN

triton = pytest.importorskip('triton')

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
TILED, SHARED = (9, 16, 14, 14), (1, 8, 40, 40)  # several tiles to a program; several programs to an image
SHAPES = [(2, 12, 5, 7), (3, 7, 1, 1), (1, 64, 1, 2), (2, 33, 13, 17), (5, 130, 3, 1), (4, 16, 14, 14), TILED, SHARED]

each_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=str)
each_format = pytest.mark.parametrize('memory_format', FORMATS, ids=str)
each_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def double(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def check(backend, name, *values):
    """Compare a pass with `algebra` in float64: shapes, dtypes, strides and values. Return what the pass gave."""
    found, exact = getattr(backend.passes, name)(*values), getattr(algebra, name)(*double(values))
    x = values[{'reduce': 2, 'grad': 1}.get(name, 0)]
    for value, wanted in zip([found] if isinstance(found, torch.Tensor) else found,
                             [exact] if isinstance(exact, torch.Tensor) else exact, strict=True):
        assert value.shape == wanted.shape
        if value.ndim == 4:
            assert value.stride() == torch.empty_like(x).stride()
            assert value.dtype == (values[0] if name == 'reduce' else x).dtype
        else:
            assert value.dtype == (values[0].dtype if value.ndim == 1 else torch.float32)
        if value.numel():
            error = (value.double() - wanted).abs().max() / wanted.abs().max().clamp(1e-6)
            assert error <= max(torch.finfo(value.dtype).eps, 2e-6)
    return found


def arguments(backend, shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Return arguments for each of the passes."""
    x, shortcut, y, dy = (backend.full(*shape, dtype=dtype, memory_format=memory_format) for _ in range(4))
    mu, c, shortcut_mu, shortcut_scale = (backend.full(shape[1]) for _ in range(4))
    a, b = (backend.full(*shape[:2]) for _ in range(2))
    return Passes(moments=(x,), apply=(x, shortcut, mu, a, b, shortcut_mu, shortcut_scale, True),
                  reduce=(dy, y.relu(), x, mu), grad=(dy, x, mu, a, b, c))


# Each pass


@pytest.mark.parametrize('name', Passes._fields)
@each_format
@each_dtype
@each_shape
def test_as_written(backend, name, shape, dtype, memory_format):
    check(backend, name, *getattr(arguments(backend, shape, dtype, memory_format), name))


@each_format
def test_shapes_reach_all_ways_through_a_pass(backend, memory_format):
    def plan(shape):
        return backend.module._plan_of('moments', backend.full(*shape, memory_format=memory_format),
                                    memory_format == torch.channels_last)

    assert plan(SHARED).parts > 1
    if backend.full(1).device.type == 'cpu':
        pixels, _, share, _, _, tile, _ = plan(TILED).arguments
        assert share >= pixels > tile


@pytest.mark.parametrize('relu', [True, False], ids=['relu', 'linear'])
@pytest.mark.parametrize('kind', ['alone', 'shortcut', 'projection'])
@each_dtype
def test_apply_with_each_kind_of_shortcut(backend, kind, dtype, relu):
    x, shortcut, mu, a, b, *projection, _ = arguments(backend, (2, 12, 5, 7), dtype, torch.channels_last).apply
    check(backend, 'apply', x, None if kind == 'alone' else shortcut, mu, a, b,
          *(projection if kind == 'projection' else (None, None)), relu)


@each_format
@each_dtype
def test_masked_gradient_is_exact(backend, dtype, memory_format):
    dy, y, x, mu = arguments(backend, (2, 12, 5, 7), dtype, memory_format).reduce
    assert torch.equal(backend.passes.reduce(dy, y, x, mu)[2], torch.where(y > 0, dy, 0))


@each_format
@each_dtype
def test_reduce_without_relu(backend, dtype, memory_format):
    dy, _, x, mu = arguments(backend, TILED, dtype, memory_format).reduce
    assert check(backend, 'reduce', dy, None, x, mu)[2].shape == (0,)


# What callers may give


def other_format(value):
    return value.contiguous(memory_format=FORMATS[value.is_contiguous()])


LAYOUTS = {
    'other format': other_format,
    'columns first': lambda value: value.transpose(2, 3).contiguous().transpose(2, 3),
    'every other pixel': lambda value: value.repeat_interleave(2, 3)[..., ::2],
    'part of the channels': lambda value: torch.cat([value, value], 1).contiguous(
        memory_format=torch.channels_last)[:, :value.shape[1]],
    'one value': lambda value: value.flatten()[:1].view(1, 1, 1, 1).expand_as(value),
    'odd address': lambda value: torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', Passes._fields)
@each_format
@pytest.mark.parametrize('which', ['x', 'others'])
def test_any_strides(backend, name, layout, memory_format, which):
    values = getattr(arguments(backend, (2, 12, 5, 7), memory_format=memory_format), name)
    place = {'reduce': 2, 'grad': 1}.get(name, 0)
    check(backend, name, *(LAYOUTS[layout](value) if getattr(value, 'ndim', 0) == 4
                           and (position == place) == (which == 'x') else value
                           for position, value in enumerate(values)))


def test_vectors_of_any_strides(backend):
    x, shortcut, mu, a, b, *projection, relu = arguments(backend, (2, 12, 5, 7)).apply
    check(backend, 'apply', x, shortcut, mu.repeat_interleave(2)[::2], mu.expand_as(a), b.t().contiguous().t(),
          *projection, relu)


@pytest.mark.parametrize('name', ['apply', 'reduce', 'grad'])
def test_dtypes_may_differ(backend, name):
    values = list(getattr(arguments(backend, (2, 12, 5, 7), torch.bfloat16, torch.channels_last), name))
    values[1 if name == 'apply' else 0] = values[1 if name == 'apply' else 0].float()
    check(backend, name, *values)


@pytest.mark.filterwarnings('ignore:var_mean')  # in `algebra`: without pixels a mean is NaN
@pytest.mark.parametrize('name', Passes._fields)
@pytest.mark.parametrize('shape', [(2, 12, 0, 7), (0, 12, 5, 7), (2, 0, 5, 7)], ids=str)
def test_nothing_to_compute(backend, name, shape):
    values = getattr(arguments(backend, shape), name)
    found, expected = getattr(backend.passes, name)(*values), getattr(algebra, name)(*values)
    for value, wanted in zip([found] if isinstance(found, torch.Tensor) else found,
                             [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        assert value.shape == wanted.shape
        assert not value.any()


@pytest.mark.parametrize('name', Passes._fields)
def test_float64_is_refused(backend, name):
    with pytest.raises(TypeError, match=r'float64\n  why: .*\n  do:  .*reference'):
        getattr(backend.passes, name)(*double(getattr(arguments(backend, (2, 12, 5, 7)), name)))


# Numbers


@pytest.mark.parametrize('trend', [0, 1])
@pytest.mark.parametrize('shape', [TILED, SHARED], ids=str)
@each_format
def test_precision_beside_a_large_mean(backend, shape, memory_format, trend):
    # within ten times the error of float32 batch norm; with a trend, tiles and programs have means of their own
    x = backend.full(*shape, memory_format=memory_format) + 1e3
    x += trend * torch.arange(shape[2], device=x.device)[:, None]

    def normalise(passes, x):
        mu, variance = algebra.combine(*passes.moments(x), shape[2] * shape[3])
        a = torch.rsqrt(variance + 1e-5).expand(shape[:2])
        return passes.apply(x, None, mu, a, torch.zeros_like(a), None, None, False)

    exact = normalise(REFERENCE, x.double())
    allowed = (nn.BatchNorm2d(shape[1], affine=False, device=x.device)(x) - exact).abs().max()
    assert (normalise(backend.passes, x) - exact).abs().max() <= 10 * allowed


def off_by_one(value):
    """Return the tensor, laid the same, at an address that 16 does not divide."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.new_zeros(value.numel() + 1).as_strided(value.shape, value.stride(), 1).copy_(value)


@pytest.mark.parametrize('name', Passes._fields)
@pytest.mark.parametrize('shape', [TILED, SHARED], ids=str)
@each_format
def test_same_bits_twice_and_wherever_the_tensors_lie(backend, name, shape, memory_format):
    values = getattr(arguments(backend, shape, memory_format=memory_format), name)
    first, *others = (getattr(backend.passes, name)(*given) for given in (values, values, map(off_by_one, values)))
    for again in others:
        torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize('name', Passes._fields)
@each_format
def test_kernels_are_given_addresses_for_16_byte_loads(backend, monkeypatch, name, memory_format):
    values = getattr(arguments(backend, SHARED, torch.bfloat16, memory_format), name)
    addresses = []
    monkeypatch.setattr(backend.module, 'launch', lambda kernel, programs, warps, *given: addresses.extend(
        value.data_ptr() for value in given if isinstance(value, torch.Tensor)))
    getattr(backend.passes, name)(*map(off_by_one, values))
    assert len(addresses) >= 3
    assert not any(address % 16 for address in addresses)


@each_format
def test_nan_stays_where_it_is(backend, memory_format):
    x, shortcut, mu, a, b, *_ = arguments(backend, SHARED, memory_format=memory_format).apply
    x[0, 3, 2, 1] = float('nan')
    at = torch.zeros_like(x, dtype=torch.bool)
    at[0, 3, 2, 1] = True
    y = backend.passes.apply(x, shortcut, mu, a, b, None, None, True)
    assert torch.equal(y.isnan(), at)
    for vector in backend.passes.moments(x):
        assert torch.equal(vector.isnan(), at.any(3).any(2))
    dy = torch.ones_like(x)
    sums, _, g = backend.passes.reduce(dy, y, x, mu)
    assert torch.equal(g, torch.where(y > 0, dy, 0))
    assert g[0, 3, 2, 1] == 0
    torch.testing.assert_close(sums, g.sum((2, 3)))


@pytest.mark.parametrize('projection', [True, False], ids=['projection', 'identity'])
@each_format
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_training_step(backend, dtype, memory_format, projection):
    x, shortcut, dy = (backend.full(4, 16, 14, 14, dtype=dtype, memory_format=memory_format) for _ in range(3))
    vectors = [backend.full(16) for _ in range(4)]
    gate = backend.full(4, 16), backend.full(4), backend.full(16, 4), backend.full(16)
    keep = torch.tensor([0, 1.25, 1.25, 1.25], device=x.device)
    results = []
    for passes, steps in ((REFERENCE, PLAIN), (backend.passes, backend.vectors)):
        values = [value.clone().requires_grad_() for value in (x, shortcut, *gate, *vectors[:4 if projection else 2])]
        y, *moments = fused_tail(
            x=values[0], shortcut=values[1], norm=Norm(*values[6:8]), gate=Gate(*values[2:6], 'sigmoid'), keep=keep,
            shortcut_norm=Norm(*values[8:]) if projection else None, passes=passes, vectors=steps)
        results.append((y, *moments[0], *(moments[1] or ()), *torch.autograd.grad(y, values, dy)))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


# Import and compilation


def test_import_without_triton(load, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert 'not installed' in load('launch').launch.problem()


def test_what_triton_needs(monkeypatch, tmp_path):
    launch.problem.cache_clear()
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CC', raising=False)
    assert 'C compiler' in launch.problem()
    launch.problem.cache_clear()
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert 'NVIDIA' in launch.problem()
    launch.problem.cache_clear()


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason='all kernels are interpreted')
@pytest.mark.parametrize(('shape', 'dtype', 'memory_format'), [
    ((8, 24, 28, 28), torch.bfloat16, torch.channels_last),  # rows of 24 and 196: not multiples of 16
    ((8, 64, 14, 14), torch.float32, torch.contiguous_format),
    ((8, 24, 5, 7), torch.bfloat16, torch.contiguous_format), ((2, 1, 1, 1), torch.float32, torch.channels_last),
    ((2, 1, 3, 3), torch.float32, torch.contiguous_format), ((1, 64, 1, 1), torch.float32, torch.channels_last),
    (SHARED, torch.float16, torch.channels_last)], ids=str)
def test_compiles_for_hopper(for_hopper, monkeypatch, shape, dtype, memory_format):
    launches = {}
    monkeypatch.setattr(kernels, 'launch', lambda kernel, programs, warps, *arguments: launches.update(
        {kernel.__name__: (kernel, warps, arguments)}))
    backend = SimpleNamespace(full=lambda *shape, dtype=torch.float32, memory_format=torch.contiguous_format:
                              torch.empty(shape, dtype=dtype).to(memory_format=memory_format))
    for name, values in arguments(backend, shape, dtype, memory_format)._asdict().items():
        getattr(kernels, name)(*values)
    assert launches.keys() >= {'_moments', '_apply', '_reduce', '_grad'}
    pixels = shape[2] * shape[3]
    row = shape[1] if memory_format == torch.channels_last else pixels
    for name, given in launches.items():
        code = for_hopper(*given)
        if row * dtype.itemsize % 16 == 0 and pixels > 1 and name != '_merge':  # of one pixel, threads hold less
            assert re.search(r'ld\.global\S*\.v4\.b32', code), f'{name} has no loads of 16 bytes'
