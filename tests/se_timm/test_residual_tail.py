"""The fused tail in our networks: what it computes, where it is taken, and where the modules are."""
import copy
import functools

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import se_timm
from se_timm import SqueezeExcite, explain, fuse, prune_se, residual_tail
from se_timm.fused import operators
from se_timm.placement import PLACEMENTS
from se_timm.residual_blocks import Tail
from se_timm.se_resnet import SEBasicBlock, SEBottleneck
from se_timm.squeeze_excite import EXCITATIONS, SQUEEZES

NAMES = timm.list_models(module=['se_resnet', 'se_cifar'])
SMALL = ('se_resnet20_cifar', 'se_resnet18', 'se_resnet50')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compute the passes in plain torch, which takes no time to compile."""
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)


@pytest.fixture
def calls(monkeypatch):
    """Return a list that grows with each tail that is fused."""
    taken, original = [], residual_tail.fused_tail

    def counted(*args, **options):
        taken.append(1)
        return original(*args, **options)

    monkeypatch.setattr(residual_tail, 'fused_tail', counted)
    return taken


def randomise(net):
    """Give the batch norms scales and shifts: the initial ones, zeros among them, hide errors."""
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1 and not name.endswith(('fc1.bias', 'fc2.bias')):
            nn.init.normal_(parameter, 1.0 if name.endswith('weight') else 0.0, 0.2)
    return net


@functools.lru_cache(maxsize=2)
def prototype(name, arguments):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=10, **dict(arguments)))


def build(name, backend='reference', dtype=torch.float64, **arguments):
    net = copy.deepcopy(prototype(name, tuple(sorted(arguments.items())))).to(dtype).train()
    fuse(net, backend)
    return net


def images(name, dtype=torch.float64, batch=3):
    size = 16 if name.endswith('cifar') else 40
    return torch.randn(batch, 3, size, size, dtype=dtype)


def step(net, x):
    torch.manual_seed(1)  # drop path
    y = net(x)
    F.cross_entropy(y, torch.arange(len(x))).backward()
    return y.detach(), {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())


def assert_same_step(one, other, x, tolerance=1e-8):
    torch.testing.assert_close(step(one, x), step(other, x), rtol=tolerance, atol=tolerance)


# What it computes


@pytest.mark.parametrize('name', SMALL)
def test_step_is_that_of_the_modules(name, uncompiled, calls):
    one, other = build(name), build(name, 'fused')
    assert_same_step(one, other, images(name))
    assert len(calls) == len(explain(other))


@pytest.mark.parametrize('arguments', [
    *(dict(excitation=excitation) for excitation in EXCITATIONS), dict(bias=False), dict(se=False), dict(stages=(2,)),
    dict(placement='pre'), dict(drop_path_rate=0.5), dict(reduction=4), dict(shortcut='padding'),
], ids=str)
def test_arguments_of_the_block(arguments, uncompiled, calls):
    name = 'se_resnet20_cifar'
    assert_same_step(build(name, **arguments), build(name, 'fused', **arguments), images(name),
                     1e-5 if arguments.get('excitation') == 'hard_sigmoid' else 1e-8)
    assert len(calls) == 9


@pytest.mark.parametrize('arguments', [
    *(dict(squeeze=squeeze) for squeeze in SQUEEZES[1:]), dict(placement='post'), dict(placement='identity'),
    dict(excitation='gelu')], ids=str)
def test_what_cannot_be_fused_is_computed_by_the_modules(arguments, uncompiled, calls):
    name = 'se_resnet20_cifar'
    net = build(name, 'fused', **arguments)
    assert_same_step(build(name, **arguments), net, images(name))
    assert not calls
    assert all(not choice.fused and choice.reason for choice in explain(net).values())


def bottleneck(placement='standard', **arguments):
    block = SEBottleneck(32, 8, **arguments).double()
    block.insert_se(functools.partial(SqueezeExcite, reduction=4, dtype=torch.float64), placement)
    return randomise(block).train()


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_placements_of_a_bottleneck(placement, uncompiled, calls):
    block, x = bottleneck(placement), torch.randn(3, 32, 6, 5, dtype=torch.float64)
    other = copy.deepcopy(block)
    other.backend = 'fused'
    y, expected, dy = other(x), block(x), torch.randn_like(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, list(other.parameters()), dy),
                               torch.autograd.grad(expected, list(block.parameters()), dy))
    assert len(calls) == (0 if placement in ('post', 'identity') else 1)


def states(norm):
    """Put a batch norm into each state that it can be in."""
    yield 'frozen', norm.eval()
    for name, attribute, value in (
            ('cumulative', 'momentum', None), ('momentum', 'momentum', 0.3), ('held', 'track_running_stats', False)):
        norm = copy.deepcopy(norm).train()
        setattr(norm, attribute, value)
        yield name, norm
    norm = copy.deepcopy(norm).train()
    norm.track_running_stats, norm.momentum, norm.num_batches_tracked = True, None, None
    yield 'cumulative without a count', norm
    for affine, track in ((False, True), (True, False), (False, False)):
        other = nn.BatchNorm2d(norm.num_features, affine=affine, track_running_stats=track, dtype=torch.float64)
        yield f'affine={affine}, track={track}', other
        yield f'affine={affine}, track={track}, eval', copy.deepcopy(other).eval()


def test_batch_norm_in_every_state(uncompiled, calls):
    block = bottleneck()
    every = list(states(block.bn3))
    for _, norm in every:
        block.bn3 = norm
        one, other = copy.deepcopy(block), copy.deepcopy(block)
        other.backend = 'fused'
        for _ in range(3):
            x = torch.randn(3, 32, 6, 5, dtype=torch.float64) * 2 + 1
            dy = torch.randn_like(x)
            y, expected = other(x), one(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y, list(other.parameters()), dy),
                                       torch.autograd.grad(expected, list(one.parameters()), dy))
        torch.testing.assert_close(dict(other.named_buffers()), dict(one.named_buffers()))
    assert len(calls) == 3 * len(every) == 33


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, uncompiled, calls):
    name = 'se_resnet20_cifar'
    one, other = build(name, dtype=torch.float32), build(name, 'fused', torch.float32)
    x = images(name, torch.float32, batch=16)
    with torch.autocast('cpu', dtype):
        y, expected = other(x), one(x)
    assert y.dtype == expected.dtype == dtype
    exact = build(name, dtype=torch.float64)(x.double())
    assert (y - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()
    assert len(calls) == 9


def test_evaluation_is_that_of_the_modules_to_the_bit(calls):
    for name in SMALL:
        one, other = build(name, dtype=torch.float32).eval(), build(name, 'fused', torch.float32).eval()
        x = images(name, torch.float32)
        assert torch.equal(one(x), other(x))
    assert not calls


def test_networks_take_auto_by_themselves():
    net = timm.create_model('se_resnet20_cifar').train()
    assert {choice.fused for choice in explain(net).values()} == {False}
    assert {choice.fused for choice in explain(net, compiled=True).values()} == {True}
    assert all('torch.compile' in choice.reason for choice in explain(net).values())


@pytest.mark.parametrize('name', NAMES)
def test_every_tail_of_every_network_can_be_fused(name):
    with torch.device('meta'):
        net = timm.create_model(name)
    assert fuse(net, 'fused').left == {}
    tails = [block.tail() for block in net.modules() if isinstance(block, residual_tail.ResidualTail)]
    assert tails
    assert all(residual_tail.structure_problem(tail) == '' for tail in tails)


def test_further_relu_before_se_is_left_to_the_modules():
    net = timm.create_model('se_resnet18.in1k')
    assert all('ReLU' in reason for reason in fuse(net, 'fused').left.values())


# Where the modules compute


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class OtherReference(SEBasicBlock):
    def reference(self, x):
        return 2 * super().reference(x)


class OfAnother(OtherReference):
    pass


class OtherBody(SEBasicBlock):
    def body(self, x):
        return 2 * super().body(x)


CHANGES = {
    'norm': lambda block: setattr(block, 'bn2', nn.GroupNorm(2, 16)),
    'subclass of batch norm': lambda block: setattr(block, 'bn2', Doubled(16)),
    'activation': lambda block: setattr(block, 'act2', nn.GELU()),
    'hook of the norm': lambda block: block.bn2.register_forward_hook(lambda *_: None),
    'hook of the gate': lambda block: block.se.gate.register_forward_hook(lambda *_: None),
    'hook before the gate': lambda block: block.se.fc1.register_forward_pre_hook(lambda *_: None),
    'forward of its own': lambda block: setattr(block.bn2, 'forward', lambda x: x),
    'other layer of the gate': lambda block: setattr(block.se, 'fc2', nn.Sequential(block.se.fc2, nn.Tanh())),
    'parametrised gate': lambda block: nn.utils.parametrizations.weight_norm(block.se.fc1),
    'gradient hook': lambda block: block.bn2.register_full_backward_hook(lambda *_: None),
    'hook of an identity': lambda block: setattr(block, 'se', nn.Identity()) or block.se.register_forward_hook(
        lambda module, inputs, output: 2 * output),
    'another reference': lambda block: setattr(block, '__class__', OtherReference),
    'another body': lambda block: setattr(block, '__class__', OtherBody),
    'gradient hook before': lambda block: block.bn2.register_full_backward_pre_hook(lambda *_: None),
    'made of another reference': lambda block: setattr(block, '__class__', OfAnother),
}


class OwnTail(SEBasicBlock):
    def body(self, x):
        return super().body(x)

    def tail(self):
        return super().tail()


def test_class_that_says_its_own_tail_is_fused():
    net = timm.create_model('se_resnet20_cifar').train()
    net.layer1[1].__class__ = OwnTail
    assert fuse(net, 'fused').left == {}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_block_is_computed_by_its_modules(change, calls, uncompiled):
    block = prototype('se_resnet20_cifar', ()).layer1[1]
    block = copy.deepcopy(block).float().train()
    block.backend = 'fused'
    CHANGES[change](block)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert torch.equal(copy.deepcopy(block)(x), copy.deepcopy(block).reference(x))
    assert not calls


def test_shortcut_with_a_forward_of_its_own(calls, uncompiled):
    class Half(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / 2

    block = build('se_resnet20_cifar', 'fused').layer2[0]
    block.downsample = Half(*block.downsample)
    other = copy.deepcopy(block)
    other.backend = 'reference'
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), other(x))
    assert calls  # the branch is fused all the same


def test_hooks_are_called(uncompiled):
    net, seen = build('se_resnet20_cifar', 'fused'), []
    net.layer2[0].se.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net(images('se_resnet20_cifar'))
    assert seen == [(3, 32, 8, 8)]


def test_drop_path_draws_as_the_module(uncompiled):
    x = torch.randn(64, 4, 3, 3)
    for drop_path in (DropPath(0.4), DropPath(0.4, scale_by_keep=False), DropPath(0.0), DropPath(0.4).eval()):
        tail = Tail(nn.Identity(), nn.BatchNorm2d(4), None, drop_path, None, None)
        torch.manual_seed(3)
        expected = drop_path(tail.norm(x)) + x
        torch.manual_seed(3)
        torch.testing.assert_close(residual_tail.residual_tail(tail, x, x), expected)


def test_unknown_backend():
    with pytest.raises(ValueError, match='did you mean fused'):
        fuse(timm.create_model('se_resnet20_cifar'), 'fusd')


def test_empty_batch_is_refused(uncompiled):
    net = build('se_resnet20_cifar', 'fused')
    with pytest.raises(ValueError, match='it holds no pixels'):
        net(images('se_resnet20_cifar')[:0])


# Derivatives that the fused function has not


def network_of(backend):
    net = build('se_resnet20_cifar', backend)
    for module in net.modules():  # functions of one image, without a change of state
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net, images('se_resnet20_cifar', batch=2)


def test_func_grad_is_computed_by_the_modules(uncompiled, calls):
    found, expected = (torch.func.grad(lambda value, net=net: net(value).square().sum())(x)
                       for net, x in [network_of('fused')] for net in (net, network_of('reference')[0]))
    assert torch.equal(found, expected)
    assert not calls


def test_func_jvp_is_computed_by_the_modules(uncompiled):
    net, x = network_of('fused')
    dx = torch.randn_like(x)
    _, found = torch.func.jvp(net, (x,), (dx,))
    expected = (net(x + 1e-6 * dx) - net(x - 1e-6 * dx)) / 2e-6
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dual_numbers_are_computed_by_the_modules(uncompiled):
    net, x = network_of('fused')
    dx = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, dx))).tangent
    _, expected = torch.func.jvp(net, (x,), (dx,))
    torch.testing.assert_close(found, expected)


def test_vmap_is_computed_by_the_modules(uncompiled):
    net, x = network_of('fused')
    found = torch.func.vmap(net)(x[:, None])
    torch.testing.assert_close(found[:, 0], net(x))


def test_second_derivative_is_a_clear_error(uncompiled):
    net, x = network_of('fused')
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="take the backend 'reference'"):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


# Under torch's transformations of programs


@pytest.mark.parametrize('record', [
    torch.fx.symbolic_trace, torch.jit.script, lambda net: torch.jit.trace(net, images('se_resnet20_cifar')),
    lambda net: torch.export.export(net, (images('se_resnet20_cifar'),), strict=False).module(),
], ids=['fx', 'script', 'trace', 'export'])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_recorded_networks_are_the_modules(record, calls, uncompiled):
    net = build('se_resnet20_cifar', 'fused')
    x = images('se_resnet20_cifar')
    recorded = record(copy.deepcopy(net))
    calls.clear()
    torch.testing.assert_close(recorded(x), build('se_resnet20_cifar')(x))
    assert not calls


def test_modes_see_operators(uncompiled):
    net, x = build('se_resnet20_cifar', 'fused'), images('se_resnet20_cifar')
    graph = make_fx(lambda x: net(x))(x)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count('se_timm.tail_apply.default') == len(explain(net))


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_gradient_checkpointing(use_reentrant, uncompiled, calls):
    name = 'se_resnet20_cifar'
    one, other = build(name), build(name, 'fused')
    other.set_grad_checkpointing()
    x = images(name)
    found, expected = step(other, x), step(one, x)
    torch.testing.assert_close(found[:2], expected[:2])
    assert len(calls) >= 2 * 9 - 3


def test_copies_and_pickles_keep_the_backend(tmp_path):
    net = build('se_resnet20_cifar', 'fused')
    torch.save(net, tmp_path / 'net.pt')
    for other in (copy.deepcopy(net), torch.load(tmp_path / 'net.pt', weights_only=False)):
        assert {choice.fused for choice in explain(other).values()} == {True}


@pytest.mark.slow
def test_compiled_training_is_that_of_the_modules():
    name = 'se_resnet20_cifar'
    one, other = build(name, dtype=torch.float32), build(name, 'auto', torch.float32)
    other.compile(fullgraph=True)  # in place: the parameters keep their names
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        x = images(name, torch.float32)
        torch.testing.assert_close(step(other, x)[:2], step(one, x)[:2], rtol=1e-3, atol=1e-4)
        for net in (one, other):
            net.zero_grad()
    torch.testing.assert_close(dict(other.named_buffers()), dict(one.named_buffers()), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.slow
def test_no_network_reaches_the_recompile_limit():
    """One graph for all steps and all blocks of a network."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for name in NAMES:
            torch._dynamo.reset()  # another network of the same class is another graph of the same code
            net = timm.create_model(name, num_classes=10).train()
            assert all(choice.fused for choice in explain(net, compiled=True).values())
            graphs = []
            net.compile(fullgraph=True, backend=lambda graph, _, graphs=graphs: graphs.append(graph) or graph)
            for _ in range(2):
                net(torch.randn(2, 3, 32, 32))
            assert len(graphs) == 1, name
            fused = [node for node in graphs[0].graph.nodes if 'autograd_function_apply' in str(node.target)]
            assert len(fused) == len(explain(net)), name


