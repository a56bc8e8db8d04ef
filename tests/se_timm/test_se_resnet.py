"""SE-ResNet, SE-ResNeXt, SENet-154 and the CIFAR networks: sizes, arguments, topologies, tags, and what is refused."""
import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn
from torch.nn import functional as F

import se_timm
from se_timm.cost import cost
from se_timm.paper import NETWORKS
from se_timm.placement import PLACEMENTS
from se_timm.se_cifar import PaddingShortcut
from se_timm.se_resnet import SE_DEFAULTS, SEBasicBlock, SEBottleneck, check_weights_fit
from se_timm.squeeze_excite import EXCITATIONS, SQUEEZES

IMAGENET = timm.list_models(module='se_resnet')
CIFAR = timm.list_models(module='se_cifar')
TAGGED = timm.list_models(module=['se_resnet', 'se_cifar'], include_tags=True)
IMAGENET_TAGGED = timm.list_models(module='se_resnet', include_tags=True)

# one of each kind of block and topology that is cheap enough to be built with real weights many times
SMALL = ('se_resnet20_cifar', 'se_resnet18', 'se_resnet50', 'se_resnext50_32x4d')
BASIC = ('se_resnet20_cifar', 'se_resnet18')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(name, **arguments):
    """Build without memory or initialisation: for what is a matter of structure."""
    return timm.create_model(name, device='meta', **arguments)


def se_blocks(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, se_timm.SqueezeExcite)}


def count(modules, suffix=''):
    return sum(p.numel() for m in modules for name, p in m.named_parameters() if name.endswith(suffix))


def images(net, size=64, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, net.in_chans, size, size, generator=generator)


# Sizes


def test_every_registered_network_is_in_the_papers_table_and_back():
    assert {*IMAGENET, *CIFAR} <= set(NETWORKS)
    assert [name for name in NETWORKS if not timm.is_model(name)] == []


@pytest.mark.parametrize('name', [*IMAGENET, *CIFAR])
def test_parameters_are_exact(name):
    assert count([on_meta(name)]) == NETWORKS[name].parameters


@pytest.mark.parametrize('name', [name for name in IMAGENET if NETWORKS[name].gflops])
def test_multiply_adds_are_the_papers(name):
    paper = NETWORKS[name]
    with_se, plain = cost(on_meta(name)), cost(on_meta(name, se=False))
    assert with_se.multiply_adds / 1e9 == pytest.approx(paper.gflops, rel=0.005)
    assert plain.multiply_adds / 1e9 == pytest.approx(paper.plain_gflops, rel=0.005)
    assert 0 < with_se.multiply_adds - plain.multiply_adds < 0.01 * plain.multiply_adds


def test_excitation_without_squeeze_costs_what_table_16_says():
    assert cost(on_meta('se_resnet50', squeeze='none')).multiply_adds / 1e9 == pytest.approx(4.27, rel=0.005)


@pytest.mark.parametrize(('name', 'plain'), [
    ('se_resnet20_cifar', 272_474), ('se_resnet56_cifar', 855_770), ('se_resnet110_cifar', 1_730_714),
])
def test_plain_cifar_networks_have_the_published_size(name, plain):
    assert count([on_meta(name, se=False)]) == plain


# The plain twin


@pytest.mark.parametrize('name', [*IMAGENET, *CIFAR])
def test_plain_twin_is_the_network_less_its_se(name):
    net, plain = on_meta(name), on_meta(name, se=False)
    assert se_blocks(net)
    assert not se_blocks(plain)
    without = {key: value.shape for key, value in net.state_dict().items() if '.se.' not in key}
    assert {key: value.shape for key, value in plain.state_dict().items()} == without
    assert count([plain]) == NETWORKS[name].parameters - count(se_blocks(net).values())


@pytest.mark.parametrize(
    ('name', 'topology'),
    [(name, topology) for name in SMALL for topology in ([None] if name in CIFAR else ['paper', 'v1.5'])])
