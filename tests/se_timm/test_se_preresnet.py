"""Pre-activation ResNets and Wide ResNets: sizes, blocks, arguments."""
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import CIFAR10, CIFAR100, NETWORKS
from se_timm.se_preresnet import PreActBasicBlock, PreActBottleneck

NAMES = timm.list_models(module='se_preresnet')
# osmr/imgclsmob: sizes of the plain networks, and of those with SE, which have a batch norm after the stem (16
# channels) in place of one after the last block (64 channels, or 256 of bottlenecks)
OSMR = {
    'se_preresnet110_cifar': (1_730_522, 1_744_664 - 2 * 16 + 2 * 64),
    'se_preresnet164_cifar': (1_703_258, 1_904_882 - 2 * 16 + 2 * 256),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(name, **arguments):
    return timm.create_model(name, device='meta', **arguments)


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', NAMES)
def test_size(name):
    assert cost(on_meta(name), (3, 32, 32)).parameters == NETWORKS[name].parameters


@pytest.mark.parametrize('name', OSMR)
def test_size_is_that_of_others(name):
    plain, with_se = OSMR[name]
    assert cost(on_meta(name, se=False), (3, 32, 32)).parameters == plain
    assert cost(on_meta(name), (3, 32, 32)).parameters == with_se


def test_wide_network_has_eleven_million_parameters():
    assert round(cost(on_meta('se_wrn16_8_cifar', se=False), (3, 32, 32)).parameters / 1e6, 1) == 11.0


@pytest.mark.parametrize(('name', 'depth', 'counted'), [
    ('se_preresnet110_cifar', 110, lambda key: 'downsample' not in key),
    ('se_preresnet164_cifar', 164, lambda key: 'downsample' not in key),
    ('se_wrn16_8_cifar', 16, lambda key: key != 'fc'),  # Wide ResNets count the projections, not the classifier
])
def test_depth_is_that_of_the_name(name, depth, counted):
    layers = [key for key, module in on_meta(name, se=False).named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and counted(key)]
    assert len(layers) == depth


def test_paper_names_them():
    for table in (CIFAR10, CIFAR100):
        assert [pair.name for pair in table.rows[:3]] == [
            'se_preresnet110_cifar', 'se_preresnet164_cifar', 'se_wrn16_8_cifar']


@pytest.mark.parametrize('name', NAMES)
def test_plain_twin_is_the_network_less_its_se(name):
    net, plain = timm.create_model(name), timm.create_model(name, se=False)
    assert not any(isinstance(module, SqueezeExcite) for module in plain.modules())
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if '.se.' not in key}, strict=True)
    for module in net.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.zeros_(module.fc2.weight)
            nn.init.constant_(module.fc2.bias, 100.)  # sigmoid(100) is 1 in float32
    assert torch.equal(net.eval()(images()), plain.eval()(images()))


def by_definition(block, x):
    """Compute a block as He et al. (2016) write it, and SE as Fig. 5 of the paper places it."""
    def at(place, value):
        return block.se(value) if block.placement == place else value

    y = F.relu(block.bn1(x))
    shortcut = block.downsample(y) if isinstance(block.downsample, nn.Conv2d) else x
    y = block.conv1(at('pre', y))
    y = block.conv2(F.relu(block.bn2(y)))
    if isinstance(block, PreActBottleneck):
        y = block.conv3(F.relu(block.bn3(at('3x3', y))))
    return at('post', at('standard', y) + at('identity', shortcut))


@pytest.mark.parametrize('placement', ['standard', 'pre', 'post', 'identity', '3x3'])
@pytest.mark.parametrize('name', ['se_preresnet164_cifar', 'se_wrn16_8_cifar'])
def test_block_computes_what_its_placement_means(name, placement, randomise):
    if placement == '3x3' and name == 'se_wrn16_8_cifar':
        pytest.skip('it has no bottlenecks')
    net = randomise(timm.create_model(name, placement=placement))
    for block in (net.layer1[0], net.layer1[1], net.layer2[0]):
        x = torch.randn(2, block.bn1.num_features, 8, 8)
        assert block.placement == placement
        torch.testing.assert_close(block(x), by_definition(block, x))


def test_network_ends_in_batch_norm_and_relu():
    net = timm.create_model('se_wrn16_8_cifar').eval()
    x = net.layer3(net.layer2(net.layer1(net.conv1(images()))))
    expected = F.relu(net.norm[0](x))
    assert torch.equal(net.forward_features(images()), expected)
    assert torch.equal(net(images()), net.fc(expected.mean((2, 3))))


def test_classes_of_the_blocks():
    for name, block in (('se_preresnet110_cifar', PreActBasicBlock), ('se_preresnet164_cifar', PreActBottleneck)):
        net = on_meta(name)
        assert {type(module) for stage in (net.layer1, net.layer2, net.layer3) for module in stage} == {block}


@pytest.mark.parametrize(('stages', 'count'), [((2,), 18), ((3, 4), 36)])
def test_stages(stages, count):
    net = on_meta('se_preresnet110_cifar', stages=stages)
    assert sum(isinstance(module, SqueezeExcite) for module in net.modules()) == count


def test_stochastic_depth_grows_to_the_rate_given():
    net = on_meta('se_wrn16_8_cifar', drop_path_rate=0.5)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in (net.layer1, net.layer2, net.layer3)
             for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(('arguments', 'error', 'given', 'remedy'), [
    (dict(placement='3x3'), ValueError, "placement: '3x3'", 'take one of standard, pre, post, identity'),
    (dict(placement='infront'), ValueError, "placement: 'infront'", 'valid'),
    (dict(stages=(5,)), ValueError, 'stages: \\[5\\]', 'name some of'),
    (dict(reduction=1000), ValueError, 'reduction: 1000', 'whole number'),
    (dict(widht=2), TypeError, 'argument of se_wrn16_8_cifar', 'width'),
    (dict(pretrained=True), ValueError, 'pretrained=True', 'train it'),
])
def test_what_cannot_be_built_is_said(arguments, error, given, remedy):
    with pytest.raises(error, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        timm.create_model('se_wrn16_8_cifar', **arguments)
