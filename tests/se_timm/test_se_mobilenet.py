"""SE-MobileNet: sizes, where SE stands, arguments."""
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import MOBILE, NETWORKS

NAME = 'se_mobilenetv1_100'
STAGES = [[64], [128] * 2, [256] * 2, [512] * 6, [1024] * 2]  # output channels of the units


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(**arguments):
    return timm.create_model(NAME, device='meta', **arguments)


def gates(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, SqueezeExcite)}


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_size_and_multiply_adds_are_the_papers():
    [row] = [pair for pair in MOBILE.rows if pair.name == NAME]
    with_se, plain = cost(on_meta()), cost(on_meta(se=False))
    assert with_se.parameters == NETWORKS[NAME].parameters
    assert round(with_se.parameters / 1e6, 1) == row.se_cost.parameters
    assert plain == cost(timm.create_model('mobilenetv1_100', device='meta'))
    assert round(plain.parameters / 1e6, 1) == row.plain_cost.parameters
    assert round(plain.multiply_adds / 1e9, 3) == row.plain_cost.gflops
    # one multiplication for each value of the units' outputs, of 112, 56, 28, 14 and 7 pixels
    scale = sum(sum(channels) * (112 // 2 ** index) ** 2 for index, channels in enumerate(STAGES))
    assert round((with_se.multiply_adds + scale) / 1e9, 3) == row.se_cost.gflops


def test_after_the_depthwise_convolutions_other_numbers_would_be_printed():
    """What tells the two places apart."""
    net = on_meta(se=False)
    units = [unit for stage in net.blocks for unit in stage]
    weights = sum(2 * unit.conv_dw.out_channels * (unit.conv_dw.out_channels // 16) for unit in units)
    scale = sum(unit.conv_dw.out_channels * side ** 2 for unit, side in zip(
        units, [112, 56, 56, 28, 28, *[14] * 6, 7, 7], strict=True))
    plain = cost(net)
    assert round((plain.parameters + weights) / 1e6, 1) == 4.6
    assert round((plain.multiply_adds + weights + scale) / 1e9, 3) == 0.571


def test_every_unit_has_a_gate_at_its_end():
    net = on_meta()
    assert list(gates(net)) == [
        f'blocks.{stage}.{index}.bn2.act.se' for stage, units in enumerate(STAGES) for index in range(len(units))]
    assert [gate.fc1.in_channels for gate in gates(net).values()] == [
        channels for stage in STAGES for channels in stage]
    assert all(isinstance(unit.se, nn.Identity) for stage in net.blocks for unit in stage)  # timm's own place


@pytest.mark.parametrize(('stages', 'count'), [((1,), 1), ((4,), 6), ((2, 5), 4), (3, 2), ((1, 2, 3, 4, 5), 13)])
def test_stages(stages, count):
    assert len(gates(on_meta(stages=stages))) == count


def test_unit_computes_what_is_said(randomise):
    net = randomise(timm.create_model(NAME))

    def normalise(norm, x):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    for unit in (net.blocks[0][0], net.blocks[3][0], net.blocks[3][1]):
        x = torch.randn(2, unit.conv_dw.in_channels, 8, 8)
        y = F.relu6(normalise(unit.bn1, unit.conv_dw(x)))
        y = unit.bn2.act.se(F.relu6(normalise(unit.bn2, unit.conv_pw(y))))
        torch.testing.assert_close(unit(x), y)


def test_plain_twin_is_the_network_less_its_se():
    net, plain = timm.create_model(NAME).eval(), timm.create_model(NAME, se=False).eval()
    assert not gates(plain)
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    for gate in gates(net).values():
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    assert torch.equal(net(images()), plain(images()))


def test_plain_twin_is_timms_network(randomise):
    theirs, ours = randomise(timm.create_model('mobilenetv1_100')), timm.create_model(NAME, se=False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(images()), theirs(images()))
    assert [key for key in on_meta().state_dict() if '.se.' not in key] == list(theirs.state_dict())


def test_arguments_of_timms_network_are_taken():
    net = on_meta(act_layer='silu', output_stride=16, drop_rate=0.1, in_chans=1)
    assert isinstance(net.blocks[0][0].bn2.act.act, nn.SiLU)
    assert net.forward_features(torch.empty(1, 1, 64, 64, device='meta')).shape == (1, 1024, 4, 4)


def test_settings_of_batch_norm_are_taken_as_by_timms_network():
    for net in (on_meta(bn_eps=1e-3, bn_momentum=0.02),
                timm.create_model('mobilenetv1_100', bn_eps=1e-3, bn_momentum=0.02, device='meta')):
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 27
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.02)}


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(stages=(6,)), ValueError, 'stages: \\[6\\]', 'name some of \\[1, 2, 3, 4, 5\\]'),
    (dict(se='yes'), ValueError, "se: 'yes'", 'False for the plain twin'),
    (dict(reduction=65), ValueError, 'reduction: 65', 'whole number'),
    (dict(placement='pre'), TypeError, "argument of se_mobilenetv1_100: 'placement'", 'valid'),
    (dict(exitation='tanh'), TypeError, "argument of se_mobilenetv1_100: 'exitation'", 'excitation'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        on_meta(**arguments)
