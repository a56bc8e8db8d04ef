"""The Triton kernels of the steps between the passes give what `vectors` gives."""
import pytest
import torch
from torch import nn

from se_timm.fused import vector_kernels, vectors
from se_timm.fused.vectors import EXCITATIONS, PLAIN, Gate, GateGradient

triton = pytest.importorskip('triton')

SHAPES = [(2, 12), (1, 7), (1, 1), (300, 20), (5, 130)]  # images and channels: one tile, several images of tiles
PIXELS = 35

each_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)
each_excitation = pytest.mark.parametrize('excitation', EXCITATIONS)
with_or_without = pytest.mark.parametrize('given', [True, False], ids=['all', 'least'])


def tensors(values):
    """Return the tensors in nested tuples, and None."""
    return [each for value in values for each in (tensors(value) if isinstance(value, tuple) else [value])]


def double(value):
    if isinstance(value, tuple):
        values = map(double, value)
        return type(value)(*values) if hasattr(value, '_fields') else tuple(values)
    return value.double() if isinstance(value, torch.Tensor) else value


def check(backend, name, *arguments):
    """Compare a step with that of `vectors` in float64."""
    compare(getattr(backend.vectors, name)(*arguments), getattr(PLAIN, name)(*map(double, arguments)))


def compare(found, exact):
    for value, wanted in zip(tensors(found), tensors(exact), strict=True):
        assert (value is None) == (wanted is None)
        if value is not None:
            assert value.dtype == torch.float32
            assert value.shape == wanted.shape
            assert (value.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max().clamp(1)


def norm_of(backend, channels):
    mu, variance, gamma = backend.full(channels), backend.full(channels).square() + 0.1, backend.full(channels)
    return vectors.normalise_by(mu, variance, gamma, 1e-5)


@pytest.mark.parametrize('squeeze', [True, False], ids=['squeeze', 'norm'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@with_or_without
@each_shape
def test_normalise(backend, shape, given, dtype, squeeze):
    affine = [backend.full(shape[1], dtype=dtype) for _ in range(2)] if given else [None, None]
    check(backend, 'normalise', backend.full(*shape), backend.full(*shape).square() + 1, PIXELS, *affine, 1e-5, None,
          squeeze)


def test_normalise_beside_a_large_mean(backend):
    check(backend, 'normalise', backend.full(300, 20) + 1e3, backend.full(300, 20).square(), PIXELS, None, None, 1e-5,
          None, False)


def gate_of(backend, channels, excitation='sigmoid', bias=True, width=5):
    fc1, fc2 = backend.full(width, channels) / channels ** 0.5, backend.full(channels, width)
    return Gate(fc1, backend.full(width) if bias else None, fc2, backend.full(channels) if bias else None, excitation)


@with_or_without
@each_excitation
@each_shape
def test_excite(backend, shape, excitation, given):
    images, channels = shape
    other = [backend.full(channels), backend.full(images), backend.full(channels)] if given else [None] * 3
    check(backend, 'excite', backend.full(*shape), gate_of(backend, channels, excitation, given),
          backend.full(channels), *other, images)


@pytest.mark.parametrize('width', [1, 16, 33, vector_kernels.LARGEST_HIDDEN + 1])
def test_hidden_layers_of_any_width(backend, width):
    z, g1, g2, gates = (backend.full(20, 70) for _ in range(4))
    gate = gate_of(backend, 70, width=width)
    hidden = backend.full(20, width).relu()
    check(backend, 'excite', z, gate, backend.full(70), backend.full(70), None, None, 20)
    norm = norm_of(backend, 70)
    check_backward(backend, (g1, g2), z, norm, backend.full(70), gate, gates, hidden, None)


@pytest.mark.parametrize('keep', [True, False], ids=['keep', 'none'])
@with_or_without
def test_terms_of_apply_without_a_gate(backend, given, keep):
    other = [backend.full(12), backend.full(3) if keep else None, backend.full(12) if given else None]
    check(backend, 'excite', None, None, backend.full(12), *other, 3)


@with_or_without
@each_excitation
@each_shape
def test_excite_backward(backend, shape, excitation, given):
    images, channels = shape
    gates = EXCITATIONS[excitation][0](2 * backend.full(*shape))
    g1, g2, mean = (backend.full(*shape) for _ in range(3))
    check_backward(
        backend, (g1, g2), mean, norm_of(backend, channels), backend.full(channels) if given else None,
        gate_of(backend, channels, excitation), gates, backend.full(images, 5).relu(),
        backend.full(images) if given else None)


def check_backward(backend, sums, mean, norm, beta, gate, gates, hidden, keep):
    """Compare the last two steps, with a gate, with those of `vectors` in float64."""
    def run(steps, sums, mean, norm, beta, gate, gates, hidden, keep):
        gradient = steps.excite_backward(*sums, norm, beta, gate, gates, hidden, keep)
        return gradient.d_hidden, steps.terms(
            *sums, mean, beta, gate, gates, hidden, keep, gradient, norm, PIXELS, True, None)

    arguments = sums, mean, norm, beta, gate, gates, hidden, keep
    compare(run(backend.vectors, *arguments), run(PLAIN, *map(double, arguments)))


@pytest.mark.parametrize('batch_statistics', [True, False], ids=['batch', 'given'])
@pytest.mark.parametrize('keep', [True, False], ids=['keep', 'none'])
@each_shape
def test_terms_without_a_gate(backend, shape, keep, batch_statistics):
    images, channels = shape
    check(backend, 'terms', backend.full(*shape), backend.full(*shape), None, backend.full(channels), None, None, None,
          backend.full(images) if keep else None, None, norm_of(backend, channels), PIXELS, batch_statistics, None)


def test_nan_reaches_the_gates(backend):
    for excitation in EXCITATIONS:
        z = backend.full(2, 12)
        z[1, 3] = float('nan')
        scale = torch.ones_like(z[0])
        gates, hidden, a, b = backend.vectors.excite(z, gate_of(backend, 12, excitation), scale, scale, None, None, 2)
        for value in (gates, hidden, a, b):
            assert value[1].isnan().all(), excitation
            assert not value[0].isnan().any(), excitation


def test_gates_near_zero_are_exact_relatively(backend):
    z, scale = 1e-5 * backend.full(3, 12), torch.ones_like(backend.full(12))
    gate = gate_of(backend, 12, 'tanh', bias=False)
    found = backend.vectors.excite(z, gate, scale, None, None, None, 3).gates
    exact = PLAIN.excite(z.double(), double(gate), scale.double(), None, None, None, 3).gates
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_nan_of_the_hidden_layer_reaches_its_gradient(backend):
    g1, g2, gates = (backend.full(3, 12) for _ in range(3))
    hidden = backend.full(3, 5).relu()
    hidden[1] = float('nan')
    gates[1] = float('nan')
    gate, norm = gate_of(backend, 12), norm_of(backend, 12)
    gradient = backend.vectors.excite_backward(g1, g2, norm, None, gate, gates, hidden, None)
    assert torch.equal(gradient.d_hidden.isnan(), hidden.isnan())


def test_vectors_of_any_strides(backend):
    every_other = [backend.full(12).repeat_interleave(2)[::2] for _ in range(2)]
    columns = [backend.full(12, 3).t() for _ in range(2)]
    check(backend, 'normalise', columns[0], columns[1].square(), PIXELS, *every_other, 1e-5, None, True)


@pytest.mark.parametrize('counted', [True, False])
def test_track(backend, counted):
    norm = nn.BatchNorm2d(300, momentum=0.3).to(backend.full(1).device)
    x = backend.full(2, 300, 3, 5)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    running, batches = (torch.zeros_like(mean), torch.ones_like(mean)), norm.num_batches_tracked.clone()
    norm(x)
    backend.track(*running, batches if counted else None, mean, variance, norm.momentum, 30)
    torch.testing.assert_close(running, (norm.running_mean, norm.running_var))
    assert batches == counted
    assert running[0]._version


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason='all kernels are interpreted')
@pytest.mark.parametrize('shape', [
    pytest.param((256, 2048), marks=pytest.mark.slow), (256, 256), pytest.param((3, 20), marks=pytest.mark.slow),
    (1, 1)], ids=str)
def test_compiles_for_hopper(for_hopper, monkeypatch, shape):
    launches = []
    monkeypatch.setattr(vector_kernels, 'launch', lambda kernel, programs, warps, *given: launches.append(
        (kernel, warps, given)))
    images, channels = shape
    square, row, keep = torch.ones(shape), torch.ones(channels), torch.ones(images)
    norm = vectors.normalise_by(row, row, row, 1e-5)
    width = max(channels // 16, 1)
    hidden = torch.ones(images, width)
    vector_kernels.normalise(square, square, PIXELS, row, row, 1e-5, None, True)
    for excitation in EXCITATIONS:
        gate = Gate(torch.ones(width, channels), torch.ones(width), torch.ones(channels, width), row, excitation)
        vector_kernels.excite(square, gate, row, row, keep, row, images)
        vector_kernels.excite_backward(square, square, norm, row, gate, square, hidden, keep)
        vector_kernels.terms(square, square, square, row, gate, square, hidden, keep, GateGradient(None, hidden), norm,
                             PIXELS, True, None)
    vector_kernels.terms(square, square, *(None,) * 7, norm, PIXELS, True, None)
    vector_kernels.track(row, row, torch.zeros((), dtype=torch.int64), row, row, 0.1, 30)
    for given in launches:
        for_hopper(*given)
