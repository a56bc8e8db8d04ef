"""The gates that are read are those by which the network multiplies."""
import pytest
import timm
import torch
import torchvision
from timm.layers import SEModule
from torch import nn

import se_timm
from se_timm.gates import GateReader, choose_blocks, find_se, gate_of

# a network of each kind of SE block, and how many it has
KINDS = {
    'se_resnet18': 8, 'seresnet18': 8, 'legacy_seresnet18': 8, 'efficientnet_b0': 16, 'ese_vovnet19b_dw': 4,
    'eca_resnet33ts': 10, 'regnety_002': 13, 'se_mobilenetv1_100': 13, 'se_bn_inception': 10,
}


def network(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments).eval()


def images(count=2, side=64):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def passed_through(net, blocks):
    """Let `net` run, and return its output and what went into each SE module and came out of it."""
    seen, handles = {}, []
    for block in blocks:
        def keep(module, inputs, output, name=block.name):
            seen[name] = inputs[0].clone(), output.clone()

        handles.append(net.get_submodule(block.module).register_forward_hook(keep))
    with torch.no_grad(), GateReader(net) as reader:
        output = net(images())
        gates = reader.gates
    for handle in handles:
        handle.remove()
    return output, seen, gates


def hooks(net):
    return sum(len(module._forward_hooks) for module in net.modules())


@pytest.mark.parametrize('name', KINDS)
def test_gates_are_the_factors_of_the_network(name):
    net = network(name)
    blocks = find_se(net)
    assert len(blocks) == KINDS[name]
    output, seen, gates = passed_through(net, blocks)
    assert list(gates) == [block.name for block in blocks]
    for block in blocks:
        before, after = seen[block.name]
        gate = gates[block.name]
        assert gate.shape == before.shape[:2]
        assert block.low <= gate.min()
        assert gate.max() <= block.high
        torch.testing.assert_close(before * gate[:, :, None, None], after)
        assert block.parameters == sum(p.numel() for p in net.get_submodule(block.module).parameters())
    with torch.no_grad():
        assert torch.equal(net(images()), output)


def test_gates_of_torchvision():
    net = torchvision.models.mobilenet_v3_small().eval()
    _, seen, gates = passed_through(net, find_se(net))
    assert len(gates) == 9
    for name, (before, after) in seen.items():
        torch.testing.assert_close(before * gates[name][:, :, None, None], after)


def test_gates_of_se_that_was_added():
    net = network('resnet18')
    se_timm.add_se(net, identity_start=True)
    _, _, gates = passed_through(net, find_se(net))
    assert len(gates) == 8
    assert all(torch.equal(gate, torch.ones_like(gate)) for gate in gates.values())
    assert {(block.low, block.high) for block in find_se(net)} == {(0., 2.)}


@pytest.mark.parametrize(('arguments', 'low', 'high'), [
    ({'excitation': 'tanh'}, -1., 1.), ({'excitation': 'relu'}, 0., 2.), ({'excitation': 'hard_sigmoid'}, 0., 1.),
    ({'excitation': 'relu6'}, 0., 6.), ({'excitation': 'gelu_tanh'}, -2., 2.), ({'excitation': 'silu'}, -2., 2.),
    ({'squeeze': 'max'}, 0., 1.)])
def test_range_follows_from_the_excitation(arguments, low, high):
    net = network('se_resnet20_cifar', **arguments)
    assert {(block.low, block.high) for block in find_se(net)} == {(low, high)}
    values = gate_of(net.layer1[0].se)(torch.linspace(-9, 9, 99))
    assert low <= values.min()
    assert values.max() <= high or high == 2


def test_gates_of_blocks_that_have_it_before_or_after_their_last_convolution():
    blocks = find_se(network('test_byobnet'))
    assert {(block.name, block.module) for block in blocks} >= {
        ('stages.0.0', 'stages.0.0.attn'), ('stages.1.0', 'stages.1.0.attn_last')}


def test_gates_of_each_position_are_averaged():
    net = network('se_resnet20_cifar', squeeze='none')
    _, seen, gates = passed_through(net, find_se(net))
    for block in find_se(net):
        before, _ = seen[block.name]
        torch.testing.assert_close(
            gates[block.name], net.get_submodule(block.module).excite(before).mean((2, 3)))


