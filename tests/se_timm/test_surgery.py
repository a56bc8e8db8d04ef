"""`fuse` in timm's own networks: the same step, the same keys, and a report of what was left."""
import copy
import pickle

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite as MobileSE
from torch import nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from se_timm import add_se, explain, find_se, fuse, remove_se
from se_timm.fused import operators

# timm's network -> residual blocks that are fused, and a word of the reason for what is left
NETWORKS = {
    'seresnet50': (16, None), 'legacy_seresnet50': (16, None),
    'legacy_seresnext26_32x4d': (8, None), 'resnet18': (8, None), 'resnetrs50': (16, None),
    'regnety_002': (13, 'not at the end'), 'regnetx_002': (13, None), 'legacy_seresnet18': (0, 'ReLU'),
    'ecaresnet26t': (0, 'EcaModule'),
}
LARGE = {'seresnext101d_32x8d': 33, 'senet154': 50, 'legacy_senet154': 50}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compute in plain torch, which takes no time to compile."""
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)


def build(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, zero_init_last=False) if 'legacy' not in name else (
        timm.create_model(name, num_classes=10, drop_rate=0.0))
    for parameter_name, parameter in net.named_parameters():
        if parameter.ndim == 1 and '.fc' not in parameter_name:
            nn.init.normal_(parameter, 1.0 if parameter_name.endswith('weight') else 0.0, 0.2)
    return net.double().train()


def step(net):
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = net(x)
    F.cross_entropy(y, torch.arange(3)).backward()
    return y.detach(), {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())


@pytest.mark.parametrize(('name', 'part', 'arguments'), [
    ('se_resnet50', 'layer1', {'se': False, 'layers': (1, 1, 1, 1)}), ('legacy_seresnet50', 'layer1', {}),
    ('regnetx_002', 's1', {'zero_init_last': False}), ('regnety_002', 's1', {'zero_init_last': False}),
    ('seresnet50', 'layer1', {'layers': (1, 1, 1, 1), 'zero_init_last': False})])
def test_hooks_of_all_modules_are_called_and_have_their_effect(name, part, arguments):
    stage = timm.create_model(name, **arguments).double().train().get_submodule(part)
    x = torch.randn(2, next(stage.parameters()).shape[1], 16, 16, dtype=torch.float64)
    for path, _ in stage.named_modules():
        by_modules, fused = copy.deepcopy(stage), copy.deepcopy(stage)
        for net in (by_modules, fused):
            net.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)
        fuse(fused, 'fused', recompute=True)
        torch.testing.assert_close(fused(x), by_modules(x), rtol=1e-9, atol=1e-9, msg=path)


@pytest.mark.parametrize('function', [fuse, explain, find_se, remove_se])
def test_what_is_no_network_is_refused(function):
    with pytest.raises(ValueError, match=rf"^{function.__name__}\('abc'\)\n  why: it is a str, not an nn.Module"):
        function('abc')


def test_recomputation_is_a_switch():
    with pytest.raises(ValueError, match="recompute: 'no'\n  why: it is a switch"):
        fuse(build('resnet18'), 'fused', recompute='no')


def test_gate_at_the_last_convolution_stays_there():
    net = timm.create_model('regnetx_002', zero_init_last=False).s1.train()
    add_se(net, at='b1.conv3', input_size=(32, 8, 8))
    other, x = copy.deepcopy(net), torch.randn(4, 32, 8, 8)
    assert fuse(other, 'fused').left == {'b1': 'its last convolution is a Gated'}
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize('name', NETWORKS)
def test_step_is_that_of_timm(name):
    blocks, reason = NETWORKS[name]
    net, other = build(name), build(name)
    report = fuse(other, 'fused')
    assert len(report.replaced) == blocks
    assert bool(report.left) == (reason is not None)
    assert all(reason in text for text in report.left.values())
    assert sum(choice.fused for choice in explain(other).values()) == blocks
    assert list(other.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(step(other), step(net), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('name', LARGE)
def test_large_networks(name):
    with torch.device('meta'):
        report = fuse(timm.create_model(name))
    assert (len(report.replaced), report.left) == (LARGE[name], {})


def test_report_is_readable():
    with torch.device('meta'):
        report = str(fuse(timm.create_model('regnety_002')))
    assert report.splitlines() == [
        'fused: 13 residual blocks',
        'left: s1.b1.se, s2.b1.se, s3.b1.se and 10 more: '
        'this SE is not at the end of a residual branch, right after its batch norm']


def test_report_names_se_of_efficientnet_and_torchvision():
    net = nn.Sequential(timm.create_model('resnet18').layer1[0], MobileSE(64), SqueezeExcitation(64, 16))
    assert list(fuse(net).left) == ['1', '2']


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
@pytest.mark.parametrize('name', ['seresnet50', 'legacy_seresnet50', 'regnety_002', 'resnet18'])
def test_fused_networks_are_networks_of_timm(name):
    net = build(name).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = net(x)
    fuse(net, 'fused')
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.jit.script(net)):
        assert torch.equal(other(x), expected)


def test_fusing_again_changes_the_backend():
    net = build('resnet18')
    first = fuse(net, 'fused')
    assert fuse(net, 'reference').replaced == first.replaced
    assert not any(choice.fused for choice in explain(net).values())


def test_fusing_again_changes_what_is_computed_again():
    net = build('resnet50')
    for recompute in (True, False):
        fuse(net, 'fused', recompute=recompute)
        assert {net.get_submodule(name).recompute for name in explain(net)} == {recompute}


def test_network_without_residual_blocks():
    with pytest.raises(ValueError, match=r'fuse\(VGG\)\n  why: it has no residual block'):
        fuse(timm.create_model('vgg11', num_classes=0))


def test_class_that_is_made_of_a_fused_one_is_read_as_that():
    """As torch's `fully_shard` makes them."""
    net, x = timm.create_model('seresnet18', num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        fuse(net)
        for block in list(net.layer1):
            cls = type(block)
            block.__class__ = type(f'FSDP{cls.__name__}', (type('Mixin', (), {}), cls), {})
        assert torch.equal(net(x), expected)
        assert explain(net)['layer1.0'] == explain(net)['layer2.0']


@pytest.mark.parametrize('name', ['resnet18', 'seresnet50', 'regnetx_002'])
def test_branches_are_dropped_as_by_timm(name, uncompiled):
    net = timm.create_model(name, drop_path_rate=0.9, zero_init_last=False).double().train()
    part = net.s4 if 'regnet' in name else net.layer4
    other = copy.deepcopy(part)
    fuse(other, 'fused')
    x = torch.randn(8, next(part.parameters()).shape[1], 8, 8, dtype=torch.float64)
    outputs = []
    for each in (part, other):
        torch.manual_seed(1)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs)


def test_block_without_a_shortcut_is_left(uncompiled):
    net = timm.create_model('regnetz_005', num_classes=2, act_layer='relu').train()
    report = fuse(net, 'fused')
    assert [name for name, reason in report.left.items() if reason == 'it has no shortcut'] == [
        f's{stage}.b1' for stage in (1, 2, 3, 4)]
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 2)
