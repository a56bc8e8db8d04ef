"""SE put into networks that are there already, and taken out again."""
import copy
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

import se_timm
from se_timm import SqueezeExcite, add_se, fold, remove_se
from se_timm.dry_run import CUBE, layout_of
from se_timm.gated import Gated, GatedCall
from se_timm.insertion import GATES, KINDS, added, plain_name
from se_timm.insertion_points import KNOWN

TORCHVISION = {
    'resnet18': ('layer1.0.bn2', 8), 'resnet50': ('layer1.0.bn3', 16), 'mobilenet_v2': ('features.3.conv.se', 10),
    'densenet121': ('features.denseblock1.denselayer1.conv2', 58),
    'regnet_x_400mf': ('trunk_output.block1.block1-0.f', 22),
    'shufflenet_v2_x0_5': ('stage2.0.branch2.se', 16), 'convnext_tiny': ('features.1.0.stochastic_depth', 18),
    'mnasnet0_5': ('layers.8.1.layers.se', 10),
}
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning'),  # torch's own GraphModule
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(size=64, batch=2, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def build(name='test_resnet', **arguments):
    """A small network with random weights, zeros included: behind a branch that begins with zero nothing is seen."""
    net = timm.create_model(name, **arguments).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def close(net):
    """Set every added gate to zero."""
    for gate in added(net).values():
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, -1000.)


