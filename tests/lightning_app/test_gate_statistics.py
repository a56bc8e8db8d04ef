"""Statistics of gates: by hand in float64, whatever the order, the batches and the processes."""
import numpy as np
import pytest
import torch

from lightning_app.analysis.channels import (
    PAPER_BLOCKS,
    default_blocks,
    default_classes,
    find_classes,
    sampled,
    short_titles,
)
from lightning_app.analysis.gate_statistics import BINS, GateStatistics
from lightning_app.data.samples import IGNORE
from se_timm.gates import SEBlock, find_se

BLOCKS = [SEBlock('a.0', 'a.0.se', 'a.0', 0., 1., 10), SEBlock('b', 'b.se', 'b', -1., 1., 20)]
CLASSES = 3


def gates(images=40, seed=0):
    """Return gates of two blocks of 5 and 7 channels, and labels; class 2 has no image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (images,), generator=generator)
    return {'a.0': torch.rand(images, 5, generator=generator),
            'b': 2 * torch.rand(images, 7, generator=generator) - 1}, labels


def measured(values, labels, batch=8, order=None, **arguments):
    statistics = GateStatistics(BLOCKS, CLASSES, **arguments)
    order = torch.arange(len(labels)) if order is None else order
    for part in order.split(batch):
        statistics.update({name: value[part] for name, value in values.items()}, labels[part])
    return statistics


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name))


def test_statistics_by_hand():
    values, labels = gates()
    for result in measured(values, labels, within=True).results():
        block = values[result.block.name].double().numpy()
        np.testing.assert_allclose(result.means, block.mean(0), atol=1e-6)
        np.testing.assert_allclose(result.stds, block.std(0), atol=1e-6)
        assert result.mean == pytest.approx(block.mean(), abs=1e-6)
        assert result.std == pytest.approx(block.std(0).mean(), abs=1e-6)
        assert result.near_zero == (abs(block) < 0.1).mean()
        assert result.near_one == (abs(block - 1) < 0.1).mean()
        expected, edges = np.histogram(block, BINS, (result.block.low, result.block.high))
        np.testing.assert_array_equal(result.histogram, expected)
        np.testing.assert_allclose(result.edges, edges)
        for label in (0, 1):
            of_class = block[labels.numpy() == label]
            assert result.counts[label] == len(of_class)
            np.testing.assert_allclose(result.class_means[label], of_class.mean(0), atol=1e-6)
            np.testing.assert_allclose(result.class_stds[label], of_class.std(0), atol=1e-6)
        assert result.counts[2] == 0
        assert np.isnan(result.class_means[2]).all()


def test_share_between_classes_by_hand():
    values, labels = gates()
    values['a.0'][labels == 1] += 0.5
    result = measured(values, labels).results()[0]
    block, classes = values['a.0'].double().numpy(), labels.numpy()
    within = sum(((block[classes == label] - block[classes == label].mean(0))**2).sum() for label in (0, 1))
    total = ((block - block.mean(0))**2).sum()
    between, n = total - within, len(block)
    assert result.class_specific == pytest.approx((between - within / (n - 2)) / total, abs=1e-5)
    assert 0.2 < result.class_specific < 0.8


def test_gates_that_know_nothing_of_the_class_are_not_called_specific():
    # plain eta squared would say about (K - 1) / (N - 1) = 0.5 here
    generator = torch.Generator().manual_seed(0)
    statistics = GateStatistics(BLOCKS[:1], 50)
    statistics.update({'a.0': torch.rand(100, 400, generator=generator)}, torch.arange(50).repeat(2))
    assert statistics.results()[0].class_specific < 0.03


def test_gates_that_follow_from_the_class_alone():
    labels = torch.arange(3).repeat(10)
    statistics = GateStatistics(BLOCKS[:1], 3)
    statistics.update({'a.0': torch.tensor([[.1, .9], [.5, .5], [.9, .1]])[labels]}, labels)
    assert statistics.results()[0].class_specific == pytest.approx(1)


@pytest.mark.parametrize(('value', 'near_zero', 'near_one'), [(1., 0, 1), (0., 1, 0), (0.3, 0, 0)])
def test_constant_gates_read_as_such(value, near_zero, near_one):
    statistics = GateStatistics(BLOCKS[:1], 3)
    statistics.update({'a.0': torch.full((12, 6), value)}, torch.arange(3).repeat(4))
    result = statistics.results()[0]
    assert (result.std, result.class_specific) == (0, 0)
    assert (result.near_zero, result.near_one) == (near_zero, near_one)
    assert result.mean == pytest.approx(value, abs=1e-6)
    assert result.histogram.sum() == 72
    assert result.histogram[min(int(value * BINS), BINS - 1)] == 72


def test_gates_beyond_the_range_are_in_the_outermost_bins():
    statistics = GateStatistics(BLOCKS[:1], 1)
    statistics.update({'a.0': torch.tensor([[-3., 7., 0.5]])}, torch.tensor([0]))
    result = statistics.results()[0]
    assert (result.histogram[0], result.histogram[-1], result.histogram.sum()) == (1, 1, 3)
    np.testing.assert_allclose(result.means, [-3, 7, 0.5])


@pytest.mark.parametrize('batch', [1, 7, 40])
def test_order_and_batches_do_not_matter(batch):
    values, labels = gates()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert_equal(measured(values, labels, within=True).results(),
                 measured(values, labels, batch, order, within=True).results())


def test_processes_add_up_to_one():
    values, labels = gates()
    parts = [measured(values, labels, order=torch.arange(rank, 40, 2)) for rank in (0, 1)]
    sums = [dict(part.sums) for part in parts]
    names = iter(sums[0])
    parts[0].reduce(lambda value: value + sums[1][next(names)])
    assert_equal(parts[0].results(), measured(values, labels).results())


def test_padding_does_not_count():
    values, labels = gates()
    padded = {name: torch.cat([value, value[:3]]) for name, value in values.items()}
    assert_equal(measured(padded, torch.cat([labels, torch.full((3,), IGNORE)])).results(),
                 measured(values, labels).results())


def test_views_of_an_image_are_averaged():
    values, labels = gates()
    views = {name: value.repeat_interleave(2, 0) + torch.tensor([-0.01, 0.01]).repeat(40)[:, None]
             for name, value in values.items()}
    statistics = GateStatistics(BLOCKS, CLASSES)
    statistics.update(views, labels)
    for one, other in zip(statistics.results(), measured(values, labels).results(), strict=True):
        np.testing.assert_allclose(one.class_means, other.class_means, atol=1e-6)


def test_without_classes():
    values, labels = gates()
    statistics = GateStatistics(BLOCKS, 1)
    statistics.update(values, labels)
    result = statistics.results()[0]
    assert np.isnan(result.class_specific)
    assert result.counts.tolist() == [40]
    np.testing.assert_array_equal(result.means, measured(values, labels).results()[0].means)


def test_nothing_counted_is_nothing():
    assert GateStatistics(BLOCKS, 3).results() == []
    values, labels = gates()
    assert measured(values, torch.full_like(labels, IGNORE)).results() == []


# Channels, blocks and classes of the figures


@pytest.mark.parametrize(('channels', 'step', 'points'), [(256, 6, 43), (512, 11, 47), (1024, 21, 49), (2048, 41, 50)])
def test_channels_are_those_of_the_papers_figures(channels, step, points):
    assert (sampled(channels).step, len(sampled(channels))) == (step, points)


@pytest.mark.parametrize(('name', 'expected'), [
    ('se_resnet50', list(PAPER_BLOCKS)),
    ('se_resnet18', ['SE_2_2', 'SE_3_2', 'SE_4_2', 'SE_5_1', 'SE_5_2']),
    ('se_resnet20_cifar', ['layer1.2', 'layer2.2', 'layer3.0', 'layer3.1', 'layer3.2']),
    ('efficientnet_b0', ['blocks.1.1', 'blocks.2.1', 'blocks.3.2', 'blocks.4.2', 'blocks.5.3', 'blocks.6.0']),
    ('se_bn_inception', [f'inception_{each}' for each in ('4b', '4c', '4d', '4e', '5a', '5b')])])
def test_blocks_of_the_figures(name, expected):
    import timm

    import se_timm  # noqa: F401

    assert [block.title for block in default_blocks(find_se(timm.create_model(name)))] == expected


def test_classes_of_the_figures():
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_names()
    assert default_classes(names, [1] * 1000) == [1, 254, 726, 972]  # goldfish, pug, plane (the tool), cliff
    assert default_classes(names, [label != 254 for label in range(1000)]) == [0, 333, 666, 999]  # no image of a pug
    assert default_classes('abcdefg', [1] * 7) == [0, 2, 4, 6]
    assert default_classes('abcdefg', [0, 3, 0, 0, 1, 1, 0]) == [1, 4, 5]
    assert default_classes('ab', [1, 1]) == [0, 1]
    assert default_classes('a', [1]) == [0]


def test_short_titles_tell_the_classes_apart():
    names = ['n01443537', 'n02012849', 'n03126707', 'cat, black', 'cat, white']
    titles = ['goldfish, Carassius auratus', 'crane', 'crane', 'cat, black', 'cat, white']
    assert short_titles(names, titles) == [
        'goldfish', 'crane (n02012849)', 'crane (n03126707)', 'cat, black', 'cat, white']


def test_classes_by_name_title_and_number():
    names, titles = ['n01', 'n02', 'n03'], ['Goldfish', 'pug', 'cliff']
    assert find_classes(names, titles, ['goldfish', 'n03', 1, 'PUG']) == [0, 2, 1]


def test_unknown_class_is_refused_with_the_nearest(refused):
    with refused("class: 'goldfsh'", 'there is no such class', 'goldfish'):
        find_classes(['n01', 'n02'], ['goldfish', 'pug'], ['goldfsh'])


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('images', [1, 2])
def test_gates_that_are_no_numbers_have_no_statistics(value, images):
    values, labels = gates()
    values['a.0'][:images, 2] = value
    broken, whole = measured(values, labels, within=True).results()
    for name in ('mean', 'std', 'near_zero', 'near_one', 'class_specific'):
        assert np.isnan(getattr(broken, name))
    assert np.isnan(broken.class_means).all()
    assert not broken.histogram.any()
    assert_equal([whole], measured(gates()[0], labels, within=True).results()[1:])


def test_gates_of_images_that_do_not_count_may_be_anything():
    values, labels = gates()
    labels[3] = IGNORE
    expected = measured(values, labels).results()
    values['b'][3] = float('nan')
    assert_equal(measured(values, labels).results(), expected)


def test_class_is_found_as_it_is_written_first():
    names = ['Cat', 'cat', 'dog']
    assert find_classes(names, names, ['cat', 'Cat', 'DOG']) == [1, 0, 2]


def test_gates_that_are_too_large_for_the_sums_count_as_eight():
    statistics = GateStatistics(BLOCKS[:1], 1)
    for _ in range(3):
        statistics.update({'a.0': torch.tensor([[1e7, -1e7, 2.]])}, torch.tensor([0]))
    result = statistics.results()[0]
    np.testing.assert_allclose(result.means, [8, -8, 2])
    np.testing.assert_allclose(result.stds, 0)
