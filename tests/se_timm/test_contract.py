"""timm's model contract, over every name that we register: what its users and its tools rely on."""
import copy
import functools
import re

import pytest
import timm
import torch
from timm.layers import get_notrace_modules
from timm.models import FeatureInfo
from timm.models.resnet import ResNet
from timm.optim import create_optimizer_v2

from se_timm import SEResNet, SEResNetCifar
from se_timm.paper import NETWORKS
from se_timm.placement import PLACEMENTS
from se_timm.se_resnet import SEBottleneck
from se_timm.squeeze_excite import EXCITATIONS, SQUEEZES

NAMES = timm.list_models('se_*')
CIFAR = timm.list_models('se_*_cifar')
# timm's VGG has hidden layers in its head, and no groups but its layers
VGG = timm.list_models(module='se_vgg')
# timm's Inception networks: group_matcher gives the same groups whether they are to be coarse or not; convolutions
# without padding make maps up to 5 pixels shorter, and need images of 75 pixels
INCEPTION = timm.list_models(module='se_inception')
WITHOUT_CHECKPOINTING = [*VGG, *INCEPTION]
SIZES = {**dict.fromkeys(CIFAR, 32), **dict.fromkeys(INCEPTION, 107)}  # of images, elsewhere 64; 107 ends in 2x2 pixels
LEAST = dict.fromkeys(INCEPTION, 75)
SHORT = dict.fromkeys(INCEPTION, 5)
# Tracing and compiling take a time that grows with the number of blocks, running one that grows with the parameters
SHALLOW = ('se_resnet18', 'se_resnet50', 'se_resnet20_cifar')
VARIANTS = [  # of what a basic block can be; the first of each argument's values is its default
    {}, *(dict(squeeze=squeeze) for squeeze in SQUEEZES[1:]),
    *(dict(excitation=excitation) for excitation in EXCITATIONS[1:]),
    *(dict(placement=placement) for placement in PLACEMENTS[1:-1]), dict(stages=(2,)), dict(bias=False), dict(se=False),
    dict(shortcut='padding'), dict(drop_rate=0.1, drop_path_rate=0.1),
]


def is_quick(name):
    """Return whether a network runs fast enough for the tests that always run."""
    return NETWORKS[name].parameters < 30e6 and name not in [*INCEPTION, 'se_shakeshake26_2x96d_cifar']


def over(names, quick):
    """Parametrise over `names`, those that are not `quick` as slow."""
    return pytest.mark.parametrize(
        'name', [pytest.param(name, marks=[] if quick(name) else [pytest.mark.slow]) for name in names])


# torch's own: script is deprecated and yet part of timm's contract, and it warns of torch's own GraphModule
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning'),
]
over_all_on_meta = pytest.mark.parametrize('name', NAMES)
over_all = over(NAMES, is_quick)
over_all_compiled = over(NAMES, lambda name: name in SHALLOW)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@functools.lru_cache(maxsize=4)
def prototype(name, arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **dict(arguments)).eval()


def build(name, **arguments):
    """Return a network of one's own in eval mode; the copy saves most of the initialisation's time."""
    return copy.deepcopy(prototype(name, tuple(sorted(arguments.items()))))


def size_of(name):
    return SIZES.get(name, 64)


def images(name, batch=2, channels=3, size=None):
    size = size or (size_of(name), size_of(name))
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


# By module, where it is not as in timm's ResNet: how many feature maps a network offers, the names of its blocks and of
# its stages, and how many groups there are beside the stages
LEVELS = {'se_cifar': 4, 'se_preresnet': 4, 'se_shakeshake': 4, 'se_shufflenet': 4, 'se_vgg': 6}
BLOCKS = {'se_vgg': r'features\.\d+', 'se_mobilenet': r'blocks\.\d+\.\d+', 'se_bn_inception': r'inception_\d\w',
          'se_inception': r'Mixed_\d\w|repeat(?:_\d)?\.\d+|block8'}