class Tiny(nn.Module):
    """A network of one's own: two blocks whose branch is a function of the module, not a module."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.unused = nn.Conv2d(width, width, 1)
        self.pairs = nn.ModuleList([nn.Identity()])
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.fc(x.mean((2, 3)))


def shape_of(net):
    """What must be as it was after an error."""
    return [(name, type(module)) for name, module in net.named_modules()], list(net.state_dict()), net.training


# Networks that are known


@pytest.mark.parametrize('name', TORCHVISION)
def test_networks_of_torchvision(name):
    net = torchvision.models.get_model(name).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    keys, x = list(net.state_dict()), images(224, 1)
    with torch.no_grad():
        expected = net(x)
        report = add_se(net, reduction=4, identity_start=True)
        assert (next(iter(report.places)), len(report.places)) == TORCHVISION[name]
        assert torch.equal(net(x), expected)
        assert [key for key in net.state_dict() if '.se.' not in key] == keys
        close(net)
        assert not torch.allclose(net(x), expected)
        remove_se(net)
        assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == keys


def test_classes_that_are_known_exist():
    for path in KNOWN:
        module, _, name = path.rpartition('.')
        __import__(module)
        assert isinstance(getattr(sys.modules[module], name), type)


def test_residual_networks_of_timm_become_the_paper_s():
    net = timm.create_model('resnet50', zero_init_last=False)
    add_se(net)
    ours = timm.create_model('se_resnet50', topology='v1.5')
    net.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), ours.eval()(images()))


def test_gate_stands_at_the_end_of_the_branch(randomise):
    net = randomise(timm.create_model('convnext_atto'))
    block = net.stages[0].blocks[0]
    add_se(net, reduction=2)
    x = torch.randn(2, 40, 8, 8)
    branch = block.mlp(block.norm(block.conv_dw(x))) * block.gamma.view(-1, 1, 1)
    gate = block.drop_path.se
    torch.testing.assert_close(block(x), x + branch * gate.excite(branch))
    torch.testing.assert_close(gate.excite(branch), torch.sigmoid(
        gate.fc2(F.relu(gate.fc1(branch.mean((2, 3), keepdim=True))))))


def test_gate_stands_before_stochastic_depth():
    net = build('test_convnext', drop_path_rate=0.9).train()
    add_se(net, reduction=4)
    block = net.stages[-1].blocks[-1]
    seen = []
    block.drop_path.se.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.manual_seed(1)
    y = block.drop_path(x := torch.randn(64, block.drop_path.se.fc1.in_channels, 2, 2))
    assert torch.equal(seen[0], block.drop_path.se(x))
    dropped = (y == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(y[~dropped], seen[0][~dropped] / (1 - block.drop_path.drop_prob))


def test_dense_layer_is_gated_before_the_concatenation():
    net = build('densenet121')
    layer = net.features.denseblock1.denselayer1
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        plain = layer([x])
        add_se(net, reduction=4)
        torch.testing.assert_close(layer([x]), plain * layer.conv2.se.excite(plain))


@pytest.mark.parametrize('name', ['seresnet18', 'regnety_002', 'efficientnet_b0', 'se_resnet18'])
def test_blocks_with_attention_of_their_own_are_left(name):
    net = timm.create_model(name, device='meta')
    with pytest.raises(ValueError, match=r'none of its .* can have one: its block has channel attention of its own'):
        add_se(net)


def test_what_is_left_is_told():
    report = add_se(timm.create_model('mobilenetv2_035'), reduction=4)
    assert report.left['blocks.0.0.drop_path'] == 'its block adds no shortcut'
    assert 'left: blocks.0.0.drop_path: its block adds no shortcut' in str(report)


# What it says


def test_report_counts_the_gates():
    net = build()
    before = sum(p.numel() for p in net.parameters())
    report = add_se(net)
    parameters = sum(p.numel() for p in net.parameters())
    assert report.net is net
    assert report.parameters == parameters - before == sum(place.parameters for place in report.places.values())
    assert report.share == report.parameters / parameters
    channels = [place.channels for place in report.places.values()]
    assert [place.parameters for place in report.places.values()] == [
        2 * c * (c // 16) + c + c // 16 for c in channels]
    lines = str(report).splitlines()
    assert lines[0] == (f'se: {len(channels)} gates, {report.parameters:,} parameters, {100 * report.share:.2f} % '
                        'of the whole')
    assert re.match(rf'layer1.0.se: slot, {channels[0]} channels \(NCHW\), [\d,]+ parameters$', lines[1])
    assert len(lines) == 1 + len(channels)


def test_config_makes_the_same_in_a_new_process(tmp_path):
    net = timm.create_model('test_convnext')
    report = add_se(net, 'stages.*.blocks.*', reduction=4, excitation='tanh', bias=False, identity_start=True)
    for gate in added(net).values():
        nn.init.normal_(gate.fc2.weight)
    x = images()
    torch.save({'config': report.config, 'state': net.state_dict(), 'x': x, 'y': net.eval()(x)}, tmp_path / 'net.pt')
    code = '''if True:
        import sys, timm, torch
        from se_timm import add_se
        saved = torch.load(sys.argv[1], weights_only=True)
        net = add_se(timm.create_model('test_convnext'), **saved['config']).net
        net.load_state_dict(saved['state'], strict=True)
        assert torch.equal(net.eval()(saved['x']), saved['y'])
    '''
    subprocess.run([sys.executable, '-c', code, tmp_path / 'net.pt'], check=True, timeout=120)


def test_config_names_classes_and_size():
    report = add_se(Tiny(), [nn.Sequential, 'stem'], input_size=(3, 16, 16), reduction=2)
    assert report.config == {
        'at': ['Sequential', 'stem'], 'input_size': [3, 16, 16], 'kind': 'se', 'reduction': 2}
    assert add_se(Tiny(), **report.config).places == report.places


# Arguments


@pytest.mark.parametrize(('arguments', 'expected'), [
    (dict(reduction=2), dict(reduction=2)), (dict(squeeze='max'), dict(squeeze='max')),
    (dict(squeeze='none'), dict(squeeze='none')), (dict(excitation='tanh'), dict(excitation='tanh')),
    (dict(bias=False), dict(bias=False)),
])
def test_arguments_of_the_block_reach_it(arguments, expected):
    net = build()
    add_se(net, **arguments)
    for gate in added(net).values():
        torch.manual_seed(0)
        block = SqueezeExcite(gate.fc1.in_channels, **expected)
        assert repr(gate) == repr(block)


@pytest.mark.parametrize('excitation', ['sigmoid', 'tanh', 'relu'])
@pytest.mark.parametrize('squeeze', ['avg', 'max', 'none'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_identity_start_keeps_every_bit(excitation, squeeze, dtype):
    net, x = build().to(dtype), images().to(dtype)
    with torch.no_grad():
        expected = net(x)
        add_se(net, identity_start=True, excitation=excitation, squeeze=squeeze, bias=False)
        assert torch.equal(net(x), expected)


def test_other_attention_goes_through_the_same_door():
    assert {'se', 'eca', 'ge', 'cbam'} <= set(KINDS)
    for kind in KINDS:
        net = build()
        with torch.no_grad():
            expected = net(images())
            report = add_se(net, kind=kind)
            assert len(report.places) == sum(place.where == 'slot' for place in report.places.values()) == 4
            assert net(images()).shape == expected.shape
            assert (kind == 'se') == all(type(gate) is SqueezeExcite for gate in added(net).values())
            remove_se(net)
            assert torch.equal(net(images()), expected)


def test_other_attention_takes_its_own_arguments():
    net = build()
    add_se(net, kind='ecam', rd_channels=5)
    assert {gate.conv.out_channels for gate in added(net).values()} == {5}


@pytest.mark.parametrize(('arguments', 'hidden'), [
    ({}, 4), ({'rd_ratio': 0.5}, 32), ({'rd_channels': 5}, 5), ({'rd_divisor': 8}, 8)])
def test_gather_excite_has_the_width_that_is_asked_for(arguments, hidden):
    net = timm.create_model('resnet18', num_classes=2)
    add_se(net, 'layer1.*', kind='ge', act_layer='silu', **arguments)
    for gate in added(net).values():
        assert gate.mlp.fc1.out_channels == hidden
        assert isinstance(gate.mlp.act, nn.SiLU)


@pytest.mark.parametrize('inside', [SqueezeExcite(8, reduction=2), nn.Identity()])
def test_sequence_with_a_child_of_that_name_keeps_it(inside):
    net = Tiny()
    net.first.add_module('se', inside)
    with pytest.raises(ValueError, match=r'at: first\.se\n  why: it has a child called se'):
        add_se(net, 'first', reduction=2)
    assert net.first.se is inside


def test_strides_of_one_axis_do_not_turn_channels_into_rows():
    net = nn.Sequential()
    net.a, net.b = nn.Conv2d(1, 16, 3, stride=(8, 1), padding=1), nn.Conv2d(16, 16, 3, padding=1)
    report = add_se(net, 'b', input_size=(1, 128, 128))
    assert [(place.channels, place.layout) for place in report.places.values()] == [(16, 'NCHW')]
    net(torch.zeros(1, 1, 128, 100))


@pytest.mark.parametrize(('at', 'places'), [
    ('stem', ['stem']), (['first', 'second'], ['first.se', 'second.se']), ('first.*', ['first.0', 'first.1']),
    ('Sequential', ['first.se', 'second.se']), (nn.ReLU, ['first.1', 'second.1']), ('*.1', ['first.1', 'second.1']),
    (['Sequential', 'first'], ['first.se', 'second.se']),
])
def test_modules_are_named_by_pattern_or_type(at, places):
    net = Tiny()
    report = add_se(net, at, reduction=2)
    assert list(report.places) == places
    for place, where in report.places.items():
        gated = net.get_submodule(place.removesuffix('.se'))
        x = torch.randn(2, 3 if place == 'stem' else 8, 16, 16)
        with torch.no_grad():
            if where.where == 'end':
                assert torch.equal(gated(x), gated.se(F.relu(gated[0](x))))
            else:
                assert torch.equal(gated(x), gated.se(gated.inner(x)))


def test_blocks_that_are_known_can_be_chosen_by_pattern():
    net = build('resnet18')
    assert list(add_se(net, 'layer[34].*').places) == ['layer3.0.se', 'layer3.1.se', 'layer4.0.se', 'layer4.1.se']


@pytest.mark.parametrize(('layout', 'module'), [
    ('NHWC', nn.LayerNorm(8)), ('NLC', nn.Sequential(nn.Flatten(1, 2), nn.LayerNorm(8)))])
def test_channels_may_be_last(layout, module):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.norm = copy.deepcopy(module)

        def forward(self, x):
            return self.norm(self.stem(x).permute(0, 2, 3, 1))

    net, x = Last(), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        y = net(x)
        [place] = add_se(net, 'norm', reduction=2, input_size=(3, 6, 5)).places.values()
        assert (place.layout, place.channels) == (layout, 8)
        [gate] = added(net).values()
        s = torch.sigmoid(gate.fc2(F.relu(gate.fc1(y.flatten(1, -2).mean(1)[:, :, None, None]))))[:, :, 0, 0]
        torch.testing.assert_close(net(x), y * s.view(2, *(1,) * (y.ndim - 2), 8))


@pytest.mark.parametrize(('shape', 'size', 'layout'), [
    ((1, 24, 7, 7), (3, 224, 224), 'NCHW'), ((1, 7, 7, 24), (3, 224, 224), 'NHWC'), ((1, 7, 7, 7), (3, 64, 64), CUBE),
    ((1, 49, 24), (3, 224, 224), 'NLC'), ((1, 16, 196, 24), (3, 224, 224), ''), ((1, 24), (3, 224, 224), ''),
    ((1, 24, 8, 7), (3, 224, 224), ''), ((1, 24, 7, 10), (3, 224, 320), 'NCHW'),
    ((1, 7, 10, 24), (3, 224, 320), 'NHWC'),
    ((1, 24, 7, 7), (3, 224, 193), 'NCHW'), ((1, 4, 7, 7, 24), (3, 224, 224), ''),
])
def test_layout_is_that_of_the_image(shape, size, layout):
    assert layout_of(torch.empty(shape), size) == layout


def test_module_that_is_called_with_more_than_a_tensor():
    class Sum(nn.Module):
        def forward(self, x, *, other):
            return x + other

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.sum = nn.Conv2d(3, 8, 1), Sum()

        def forward(self, x):
            x = self.stem(x)
            return self.sum(x, other=x)

    net = Net()
    add_se(net, 'sum', reduction=2, input_size=(3, 16, 16))
    assert type(net.sum) is GatedCall
    y = 2 * net.stem(images(8))
    torch.testing.assert_close(net(images(8)), net.sum.se(y))


def test_channels_of_the_images_are_the_network_s():
    net = timm.create_model('test_resnet', in_chans=1)
    add_se(net)
    assert net(images(32, channels=1)).shape == (2, 1000)


def test_gates_within_gates():
    net, x = torchvision.models.resnet18().eval(), images()
    keys = list(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        report = add_se(net, ['layer1.1.bn2', 'layer1.1'])
        assert list(report.places) == ['layer1.1.bn2']  # the end of that block is its batch norm
        remove_se(net)
        report = add_se(net, [type(net.layer1[0].bn1), 'layer4', 'layer3'])
        again = add_se(torchvision.models.resnet18(), **report.config).net.eval()
        again.load_state_dict(net.state_dict(), strict=True)
        assert torch.equal(again(x), net(x))
        assert set(remove_se(net)) == set(report.places)
        assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == keys


class Wrapped(nn.Module):
    """A module with a child, which is no sequence."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x).relu()


