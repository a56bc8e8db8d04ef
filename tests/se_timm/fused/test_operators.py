"""The operators: schemas, shapes, gradients, autocast, and what they refuse."""
import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from se_timm.fused import inductor, operators
from se_timm.fused.function import REFERENCE, Passes
from se_timm.fused.operators import OPERATORS

N, C = 3, 5
pytestmark = pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor:UserWarning')  # opcheck asks for it


def arguments(dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format):
    """Return one set of arguments for each variant of each operator."""
    torch.manual_seed(0)

    def full():
        return torch.randn(N, C, 4, 6).to(dtype).contiguous(memory_format=memory_format).requires_grad_(requires_grad)

    def vector(*shape):
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, dtype=wide).requires_grad_(requires_grad)

    x, y, dy = full(), full(), full()
    mu, a, b, other_mu, other_scale = vector(C), vector(N, C), vector(N, C), vector(C), vector(C)
    return {
        'moments': [(x,)],
        'apply': [(x, y, mu, a, b, None, None, True), (x, y, mu, a, b, other_mu, other_scale, True),
                  (x, None, mu, a, b, None, None, False)],
        'reduce': [(dy, y, x, mu), (dy, None, x, mu)],
        'grad': [(dy, x, mu, a, b, vector(C))],
    }


CASES = [pytest.param(name, index, id=f'{name}-{index}')
         for name, variants in arguments().items() for index in range(len(variants))]
DIFFERENTIABLE = [case for case in CASES if case.values[0] in ('moments', 'apply')]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compute in plain torch: compiling each variant takes seconds, and test_inductor.py compares the two."""
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)


def flat(value):
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize('requires_grad', [False, True], ids=['data', 'parameters'])
@pytest.mark.parametrize(('name', 'index'), CASES)
def test_opcheck(name, index, requires_grad):
    if requires_grad and name in ('reduce', 'grad'):
        pytest.skip('no derivative')
    opcheck(getattr(OPERATORS, name), arguments(requires_grad=requires_grad)[name][index])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(('name', 'index'), CASES)
def test_values_dtypes_and_strides(name, index, dtype, memory_format):
    values = arguments(dtype, memory_format=memory_format)[name][index]
    found, expected = flat(getattr(OPERATORS, name)(*values)), flat(getattr(REFERENCE, name)(*values))
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)
    shapes = flat(getattr(OPERATORS, name)(*(
        value.to('meta') if isinstance(value, torch.Tensor) else value for value in values)))
    for each, shape in zip(found, shapes, strict=True):
        assert (each.shape, each.dtype, each.stride()) == (shape.shape, shape.dtype, shape.stride())


@pytest.mark.parametrize(('name', 'index'), DIFFERENTIABLE)
def test_gradcheck(name, index):
    values = arguments(torch.float64, requires_grad=True)[name][index]
    assert torch.autograd.gradcheck(getattr(OPERATORS, name), values)


@pytest.mark.parametrize(('name', 'index'), CASES)
def test_autocast_casts_nothing(name, index):
    values = arguments(torch.bfloat16)[name][index]
    with torch.autocast('cpu', torch.bfloat16):
        found = flat(getattr(OPERATORS, name)(*values))
    expected = flat(getattr(OPERATORS, name)(*values))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(('name', 'index'), DIFFERENTIABLE)
def test_forward_mode_is_an_error_not_zero(name, index):
    operator, (x, *others) = getattr(OPERATORS, name), arguments()[name][index]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda value: operator(value, *others), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match='jvp'):
        operator(forward_ad.make_dual(x, torch.ones_like(x)), *others)


@pytest.mark.parametrize(('name', 'index'), CASES)
def test_second_derivatives_are_errors(name, index):
    values = arguments(requires_grad=True)[name][index]

    def differentiate_twice():
        y = flat(getattr(OPERATORS, name)(*values))[0]
        torch.autograd.grad(y.square().sum(), values[0], create_graph=True)

    with pytest.raises(RuntimeError, match='second derivative'):
        differentiate_twice()


@pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')
def test_vmap_maps():
    x = torch.randn(2, N, C, 4, 6)
    mean, squares = torch.func.vmap(OPERATORS.moments)(x)
    torch.testing.assert_close(mean, x.mean((3, 4)))
    torch.testing.assert_close(squares, x.var((3, 4), correction=0) * 24)


@pytest.mark.skipif(not inductor.available(), reason='needs a C++ compiler')
def test_operators_are_compiled_where_a_compiler_is(monkeypatch):
    monkeypatch.setattr(operators, 'compiler_available', inductor.available)
    x = torch.randn(N, C, 4, 6, requires_grad=True)
    assert operators.backend_passes(x) is inductor.COMPILED
    opcheck(OPERATORS.moments, (x,))


def test_names():
    assert [operator.name() for operator in OPERATORS] == [f'se_timm::tail_{name}' for name in Passes._fields]
