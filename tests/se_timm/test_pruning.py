"""A network from which SE is taken computes what it is said to compute."""
import copy

import pytest
import timm
import torch
from torch.nn.utils import parametrize

from se_timm import add_se, fold
from se_timm.gates import GateReader, find_se
from se_timm.pruning import prune_se


def network(name, **arguments):
    """Return a network whose batch norms have statistics, and whose gates differ from channel to channel."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **arguments)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def last_layer(module):
    return module.conv if hasattr(module, 'conv') else getattr(module, 'fc2', None) or module.conv_expand


def with_constant_gates(net, gates):
    """Return a copy in which these SE blocks have gates that depend on no image."""
    net = copy.deepcopy(net)
    for block in find_se(net):
        if block.name in gates:
            layer = last_layer(net.get_submodule(block.module))
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(torch.logit(gates[block.name]))
    return net


@pytest.mark.parametrize(('name', 'kept'), [
    ('se_resnet18', 'folded'), ('se_resnet50', 'folded'), ('seresnet18', 'folded'), ('legacy_seresnet50', 'folded'),
    ('legacy_seresnet18', 'scale'), ('regnety_002', 'scale'), ('efficientnet_b0', 'scale'),
    ('se_mobilenetv1_100', 'scale')])
def test_constant_gates_go_on_scaling(name, kept, x):
    net = network(name)
    blocks = find_se(net)[-2:]
    generator = torch.Generator().manual_seed(2)
    channels = {block.name: last_layer(net.get_submodule(block.module)).out_channels for block in blocks}
    gates = {name: torch.rand(count, generator=generator) * 0.8 + 0.1 for name, count in channels.items()}
    before = copy.deepcopy(net.state_dict())
    pruned = prune_se(net, list(gates), gates)
    assert pruned.blocks == dict.fromkeys(gates, kept)
    with torch.no_grad():
        expected = with_constant_gates(net, gates)(x)
        torch.testing.assert_close(pruned.net(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(net(x), expected, rtol=1e-2)
    assert pruned.parameters == sum(block.parameters for block in blocks)
    assert pruned.net is not net
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_network_without_the_last_stage_is_that_of_the_paper(x):
    net = network('se_resnet50')
    pruned = prune_se(net, 'SE_5_*')
    variant = timm.create_model('se_resnet50', num_classes=5, stages=(2, 3, 4)).eval()
    variant.load_state_dict(pruned.net.state_dict())
    with torch.no_grad():
        assert torch.equal(pruned.net(x), variant(x))
    assert pruned.blocks == dict.fromkeys(['layer4.0', 'layer4.1', 'layer4.2'], 'nothing')
    assert pruned.parameters == 1_572_864 + 3 * (2048 + 128)
    assert pruned.multiply_adds == 1_572_864
    assert '3 SE blocks taken out (layer4.0, layer4.1, layer4.2): 1,579,392 parameters' in str(pruned)
    assert [block.title for block in find_se(pruned.net)][-1] == 'SE_4_6'


def test_all_of_it_in_place(x):
    net = network('se_resnet20_cifar')
    plain = timm.create_model('se_resnet20_cifar', num_classes=5, se=False).eval()
    assert prune_se(net, '*', inplace=True).net is net
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))


def test_pruned_network_trains_on(x):
    net = network('se_resnet18')
    gates = {'layer4.1': torch.full((512,), 0.5)}
    pruned = prune_se(net, 'SE_5_2', gates).net.train()
    pruned(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_gates_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r'those of layer4\.2 are missing'):
        prune_se(network('se_resnet50'), 'SE_5_*', {'layer4.0': torch.ones(2048), 'layer4.1': torch.ones(2048)})


def test_gates_without_values():
    net = timm.create_model('se_resnet18', device='meta')
    pruned = prune_se(net, 'SE_5_*', {block.name: torch.ones(512, device='meta') for block in find_se(net)[-2:]})
    assert (pruned.parameters, pruned.multiply_adds) == (66_624, 65_536)


def test_copy_is_made_or_not_as_a_switch_says():
    net = network('se_resnet18')
    with pytest.raises(ValueError, match=r"^inplace: 'False'\n  why: it is a switch"):
        prune_se(net, 'SE_5_*', inplace='False')
    assert len(find_se(net)) == 8


def test_unknown_block_is_named():
    with pytest.raises(ValueError, match='SE_6_1'):
        prune_se(network('se_resnet18'), 'SE_6_1')


@pytest.mark.parametrize(('gate', 'given'), [
    (torch.rand(8, 512), 'of shape (8, 512)'), (torch.rand(7), '512 of layer4.0, 7 of layer4.1'),
    ([0.5] * 512, 'of type list'), (0.5, 'of type float'), (torch.full((512,), torch.nan), 'not finite')])
@pytest.mark.parametrize('name', ['se_resnet18', 'regnety_002'])
def test_gates_that_are_none_leave_the_network_as_it_is(name, gate, given):
    net = network(name)
    first, second = (block.name for block in find_se(net)[-2:])
    before = copy.deepcopy(net.state_dict())
    channels = last_layer(net.get_submodule(find_se(net)[-2].module)).out_channels
    with pytest.raises(ValueError, match='gates') as error:
        prune_se(net, [first, second], {first: torch.rand(channels), second: gate}, inplace=True)
    if name == 'se_resnet18':
        assert given in str(error.value)
    assert net.state_dict().keys() == before.keys()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(('blocks', 'gates', 'given'), [
    ('SE_5_2', {'layer4.1': torch.rand(1)}, r"gates\['layer4.1'\]: a single number"),
    ('SE_5_2', [torch.rand(512)], 'gates: a list'),
    ([], None, r'blocks: \[\]'),
])
@pytest.mark.parametrize('excitation', ['sigmoid', 'prelu'])  # the latter has a parameter of its own
def test_what_would_be_taken_for_something_else_is_refused(blocks, gates, given, excitation):
    with pytest.raises(ValueError, match=rf'^{given}\n  why: .*\n  do:  '):
        prune_se(timm.create_model('se_resnet18', device='meta', excitation=excitation), blocks, gates)


def test_hooks_of_the_network_are_not_run(x):
    net, seen = network('se_resnet18'), []
    net.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.mean().item()))
    with GateReader(net) as reader, torch.no_grad():
        net(x)
        before = {name: gate.clone() for name, gate in reader.gates.items()}
        prune_se(net, 'SE_5_*')
        assert len(seen) == 1
        assert all(torch.equal(gate, before[name]) for name, gate in reader.gates.items())


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize('case', ['parametrised', 'hooked', 'shared', 'without weight'])
def test_constants_are_not_folded_into_a_norm_that_others_have_a_part_in(case, x):
    net = network('se_resnet18')
    norm = net.layer1[0].bn2
    if case == 'parametrised':
        parametrize.register_parametrization(norm, 'weight', Halved())
    elif case == 'hooked':
        norm.register_forward_hook(lambda module, args, output: output + 1)
    elif case == 'shared':
        net.layer1[1].bn2 = norm
    else:
        net.layer1[0].bn2 = torch.nn.BatchNorm2d(64, affine=False).eval()
    gates = {'layer1.0': torch.rand(64) * 0.8 + 0.1}
    pruned = prune_se(net, 'layer1.0', gates)
    assert pruned.blocks == {'layer1.0': 'scale'}
    with torch.no_grad():
        torch.testing.assert_close(pruned.net(x), with_constant_gates(net, gates)(x), rtol=1e-4, atol=1e-4)


def test_se_that_stands_in_two_blocks():
    net = network('se_resnet18')
    net.layer1[1].se = net.layer1[0].se
    with pytest.raises(ValueError, match=r'block: layer1\.0\.se\n  why: its SE stands in several places'):
        prune_se(net, 'layer1.*')


@pytest.mark.parametrize('placement', ['pre', 'post', 'identity', '3x3'])
def test_gate_that_is_put_back_stands_at_the_end_of_the_branch(placement, x):
    net = prune_se(network('se_resnet50', placement=placement), 'layer4.*', input_size=(3, 64, 64)).net
    with torch.no_grad():
        before = net(x)
        report = add_se(net, identity_start=True)
        assert torch.equal(net(x), before)
    assert [place.channels for place in report.places.values()] == [2048] * 3
    seen = []
    for name in ('bn3', 'se'):
        net.layer4[1].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    net(x)
    assert seen == ['bn3', 'se']


@pytest.mark.parametrize('function', [fold, lambda net: prune_se(net, 'layer4.1')])
def test_network_that_cannot_be_copied_is_refused(function):
    net = network('se_resnet18')
    torch.nn.utils.prune.l1_unstructured(net.layer1[0].conv1, 'weight', 0.5)
    net.layer1[0].conv1(torch.zeros(1, 64, 8, 8))
    with pytest.raises(ValueError, match=r'it cannot be copied.*\n  do:  take out what cannot be'):
        function(net)


def test_network_that_does_not_run_on_the_size_of_its_configuration():
    net = timm.create_model('swin_tiny_patch4_window7_224', img_size=64, depths=(1, 1), num_heads=(1, 2), embed_dim=8)
    add_se(net, input_size=(3, 64, 64), reduction=2)
    with pytest.raises(ValueError, match=r'^prune_se\(SwinTransformer\)\n  why: it does not run on an image of \(3, '):
        prune_se(net, '*')
    assert len(prune_se(net, '*', input_size=(3, 64, 64)).blocks) == len(find_se(net)) > 0


def test_second_name_of_a_stage_is_no_second_place(x):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network('se_resnet18')
            self.last = self.net.layer4

        def forward(self, x):
            return self.net(x)

    gates = {'net.layer4.0': torch.rand(512)}
    assert prune_se(Named(), 'net.layer4.0', gates, input_size=(3, 64, 64)).blocks == {'net.layer4.0': 'folded'}


def test_constants_keep_the_dtype_of_autocast(x):
    net = network('se_mobilenetv1_100')
    block = find_se(net)[-1]
    gates = {block.name: torch.full((last_layer(net.get_submodule(block.module)).out_channels,), 0.5)}
    pruned, seen = prune_se(net, block.name, gates).net, []
    pruned.get_submodule(block.module).register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        pruned(x)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize('placement', ['pre', 'post', 'identity', '3x3'])
def test_constant_gates_go_on_scaling_where_the_block_stood(placement, x):
    net = network('se_resnet50', placement=placement)
    channels = last_layer(net.layer4[1].se).out_channels
    gates = {'layer4.1': torch.rand(channels, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1}
    pruned = prune_se(net, 'layer4.1', gates)
    assert pruned.blocks == {'layer4.1': 'scale'}
    with torch.no_grad():
        torch.testing.assert_close(pruned.net(x), with_constant_gates(net, gates)(x), rtol=1e-4, atol=1e-4)


def test_constants_are_in_the_state_and_the_network_stays_in_evaluation(x):
    net = network('se_mobilenetv1_100')
    block = find_se(net)[-1]
    gate = torch.full((last_layer(net.get_submodule(block.module)).out_channels,), 0.5, dtype=torch.float64)
    pruned = prune_se(net, block.name, {block.name: gate}).net
    other = prune_se(net, block.name, {block.name: torch.ones_like(gate)}).net
    other.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), pruned(x))
    assert {value.dtype for value in pruned.state_dict().values()} == {torch.float32, torch.int64}
    assert not any(module.training for module in pruned.modules())