def test_a_gate_around_a_gated_module():
    net = Tiny()
    net.first = Wrapped()
    keys, x = list(net.state_dict()), images(16)
    with torch.no_grad():
        expected = net(x)
        places = add_se(net, ['first', 'first.conv'], reduction=2).places
        inner = net.first.inner.conv
        x8 = torch.randn(2, 8, 4, 4)
        assert torch.equal(net.first(x8), net.first.se(inner.se(inner.inner(x8)).relu()))
        assert set(remove_se(net)) == set(places) == {'first', 'first.conv'}
        assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == keys


# The network stays what it was


def test_copy_leaves_the_network_alone():
    net = build()
    before, x = shape_of(net), images()
    report = add_se(net, inplace=False, identity_start=True)
    assert shape_of(net) == before
    assert report.net is not net
    assert len(added(report.net)) == 4
    with torch.no_grad():
        assert torch.equal(report.net(x), net(x))
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in report.net.parameters())


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'resnest14d', 'densenet121'])
def test_removal_is_the_inverse(name):
    net = build(name)
    before, modules = shape_of(net), dict(net.named_modules())
    places = add_se(net, reduction=4).places
    assert remove_se(net) == list(places)
    assert shape_of(net) == before
    after = dict(net.named_modules())
    assert all(after[key] is module for key, module in modules.items())
    assert [vars(module).keys() for module in modules.values()] == [vars(module).keys() for module in after.values()]
    add_se(net, reduction=4)


@pytest.mark.parametrize('name', ['test_resnet', 'densenet121'])
def test_state_of_the_plain_network_loads_and_so_does_its_own(name):
    plain, net = build(name), build(name)
    add_se(net, reduction=4, identity_start=True)
    result = net.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all('.se.' in key for key in result.missing_keys)
    with torch.no_grad():
        assert torch.equal(net(images()), plain(images()))
    other = build(name)
    add_se(other, reduction=4, identity_start=True)
    other.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(images()), net(images()))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*\.foo"'):
        other.load_state_dict({**net.state_dict(), list(net.state_dict())[-4] + '.foo': torch.zeros(1)}, strict=True)