def test_network_with_open_gates_is_its_plain_twin(name, topology, randomise):
    net = randomise(timm.create_model(name, topology=topology))
    for se in se_blocks(net).values():
        nn.init.zeros_(se.fc2.weight)
        nn.init.constant_(se.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    plain = timm.create_model(name, topology=topology, se=False).eval()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    x = images(net)
    assert torch.equal(net(x), plain(x))


# Arguments: weights are counted as in the paper's Eq. 5, (2 / r) sum N C^2


@pytest.mark.parametrize(('reduction', 'weights', 'biases'), [
    (2, 20_119_552, 22_656), (4, 10_059_776, 18_880), (8, 5_029_888, 16_992), (16, 2_514_944, 16_048),
    (32, 1_257_472, 15_576),
])
def test_reduction_adds_the_weights_of_table_10(reduction, weights, biases):
    modules = se_blocks(on_meta('se_resnet50', reduction=reduction)).values()
    assert (len(modules), count(modules, 'weight'), count(modules, 'bias')) == (16, weights, biases)
    assert count(se_blocks(on_meta('se_resnet50', reduction=reduction, bias=False)).values()) == weights


@pytest.mark.parametrize('reduction', [2, 4, 8, 16, 32])
def test_reduction_of_a_basic_block_network(reduction):
    blocks = [64, 64, 128, 128, 256, 256, 512, 512]
    modules = se_blocks(on_meta('se_resnet18', reduction=reduction, bias=False)).values()
    assert count(modules) == sum(2 * channels * (channels // reduction) for channels in blocks)


@pytest.mark.parametrize(('name', 'placement', 'weights'), [
    ('se_resnet50', 'standard', 2_514_944), ('se_resnet50', 'post', 2_514_944), ('se_resnet50', 'identity', 2_514_944),
    ('se_resnet50', 'pre', 1_991_168), ('se_resnet50', '3x3', 157_184),
    ('se_resnet18', 'standard', 87_040), ('se_resnet18', 'post', 87_040), ('se_resnet18', 'identity', 87_040),
    ('se_resnet18', 'pre', 54_784),
])
def test_placement_decides_the_width_of_se(name, placement, weights):
    net = on_meta(name, placement=placement, bias=False)
    assert count(se_blocks(net).values()) == weights
    assert count([net]) - count([on_meta(name, se=False)]) == weights


@pytest.mark.parametrize(('stages', 'weights'), [
    ((2,), 24_576), ((3,), 131_072), ((4,), 786_432), ((5,), 1_572_864), ([2, 3, 4], 942_080),
    ((2, 3, 4, 5), 2_514_944),
])
def test_stages_carry_se_as_in_table_13(stages, weights):
    modules = se_blocks(on_meta('se_resnet50', stages=stages, bias=False))
    assert {name.split('.')[0] for name in modules} == {f'layer{stage - 1}' for stage in stages}
    assert count(modules.values()) == weights


@pytest.mark.parametrize(('stages', 'weights'), [((2,), 96), ((3,), 384), ((4,), 1536), ((2, 4), 1632)])
def test_stages_of_a_cifar_network(stages, weights):
    modules = se_blocks(on_meta('se_resnet20_cifar', stages=stages, bias=False))
    assert {name.split('.')[0] for name in modules} == {f'layer{stage - 1}' for stage in stages}
    assert count(modules.values()) == weights


@pytest.mark.parametrize('excitation', EXCITATIONS)
@pytest.mark.parametrize('squeeze', SQUEEZES)
@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18', 'se_resnet50'])
def test_squeeze_and_excitation_reach_every_block(name, squeeze, excitation):
    modules = se_blocks(on_meta(name, squeeze=squeeze, excitation=excitation)).values()
    expected = type(se_timm.SqueezeExcite(16, excitation=excitation).gate)
    assert modules
    assert {(module.squeeze, type(module.gate)) for module in modules} == {(squeeze, expected)}


# Placement: each block against the paper's Fig. 5 and Table 15, composed by hand


def residual_branch(block, x, after_3x3):
    x = F.relu(block.bn1(block.conv1(x)))
    if isinstance(block, SEBasicBlock):
        return block.bn2(block.conv2(x))
    return block.bn3(block.conv3(after_3x3(F.relu(block.bn2(block.conv2(x))))))


COMPOSED = {
    'standard': lambda se, branch, shortcut, x: F.relu(se(branch(x)) + shortcut(x)),
    'pre': lambda se, branch, shortcut, x: F.relu(branch(se(x)) + shortcut(x)),
    'post': lambda se, branch, shortcut, x: se(F.relu(branch(x) + shortcut(x))),
    'identity': lambda se, branch, shortcut, x: F.relu(branch(x) + se(shortcut(x))),
    '3x3': lambda se, branch, shortcut, x: F.relu(branch(x, se) + shortcut(x)),
}


def compose(block, placement, x):
    def branch(x, after_3x3=nn.Identity()):  # noqa: B008  (stateless)
        return residual_branch(block, x, after_3x3)

    return COMPOSED[placement](block.se, branch, block.downsample or nn.Identity(), x)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('index', [0, 1], ids=['projection', 'identity'])
@pytest.mark.parametrize(
    ('name', 'placement'),
    [(name, placement) for name in SMALL for placement in PLACEMENTS if placement != '3x3' or name not in BASIC])
def test_block_computes_what_its_placement_means(name, placement, index, training, randomise):
    net = randomise(timm.create_model(name, placement=placement, stages=(3,))).train(training)
    block = net.layer2[index]
    assert (block.downsample is None) == bool(index)
    x = torch.randn(2, block.conv1.in_channels, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = compose(copy.deepcopy(block), placement, x)
    assert torch.equal(block(x.clone()), expected)
    same_width = {'standard', 'post', 'identity'}  # here SE fits in each of these places: it must be told apart
    for other in same_width - {placement} if placement in same_width else ():
        assert not torch.equal(compose(copy.deepcopy(block), other, x), expected)


def test_further_relu_stands_before_se_under_the_tag_of_the_weights_that_need_it(randomise):
    block = randomise(timm.create_model('se_resnet18.in1k')).layer2[1]
    x = torch.randn(2, 128, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x.clone()), F.relu(block.se(F.relu(residual_branch(block, x, nn.Identity()))) + x))


# Topology and tags


def strides(net, stage):
    block = getattr(net, f'layer{stage - 1}')[0]
    return block.conv1.stride[0], block.conv2.stride[0]


def is_paper(tagged):
    return tagged.split('.')[1] in ('in1k', 'untrained')


@pytest.mark.parametrize('tagged', IMAGENET_TAGGED)
def test_tag_decides_the_topology(tagged):
    net = on_meta(tagged)
    in_1x1 = is_paper(tagged) and isinstance(net.layer1[0], SEBottleneck) and tagged.startswith('se_resnet')
    in_first = in_1x1 or isinstance(net.layer1[0], SEBasicBlock)
    assert [strides(net, stage) for stage in (3, 4, 5)] == [(2, 1) if in_first else (1, 2)] * 3
    assert strides(net, 2) == (1, 1)
    pool = net.maxpool
    expected = (3, 2, 0, True) if is_paper(tagged) else (3, 2, 1, False)
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == expected
    assert f'{net.default_cfg["architecture"]}.{net.default_cfg["tag"]}' == tagged


@pytest.mark.parametrize('tagged', IMAGENET_TAGGED)
def test_tag_does_not_change_the_layout_of_the_weights(tagged):
    shapes = {key: value.shape for key, value in on_meta(tagged).state_dict().items()}
    assert shapes == {key: value.shape for key, value in on_meta(tagged.split('.')[0]).state_dict().items()}


@pytest.mark.parametrize('name', IMAGENET)
def test_topology_without_tag_is_the_papers(name):
    net = on_meta(name)
    assert net.maxpool.ceil_mode
    assert net.default_cfg['tag'] in ('in1k', 'untrained')
    assert on_meta(name, topology='paper').default_cfg['tag'] == net.default_cfg['tag']
    assert on_meta(name, topology='auto').default_cfg['tag'] == net.default_cfg['tag']


@pytest.mark.parametrize('name', IMAGENET)
def test_topology_argument_takes_the_tag_without_weights(name):
    net = on_meta(name, topology='v1.5')
    assert net.default_cfg['tag'] == 'v1_5'
    assert (net.maxpool.padding, net.maxpool.ceil_mode) == (1, False)


@pytest.mark.parametrize('name', ['se_resnet18', 'se_resnet50'])
def test_last_batch_norm_of_a_branch_starts_at_zero_in_v15_only(name):
    last = 'bn2' if name == 'se_resnet18' else 'bn3'
    paper, v15 = timm.create_model(name), timm.create_model(f'{name}.v1_5')
    assert getattr(paper.layer1[0], last).weight.eq(1).all()
    assert getattr(v15.layer1[0], last).weight.eq(0).all()


def test_senet154_is_built_as_the_appendix_says():
    net = on_meta('se_senet154')
    assert [layer.out_channels for layer in net.conv1 if isinstance(layer, nn.Conv2d)] == [64, 64, 128]
    assert [len(getattr(net, f'layer{index}')) for index in (1, 2, 3, 4)] == [3, 8, 36, 3]
    for stage, (inner, outer) in enumerate([(128, 256), (256, 512), (512, 1024), (1024, 2048)], start=1):
        block = getattr(net, f'layer{stage}')[0]
        assert (block.conv1.out_channels, block.conv2.out_channels, block.conv3.out_channels) == (inner, outer, outer)
        assert block.conv2.groups == 64
        assert block.downsample[0].kernel_size == ((1, 1) if stage == 1 else (3, 3))
        assert block.se.fc1.out_channels == outer // 16


@pytest.mark.parametrize('tagged', TAGGED)
def test_dropout_is_senet154s_alone(tagged):
    assert on_meta(tagged).drop_rate == (0.2 if tagged.startswith('se_senet154.') else 0)


@pytest.mark.parametrize('tagged', TAGGED)
def test_drop_rate_is_the_users_where_given(tagged):
    assert on_meta(tagged, drop_rate=0.4).drop_rate == 0.4


# The CIFAR networks' own


def test_padding_shortcut_takes_every_second_pixel_and_pads_channels():
    x = torch.randn(2, 16, 9, 8)
    y = PaddingShortcut(16, 32)(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert y.shape == (2, 32, 5, 4)


def test_padding_shortcut_has_no_parameters():
    projection, padding = (on_meta('se_resnet20_cifar', se=False, shortcut=name) for name in ('projection', 'padding'))
    removed = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert count([projection]) - count([padding]) == removed


def test_padding_shortcut_is_added_to_the_branch(randomise):
    net = randomise(timm.create_model('se_resnet20_cifar', shortcut='padding'))
    block, x = net.layer2[0], torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = F.relu(block.se(residual_branch(block, x, nn.Identity())) + PaddingShortcut(16, 32)(x))
    assert torch.equal(block(x.clone()), expected)


@pytest.mark.parametrize('name', BASIC)
def test_stochastic_depth_grows_to_the_rate_given(name):
    net = on_meta(name, drop_path_rate=0.3)
    rates = [module.drop_prob for module in net.modules() if type(module).__name__ == 'DropPath']
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


# What is refused: the message has three lines, what was given, why not, what to do


def assert_names(error, *parts):
    given, why, remedy = str(error.value).splitlines()
    assert why.startswith('  why: ')
    assert remedy.startswith('  do:  ')
    assert parts[0] in given
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize('tagged', IMAGENET_TAGGED)
def test_topology_against_the_tag_is_an_error(tagged):
    topology = 'v1.5' if is_paper(tagged) else 'paper'
    with pytest.raises(ValueError, match='topology') as error:
        on_meta(tagged, topology=topology)
    assert_names(error, topology, tagged, 'leave topology out')


@pytest.mark.parametrize('tagged', IMAGENET_TAGGED)
def test_topology_agreeing_with_the_tag_is_taken(tagged):
    net = on_meta(tagged, topology='paper' if is_paper(tagged) else 'v1.5')
    assert net.default_cfg['tag'] == tagged.split('.')[1]


OTHER_SE = {
    'se': False, 'reduction': 8, 'squeeze': 'max', 'excitation': 'tanh', 'bias': False, 'placement': 'pre',
    'stages': (2, 3),
}


@pytest.mark.parametrize('name', SE_DEFAULTS)
def test_se_argument_against_the_weights_is_an_error(name):
    with pytest.raises(ValueError, match=name) as error:
        on_meta('se_resnet50', pretrained=True, **{name: OTHER_SE[name]})
    assert_names(error, f'{name}={OTHER_SE[name]!r}', f'{name}={SE_DEFAULTS[name]!r}', f'leave {name} out')


@pytest.mark.parametrize(('tagged', 'stride'), [
    ('se_resnet50', False), ('se_resnext50_32x4d', True), ('se_senet154.in1k', True)])
def test_stride_against_the_weights_is_an_error(tagged, stride):
    with pytest.raises(ValueError, match=f'stride_in_1x1={stride} with pretrained=True') as error:
        on_meta(tagged, pretrained=True, stride_in_1x1=stride)
    assert f'stride_in_1x1={not stride}' in str(error.value)


@pytest.mark.parametrize('name', ['se_resnet50.v1_5', 'se_resnet50.ra2_in1k', 'se_resnet18'])
def test_stride_that_only_the_papers_bottleneck_has(name):
    with pytest.raises(ValueError, match='stride_in_1x1=True') as error:
        on_meta(name, stride_in_1x1=True)
    assert "topology='paper'" in str(error.value)
    on_meta(name, stride_in_1x1=False)


def test_stages_fit_the_weights_in_any_order():
    check_weights_fit('se_resnet50', {'stages': [5, 3, 4, 2]})


WEIGHTLESS = [tagged for tagged in TAGGED if not get_pretrained_cfg(tagged).has_weights]


@pytest.mark.parametrize('tagged', WEIGHTLESS)
def test_pretrained_without_weights_names_the_tags_that_have_them(tagged):
    with pytest.raises(ValueError, match='pretrained=True') as error:
        on_meta(tagged, pretrained=True)
    assert_names(error, tagged, *timm.list_pretrained(f'{tagged.split(".")[0]}.*'), 'there are no weights')


@pytest.mark.parametrize('name', ['se_resnet18', 'se_resnet34', 'se_resnext101_64x4d'])
def test_default_tag_is_untrained_where_the_papers_network_has_no_weights(name):
    with pytest.raises(ValueError, match='pretrained=True') as error:
        on_meta(name, pretrained=True)
    assert_names(error, f'{name}.untrained', *timm.list_pretrained(f'{name}.*'))


@pytest.mark.parametrize('name', [*IMAGENET, *CIFAR])
def test_unknown_keyword_is_a_type_error_with_the_nearest_name(name):
    with pytest.raises(TypeError, match='reductoin') as error:
        on_meta(name, reductoin=8)
    assert_names(error, f"{name}: 'reductoin'", 'did you mean reduction')


@pytest.mark.parametrize('name', [*IMAGENET, *CIFAR])
def test_unknown_tag_is_an_error(name):
    with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \(nope\) for {name}'):
        on_meta(f'{name}.nope')


@pytest.mark.parametrize(('argument', 'value', 'remedy'), [
    ('placement', 'identty', 'did you mean identity'), ('squeeze', 'average', 'did you mean avg'),
    ('excitation', 'sigmod', 'did you mean sigmoid'), ('reduction', 0, 'whole number'),
    ('se', 'no', 'False for the plain twin'), ('stages', (), 'se=False'), ('stages', (1, 2), 'name some of'),
    ('stages', 'all', 'name some of'),
])
@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18', 'se_resnet50'])
def test_impossible_argument_is_an_error_with_its_remedy(name, argument, value, remedy):
    with pytest.raises(ValueError, match=argument) as error:
        on_meta(name, **{argument: value})
    assert_names(error, argument, remedy)


@pytest.mark.parametrize(('name', 'stage'), [('se_resnet20_cifar', 5), ('se_resnet18', 6), ('se_resnet50', 6)])
def test_stage_that_the_network_lacks_is_an_error(name, stage):
    with pytest.raises(ValueError, match='stages') as error:
        on_meta(name, stages=(2, stage))
    assert_names(error, f'[2, {stage}]', f'[{stage}]')


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_resnet18', 'se_resnet50'])
def test_one_stage_as_a_bare_number_is_that_stage(name):
    assert set(se_blocks(on_meta(name, stages=3))) == set(se_blocks(on_meta(name, stages=(3,))))


@pytest.mark.parametrize('name', BASIC)
def test_place_inside_a_bottleneck_is_refused_by_basic_blocks(name):
    with pytest.raises(ValueError, match='3x3') as error:
        on_meta(name, placement='3x3')
    assert_names(error, 'placement', 'bottleneck', 'standard, pre, post, identity')


def test_unknown_topology_is_an_error():
    with pytest.raises(ValueError, match='topology') as error:
        on_meta('se_resnet50', topology='v1')
    assert_names(error, "'v1'", 'v1.5', 'paper')


def test_unknown_shortcut_is_an_error():
    with pytest.raises(ValueError, match='shortcut') as error:
        on_meta('se_resnet20_cifar', shortcut='pad')
    assert_names(error, "'pad'", 'did you mean padding')


def test_second_attention_is_an_error():
    with pytest.raises(ValueError, match='attn_layer') as error:
        on_meta('se_resnet50', block_args=dict(attn_layer='eca'))
    assert_names(error, "attn_layer='eca'", 'se=False')
    assert not se_blocks(on_meta('se_resnet50', se=False, block_args=dict(attn_layer='eca')))


# The registry


ENTRY_POINTS = '''
import json, timm
def modules():
    return {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
before = modules()
import se_timm
print(json.dumps([before, modules()]))
'''


def test_import_overwrites_no_timm_model_and_warns_of_nothing():
    command = [sys.executable, '-W', 'error::UserWarning', '-c', ENTRY_POINTS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout)
    assert len(before) > 1000
    assert {name: after[name] for name in before} == before
    assert {*IMAGENET, *CIFAR} <= set(after) - set(before)
    assert all(after[name].startswith('se_timm.') for name in set(after) - set(before))


# Saved and loaded again: config.json carries tag and arguments, and they must bring the same network back


SAVED = {
    'paper': ('se_resnet50', {}), 'paper, named': ('se_resnet50', {'topology': 'paper'}),
    'paper, tag of other weights': ('se_resnet18.in1k', {}), 'paper, untrained': ('se_resnet18', {}),
    'v1.5 by tag': ('se_resnet50.v1_5', {}), 'v1.5 by argument': ('se_resnet50', {'topology': 'v1.5'}),
    "v1.5 by timm's tag": ('se_resnext50_32x4d.racm_in1k', {}), 'v1.5, basic': ('se_resnet18', {'topology': 'v1.5'}),
    'classes and channels': ('se_resnet18', {'num_classes': 7, 'in_chans': 1}),
    'cifar': ('se_resnet20_cifar', {}), 'cifar, padding': ('se_resnet20_cifar', {'shortcut': 'padding', 'se': False}),
    'plain': ('se_resnet18', {'se': False}), 'plain, v1.5': ('se_resnet18.v1_5', {'se': False}),
    **{f'{name}={value}': ('se_resnet18', {name: value}) for name, value in OTHER_SE.items() if name != 'se'},
}


@pytest.mark.parametrize('case', SAVED)
def test_saved_network_comes_back_with_its_topology_and_arguments(case, tmp_path, randomise):
    name, arguments = SAVED[case]
    net = randomise(timm.create_model(name, **arguments))
    save_for_hf(net, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(net, 65)
    assert torch.equal(again(x), net(x))
    assert again.default_cfg['tag'] == net.default_cfg['tag']


@pytest.mark.parametrize(('arguments', 'topology'), [
    ({}, 'paper'), ({'topology': 'v1.5'}, 'v1.5'), ({'pretrained_cfg_overlay': {'tag': 'food101'}}, 'paper'),
    ({'pretrained_cfg_overlay': {'tag': 'food101'}, 'topology': 'paper'}, 'paper'),
    ({'pretrained_cfg_overlay': {'tag': 'food101'}, 'topology': 'v1.5'}, 'v1.5'),
    ({'pretrained_cfg': {'tag': 'food101'}, 'topology': 'paper'}, 'paper'),
    ({'pretrained_cfg': {'tag': 'food101'}, 'topology': 'v1.5'}, 'v1.5'),
    ({'pretrained_cfg': {'mean': (0.5, 0.5, 0.5)}}, 'paper'),
    ({'pretrained_cfg': {'mean': (0.5, 0.5, 0.5)}, 'topology': 'v1.5'}, 'v1.5'),
])
def test_topology_where_the_tag_is_of_another_or_there_is_none(arguments, topology):
    assert timm.create_model('se_resnet50', device='meta', **arguments).topology == topology


@pytest.mark.parametrize(('arguments', 'why'), [
    ({'pretrained_cfg': {'tag': 'food101'}}, 'none that is known'),
    ({'pretrained_cfg_overlay': {'tag': 'ra2_in1k'}, 'topology': 'paper'}, "belong to the topology 'v1.5'"),
])
def test_topology_that_is_not_clear_is_refused(arguments, why):
    with pytest.raises(ValueError, match=rf'the tag .*\n  why: .*{why}.*\n  do:  .*topology'):
        timm.create_model('se_resnet50', device='meta', **arguments)


@pytest.mark.parametrize(('name', 'arguments', 'given'), [
    ('se_resnet50', {'relu_before_se': True}, 'relu_before_se=True with bottlenecks'),
    ('se_resnet18', {'relu_before_se': True, 'placement': 'pre'}, "relu_before_se=True with placement='pre'"),
    ('se_resnet50', {'stride_in_1x1': True, 'aa_layer': BlurPool2d}, 'stride_in_1x1=True with aa_layer'),
])
def test_arguments_that_would_have_no_effect_are_refused(name, arguments, given):
    with pytest.raises(ValueError, match=rf'^{given}\n  why: .*\n  do:  leave'):
        timm.create_model(name, device='meta', **arguments)


@pytest.mark.parametrize('stages', [(3, 3), {3}, range(3, 4), 3, (3.0,)])
def test_stages_in_any_form_are_the_same_network(stages):
    for name in ('se_mobilenetv1_100', 'se_resnet50', 'se_vgg16_bn'):
        net = timm.create_model(name, device='meta', stages=stages)
        assert net.state_dict().keys() == timm.create_model(name, device='meta', stages=(3,)).state_dict().keys()


def test_stages_that_weights_were_trained_with_may_have_any_form():
    for stages in ((2, 3, 4, 5), [5, 4, 3, 2], range(2, 6), {2, 3, 4, 5}):
        check_weights_fit('se_resnet50', {'stages': stages})
    with pytest.raises(ValueError, match='trained with stages'):
        check_weights_fit('se_resnet50', {'stages': range(2, 5)})


def test_further_relu_is_for_the_standard_placement_alone():
    blocks = {place: timm.create_model('se_resnet18.in1k', device='meta', placement=place).layer1[0]
              for place in ('standard', 'pre')}
    assert {place: block.relu_before_se for place, block in blocks.items()} == {'standard': True, 'pre': False}


@pytest.mark.parametrize(('name', 'arguments', 'given'), [
    ('se_resnet50', {'stages': 2.5}, r'stages: \[2.5\]'), ('se_vgg16_bn', {'stages': True}, r'stages: \[True\]'),
    ('se_resnet20_cifar', {'layers': (3, 3)}, r'layers: \(3, 3\)'),
    ('se_preresnet164_cifar', {'layers': (1, 1)}, r'layers: \(1, 1\)'),
    ('se_shakeshake26_2x96d_cifar', {'layers': (1, 1)}, r'layers: \(1, 1\)'),
    ('se_shufflenetv1_g3', {'channels': (240, 480)}, r'channels: \(240, 480\)'),
    ('se_shufflenetv1_g3', {'groups': 7}, r'groups: 7 with channels: \(240, 480, 960\)'),
    ('se_shufflenetv1_g3', {'groups': 0}, r'groups: 0 with channels: \(240, 480, 960\)'),
    ('se_shakeshake26_2x96d_cifar', {'width': 97}, 'width: 97 with cardinality: 0'),
    ('se_shakeeven29_2x4x64d_cifar', {'cardinality': 3}, 'width: 256 with cardinality: 3'),
])
def test_numbers_that_do_not_fit_are_refused(name, arguments, given):
    with pytest.raises(ValueError, match=rf'^{given}\n  why: '):
        timm.create_model(name, device='meta', **arguments)


def test_stochastic_depth_of_the_cifar_networks_grows_to_the_rate_given():
    net = on_meta('se_resnet20_cifar', drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in (net.layer1, net.layer2, net.layer3)
             for block in stage]
    assert rates == pytest.approx([0.05 * number for number in range(9)])


@pytest.mark.parametrize('name', ['se_resnet20_cifar', 'se_wrn16_8_cifar'])
def test_more_numbers_than_stages_are_refused(name):
    with pytest.raises(ValueError, match='the network has 3 stages'):
        timm.create_model(name, layers=(1, 1, 1, 1))