STAGES = {'se_mobilenet': r'blocks\.\d+', 'se_bn_inception': r'inception_\d'}
OTHERS = {'se_bn_inception': 3}  # stem, second convolution and classifier
WITHOUT_DEPTH = dict.fromkeys(  # no stochastic depth
    ['se_bn_inception', 'se_inception', 'se_mobilenet', 'se_shakeshake', 'se_shufflenet', 'se_vgg'], True)


def of_module(table, name, default):
    return table.get(timm.models.model_entrypoint(name).__module__.rpartition('.')[2], default)


def at_least(name, size):
    return tuple(max(side, LEAST.get(name, 1)) for side in size)


def levels(name):
    return of_module(LEVELS, name, 5)


def named(pattern, keys):
    """Return the modules that have parameters and whose names begin with `pattern`, in the order of the network."""
    matches = [re.match(pattern, key) for key in keys]
    return list(dict.fromkeys(match.group() for match in matches if match))


def classifier_of(name):
    return timm.get_pretrained_cfg(name).classifier


def flat(key):
    """Return a key that is the same where timm's features took a module out of a sequence."""
    return key.replace('_', '.')


def assert_reduced(x, taps, reductions, short):
    """Compare the sizes of feature maps with the rounded-up ones, of which they may be `short` pixels short."""
    for tap, reduction in zip(taps, reductions, strict=True):
        assert all(0 <= -(-side // reduction) - got <= short
                   for side, got in zip(x.shape[2:], tap.shape[2:], strict=True))


def assert_all_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Features


# timm's ways of taking features, and where each keeps the network's own modules
FORMS = {'list': '', 'dict': '', 'hook': 'body.', 'fx': 'graph_module.', 'getter': 'model.'}


@pytest.mark.parametrize('form', FORMS)
@over_all
def test_features_only_gives_the_intermediates_in_every_form(name, form):
    net = build(name)
    features = timm.create_model(name, features_only=True, feature_cls=form).eval()
    head = (f'{classifier_of(name)}.', 'pre_logits.')
    kept = {flat(key): value for key, value in net.state_dict().items() if not key.startswith(head)}
    keys = {flat(key.removeprefix(FORMS[form])): key for key in features.state_dict()}
    assert keys.keys() == kept.keys()
    features.load_state_dict({keys[key]: value for key, value in kept.items()}, strict=True)
    x = images(name)
    with torch.no_grad():
        outputs = features(x)
        expected = net.forward_intermediates(x, intermediates_only=True)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert len(outputs) == levels(name)
    assert_all_equal(outputs, expected)
    assert features.feature_info.channels() == [output.shape[1] for output in outputs]
    assert_reduced(x, outputs, features.feature_info.reduction(), SHORT.get(name, 0))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18'])
def test_features_only_of_chosen_levels(name, form):
    features = timm.create_model(name, features_only=True, feature_cls=form, out_indices=(1, 3)).eval()
    outputs = features(images(name))
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    info = FeatureInfo(build(name).feature_info, (1, 3))
    assert [output.shape[1] for output in outputs] == info.channels() == features.feature_info.channels()


@over_all
def test_last_intermediate_is_forward_features(name):
    net, x = build(name), images(name)
    with torch.no_grad():
        final, taps = net.forward_intermediates(x)
        assert len(taps) == len(net.feature_info) == levels(name)
        assert torch.equal(final, net.forward_features(x))
        assert torch.equal(final, taps[-1])
        assert_all_equal(net.forward_intermediates(x, indices=2, intermediates_only=True), taps[-2:])
        assert_all_equal(net.forward_intermediates(x, indices=[0, 2], intermediates_only=True), [taps[0], taps[2]])
        net.set_grad_checkpointing(name not in WITHOUT_CHECKPOINTING)
        assert_all_equal(net.forward_intermediates(x, intermediates_only=True), taps)


@over_all
def test_stopping_early_ends_at_the_tap(name):
    net, x = build(name), images(name)
    with torch.no_grad():
        taps = net.forward_intermediates(x, intermediates_only=True)
        for index, tap in enumerate(taps):
            final, selected = net.forward_intermediates(x, indices=[index], stop_early=True)
            assert_all_equal(selected, [tap])
            if index:  # timm's ResNet has its max pool behind tap 0
                assert torch.equal(final, tap)


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18'])
def test_intermediates_come_as_nchw_only(name):
    with pytest.raises(AssertionError, match='NCHW'):
        build(name).forward_intermediates(images(name), output_fmt='NHWC')


@over_all
def test_pruned_network_ends_at_the_tap_and_uses_every_parameter(name):
    net, x = build(name), images(name)
    with torch.no_grad():
        taps = net.forward_intermediates(x, intermediates_only=True)
    for index in range(1, levels(name)):
        pruned = copy.deepcopy(net)
        assert pruned.prune_intermediate_layers([index]) == [index]
        features = pruned.forward_features(x)
        assert torch.equal(features, taps[index])
        assert pruned.num_features == features.shape[1]
        features.sum().backward()
        assert [key for key, parameter in pruned.named_parameters() if parameter.grad is None] == []


@over_all
def test_pruning_that_keeps_the_head_keeps_the_logits(name):
    net, x = build(name), images(name)
    with torch.no_grad():
        expected = net(x)
        net.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(net(x), expected)


# The head


@over_all
def test_classifier_is_reset_and_removed(name):
    net, x = build(name), images(name)
    with torch.no_grad():
        features, pooled = net.forward_features(x), net.forward_head(net.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, net.head_hidden_size)
        net.reset_classifier(7)
        assert net(x).shape == (2, 7)
        assert net.get_classifier().out_features == net.num_classes == 7
        net.reset_classifier(0)
        assert torch.equal(net(x), pooled)
        net.reset_classifier(0, '')
        assert torch.equal(net(x), net.pre_logits(features) if name in VGG else features)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax'])
@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18'])
def test_resetting_without_a_pooling_keeps_it(name, pool):
    net = timm.create_model(name, global_pool=pool).eval()
    features = net.forward_features(images(name))
    pooled = net.forward_head(features, pre_logits=True)
    net.reset_classifier(5, None)
    assert torch.equal(net.forward_head(features, pre_logits=True), pooled)
    assert net.head_hidden_size == pooled.shape[1]
    assert net(images(name)).shape == (2, 5)
    net.reset_classifier(5, 'avg')
    assert net.head_hidden_size == net.num_features


@over_all_on_meta
def test_resetting_keeps_device_dtype_mode_and_frozen_parameters(name):
    net = timm.create_model(name, device='meta', dtype=torch.bfloat16).train()
    net.requires_grad_(False)
    net.reset_classifier(3)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {('meta', torch.bfloat16)}
    assert all(module.training for module in net.modules())
    assert {key for key, p in net.named_parameters() if p.requires_grad} == {
        f'{classifier_of(name)}.weight', f'{classifier_of(name)}.bias'}


# Training


@over_all_on_meta
def test_layer_decay_takes_every_parameter_once_and_grows_towards_the_head(name):
    net = timm.create_model(name, device='meta')
    optimizer = create_optimizer_v2(net, opt='sgd', lr=1.0, momentum=0.9, weight_decay=1e-4, layer_decay=0.75)
    scale = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    parameters = dict(net.named_parameters())
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(parameters) == len(scale)
    scales = {key: scale[id(p)] for key, p in parameters.items()}
    assert scales[f'{classifier_of(name)}.weight'] == 1 == scales[f'{classifier_of(name)}.bias']
    assert scales[f'{net.default_cfg["first_conv"]}.weight'] == min(scales.values())
    blocks = named(of_module(BLOCKS, name, r'layer\d+\.\d+'), scales)
    by_block = [{value for key, value in scales.items() if key.startswith(f'{block}.')} for block in blocks]
    assert all(len(values) == 1 for values in by_block)  # a block's SE learns at its block's rate
    assert [min(values) for values in by_block] == sorted(min(values) for values in by_block)
    assert len({min(values) for values in by_block}) == len(blocks)


@over_all_on_meta
def test_biases_and_batch_norms_have_no_weight_decay(name):
    net = timm.create_model(name, device='meta')
    optimizer = create_optimizer_v2(net, opt='sgd', lr=1.0, weight_decay=1e-4)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert {key for key, p in net.named_parameters() if id(p) in decayed} == {
        key for key, p in net.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize('name', [name for name in NAMES if name not in [*VGG, *INCEPTION]])
def test_coarse_groups_are_the_stages(name):
    net = timm.create_model(name, device='meta')
    groups = timm.models.group_parameters(net, net.group_matcher(coarse=True), reverse=True)
    stages = named(of_module(STAGES, name, r'layer\d+'), groups)
    by_stage = [{value for key, value in groups.items() if key.startswith(stage)} for stage in stages]
    assert all(len(values) == 1 for values in by_stage)
    assert len(set(groups.values())) == len(stages) + of_module(OTHERS, name, 2)  # stem and classifier


def gradients(net, x):
    torch.manual_seed(0)  # for dropout
    outputs = net(x)
    outputs.square().sum().backward()
    return outputs.detach(), {key: parameter.grad for key, parameter in net.named_parameters()}


@pytest.mark.parametrize('name', WITHOUT_CHECKPOINTING)
def test_gradient_checkpointing_is_refused_where_timm_has_none(name):
    with pytest.raises(AssertionError, match='checkpointing not supported'):
        timm.create_model(name, device='meta').set_grad_checkpointing()


@over([name for name in NAMES if name not in WITHOUT_CHECKPOINTING], is_quick)
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(name):
    net, again, x = build(name).train(), build(name).train(), images(name)
    outputs, expected = gradients(net, x)
    again.set_grad_checkpointing()
    assert again.grad_checkpointing
    outputs_again, given = gradients(again, x)
    assert torch.equal(outputs_again, outputs)
    for key, gradient in expected.items():
        torch.testing.assert_close(given[key], gradient)
    again.set_grad_checkpointing(False)
    assert not again.grad_checkpointing


def assert_every_parameter_has_a_gradient(net, x):
    outputs, given = gradients(net.train(), x)
    assert outputs.isfinite().all()
    assert [key for key, gradient in given.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in given.values())


@over_all
def test_every_parameter_gets_a_gradient(name):
    assert_every_parameter_has_a_gradient(build(name), images(name))


@pytest.mark.parametrize('arguments', VARIANTS, ids=str)
def test_every_parameter_of_every_variant_gets_a_gradient(arguments):
    assert_every_parameter_has_a_gradient(build('se_resnet20_cifar', **arguments), images('se_resnet20_cifar', 4))


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_every_parameter_of_a_bottleneck_gets_a_gradient_in_every_placement(placement):
    assert_every_parameter_has_a_gradient(build('se_resnet50', placement=placement), images('se_resnet50'))


@pytest.mark.parametrize('name', ['se_resnet18.in1k', 'se_resnet50.v1_5'])
def test_every_parameter_gets_a_gradient_under_the_other_tags(name):
    assert_every_parameter_has_a_gradient(timm.create_model(name), images(name))


# Devices, dtypes, inputs


@over_all_on_meta
def test_device_and_dtype_reach_every_tensor(name):
    net = timm.create_model(name, device='meta', dtype=torch.bfloat16).eval()
    tensors = [*net.parameters(), *net.buffers()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}
    outputs = net(torch.empty(2, *net.default_cfg['input_size'], device='meta', dtype=torch.bfloat16))
    assert (outputs.shape, outputs.dtype) == ((2, net.num_classes), torch.bfloat16)


@over_all_on_meta
def test_device_context_reaches_every_tensor(name):
    with torch.device('meta'):
        net = timm.create_model(name)
    assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {'meta'}


@over_all_on_meta
@pytest.mark.parametrize('channels', [1, 4])
def test_input_channels_are_the_users(name, channels):
    net = timm.create_model(name, in_chans=channels, device='meta').eval()
    assert net.in_chans == channels
    assert net(torch.empty(2, channels, size_of(name), size_of(name), device='meta')).shape == (2, net.num_classes)


@over_all_on_meta
@pytest.mark.parametrize('size', [(33, 47), (224, 193), (320, 320)])
def test_other_sizes_are_taken(name, size):
    net = timm.create_model(name, device='meta').eval()
    x = torch.empty(1, 3, *at_least(name, size), device='meta')
    assert net(x).shape == (1, net.num_classes)
    reductions = [info['reduction'] for info in net.feature_info]
    # the paper's max pool has no padding: in ceil mode it can be a pixel short of the rounded-up size
    taps = net.forward_intermediates(x, intermediates_only=True)
    assert_reduced(x, taps, reductions, SHORT.get(name, 1))


@over(NAMES, lambda name: NETWORKS[name].parameters < 12e6)
@pytest.mark.parametrize('argument', ['drop_rate', 'drop_path_rate', 'drop_block_rate'])
def test_what_is_dropped_is_dropped_in_training_only_or_refused(name, argument):
    net, x = build(name, num_classes=10), images(name, 4)
    if (argument == 'drop_block_rate' and not isinstance(net, ResNet)) or (
            argument == 'drop_path_rate' and of_module(WITHOUT_DEPTH, name, False)):
        with pytest.raises((TypeError, ValueError), match=argument):
            build(name, num_classes=10, **{argument: 0.5})
        return
    dropping = build(name, num_classes=10, **{argument: 0.5})
    dropping.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(dropping(x), net(x))
        torch.manual_seed(1)
        expected = net.train()(x)
        torch.manual_seed(1)
        assert not torch.equal(y := dropping.train()(x), expected)
    assert y.isfinite().all()


@over_all
def test_one_channel_and_odd_size_run(name):
    with torch.no_grad():
        logits = build(name, in_chans=1)(images(name, 2, 1, at_least(name, (65, 47))))
    assert logits.shape == (2, 10 if name in CIFAR else 1000)
    assert logits.isfinite().all()


@over_all
def test_an_image_alone_has_the_logits_it_has_in_a_batch(name):
    net, x = build(name).double(), images(name, 3).double()  # 152 layers at their initial values are ill-conditioned
    with torch.no_grad():
        torch.testing.assert_close(net(x[1:2]), net(x)[1:2])


@pytest.mark.parametrize('name', SHALLOW)
def test_channels_last_and_bfloat16_run(name):
    net = build(name).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    x = images(name).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    with torch.no_grad():
        logits, expected = net(x), build(name)(images(name))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


# Scripted, traced, exported, compiled


def assert_scripts(net, x):
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(x), net(x), rtol=1e-4, atol=1e-5)


class Tracer(torch.fx.Tracer):
    """Leaves whole what timm says cannot be traced: the hidden layers of VGG."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, tuple(get_notrace_modules())) or super().is_leaf_module(m, module_qualified_name)


def trace(net):
    return torch.fx.GraphModule(net, Tracer().trace(net))


def assert_traces(net, x):
    """Trace in both modes; the train mode's graph must give a gradient to every parameter."""
    traced = trace(net.eval())
    with torch.no_grad():
        assert torch.equal(traced(x), net(x))
        assert torch.equal(torch.jit.script(traced)(x), net(x))
    assert_every_parameter_has_a_gradient(trace(net.train()), x)


def assert_exports(net, x):
    """Export with a free batch size and run with another."""
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    more = torch.cat([x, x.flip(0), x])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), net(more), rtol=1e-4, atol=1e-5)