@pytest.mark.parametrize('name', ['test_resnet', 'densenet121'])
@pytest.mark.parametrize('way', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_network_is_copied_and_pickled(name, way):
    net = build(name)
    places = add_se(net, reduction=4).places
    again = way(net)
    with torch.no_grad():
        assert torch.equal(again(images()), net(images()))
    assert remove_se(again) == list(places)
    assert len(added(net)) == len(places)


@pytest.mark.parametrize('convert', [
    convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d])
def test_gates_outlive_what_replaces_batch_norms(convert):
    net = torchvision.models.resnet18().eval()
    add_se(net)
    before = len(added(net))
    assert isinstance(net.layer1[0].bn2, Gated)
    expected = net(images())
    net = convert(net).eval()
    assert len(added(net)) == before == 8
    assert type(net.layer1[0].bn2.inner) is not nn.BatchNorm2d
    if convert is freeze_batch_norm_2d:  # synchronised ones run on GPUs
        torch.testing.assert_close(net(images()), expected)


def test_what_the_module_has_is_found_at_the_gated_one():
    net = torchvision.models.resnet18()
    add_se(net)
    assert net.layer1[0].bn2.num_features == 64
    assert net.layer1[0].bn2.weight is net.layer1[0].bn2.inner.weight
    with pytest.raises(AttributeError):
        _ = net.layer1[0].bn2.foo
    net.layer1[0].bn2.momentum = 0.5
    assert net.layer1[0].bn2.inner.momentum == 0.5
    net.layer1[0].bn2.weight = nn.Parameter(torch.ones(64))
    assert net.layer1[0].bn2.inner.weight.eq(1).all()


def test_what_is_put_on_a_gated_module_is_in_its_state():
    plain, net = timm.create_model('test_convnext').eval(), timm.create_model('test_convnext').eval()
    add_se(net, at='stages.*')
    net.stages[0].inner = Gated(net.stages[0].inner, nn.Identity())  # one around another
    for each in (plain, net):
        stage = each.stages[0]
        assert isinstance(stage, Gated) == (each is net)
        stage.prompt = nn.Parameter(torch.ones(3))
        stage.register_parameter('other', nn.Parameter(torch.ones(3)))
        stage.register_buffer('running', torch.ones(3))
        stage.register_buffer('passing', torch.ones(3), persistent=False)
        stage.adapter = nn.Linear(2, 2)
        stage.add_module('second', nn.Linear(2, 2))
        stage.register_buffer('_hidden', torch.ones(3))
        stage._hidden = stage._hidden + 1
        stage._weight = nn.Parameter(torch.ones(3))
        stage._child = None
        stage._child = nn.Linear(2, 2)
        assert stage._weight.eq(1).all()
        stage.passed, stage.taken = 3, nn.Parameter(torch.ones(3))
        del stage.passed, stage.taken
        assert not hasattr(stage, 'passed')
        assert not hasattr(stage, 'taken')
    assert [key for key in net.state_dict() if '.se.' not in key] == list(plain.state_dict())
    assert len(list(net.buffers())) == len(list(plain.buffers())) == 3
    assert net.state_dict()['stages.0._hidden'].eq(2).all()
    net.load_state_dict(net.state_dict())
    copied = copy.deepcopy(net)
    assert list(copied.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        assert torch.equal(copied(images()), net(images()))


@torch.no_grad()
def test_gated_module_is_compiled_and_its_forward_replaced():
    net = torchvision.models.resnet18().eval()
    add_se(net)
    gated, expected = net.layer1[0].bn2, net(images())
    gated.compile(backend='eager')
    torch.testing.assert_close(net(images()), expected)
    before, calls = gated.forward, []
    gated.forward = lambda x: calls.append(x) or before(x)
    torch.testing.assert_close(net(images()), expected)
    assert calls


@pytest.mark.parametrize('training', [True, False])
def test_mode_device_and_dtype_are_the_network_s(training):
    net = timm.create_model('test_resnet', device='meta', dtype=torch.bfloat16).train(training)
    add_se(net)
    assert {module.training for module in net.modules()} == {training}
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {('meta', torch.bfloat16)}
    net.to(torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_network_that_does_not_run_on_the_meta_device():
    class Net(Tiny):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1 else x

    assert list(add_se(Net(), 'first', reduction=2).places) == ['first.se']


def test_the_dry_run_leaves_buffers_and_random_numbers_alone():
    net = build().train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    add_se(net, identity_start=True)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items() if key in state)


def test_dry_run_calls_no_hooks_of_the_user():
    net, seen = build(), []
    net.layer1.register_forward_hook(lambda *args: seen.append(args))
    net.layer1.register_forward_pre_hook(lambda *args: seen.append(args))
    add_se(net)
    assert seen == []
    net(images())
    assert len(seen) == 2


def test_dry_run_leaves_random_numbers_alone():
    class Noisy(Tiny):
        def forward(self, x):
            return super().forward(x + torch.randn(1).item())  # which does not run on the meta device

    net = Noisy()
    torch.manual_seed(3)
    SqueezeExcite(8, 2)
    expected = torch.rand(1)
    torch.manual_seed(3)
    add_se(net, 'first', reduction=2)
    assert torch.equal(torch.rand(1), expected)


def test_batch_norms_that_are_in_evaluation_stay_so():
    net = torchvision.models.resnet18().train()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    add_se(net)
    assert not any(norm.training for norm in norms)
    assert all(gate.training for gate in added(net).values())
    remove_se(net)
    assert not any(norm.training for norm in norms)


def test_gate_has_the_dtype_of_the_maps():
    net = build('test_convnext').bfloat16()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    net.stem[1].float()
    expected = timm.create_model('test_convnext').bfloat16()
    add_se(expected, reduction=4)
    assert {gate.fc1.weight.dtype for gate in added(expected).values()} == {torch.bfloat16}

    class Mixed(Tiny):
        def __init__(self):
            super().__init__()
            self.first = Wrapped().double()

        def forward(self, x):
            return self.first(self.stem(x).double())

    mixed = Mixed()
    add_se(mixed, 'first', reduction=2)
    assert mixed(images(16)).dtype == mixed.first.se.fc1.weight.dtype == torch.float64


def test_gate_has_the_dtype_of_maps_that_a_block_casts():
    class Cast(nn.Sequential):
        def forward(self, x):
            assert torch.is_nonzero(self[0].weight.sum())  # on meta there is no autocast
            with torch.autocast('cpu', torch.bfloat16):
                return super().forward(x)

    class Float(nn.Sequential):
        def forward(self, x):
            return super().forward(x).float()

    for net, at, dtype in (
            (nn.Sequential(Cast(nn.Conv2d(3, 8, 1)), nn.Flatten()), '0', torch.bfloat16),
            (nn.Sequential(Float(nn.Conv2d(3, 8, 1)), nn.Flatten()).bfloat16(), '0', torch.float32)):
        add_se(net, at, reduction=2, input_size=(3, 16, 16))
        assert net[0].se.fc1.weight.dtype == dtype
        net(torch.rand(2, 3, 16, 16, dtype=net[0].inner[0].weight.dtype))


@pytest.mark.parametrize('needs_values', [True, False], ids=['values', 'meta'])
def test_gate_has_the_dtype_of_the_weights_where_maps_have_that_of_autocast(needs_values):
    class Cast(Tiny):
        def forward(self, x):
            if needs_values and not torch.is_nonzero(self.fc.weight.sum()):
                return x
            with torch.autocast('cpu', torch.bfloat16):
                return super().forward(x)

    net = Cast()
    with torch.autocast('cpu', torch.bfloat16):  # of the caller
        add_se(net, ['first', 'second'], reduction=2)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert net(images(16)).dtype == torch.bfloat16


@pytest.mark.parametrize('at', ['layer2', 'layer*.*', 'layer2.0.bn2', 'layer*'])
def test_gates_act_under_gradient_checkpointing_too(at):
    net, x = build('resnet18'), images()
    report = add_se(net, at, reduction=4)
    with torch.no_grad():
        expected = net(x)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net(x), expected)
    net.train()(x).sum().backward()
    assert all(gate.fc1.weight.grad is not None for gate in added(net).values())
    again = timm.create_model('resnet18').eval()
    again.set_grad_checkpointing()
    assert add_se(again, at, reduction=4).places == report.places


@pytest.mark.parametrize(('name', 'at'), [('test_vit', 'blocks'), ('mobilenetv2_035', 'blocks'), ('vgg11', 'features')])
def test_gates_after_sequences_are_in_the_intermediates(name, at):
    net = build(name)
    add_se(net, at, reduction=4)
    net.forward_intermediates(images(net.default_cfg['input_size'][-1], 1))[0].sum().backward()
    [gate] = added(net).values()
    assert gate.fc1.weight.grad is not None


def test_module_with_several_names_is_replaced_under_each():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torchvision.models.resnet18()
            self.stem = nn.Sequential(self.encoder.conv1, self.encoder.maxpool)
            self.block, self.norm = self.encoder.layer1[0], self.encoder.layer1[0].bn2

        def forward(self, x):
            return self.block(self.stem(x))

    for at in ('block', 'norm', ['norm', 'encoder.layer1.0.bn2'], ['block', 'encoder.layer1.0']):
        net = Two().eval()
        x, keys = images(), list(net.state_dict())
        with torch.no_grad():
            expected = net(x)
            assert len(add_se(net, at).places) == 1
            assert net.norm is net.encoder.layer1[0].bn2
            assert not torch.allclose(net(x), expected)
            remove_se(net)
            assert torch.equal(net(x), expected)
        assert list(net.state_dict()) == keys
        assert net.norm is net.encoder.layer1[0].bn2


@pytest.mark.parametrize('name', ['repvgg_a0', 'mobileone_s0', 'efficientvit_m0', 'shvit_s1', 'fastvit_t8'])
def test_gates_are_not_lost_when_layers_are_joined(name):
    net = build(name)
    add_se(net, reduction=4, identity_start=True)
    for gate in added(net).values():
        nn.init.ones_(gate.fc2.bias)
    x = images(net.default_cfg['input_size'][-1], 1)
    with torch.no_grad():
        expected = net(x)
        if name in ('fastvit_t8', 'efficientvit_m0'):  # their gates stand beside what is joined
            joined = reparameterize_model(net)
            assert len(added(joined)) == len(added(net))
            torch.testing.assert_close(joined(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            return
        with pytest.raises(ValueError, match='it would lose the gates that add_se put there'):
            reparameterize_model(net)
        remove_se(net)
        reparameterize_model(net)


def test_parts_of_layers_that_torch_computes_whole_are_refused():
    class Net(Tiny):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(ValueError, match='why: it is a part of a layer of torch that in evaluation does not call its'):
        add_se(Net(), 'layer.linear2', input_size=(3, 8, 8), reduction=2)
    net = Net().eval()
    add_se(net, 'layer', input_size=(3, 8, 8), reduction=2)
    with torch.no_grad():
        fast = net(images(8))
    torch.testing.assert_close(fast, net(images(8)))


def test_layout_of_a_cube_is_that_of_the_other_blocks_of_its_class():
    report = add_se(timm.create_model('maxvit_nano_rw_256', device='meta'), identity_start=True)
    layouts = {name: place.layout for name, place in report.places.items()}
    assert {layout for name, layout in layouts.items() if '.attn_' in name} == {'NHWC'}
    assert layouts['stages.0.blocks.0.attn_block.drop_path1'] == 'NHWC'  # of 64 x 64 x 64


def test_network_that_keeps_what_it_has_computed():
    """LeViT its attention biases, with their graph, from an evaluation until the next training."""
    net = timm.create_model('levit_128s', num_classes=5).eval()
    before = net(x := images(224)).detach()
    report = add_se(net, reduction=4, identity_start=True, inplace=False)
    assert len(report.places) == 20
    with torch.no_grad():
        assert torch.equal(report.net(x), before)
        torch.testing.assert_close(fold(net)(x), before, rtol=1e-4, atol=1e-4)


def test_numbers_of_numpy_are_a_size():
    report = add_se(Tiny(), 'first', input_size=(3, *np.array([16, 16])), reduction=2)
    assert json.loads(json.dumps(report.config))['input_size'] == [3, 16, 16]


def test_layout_of_a_cube_that_nothing_tells():
    net = Tiny()
    net.first = Wrapped()
    with pytest.raises(ValueError, match='of which it cannot be told which are which; another input_size may tell'):
        add_se(net, 'first', input_size=(3, 8, 8), reduction=2)
    [place] = add_se(net, 'first', input_size=(3, 16, 16), reduction=2).places.values()
    assert (place.layout, place.channels) == ('NCHW', 8)


@pytest.mark.parametrize(('name', 'gates'), [('vovnet39a', 0), ('repvgg_a0', 17), ('mobilenetv2_100', 10)])
def test_blocks_without_a_shortcut_are_left(name, gates):
    net = timm.create_model(name, device='meta')
    if not gates:
        with pytest.raises(ValueError, match='its block adds no shortcut'):
            add_se(net, reduction=4)
        return
    report = add_se(net, reduction=4)
    assert len(report.places) == gates
    assert set(report.left.values()) == {'its block adds no shortcut'}
    remove_se(net)
    again = add_se(net, {'repvgg_a0': 'RepVggBlock', 'mobilenetv2_100': 'InvertedResidual'}[name], reduction=4)
    assert again.places == report.places


def test_branches_with_stochastic_depth_of_their_own():
    report = add_se(timm.create_model('nextvit_small', device='meta'), reduction=4)
    assert {name.rpartition('.')[2] for name in report.places} == {
        'attn_drop_path', 'mhsa_drop_path', 'mhca_drop_path', 'mlp_drop_path'}


def test_rate_of_stochastic_depth_is_no_stochastic_depth():
    net = Tiny()
    net.drop_path_rate = None
    with pytest.raises(ValueError, match='it has no residual block'):
        add_se(net)


def test_messages_name_the_keys_of_the_state_dict():
    net = torchvision.models.resnet18()
    add_se(net)
    state = net.state_dict()
    del state['layer1.0.bn2.weight']
    with pytest.raises(RuntimeError, match=r'Missing key.*"layer1\.0\.bn2\.weight"'):
        net.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.0\.bn2\.weight:'):
        net.load_state_dict({**net.state_dict(), 'layer1.0.bn2.weight': torch.ones(1)})


def test_slot_has_its_old_module_again():
    net = timm.create_model('se_resnet20_cifar', se=False).eval()
    slot = net.layer1[0].se
    add_se(net)
    remove_se(net)
    assert net.layer1[0].se is slot
    assert not any(module.training for module in net.modules())


# Everything else goes on working


@pytest.mark.parametrize('name', [
    'test_resnet', *(pytest.param(name, marks=pytest.mark.slow) for name in ('test_convnext', 'dla46_c'))])
def test_compiles_exports_and_traces(name):
    net = build(name)
    add_se(net, reduction=4)
    x = images()
    with torch.no_grad():
        expected = net(x)
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend='eager')
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), expected)


