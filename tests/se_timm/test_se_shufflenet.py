"""SE-ShuffleNet: sizes, units, where SE stands, arguments."""
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SEShuffleNetV1, SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import MOBILE, NETWORKS
from se_timm.se_shufflenet import ShuffleUnit

NAME = 'se_shufflenetv1_g3'
PLACEMENTS = ['standard', 'pre', 'post', 'identity']
STAGES = [(4, 240), (8, 480), (4, 960)]  # units and output channels
# channels of the three stages by g (Zhang et al., Table 1), and parameters (osmr/imgclsmob, shufflenet.py)
GROUPS = {
    1: ((144, 288, 576), 1_531_936), 2: ((200, 400, 800), 1_733_848), 3: ((240, 480, 960), 1_865_728),
    4: ((272, 544, 1088), 1_968_344), 8: ((384, 768, 1536), 2_434_768),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(**arguments):
    return timm.create_model(NAME, device='meta', **arguments)


def units(net):
    return [module for module in net.modules() if isinstance(module, ShuffleUnit)]


def gates(net):
    return [module for module in net.modules() if isinstance(module, SqueezeExcite)]


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('groups', GROUPS)
def test_size_of_the_plain_network_is_that_of_others(groups):
    channels, parameters = GROUPS[groups]
    assert cost(SEShuffleNetV1(groups, channels, se=False, device='meta')).parameters == parameters


def test_size_and_multiply_adds_are_the_papers_cut_off():
    [row] = [pair for pair in MOBILE.rows if pair.name == NAME]
    with_se, plain = cost(on_meta()), cost(on_meta(se=False))
    assert with_se.parameters == NETWORKS[NAME].parameters
    assert math.floor(with_se.parameters / 1e5) / 10 == row.se_cost.parameters
    assert math.floor(plain.parameters / 1e5) / 10 == row.plain_cost.parameters
    # one multiplication for each value of the branches, of 28, 14 and 7 pixels
    scale = 28 ** 2 * (216 + 3 * 240) + 14 ** 2 * (240 + 7 * 480) + 7 ** 2 * (480 + 3 * 960)
    added = (with_se.multiply_adds - plain.multiply_adds + scale) / 1e9
    assert row.plain_cost.gflops + added == pytest.approx(row.se_cost.gflops, abs=0.0005)


def test_multiply_adds_printed_are_about_those_of_all_groups():
    counted = [cost(SEShuffleNetV1(groups, channels, se=False, device='meta')).multiply_adds / 1e6
               for groups, (channels, _) in GROUPS.items()]
    assert [round(count) for count in counted] == [143, 141, 137, 134, 138]
    assert min(counted) < 140 < max(counted)


def test_on_the_outputs_of_the_units_another_size_would_be_printed():
    assert round(cost(on_meta(placement='post')).parameters / 1e6, 2) == 2.59


@pytest.mark.parametrize(('placement', 'channels'), [
    ('standard', lambda before, after: after - before), ('pre', lambda before, after: before),
    ('post', lambda before, after: after), ('identity', lambda before, after: before)])
def test_channels_of_the_gates(placement, channels):
    expected, before = [], 24
    for count, after in STAGES:
        expected += [channels(before, after), *[after] * (count - 1)]
        before = after
    assert [gate.fc1.in_channels for gate in gates(on_meta(placement=placement))] == expected


@pytest.mark.parametrize(('stages', 'count'), [((2,), 4), ((3, 4), 12), ([4], 4), ((2, 3, 4), 16)])
def test_stages(stages, count):
    assert len(gates(on_meta(stages=stages))) == count


def shuffled(x, groups):
    """Channel j of group i goes to place i of the j-th run of `groups` channels."""
    width = x.shape[1] // groups
    y = torch.empty_like(x)
    for i in range(groups):
        for j in range(width):
            y[:, j * groups + i] = x[:, i * width + j]
    return y


def by_definition(unit, x):
    """Compute a unit as Zhang et al. draw it (Fig. 2b and c), and SE as Fig. 5 of the paper places it."""
    def at(place, value):
        return unit.se(value) if unit.placement == place else value

    y = F.relu(unit.bn1(unit.conv1(at('pre', x))))
    y = unit.bn2(unit.conv2(shuffled(y, 3)))
    y = at('standard', unit.bn3(unit.conv3(y)))
    if unit.conv2.stride == (2, 2):
        y = torch.cat([at('identity', F.avg_pool2d(x, 3, 2, padding=1)), y], dim=1)
    else:
        y = at('identity', x) + y
    return at('post', F.relu(y))


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_unit_computes_what_its_placement_means(placement, randomise):
    net = randomise(timm.create_model(NAME, placement=placement))
    for unit in (net.layer1[0], net.layer1[1], net.layer2[0]):
        x = torch.randn(2, unit.conv1.in_channels, 8, 8)
        assert unit.placement == placement
        torch.testing.assert_close(unit(x), by_definition(unit, x))


def test_convolutions_are_grouped_but_for_the_first():
    net = on_meta()
    assert [unit.conv1.groups for unit in units(net)] == [1] + [3] * 15
    assert {unit.conv3.groups for unit in units(net)} == {3}
    assert all(unit.conv2.groups == unit.conv2.in_channels == unit.conv1.out_channels for unit in units(net))
    assert [unit.conv1.out_channels for unit in units(net)] == [60] * 4 + [120] * 8 + [240] * 4


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_plain_twin_is_the_network_less_its_se(placement):
    net = timm.create_model(NAME, placement=placement).eval()
    plain = timm.create_model(NAME, se=False).eval()
    assert not gates(plain)
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    for gate in gates(net):
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    assert torch.equal(net(images()), plain(images()))


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
@pytest.mark.parametrize('placement', PLACEMENTS[1:])  # the first is the default, see test_contract.py
def test_every_placement_trains_scripts_and_traces(placement):
    net = timm.create_model(NAME, placement=placement).train()
    net(images()).sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        expected = net.eval()(images())
        for form in (torch.jit.script(net), torch.fx.symbolic_trace(net)):
            torch.testing.assert_close(form(images()), expected)


@pytest.mark.slow
def test_units_compile_with_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch.compiler.reset()
    net = timm.create_model(NAME).layer1[:2].double().train()
    x = torch.randn(2, 24, 16, 16, dtype=torch.float64)
    results = []
    for form in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        y = form(x)
        y.square().sum().backward()
        results.append((y.detach(), [parameter.grad.clone() for parameter in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    torch.compiler.reset()


def test_convolutions_start_by_the_outputs_of_a_group():
    """By all outputs, the depthwise convolutions would start about ten times too small."""
    net = timm.create_model(NAME, se=False)
    for unit in units(net):
        for conv in (unit.conv1, unit.conv2, unit.conv3):
            outputs = math.prod(conv.kernel_size) * conv.out_channels / conv.groups
            assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / outputs), rel=0.2)


def test_feature_maps():
    net = on_meta()
    x = torch.empty(1, 3, 224, 224, device='meta')
    shapes = [tuple(tap.shape[1:]) for tap in net.forward_intermediates(x, intermediates_only=True)]
    assert shapes == [(24, 56, 56), (240, 28, 28), (480, 14, 14), (960, 7, 7)]


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(placement='3x3'), ValueError, "placement: '3x3'", 'take one of standard, pre, post, identity'),
    (dict(placement='infront'), ValueError, "placement: 'infront'", 'valid'),
    (dict(stages=(5,)), ValueError, 'stages: \\[5\\]', 'name some of'),
    (dict(reduction=1000), ValueError, 'reduction: 1000', 'whole number'),
    (dict(placement='pre', reduction=32), ValueError, 'reduction: 32', 'from 1 to 24'),
    (dict(gruops=2), TypeError, "argument of se_shufflenetv1_g3: 'gruops'", 'groups'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        on_meta(**arguments)