@pytest.mark.slow
def test_two_hundred_steps_give_the_losses_of_the_modules(uncompiled):
    """In float64 to rounding; in float32 as far from these as the modules' own float32."""
    losses = {}
    for backend, dtype in (('reference', torch.float64), ('fused', torch.float64),
                           ('reference', torch.float32), ('fused', torch.float32)):
        net = build('se_resnet20_cifar', backend, dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(0)
        history = losses[backend, dtype] = []
        for _ in range(200):
            x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
            labels = (x.mean((2, 3)) @ torch.linspace(-30, 30, 3, dtype=dtype) + 5).round().long().clamp(0, 9)
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    exact, fused64, modules32, fused32 = (torch.tensor(each, dtype=torch.float64) for each in losses.values())
    torch.testing.assert_close(fused64, exact, rtol=1e-6, atol=1e-6)
    assert exact[-20:].mean() < exact[:20].mean()
    assert (fused32 - exact).abs().mean() <= 2 * (modules32 - exact).abs().mean() + 1e-3


def test_public_names():
    assert {'explain', 'fuse'} <= set(se_timm.__all__)


def test_further_relu_stays_where_its_se_was_taken_out():
    """Of timm's weights for se_resnet18."""
    torch.manual_seed(0)
    net = prune_se(timm.create_model('se_resnet18.in1k', num_classes=5), 'SE_5_*').net.double().train()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    outputs = {}
    for backend in ('reference', 'fused'):
        copied = copy.deepcopy(net)
        fuse(copied, backend)
        outputs[backend] = copied(x)
    torch.testing.assert_close(outputs['fused'], outputs['reference'])


def test_explanation_as_text_has_a_line_for_each_reason():
    net = timm.create_model('se_resnet18', num_classes=5)
    assert str(explain(net)).count('layer') == 8
    assert len(str(explain(net)).splitlines()) == 1
    net.layer4[1].backend = 'reference'
    assert str(explain(net)).splitlines()[1] == "by the modules, the backend is 'reference': layer4.1"
    assert 'fuse' in str(explain(timm.create_model('seresnet18')))
