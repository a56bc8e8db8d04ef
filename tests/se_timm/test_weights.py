"""Weights of other sources in our networks: random ones, since none can be downloaded, and logits to the last bit."""
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torchvision.models import ResNet

from se_timm.paper import NETWORKS
from se_timm.se_resnet import TIMM_NAMES
from se_timm.weights import checkpoint_filter_fn, from_cadene, from_moskomule, to_cadene, to_moskomule


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cases(pairs):
    """Return one case for each (our name, theirs); those above 60 million parameters are slow."""
    return [
        pytest.param(name, theirs, marks=[pytest.mark.slow] if NETWORKS[name].parameters > 60e6 else [], id=theirs)
        for name, theirs in pairs if theirs
    ]


def load(name, state_dict, **arguments):
    """Create our network as `pretrained=True` does, with `state_dict` in the place of the downloaded file."""
    overlay = dict(state_dict=state_dict)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


@torch.no_grad()
def assert_same_bits(ours, theirs, sizes=(224, 193)):
    for size in sizes:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        logits = theirs(x)
        assert logits.isfinite().all()
        assert logits.std() > 1e-4
        assert torch.equal(ours(x), logits)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# The authors' networks, as timm hosts them


@pytest.mark.parametrize(('name', 'legacy'), cases((name, pair[0]) for name, pair in TIMM_NAMES.items()))
def test_legacy_weights_give_legacy_logits_and_go_back(name, legacy, randomise):
    theirs = randomise(timm.create_model(legacy))
    ours = load(f'{name}.in1k', theirs.state_dict())
    assert_same_bits(ours, theirs)
    back = to_cadene(ours.state_dict())
    assert_same_tensors(back, theirs.state_dict())
    fresh = timm.create_model(legacy).eval()
    fresh.load_state_dict(back, strict=True)
    assert_same_bits(ours, fresh, sizes=(64,))


@pytest.mark.parametrize(('name', 'legacy'), [(name, pair[0]) for name, pair in TIMM_NAMES.items() if pair[0]])
def test_key_map_is_strict_both_ways(name, legacy):
    ours, theirs = timm.create_model(name, device='meta'), timm.create_model(legacy, device='meta')
    ours.load_state_dict(from_cadene(theirs.state_dict()), strict=True, assign=True)
    theirs.load_state_dict(to_cadene(ours.state_dict()), strict=True, assign=True)
    assert from_cadene(to_cadene(ours.state_dict())).keys() == ours.state_dict().keys()


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('counted', [True, False], ids=['counted', 'without num_batches_tracked'])
def test_cadenes_files_load(counted, prefix, randomise):
    theirs = randomise(timm.create_model('legacy_seresnet50'))
    file = {
        prefix + key: value for key, value in theirs.state_dict().items()
        if counted or not key.endswith('num_batches_tracked')
    }
    assert f'{prefix}layer1.0.se_module.fc1.weight' in file
    assert f'{prefix}last_linear.weight' in file
    assert_same_bits(load('se_resnet50.in1k', file), theirs, sizes=(65,))


@pytest.mark.parametrize('name', ['se_resnet18', 'se_resnet50', pytest.param('se_senet154', marks=pytest.mark.slow)])
def test_part_of_cadenes_file_is_known_for_such(name):
    theirs = timm.create_model(TIMM_NAMES[name][0]).state_dict()
    ours = timm.create_model(f'{name}.in1k')
    for part in ('layer0', 'layer0.bn', 'layer2', 'se_module', 'last_linear'):
        weights = {key: value for key, value in theirs.items() if part in key and not key.startswith('layer0.conv3')}
        assert not ours.load_state_dict(checkpoint_filter_fn(weights, ours), strict=False).unexpected_keys
    assert torch.equal(ours.layer2[0].se.fc1.weight, theirs['layer2.0.se_module.fc1.weight'])


def test_classifier_alone_asks_for_no_further_relu():
    ours = timm.create_model('se_resnet18')
    weights = {'last_linear.weight': torch.rand(1000, 512), 'last_linear.bias': torch.rand(1000)}
    ours.load_state_dict(checkpoint_filter_fn(weights, ours), strict=False)
    assert torch.equal(ours.fc.bias, weights['last_linear.bias'])


@pytest.mark.parametrize('name', [name for name, pair in TIMM_NAMES.items() if pair[0]])
def test_tag_in1k_names_timms_file_and_its_preprocessing(name):
    ours, theirs = get_pretrained_cfg(f'{name}.in1k'), get_pretrained_cfg(f'{TIMM_NAMES[name][0]}.in1k')
    assert ours.url == theirs.url
    assert ours.url
    for field in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'num_classes', 'license'):
        assert getattr(ours, field) == getattr(theirs, field)


