"""The paper's tables, as far as networks can confirm them: parameters, multiply-adds, Equation 5."""
import pytest
import timm

from se_timm import SqueezeExcite
from se_timm.cost import cost
from se_timm.paper import ABLATIONS, IMAGENET, MOBILE, NETWORKS, TABLES, extra_weights, printed_parameters

ABLATED = {f'{table.version} {table.number} {row.variant}': row for table in ABLATIONS for row in table.rows}
# places of SE and channels there, where they are not those of the feature maps
PLACES = {
    'se_bn_inception': [(1, 256), (1, 320), (3, 576), (2, 608), (1, 1056), (2, 1024)],
    'se_inception_v3': [(1, 256), (2, 288), (5, 768), (1, 1280), (2, 2048)],
    'se_inception_resnet_v2': [(10, 320), (20, 1088), (10, 2080)],
    'se_vgg16_bn': [(2, 64), (2, 128), (3, 256), (6, 512)],
    'se_mobilenetv1_100': [(1, 64), (2, 128), (2, 256), (6, 512), (2, 1024)],
    'se_shufflenetv1_g3': [(1, 240 - 24), (3, 240), (1, 480 - 240), (7, 480), (1, 960 - 480), (3, 960)],
}
RESNET50 = [(3, 256), (4, 512), (6, 1024), (3, 2048)]  # blocks and channels of each stage, Table 1


def on_meta(name, **arguments):
    return timm.create_model(name, device='meta', **arguments)


def running_statistics(net):
    return sum(buffer.numel() for name, buffer in net.named_buffers() if 'running' in name)


@pytest.mark.parametrize('row', ABLATED.values(), ids=ABLATED)
def test_ablation_costs_what_is_printed(row):
    net = on_meta('se_resnet50', **row.arguments)
    counted = cost(net)
    if row.cost.parameters is not None:
        assert printed_parameters(counted.parameters, running_statistics(net)) == row.cost.parameters
    if row.cost.gflops is not None:
        assert counted.multiply_adds / 1e9 == pytest.approx(row.cost.gflops, rel=0.003)


@pytest.mark.parametrize('reduction', [4, 8, 32])
def test_without_running_statistics_and_biases_other_parameters_would_be_printed(reduction):
    printed = {row.arguments['reduction']: row.cost.parameters for row in ABLATIONS[0].rows[:-1]}
    parameters = cost(on_meta('se_resnet50', reduction=reduction, bias=False)).parameters
    assert printed_parameters(parameters, 0) < printed[reduction]


@pytest.mark.parametrize('reduction', [2, 4, 8, 16, 32])
def test_equation_5_counts_the_weights_of_resnet_50(reduction):
    net = on_meta('se_resnet50', reduction=reduction, bias=False)
    added = cost(net).parameters - cost(on_meta('se_resnet50', se=False)).parameters
    assert added == extra_weights(RESNET50, reduction) == 2 * 20_119_552 // reduction


@pytest.mark.parametrize('name', NETWORKS)
def test_equation_5_counts_the_weights_of_every_network(name):
    net = on_meta(name)
    # of the feature maps, not of the SE blocks that are to be counted
    stages = PLACES.get(name) or [
        (len(net.get_submodule(f'layer{index}')), info['num_chs'])
        for index, info in enumerate(net.feature_info[1:], start=1)]
    blocks = [module for module in net.modules() if isinstance(module, SqueezeExcite)]
    assert sum(blocks for blocks, _ in stages) == len(blocks)
    assert sum(block.fc1.weight.numel() + block.fc2.weight.numel() for block in blocks) == extra_weights(stages, 16)


def test_claims_of_the_text():
    with_se, plain = cost(on_meta('se_resnet50', bias=False)), cost(on_meta('se_resnet50', se=False))
    assert round(100 * (3.87 / 3.86 - 1), 2) == 0.26  # "a 0.26 % relative increase", of the printed numbers
    assert round((with_se.parameters - plain.parameters) / 1e6, 1) == 2.5
    without_last = cost(on_meta('se_resnet50', bias=False, stages=(2, 3, 4)))
    assert round(100 * (without_last.parameters / plain.parameters - 1)) == 4  # "~4 %"


def test_each_table_is_there_once():
    assert len({(table.version, table.number) for table in TABLES}) == len(TABLES)
    assert {table.number for table in TABLES if table.version == 'v4'} >= set(range(2, 17))


@pytest.mark.parametrize('table', [IMAGENET, MOBILE], ids=['imagenet', 'mobile'])
def test_se_gains_in_every_row(table):
    for pair in table.rows:
        assert pair.se.top1 < pair.plain.top1
        assert pair.se.top5 < pair.plain.top5
        assert pair.se_cost.gflops >= pair.plain_cost.gflops


@pytest.mark.parametrize('pair', [pair for table in TABLES for pair in table.rows if getattr(pair, 'name', '')],
                         ids=lambda pair: pair.network)
def test_named_networks_are_registered(pair):
    assert timm.is_model(pair.name)
    assert pair.name in NETWORKS

    def letters(text):
        return ''.join(filter(str.isalnum, text.lower()))

    assert letters(pair.network.removeprefix('SE-').removesuffix(' + Cutout')) in letters(pair.name)