@pytest.mark.parametrize('name', ['test_resnet', 'resnet18', 'test_convnext'])
def test_networks_with_a_place_for_attention_script(name):
    net = build(name)
    add_se(net, reduction=4)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(images()), net(images()), rtol=1e-4, atol=1e-5)


def test_networks_with_a_place_for_attention_get_the_fused_tail():
    net = build('resnet18')
    add_se(net, identity_start=True)
    assert len(se_timm.fuse(net, 'fused').replaced) == 8
    assert {choice.fused for choice in se_timm.explain(net.train()).values()} == {True}


@pytest.mark.parametrize('name', ['legacy_seresnet18', 'legacy_seresnext26_32x4d', 'legacy_senet154'])
def test_places_are_the_same_in_networks_that_are_fused(name):
    plain, fused = (timm.create_model(name, device='meta') for _ in range(2))
    se_timm.fuse(fused)
    expected, found = (se_timm.add_se(net, at='layer1.*').places for net in (plain, fused))
    assert found == expected


def test_se_goes_into_networks_that_are_fused():
    net = timm.create_model('resnet18')
    se_timm.fuse(net)
    assert len(add_se(net).places) == 8
    assert len(remove_se(net)) == 8


@pytest.mark.parametrize(('name', 'arguments'), [
    ('se_resnet18', {}), ('se_resnet20_cifar', {}), ('se_wrn16_8_cifar', {}), ('se_preresnet164_cifar', {}),
    ('se_shakeshake26_2x96d_cifar', {'width': 16})])