@pytest.mark.parametrize('name', ['se_resnet18', 'se_resnet34'])
def test_weights_with_the_further_relu_are_refused_without_it(name):
    state_dict = timm.create_model(TIMM_NAMES[name][0]).state_dict()
    for untagged in (name, f'{name}.v1_5'):
        with pytest.raises(ValueError, match='further ReLU') as error:
            load(untagged, state_dict)
        assert f'{name}.in1k' in str(error.value)


@pytest.mark.parametrize(('legacy', 'name'), [
    ('legacy_seresnext50_32x4d', 'se_resnext50_32x4d.v1_5'), ('legacy_seresnet50', 'se_resnet50.v1_5')])
def test_weights_of_the_papers_topology_are_refused_by_the_other(legacy, name):
    with pytest.raises(ValueError, match="trained with topology='paper'") as error:
        load(name, timm.create_model(legacy).state_dict())
    assert "topology='paper'" in str(error.value).splitlines()[-1]


@pytest.mark.parametrize(('name', 'legacy', 'argument', 'trained'), [
    ('se_resnet50', 'legacy_seresnet50', {'squeeze': 'max'}, "squeeze='avg'"),
    ('se_resnet50', 'legacy_seresnet50', {'excitation': 'tanh'}, "excitation='sigmoid'"),
    ('se_resnet50', 'legacy_seresnet50', {'placement': 'post'}, "placement='standard'"),
    ('se_resnet50', 'legacy_seresnet50', {'stride_in_1x1': False}, 'stride_in_1x1=True'),
    ('se_resnext50_32x4d', 'legacy_seresnext50_32x4d', {'stride_in_1x1': True}, 'stride_in_1x1=False'),
])
def test_weights_of_a_network_that_computes_something_else_are_refused(name, legacy, argument, trained):
    state_dict = timm.create_model(legacy).state_dict()
    load(name, state_dict)
    with pytest.raises(ValueError, match=trained) as error:
        load(name, state_dict, **argument)
    assert trained in str(error.value).splitlines()[-1]


def test_unfitting_file_is_an_error_and_not_a_silent_partial_load():
    state_dict = timm.create_model('legacy_seresnet18').state_dict()
    state_dict.pop('layer1.0.se_module.fc1.weight')
    with pytest.raises(RuntimeError, match=r'layer1\.0\.se\.fc1\.weight'):
        load('se_resnet18.in1k', state_dict)


# Other class counts and channels


@pytest.mark.parametrize('classes', [5, 0])
@pytest.mark.parametrize(('name', 'legacy', 'first'), [
    ('se_resnet18', 'legacy_seresnet18', 'conv1'),
    pytest.param('se_senet154', 'legacy_senet154', 'conv1.0', marks=pytest.mark.slow),
])
def test_classifier_and_first_convolution_are_adapted(name, legacy, first, classes, randomise):
    theirs = randomise(timm.create_model(legacy)).state_dict()
    ours = load(f'{name}.in1k', theirs, num_classes=classes, in_chans=1)
    expected = from_cadene(theirs)
    summed = expected.pop(f'{first}.weight').sum(1, keepdim=True)
    torch.testing.assert_close(ours.get_submodule(first).weight.data, summed)
    own = ours.state_dict()
    assert all(torch.equal(own[key], value) for key, value in expected.items() if not key.startswith('fc.'))
    assert ours(torch.randn(1, 1, 64, 64)).shape == (1, classes or ours.num_features)


# timm's own networks in the v1.5 topology, by tag

V15 = {
    f'{name}.{weights.split(".")[1]}': weights
    for name, (_, timm_name) in TIMM_NAMES.items() for weights in timm.list_pretrained(f'{timm_name}.*')
}


def test_every_tag_of_timms_weights_is_a_tag_of_ours():
    assert {weights.split('.')[0] for weights in V15.values()} >= {
        'seresnet50', 'seresnext50_32x4d', 'seresnext101_32x4d', 'seresnext101_64x4d', 'senet154'}
    assert set(V15) <= set(timm.list_models(module='se_resnet', include_tags=True))


