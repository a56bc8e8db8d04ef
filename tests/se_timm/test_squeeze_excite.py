"""The SE block against Equations 2 to 4 of the paper, written out in NumPy."""
import numpy as np
import pytest
import torch
from timm.layers import SEModule
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.squeeze_excite import EXCITATIONS, IDENTITY_GATES, SQUEEZES

SQUEEZE = {
    'avg': lambda u: u.mean((2, 3), keepdims=True),
    'max': lambda u: u.max((2, 3), keepdims=True),
    'none': lambda u: u,
}
GATE = {
    'sigmoid': lambda v: 1 / (1 + np.exp(-v)),
    'tanh': np.tanh,
    'relu': lambda v: np.maximum(v, 0),
    'hard_sigmoid': lambda v: np.clip(v + 3, 0, 6) / 6,
}


def images(channels, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def block(channels=12, **arguments):
    """Return a float64 block whose biases, if it has any, are not zero."""
    torch.manual_seed(0)
    se = SqueezeExcite(channels, dtype=torch.float64, **arguments)
    for layer in (se.fc1, se.fc2):
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return se


def fully_connected(layer, z):
    out = np.einsum('oc,nchw->nohw', layer.weight.detach().numpy()[:, :, 0, 0], z)
    return out if layer.bias is None else out + layer.bias.detach().numpy()[:, None, None]


def gates_by_formula(se, u, squeeze, excitation):
    hidden = np.maximum(fully_connected(se.fc1, SQUEEZE[squeeze](u.numpy())), 0)
    return GATE[excitation](fully_connected(se.fc2, hidden))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('excitation', EXCITATIONS)
@pytest.mark.parametrize('squeeze', SQUEEZES)
def test_block_computes_the_formula(squeeze, excitation, bias):
    se, u = block(reduction=3, squeeze=squeeze, excitation=excitation, bias=bias), images(12)
    gates = gates_by_formula(se, u, squeeze, excitation)
    assert len(np.unique(gates.round(6))) > 6  # neither saturated nor dead: the comparison says something
    np.testing.assert_allclose(se.excite(u).detach().numpy(), gates, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(se(u).detach().numpy(), gates * u.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('squeeze', SQUEEZES)
def test_gradients_are_those_of_the_formula(squeeze):
    assert torch.autograd.gradcheck(block(channels=4, reduction=2, squeeze=squeeze), images(4, 2).requires_grad_())


def test_defaults_are_the_papers():
    se = SqueezeExcite(64)
    assert (se.squeeze, type(se.gate).__name__, se.fc1.out_channels) == ('avg', 'Sigmoid', 4)
    assert se.fc1.bias is not None
    assert se.fc2.bias is not None


@pytest.mark.parametrize('reduction', [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize('channels', [32, 48, 64, 100, 576, 1056])
def test_hidden_width_is_exactly_channels_over_reduction(channels, reduction):
    hidden = channels // reduction
    shapes = {name: tuple(value.shape) for name, value in SqueezeExcite(channels, reduction).state_dict().items()}
    assert shapes == {
        'fc1.weight': (hidden, channels, 1, 1), 'fc1.bias': (hidden,),
        'fc2.weight': (channels, hidden, 1, 1), 'fc2.bias': (channels,),
    }


def test_hidden_width_is_not_rounded_up_to_timms_multiple_of_eight():
    assert SqueezeExcite(48, 16).fc1.out_channels == 3
    assert SEModule(48).fc1.out_channels == 8


def test_without_bias_there_are_only_the_two_weights():
    assert set(SqueezeExcite(32, bias=False).state_dict()) == {'fc1.weight', 'fc2.weight'}


def test_timms_weights_give_timms_output_to_the_bit():
    theirs = SEModule(256)
    ours = SqueezeExcite(256)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    u = images(256, dtype=torch.float32)
    assert torch.equal(ours(u), theirs(u))


def test_any_other_activation_of_timm_is_taken():
    se, u = block(reduction=3, excitation='elu'), images(12)
    v = fully_connected(se.fc2, np.maximum(fully_connected(se.fc1, SQUEEZE['avg'](u.numpy())), 0))
    np.testing.assert_allclose(se.excite(u).detach().numpy(), np.where(v > 0, v, np.expm1(v)), rtol=1e-10)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('squeeze', SQUEEZES)
def test_memory_format_is_kept(squeeze, memory_format):
    u = images(12).contiguous(memory_format=memory_format)
    assert block(reduction=3, squeeze=squeeze)(u).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('excitation', ['sigmoid', 'prelu'])
def test_dtype_argument_reaches_every_parameter_and_the_output(dtype, excitation):
    se = SqueezeExcite(32, excitation=excitation, dtype=dtype)
    assert {parameter.dtype for parameter in se.parameters()} == {dtype}
    assert se(images(32, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('excitation', ['sigmoid', 'prelu'])
def test_device_argument_reaches_every_parameter(excitation):
    se = SqueezeExcite(32, excitation=excitation, device='meta')
    assert {parameter.device.type for parameter in se.parameters()} == {'meta'}
    assert se(torch.empty(2, 32, 5, 7, device='meta')).shape == (2, 32, 5, 7)


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')  # deprecated, and yet part of timm's contract
@pytest.mark.parametrize('squeeze', SQUEEZES)
def test_scripted_block_gives_the_same_bits(squeeze):
    se, u = block(reduction=3, squeeze=squeeze), images(12)
    assert torch.equal(torch.jit.script(se)(u), se(u))


def test_representation_names_the_squeeze():
    assert "squeeze='max'" in repr(SqueezeExcite(32, squeeze='max'))


def assert_names(error, *parts):
    """Check the three lines: what was given, why not, what to do."""
    given, why, remedy = str(error.value).splitlines()
    assert why.startswith('  why: ')
    assert remedy.startswith('  do:  ')
    for part in parts:
        assert part in str(error.value)
    assert parts[0] in given


def test_numbers_may_be_numpys():
    layer = SqueezeExcite(np.int64(32), np.int64(4)).fc1
    assert (layer.in_channels, layer.out_channels, type(layer.out_channels)) == (32, 8, int)


@pytest.mark.parametrize('reduction', [0, -1, 33, 2.0, '16', True, None])
def test_impossible_reduction_is_an_error_with_value_and_range(reduction):
    with pytest.raises(ValueError, match='reduction') as error:
        SqueezeExcite(32, reduction)
    assert_names(error, repr(reduction), '32 channels', 'from 1 to 32')


@pytest.mark.parametrize('channels', [0, -1, 32., '32', True])
def test_channels_that_are_none(channels):
    with pytest.raises(ValueError, match='no number of channels') as error:
        SqueezeExcite(channels)
    assert_names(error, f'channels: {channels!r}', 'from 1')


@pytest.mark.parametrize(('squeeze', 'close'), [('average', 'avg'), ('maximum', 'max'), ('None', 'none')])
def test_unknown_squeeze_is_an_error_with_the_nearest_name(squeeze, close):
    with pytest.raises(ValueError, match='squeeze') as error:
        SqueezeExcite(32, squeeze=squeeze)
    assert_names(error, repr(squeeze), f'did you mean {close}', *SQUEEZES)


@pytest.mark.parametrize(('excitation', 'close'), [('sigmod', 'sigmoid'), ('tan', 'tanh'), ('relu_', 'relu')])
def test_unknown_excitation_is_an_error_with_the_nearest_name(excitation, close):
    with pytest.raises(ValueError, match='excitation') as error:
        SqueezeExcite(32, excitation=excitation)
    assert_names(error, repr(excitation), f'did you mean {close}', *EXCITATIONS)


@pytest.mark.parametrize('excitation', [None, '', 1, torch.nn.Sigmoid])
def test_excitation_that_is_no_name_is_an_error(excitation):
    with pytest.raises(ValueError, match='excitation') as error:
        SqueezeExcite(32, excitation=excitation)
    assert_names(error, repr(excitation), *EXCITATIONS)


# Starting as an identity


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('excitation', IDENTITY_GATES)
def test_identity_start_is_an_identity_to_the_bit(excitation, dtype):
    block = SqueezeExcite(32, 4, excitation=excitation, identity_start=True, dtype=dtype)
    x = 100 * torch.randn(2, 32, 5, 5, dtype=dtype)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('excitation', IDENTITY_GATES)
def test_identity_start_learns_from_fc2_on(excitation, bias):
    torch.manual_seed(0)
    block = SqueezeExcite(32, 4, excitation=excitation, bias=bias, identity_start=True)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        block(torch.randn(8, 32, 5, 5) + 1).square().mean().backward()
        assert block.fc2.weight.grad.any()
        assert bool(block.fc1.weight.grad.any()) == (step == 2)
        optimizer.step()


@pytest.mark.parametrize(('excitation', 'gate'), [
    ('sigmoid', lambda t: 2 * torch.sigmoid(t)), ('tanh', lambda t: 1 + torch.tanh(t)),
    ('relu', lambda t: F.relu(1 + t))])
def test_gates_of_the_identity_start(excitation, gate):
    block = SqueezeExcite(32, 4, excitation=excitation, identity_start=True)
    torch.nn.init.normal_(block.fc2.weight)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(block.excite(x), gate(block.fc2(F.relu(block.fc1(x.mean((2, 3), keepdim=True))))))


def test_identity_start_of_another_excitation_is_refused():
    with pytest.raises(ValueError, match='identity_start') as error:
        SqueezeExcite(32, excitation='hard_sigmoid', identity_start=True)
    assert_names(error, "excitation='hard_sigmoid'", 'take one of sigmoid, tanh, relu')


def test_layers_start_as_the_convolutions_of_a_resnet():
    """Normal, with the variance of He et al. for the outputs: of fc1 few, of fc2 many."""
    torch.manual_seed(0)
    se = SqueezeExcite(1024, reduction=16)
    assert se.fc1.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.03)
    assert se.fc2.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.03)