def test_plain_twins_of_this_package_become_its_networks(name, arguments):
    net, plain = timm.create_model(name, **arguments), timm.create_model(name, se=False, **arguments)
    add_se(plain)
    plain.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images()), net.eval()(images()))


@pytest.mark.parametrize('make', [
    lambda: build('test_resnet'), lambda: build('dla46_c'), lambda: torchvision.models.resnet18()])
def test_folds(make, randomise):
    net = randomise(make()).eval()
    add_se(net, reduction=4)
    with torch.no_grad():
        torch.testing.assert_close(se_timm.fold(net)(images()), net(images()), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings('ignore:Grad strides do not match bucket view strides')  # of 1x1 convolutions
def test_trains_under_ddp(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/ddp', rank=0, world_size=1)
    try:
        net = build('test_convnext').train()
        add_se(net, reduction=4, identity_start=True)
        parallel = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
        for _ in range(2):  # DDP refuses the second step if a parameter took no part in the first
            optimizer.zero_grad()
            parallel(images()).square().mean().backward()
            optimizer.step()
        assert all(gate.fc2.weight.any() for gate in added(net).values())
        with pytest.raises(ValueError, match='why: its parameters are spread'):
            add_se(parallel)
    finally:
        torch.distributed.destroy_process_group()


# Bad input


class Shared(Tiny):
    def __init__(self):
        super().__init__()
        self.second = self.first


class Broken(Tiny):
    def forward(self, x):
        raise RuntimeError('no such thing')


class Pairs(Tiny):
    def __init__(self):
        super().__init__()
        self.first = nn.Module()
        self.first.forward = lambda x: (x, x)

    def forward(self, x):
        return super().forward(x) if False else self.first(self.stem(x))


class Uncopied(Tiny):
    def __init__(self):
        super().__init__()
        self.kept = 2 * self.stem.weight  # no leaf of the graph


class Batches(Tiny):
    def __init__(self):
        super().__init__()
        self.first = Wrapped()

    def forward(self, x):
        maps = self.stem(x).unfold(2, 112, 112).permute(0, 2, 1, 4, 3).flatten(0, 1)  # halves of the images
        return self.first(maps)


class OfItsOwn(Tiny):
    def __init__(self):
        super().__init__()
        self.stem.se = nn.Identity()


@pytest.mark.parametrize(('make', 'arguments', 'given', 'why', 'do'), [
    (Tiny, dict(), 'add_se(Tiny)', 'it has no residual block of a kind that is known', 'name the modules'),
    (Tiny, dict(at='fisrt'), "at: 'fisrt'", 'no module of Tiny has such a name or class', 'did you mean first'),
    (Tiny, dict(at='Sequental'), "at: 'Sequental'", 'no module', 'did you mean Sequential'),
    (Tiny, dict(at=nn.BatchNorm2d), "at: 'torch.nn.modules.batchnorm.BatchNorm2d'", 'no module', 'or classes'),
    (Tiny, dict(at=['first', 'third']), "at: 'third'", 'no module', 'names as of named_modules()'),
    (Tiny, {}, 'add_se(Tiny)', 'no residual block', 'name the modules'),
    (Tiny, dict(at=[]), 'at: []', 'it names nothing', 'leave it out'),
    (Tiny, dict(at=Tiny), 'Tiny', 'it is the network itself', 'name modules within it'),
    (Tiny, dict(at='first'), 'reduction: 16 at first', 'a block of 8 channels', 'from 1 to 8'),
    (lambda: timm.create_model('ghostnet_050'), dict(), 'reduction: 16 at blocks.0.0.ghost2', '8 channels', 'to 8'),
    (Tiny, dict(at=5), 'at: 5', 'it is a int', 'give names of modules'),
    (Tiny, dict(at=['first', None]), 'at: None', 'it is a NoneType', 'give names of modules'),
    (Tiny, dict(at=nn.ReLU()), 'at: ReLU()', 'it is a ReLU', 'give names of modules'),
    (Tiny, dict(at='first', bias='no'), "bias: 'no'", 'it is a switch', 'True or False'),
    (Tiny, dict(at='first', inplace=0), 'inplace: 0', 'it is a switch', 'True or False'),
    (Tiny, dict(at='first', identity_start='yes'), "identity_start: 'yes'", 'it is a switch', 'True or False'),
    (Tiny, dict(at='first', input_size=224), 'input_size: 224', 'not channels, height and', '(3, 224, 224)'),
    (Uncopied, dict(at='first'), 'add_se(Uncopied)', 'it cannot be copied', 'take out what cannot be'),
    (Batches, dict(at='first'), 'at: first', 'whose first dimension is not the batch', 'name other modules'),
    (Shared, dict(at='first'), 'at: first.se', 'it runs 2 times in a forward pass', 'name other modules'),
    (Tiny, dict(at=['first', 'unused']), 'at: unused', 'it does not run in a forward pass', 'name other modules'),
    (Pairs, dict(at='first'), 'at: first', 'it gives a tuple, not a tensor', 'name other modules'),
    (Tiny, dict(at='fc'), 'at: fc', 'it gives (1, 4): neither maps', 'name other modules'),
    (OfItsOwn, dict(at='stem', reduction=2), 'at: stem', 'it has a child called se', 'name other modules'),
    (Broken, dict(at='first'), 'add_se(Broken)', 'it does not run on an image of (3, 224, 224) (RuntimeError: no such',
     'say input_size='),
    (Tiny, dict(at='first', input_size=(1, 8, 8)), 'add_se(Tiny)', 'not run on an image of (1, 8, 8)', 'input_size'),
    (Tiny, dict(at='first', input_size=(3, 8)), 'input_size: (3, 8)', 'not channels, height and', '(3, 224, 224)'),
    (Tiny, dict(at='first', input_size='big'), "input_size: 'big'", 'not channels, height and', '(3, 224, 224)'),
    (lambda: torch.jit.script(Tiny()), dict(at='first'), 'add_se(', 'TorchScript cannot be changed', 'before torch'),
    (lambda: torch.compile(Tiny()), dict(at='first'), 'add_se(OptimizedModule)', 'compiled', 'before torch'),
    (lambda: nn.DataParallel(Tiny()), dict(at='first'), 'add_se(DataParallel)', 'spread over', 'before that'),
    (Tiny, dict(at='first', kind='cbm'), "kind: 'cbm'", 'there is no such kind', 'did you mean cbam'),
    (Tiny, dict(at='first', reductoin=2), "argument of add_se: 'reductoin'", 'no such', 'did you mean reduction'),
    (Tiny, dict(at='first', kind='eca', identity_start=True), "identity_start=True with kind='eca'", 'do not begin',
     "take kind='se'"),
    (Tiny, dict(at='first', reduction=2, identity_start=True, excitation='hard_sigmoid'),
     "identity_start=True with excitation='hard_sigmoid'", 'no form', 'take one of sigmoid, tanh, relu'),
    (Tiny, dict(at='first', kind='eca', kernel=3), 'eca at first', 'timm cannot make it', 'correct its arguments'),
    (Tiny, dict(at='first', reduction=2, squeeze='average'), "squeeze: 'average'", 'no such squeeze', 'did you mean'),
])
def test_what_cannot_be_is_said_and_changes_nothing(make, arguments, given, why, do):
    net = make()
    before = shape_of(net)
    with pytest.raises(ValueError, match='\n  why: ') as caught:
        add_se(net, **arguments)
    first, second, third = str(caught.value).split('\n')
    assert given in first
    assert why in second
    assert do in third
    assert shape_of(net) == before


def test_compiled_in_place_is_refused():
    net = Tiny()
    net.compile()
    with pytest.raises(ValueError, match='it is compiled'):
        add_se(net, 'first')


def test_something_else_than_a_network_is_refused():
    with pytest.raises(ValueError, match=r"add_se\('resnet18'\)\n  why: it is a str, not an nn.Module"):
        add_se('resnet18')


def test_adding_twice_is_refused():
    net = build()
    add_se(net)
    before = shape_of(net)
    with pytest.raises(ValueError, match='why: it has 4 added gates already\n  do:  call remove_se first'):
        add_se(net)
    assert shape_of(net) == before


def test_removing_from_a_network_without_is_refused():
    with pytest.raises(ValueError, match=r'why: it has no gate that add_se put there\n  do:  .*se=False'):
        remove_se(timm.create_model('se_resnet20_cifar'))


class TwoArguments(nn.Module):
    """A block that is called with its input and a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x, scale):
        return x + scale * self.conv(x)


class CalledOneByOne(nn.Module):
    """A network that calls the members of a sequence with two arguments."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(TwoArguments(), TwoArguments())

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, 0.5)
        return x


def test_end_of_a_sequence_that_is_called_with_more_than_a_tensor_is_refused():
    with pytest.raises(ValueError, match=r'at: blocks\S*\n  why: it is called with more than a tensor'):
        add_se(CalledOneByOne(), at='blocks', input_size=(3, 32, 32))


def test_numbers_of_numpy_can_be_written_to_a_file():
    config = add_se(build(), reduction=np.int64(4), bias=False).config
    assert json.loads(json.dumps(config)) == config == {'kind': 'se', 'reduction': 4, 'bias': False}
    json.dumps(add_se(build(), kind='eca', kernel_size=np.int64(3)).config)


def test_attributes_of_the_user_stay():
    """Of the names under which add_se puts methods of its own."""
    net = build('repvgg_a0')
    net.head.fuse, net.stages[0][1].reparameterize, names = True, list, {'stages.0.1.identity.weight', 'head.fc.weight'}
    net.no_weight_decay = kept = lambda: names
    gated = add_se(net, ['RepVggBlock', 'stages.0.1.identity'], reduction=4, inplace=False).net
    assert gated.no_weight_decay() == {'stages.0.1.identity.inner.weight', 'head.fc.weight'}
    for stage in gated.stages[:3]:
        with pytest.raises(ValueError, match='it would lose the gates'):
            stage[1].reparameterize()
    gated = copy.deepcopy(gated)
    remove_se(gated)
    assert (gated.head.fuse, gated.no_weight_decay, gated.stages[0][1].reparameterize) == (True, kept, list)
    for before, after in zip(net.modules(), gated.modules(), strict=True):
        assert vars(before).keys() == vars(after).keys()


def test_methods_that_the_user_changes_meanwhile_stay_as_they_are():
    net = build('repvgg_a0')
    add_se(net, reduction=4)
    first, second = net.stages[0][1], net.stages[1][1]
    first.reparameterize = list
    del second.reparameterize
    remove_se(net)
    assert first.reparameterize is list
    assert all('reparameterize' not in vars(module) for module in net.modules() if module is not first)
    add_se(net, reduction=4)


def test_exemptions_of_the_user_are_not_asked_for():
    net = build()
    net.no_weight_decay = lambda model: {'fc.weight'}  # timm gives no argument
    add_se(net)
    remove_se(net)
    assert net.no_weight_decay(net) == {'fc.weight'}


def test_gate_of_a_block_with_whole_numbers_has_the_dtype_of_its_other_weights():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            assert torch.is_nonzero(self.conv.weight.sum())
            return self.conv(x)

    net = nn.Sequential(Packed(), nn.Flatten())
    with torch.autocast('cpu', torch.bfloat16):
        add_se(net, '0.conv', reduction=2, input_size=(3, 16, 16))
    assert net[0].conv.se.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize(('name', 'at'), [('efficientvit_m0', None), ('levit_128s', 'stages.*.blocks.*.attn')])
def test_exemptions_from_weight_decay_are_kept(name, at):
    """Of networks that name them as in the state dict; also of copies."""
    net = timm.create_model(name)

    def exempt(net):
        groups = create_optimizer_v2(net, 'adamw', lr=0.1, weight_decay=0.05).param_groups
        ids = {id(parameter) for group in groups if not group['weight_decay'] for parameter in group['params']}
        return {plain_name(net, key) for key, parameter in net.named_parameters()
                if id(parameter) in ids and '.se.' not in key}

    before = exempt(net)
    assert any('attention_biases' in key for key in before)
    gated = add_se(net, at, reduction=4, inplace=False).net
    for each in (gated, copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert exempt(each) == before
        assert all(each.get_parameter(key) is not None for key in each.no_weight_decay())
    remove_se(gated)
    assert 'no_weight_decay' not in vars(gated)
    assert exempt(gated) == before


# Of the tables


@pytest.mark.parametrize('kind', KINDS)
def test_blocks_with_any_kind_of_attention_are_left(kind):
    net = build('test_resnet')
    gates = added(add_se(net, kind=kind).net).values()
    assert {type(gate).__name__ for gate in gates} <= set(GATES)


@pytest.mark.parametrize(('name', 'child', 'gates'), [
    ('inception_resnet_v2', 'conv2d', 40), ('dla60_res2net', 'bn3', 16)])
def test_ends_of_the_blocks_that_are_known(name, child, gates):
    places = add_se(timm.create_model(name, device='meta')).places
    assert len(places) == gates
    assert {place.rpartition('.')[2] for place in places} == {child}


def test_gate_is_on_the_device_of_its_block():
    net = build()
    net.layer4.to('meta')
    add_se(net)
    assert {parameter.device.type for parameter in net.layer4.parameters()} == {'meta'}
    assert {parameter.device.type for parameter in net.layer3.parameters()} == {'cpu'}


def test_block_whose_stochastic_depth_is_none_is_known():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.drop_path = None

        def forward(self, x):
            out = self.conv(x)
            return x + (out if self.drop_path is None else self.drop_path(out))

    net = nn.Sequential(Block(), nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    assert list(add_se(net, input_size=(3, 16, 16), reduction=1).places) == ['0.drop_path']
    remove_se(net)
    assert net[0].drop_path is None


def test_convolution_over_a_sequence_is_refused():
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 1))
    with pytest.raises(ValueError, match='neither maps'):
        add_se(net, at='1', reduction=2, input_size=(3, 16, 16))


def test_gate_is_in_the_mode_of_its_block():
    net = build().train()
    net.layer1.eval()
    add_se(net, kind='strip')
    assert not any(module.training for module in net.layer1.modules())
    assert all(module.training for module in net.layer2.modules())


def test_unexpected_keys_are_named_as_in_the_state_dict():
    net = torchvision.models.resnet18()
    add_se(net)
    result = net.load_state_dict({**net.state_dict(), 'layer1.0.bn2.foo': torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ['layer1.0.bn2.foo']


def test_child_in_place_of_a_hidden_attribute_is_found():
    net = timm.create_model('test_convnext')
    add_se(net, at='stages.*')
    stage = net.stages[0]
    stage._child = None
    stage._child = nn.Linear(2, 2)
    assert isinstance(stage._child, nn.Linear)


@pytest.mark.parametrize('training', [True, False])
def test_gated_modules_are_in_the_mode_of_the_network(training):
    net = torchvision.models.resnet18().train(training)
    add_se(net)
    assert {module.training for module in net.modules()} == {training}