@pytest.mark.parametrize('tagged', V15)
def test_v15_tag_names_timms_file_and_its_preprocessing(tagged):
    ours, theirs = get_pretrained_cfg(tagged), get_pretrained_cfg(V15[tagged])
    assert ours.hf_hub_id == theirs.hf_hub_id
    assert ours.hf_hub_id.startswith('timm/')
    for field in ('input_size', 'test_input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'test_crop_pct'):
        assert getattr(ours, field) == getattr(theirs, field)


ONE_TAG_EACH = {tagged.split('.')[0]: tagged for tagged in V15}


@pytest.mark.parametrize(('name', 'theirs'), cases((name, V15[tagged]) for name, tagged in ONE_TAG_EACH.items()))
def test_timms_v15_weights_give_timms_logits(name, theirs, randomise):
    net = randomise(timm.create_model(theirs))
    ours = load(ONE_TAG_EACH[name], net.state_dict())
    assert_same_tensors(ours.state_dict(), net.state_dict())
    assert_same_bits(ours, net)


@pytest.mark.parametrize(('name', 'plain'), [
    ('se_resnet18', 'resnet18'), ('se_resnet50', 'resnet50'), ('se_resnext50_32x4d', 'resnext50_32x4d'),
])
def test_plain_twin_in_v15_is_timms_resnet(name, plain, randomise):
    theirs = randomise(timm.create_model(plain))
    ours = timm.create_model(name, topology='v1.5', se=False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_bits(ours, theirs, sizes=(193,))


# moskomule/senet.pytorch, written out from its layout: torchvision's ResNet, se.fc of linear layers without biases


class Gate(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(self.avg_pool(x).flatten(1))[:, :, None, None]


def conv3x3(in_channels, channels, stride=1):
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels, channels, stride=1, downsample=None, *_, **__):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.se = Gate(channels)
        self.downsample = downsample

    def forward(self, x):
        out = self.se(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels, channels, stride=1, downsample=None, *_, **__):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels * 4, 1, bias=False), nn.BatchNorm2d(channels * 4)
        self.se = Gate(channels * 4)
        self.downsample = downsample

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        out = self.se(self.bn3(self.conv3(out)))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class CifarNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, 1, blocks)
        self.layer2 = self.stage(16, 32, 2, blocks)
        self.layer3 = self.stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, 10)

    def stage(self, in_channels, channels, stride, blocks):
        downsample = None if stride == 1 else nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
        first = BasicBlock(in_channels, channels, stride, downsample)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(x.mean((2, 3)))


MOSKOMULE = {
    'se_resnet18.v1_5': lambda: ResNet(BasicBlock, [2, 2, 2, 2]),
    'se_resnet50.v1_5': lambda: ResNet(Bottleneck, [3, 4, 6, 3]),
    'se_resnet20_cifar': lambda: CifarNet(3),
}


@pytest.fixture(params=MOSKOMULE)
def moskomule(request, randomise):
    """One of their networks, in float64: linear layers and 1x1 convolutions do not sum in the same order."""
    torch.manual_seed(0)
    return request.param, randomise(MOSKOMULE[request.param]()).double()


@torch.no_grad()
def assert_same_logits(ours, theirs):
    x = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_moskomules_weights_map_strictly_both_ways(moskomule):
    name, theirs = moskomule
    ours = timm.create_model(name, bias=False, dtype=torch.float64).eval()
    ours.load_state_dict(from_moskomule(theirs.state_dict()), strict=True)
    assert_same_logits(ours, theirs)
    assert_same_tensors(to_moskomule(ours.state_dict()), theirs.state_dict())
    theirs.load_state_dict(to_moskomule(ours.state_dict()), strict=True)


def test_moskomules_weights_load_by_the_factory(moskomule):
    name, theirs = moskomule
    assert_same_logits(load(name, theirs.state_dict(), bias=False, dtype=torch.float64), theirs)


def test_moskomules_weights_are_refused_by_the_papers_topology(moskomule):
    name, theirs = moskomule
    if name.endswith('.v1_5'):  # those of ImageNet
        with pytest.raises(ValueError, match=r"trained with topology='v1\.5'"):
            load(name.removesuffix('.v1_5'), theirs.state_dict(), bias=False)


def test_moskomules_weights_are_refused_by_a_network_with_biases(moskomule):
    name, theirs = moskomule
    with pytest.raises(ValueError, match='no biases') as error:
        load(name, theirs.state_dict())
    assert 'bias=False' in str(error.value)


def test_networks_with_biases_have_no_weights_in_moskomules_layout():
    with pytest.raises(ValueError, match=r'weights with layer1.0.se.fc1.bias\n  why: .* no biases\n'):
        to_moskomule(timm.create_model('se_resnet18').state_dict())
