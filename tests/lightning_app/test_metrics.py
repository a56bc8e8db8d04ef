"""Counts are exact and losses as good as exact, however the samples are divided."""
import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_app.metrics import ClassificationMetrics

IGNORE = -1


def batch(count=211, classes=10, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < ignored] = IGNORE
    return logits, labels


def measure(logits, labels, sizes=None):
    metrics = ClassificationMetrics(logits.shape[1])
    for part in zip(logits.split(sizes or len(logits)), labels.split(sizes or len(labels)), strict=True):
        metrics.update(*part)
    return metrics


def counts(metrics):
    return metrics.top1.item(), metrics.top5.item(), metrics.count.item()


def test_by_hand():
    logits = torch.tensor([
        [6., 5., 4., 3., 2., 1.],  # label 0: best
        [6., 5., 4., 3., 2., 1.],  # label 4: fifth
        [6., 5., 4., 3., 2., 1.],  # label 5: sixth
        [1., 2., 3., 4., 5., 6.],  # does not count
    ])
    results = measure(logits, torch.tensor([0, 4, 5, IGNORE])).compute()
    assert results['top1'].item() == pytest.approx(100 / 3, abs=1e-12)
    assert results['top5'].item() == pytest.approx(200 / 3, abs=1e-12)
    log_sum = math.log(sum(math.exp(value) for value in range(1, 7)))
    assert results['loss'].item() == pytest.approx((3 * log_sum - 6 - 2 - 1) / 3, abs=1e-6)


@pytest.mark.parametrize(('labels', 'given'), [
    (torch.eye(4), 'labels: torch.float32 of shape (4, 4)'), (torch.zeros(4), 'labels: torch.float32 of shape (4,)'),
    (torch.eye(4).long(), 'labels: torch.int64 of shape (4, 4)'),
    (torch.zeros(4).int(), 'labels: torch.int32 of shape (4,)')], ids=['soft', 'float', 'one-hot', 'int32'])
def test_labels_that_are_none(labels, given, refused):
    with refused(given, 'it has one', 'of int64'):
        ClassificationMetrics(4).update(torch.zeros(4, 4), labels)


def test_labels_of_bytes():
    logits, labels = batch(ignored=0.0)
    assert measure(logits, labels.byte()).compute() == measure(logits, labels).compute()


@pytest.mark.parametrize('ignored', [0.0, 0.2])
@pytest.mark.parametrize('classes', [2, 3, 5, 10, 100])
def test_as_torchmetrics(classes, ignored):
    logits, labels = batch(classes=classes, ignored=ignored)
    results = measure(logits, labels, 32).compute()
    for name, k in (('top1', 1), ('top5', min(5, classes))):
        theirs = MulticlassAccuracy(classes, top_k=k, average='micro', ignore_index=IGNORE)
        assert results[name].item() == pytest.approx(100 * theirs(logits, labels).item(), abs=1e-5)
    expected = F.cross_entropy(logits.double(), labels, ignore_index=IGNORE)
    assert results['loss'].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('sizes', [1, 2, 7, 64, 210, [1, 100, 9, 101]])
@pytest.mark.parametrize('classes', [3, 10, 1000])
def test_any_division_into_batches_gives_the_same(sizes, classes):
    logits, labels = batch(classes=classes)
    whole, parts = measure(logits, labels), measure(logits, labels, sizes)
    assert counts(whole) == counts(parts)
    assert abs(whole.compute()['loss'] - parts.compute()['loss']) < 1e-12


@pytest.mark.parametrize('processes', [2, 3])
def test_any_division_among_processes_gives_the_same(processes):
    # the states of processes are summed
    logits, labels = batch()
    whole = measure(logits, labels)
    merged = measure(logits[::processes], labels[::processes])
    for rank in range(1, processes):
        merged.merge_state(measure(logits[rank::processes], labels[rank::processes]))
    assert counts(whole) == counts(merged)
    assert abs(whole.compute()['loss'] - merged.compute()['loss']) < 1e-12


def test_padding_changes_nothing():
    logits, labels = batch(ignored=0)
    padded = measure(torch.cat([logits, logits[-1:].expand(5, -1)]), torch.cat([labels, torch.full((5,), IGNORE)]), 27)
    assert counts(padded) == counts(measure(logits, labels))
    assert abs(padded.compute()['loss'] - measure(logits, labels).compute()['loss']) < 1e-12


def test_padding_whose_logits_are_not_finite_changes_nothing():
    logits, labels = batch()
    expected = measure(logits, labels).compute()
    logits[labels == IGNORE] = math.nan
    assert measure(logits, labels).compute() == expected


def test_logits_that_are_not_numbers_are_wrong():
    logits, labels = batch(ignored=0)
    some = logits.clone()
    some[::2, 3] = float('nan')
    expected = counts(measure(logits[1::2], labels[1::2]))
    assert counts(measure(some, labels)) == (*expected[:2], len(labels))


@pytest.mark.parametrize('classes', [2, 3, 4])
def test_fewer_than_five_classes(classes):
    logits, labels = batch(classes=classes)
    results = measure(logits, labels).compute()
    assert results['top5'] == 100
    assert 0 < results['top1'] < 100


def test_accuracies_go_from_0_to_100():
    labels = torch.arange(10)
    right = F.one_hot(labels, 10).float()
    results = measure(right, labels).compute()
    assert (results['top1'], results['top5']) == (100, 100)
    results = measure(-right, labels).compute()
    assert (results['top1'], results['top5']) == (0, 0)


def test_nothing_but_padding_is_not_a_number():
    assert all(value.isnan() for value in measure(*batch(ignored=1.1)).compute().values())


def test_results_have_their_logged_names():
    metrics = measure(*batch())
    results = metrics.results('val')
    assert {f'val/{name}': value for name, value in metrics.compute().items()}.items() <= results.items()
    assert (results['val/top1_error'], results['val/top5_error']) == (
        100 - results['val/top1'], 100 - results['val/top5'])
    assert set(metrics.results('test')) == {
        'test/loss', 'test/top1', 'test/top5', 'test/top1_error', 'test/top5_error'}


def test_reset():
    metrics = measure(*batch())
    metrics.reset()
    metrics.update(*batch(seed=1))
    assert counts(metrics) == counts(measure(*batch(seed=1)))
    assert metrics.compute()['loss'] == measure(*batch(seed=1)).compute()['loss']


def test_logits_in_half_precision():
    # the loss is taken in float32: bfloat16 itself has three digits
    logits, labels = batch()
    logits = logits.bfloat16()
    expected = F.cross_entropy(logits.double(), labels, ignore_index=IGNORE)
    results = measure(logits, labels).compute()
    assert results['loss'].item() == pytest.approx(expected.item(), rel=1e-6)


def test_sums_stay_float64_in_a_module_of_half_precision():
    module = torch.nn.Module()
    module.metrics = ClassificationMetrics(10)
    module.bfloat16()
    module.metrics.update(*batch())
    assert module.metrics.loss_sum.dtype == torch.float64
    assert module.metrics.compute()['loss'] == measure(*batch()).compute()['loss']


def test_sums_are_float32_on_a_machine_without_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    logits, labels = batch()
    metrics = measure(logits, labels)
    assert {value.dtype for value in metrics.compute().values()} == {torch.float32}
    monkeypatch.undo()
    exact = measure(logits, labels)
    assert counts(metrics) == counts(exact)
    assert float(metrics.compute()['loss']) == pytest.approx(float(exact.compute()['loss']), rel=1e-5)