def test_titles_are_those_of_the_paper():
    titles = [block.title for block in find_se(network('se_resnet50'))]
    assert titles == [f'SE_{stage}_{block + 1}' for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3))
                      for block in range(blocks)]
    # three stages: the paper numbers no such network
    assert find_se(network('se_resnet20_cifar'))[0].title == 'layer1.0'


def test_nothing_is_left_in_the_network():
    net = network('se_resnet18')
    reader = GateReader(net)
    reader.attach()
    reader.attach()
    assert hooks(net) == 8
    reader.detach()
    assert hooks(net) == 0
    assert reader.gates == {}
    with pytest.raises(ZeroDivisionError), GateReader(net):
        raise ZeroDivisionError
    assert hooks(net) == 0


def test_fused_network_is_fused_again_afterwards():
    net = network('seresnet18')
    se_timm.fuse(net, 'fused')
    with GateReader(net), torch.no_grad():
        net(images())
    assert all(choice.fused for choice in se_timm.explain(net.train()).values())


@pytest.mark.slow  # compiles
def test_gates_of_a_compiled_network():
    net = network('se_resnet20_cifar')
    reader = GateReader(net)
    with torch.no_grad(), reader:
        expected, gates = net(images(4, 32)), reader.gates
    net.compile()
    net.train()
    net(images(4, 32)).sum().backward()
    net.load_state_dict(network('se_resnet20_cifar').state_dict())
    net.eval()
    for _ in range(2):
        with torch.no_grad(), reader:
            torch.testing.assert_close(net(images(4, 32)), expected)
            for name, gate in reader.gates.items():
                torch.testing.assert_close(gate, gates[name])
            assert len(reader.gates) == 9


# Choosing


@pytest.mark.parametrize(('names', 'count'), [
    ('SE_5_3', 1), ('layer4.2', 1), ('layer4.2.se', 1), ('SE_5_*', 3), ('layer4.*', 3),
    (['SE_2_*', 'layer1.0', 'SE_5_1'], 4), ('*', 16)])
def test_blocks_are_chosen_by_name(names, count):
    net = network('se_resnet50')
    chosen = choose_blocks(net, names)
    assert len(chosen) == count
    assert chosen == [block for block in find_se(net) if block in chosen]  # in the order of the network


@pytest.mark.parametrize(('name', 'hint'), [('SE_5_4', 'SE_5_'), ('layer4.7', 'layer4.'), ('layer9.*', 'layer')])
def test_unknown_block_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f'did you mean {hint}') as caught:
        choose_blocks(network('se_resnet50'), ['SE_5_3', name])
    assert name in str(caught.value)


@pytest.mark.parametrize(('names', 'given', 'why'), [
    (None, 'None', 'NoneType'), (3, '3', 'int'), ([None], 'None', 'NoneType'), (nn.Conv2d, '<class', 'type')])
def test_what_is_no_name_of_a_block_is_refused(names, given, why):
    with pytest.raises(ValueError, match=rf'^blocks: {given}.*\n  why: it is a {why}\n'):
        choose_blocks(network('se_resnet18'), names)


def test_names_are_no_blocks_to_read():
    with pytest.raises(ValueError, match=r"^blocks: 'layer1.0'\n  why: it is no SEBlock\n"):
        GateReader(network('se_resnet18'), ['layer1.0'])


def test_network_without_se_is_refused():
    assert find_se(network('resnet18')) == []
    with pytest.raises(ValueError, match='no SE block of a kind that is known'):
        choose_blocks(network('resnet18'), '*')


def test_gates_are_readable_only_while_attached_and_have_no_graph():
    net = network('se_resnet20_cifar')
    with GateReader(net) as reader:
        net(images(2, 32))
        assert reader.gates
        assert not any(gate.requires_grad for gate in reader.gates.values())
    assert reader.gates == {}


def test_blocks_with_two_gates_are_named_by_their_modules():
    net = nn.Sequential(nn.Module())
    net[0].se, net[0].attn = SEModule(8), SEModule(8)
    assert [block.name for block in find_se(net)] == ['0.se', '0.attn']


def test_titles_of_gates_within_a_block():
    net = torchvision.models.resnet18()
    se_timm.add_se(net)
    assert [block.title for block in find_se(net)][:2] == ['layer1.0.bn2', 'layer1.1.bn2']