def assert_close(given, expected, tolerance, name=None):
    """Compare by the largest value: fused kernels round otherwise, and small values are sums of large ones."""
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * expected.abs().max().item(), msg=name)


def assert_compiles(net, x, backend='eager'):
    """Compile without graph breaks, forward and backward, in both modes."""
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True, backend=backend)(x), net(x), 1e-5)
    net, x = net.double().train(), x.double()  # within the compiler the tails are fused, which rounds otherwise
    expected, wanted = gradients(copy.deepcopy(net), x)
    outputs, given = gradients(torch.compile(net, fullgraph=True, backend=backend), x)
    assert_close(outputs, expected, 1e-5)
    # the compiled module's names have a prefix
    for (key, gradient), expected_gradient in zip(given.items(), wanted.values(), strict=True):
        assert_close(gradient, expected_gradient, 1e-5, key)
    torch.compiler.reset()
    for parameter in net.parameters():  # torch.compile keeps them, gigabytes of a large network
        parameter.data, parameter.grad = parameter.new_empty(0), None


COMPILERS = [assert_scripts, assert_traces, assert_exports, assert_compiles]
QUICK_COMPILERS = [*COMPILERS[:-1], pytest.param(assert_compiles, marks=pytest.mark.slow)]


@pytest.mark.parametrize('check', QUICK_COMPILERS)
@over_all_compiled
def test_every_network_scripts_traces_exports_and_compiles(name, check):
    check(build(name), images(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', [*SHALLOW, 'se_mobilenetv1_100'])
def test_network_compiles_with_inductor(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))  # what an interrupted run left is not to be read
    # float64: gradients of a few pixels a channel, in float32, differ by more than an error would
    assert_compiles(build(name).double(), images(name).double(), backend='inductor')


def shallow_variant(arguments):
    """Return a network of three blocks with these arguments: enough to trace each of them."""
    return SEResNetCifar((1, 1, 1), **arguments).eval()


@pytest.mark.parametrize('check', COMPILERS)
def test_default_variant_scripts_traces_exports_and_compiles(check):
    check(shallow_variant({}), images('se_resnet20_cifar'))


@pytest.mark.parametrize('check', QUICK_COMPILERS)
@pytest.mark.parametrize('arguments', VARIANTS[1:-1], ids=str)
def test_every_variant_scripts_traces_exports_and_compiles(arguments, check):
    check(shallow_variant(arguments), images('se_resnet20_cifar'))


@pytest.mark.parametrize('check', COMPILERS)
def test_place_inside_a_bottleneck_scripts_traces_exports_and_compiles(check):
    net = SEResNet(SEBottleneck, (1, 1, 1, 1), placement='3x3').eval()
    check(net, images('se_resnet50'))


@pytest.mark.parametrize('check', COMPILERS)
@pytest.mark.parametrize(('name', 'part'), [
    ('se_bn_inception', 'inception_3a'), ('se_bn_inception', 'inception_3c'), ('se_inception_v3', 'Mixed_6a'),
    ('se_inception_resnet_v2', 'repeat.0'),
])
def test_part_of_a_deep_network_scripts_traces_exports_and_compiles(name, part, check):
    module = build(name).get_submodule(part)
    check(module, torch.randn(2, next(module.parameters()).shape[1], 8, 8))


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_preresnet164_cifar'])
def test_head_that_does_not_fit_the_pruned_network_goes(name):
    net = timm.create_model(name, num_classes=5)
    net.prune_intermediate_layers([0, 1], prune_head=False)
    assert net.num_classes == 0
    assert net(torch.randn(2, 3, 64, 64)).dim() == 4


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_preresnet164_cifar', 'se_wrn16_8_cifar'])
def test_norms_of_stem_and_end_learn_at_the_rate_of_what_is_before_them(name):
    net = timm.create_model(name, device='meta')
    groups = create_optimizer_v2(net, opt='sgd', lr=1.0, weight_decay=1e-4, layer_decay=0.75).param_groups
    scale = {id(parameter): group['lr_scale'] for group in groups for parameter in group['params']}
    last = list(net.layer3.parameters())[-1]
    for key, parameter in net.named_parameters():
        if key.startswith('bn1.'):
            assert scale[id(parameter)] == min(scale.values())
        if key.startswith('norm.'):
            assert scale[id(parameter)] == scale[id(last)] < 1


def test_intermediates_are_computed_again_under_gradient_checkpointing():
    net, calls = timm.create_model('se_resnet20_cifar', num_classes=2).train(), []
    net.set_grad_checkpointing()
    net.layer2[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    net.forward_intermediates(torch.randn(2, 3, 32, 32, requires_grad=True))[0].sum().backward()
    assert len(calls) == 2
