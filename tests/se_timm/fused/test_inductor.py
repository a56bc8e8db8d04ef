"""The compiled passes are the written ones, for any number of shapes."""
import pytest
import torch

from se_timm.fused import algebra
from se_timm.fused.function import REFERENCE, Gate, Norm, Passes, fused_tail
from se_timm.fused.inductor import COMPILED, available

pytestmark = pytest.mark.skipif(not available(), reason='needs a C++ compiler')


def arguments(shape=(2, 8, 6, 5), dtype=torch.float32, memory_format=torch.contiguous_format):
    """Return arguments for each of the passes."""
    generator = torch.Generator().manual_seed(0)

    def full():
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)

    x, y, dy = full(), full().relu(), full()
    mu, c = torch.randn(2, shape[1], generator=generator)
    a, b = torch.randn(2, *shape[:2], generator=generator)
    return Passes(
        moments=(x,), apply=(x, y, mu, a, b, None, None, True), reduce=(dy, y, x, mu), grad=(dy, x, mu, a, b, c))


@pytest.mark.parametrize('name', Passes._fields)
@pytest.mark.parametrize(('dtype', 'memory_format'), [
    (torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)], ids=['float32', 'bfloat16'])
def test_as_written(name, dtype, memory_format):
    values = getattr(arguments(dtype=dtype, memory_format=memory_format), name)
    found, expected = getattr(COMPILED, name)(*values), getattr(REFERENCE, name)(*values)
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    values, wanted_values = ([each] if isinstance(each, torch.Tensor) else each for each in (found, expected))
    for value, wanted in zip(values, wanted_values, strict=True):
        assert value.stride() == wanted.stride()


def test_training_step_is_the_written_one():
    x, shortcut, mu, *_ = arguments().apply
    gamma, beta = mu, mu.flip(0)
    gate = Gate(torch.randn(2, 8), torch.randn(2), torch.randn(8, 2), torch.randn(8), 'sigmoid')
    results = []
    for passes in (REFERENCE, COMPILED):
        values = [value.clone().requires_grad_() for value in (x, shortcut, gamma, beta, *gate[:4])]
        y, moments, _ = fused_tail(
            *values[:2], Norm(*values[2:4]), gate=Gate(*values[4:], 'sigmoid'), passes=passes)
        results.append((y, *moments, *torch.autograd.grad(y.square().sum(), values)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_shapes_than_dynamo_compiles_for_one_function():
    # a low limit, given here: importing timm.optim raises torch's to a million
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for size in range(1, 6):
            x, = arguments((2, 8, size, size)).moments
            torch.testing.assert_close(COMPILED.moments(x), algebra.moments(x), rtol=1e-5, atol=1e-5)
