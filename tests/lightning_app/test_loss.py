"""The training loss against its formula."""
import pytest
import torch
from timm.loss import JsdCrossEntropy
from torch.nn import functional as F

from lightning_app.loss import Loss, build_loss, check_loss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_cross_entropy(smoothing):
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(build_loss(Loss('ce', smoothing), 5)(LOGITS, LABELS), expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_binary_cross_entropy(smoothing):
    targets = F.one_hot(LABELS, 5) * (1 - smoothing) + smoothing / 5
    expected = F.binary_cross_entropy_with_logits(LOGITS, targets)
    torch.testing.assert_close(build_loss(Loss('bce', smoothing), 5)(LOGITS, LABELS), expected)


def test_binary_cross_entropy_summed_over_classes_of_targets_above_a_threshold():
    targets = torch.rand(8, 5, generator=torch.Generator().manual_seed(1))
    found = build_loss(Loss('bce', bce_sum=True, bce_threshold=0.3), 5, mixed=True)(LOGITS, targets)
    expected = F.binary_cross_entropy_with_logits(LOGITS, (targets > 0.3).float(), reduction='none').sum(1).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('name', ['ce', 'poly'])
def test_soft_targets(name):
    targets = torch.rand(8, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = build_loss(Loss(name, smoothing=0.1), 5, mixed=True)(LOGITS, targets)  # smoothed already
    log_probability = LOGITS.log_softmax(1)
    expected = -(targets * log_probability).sum(1)
    if name == 'poly':  # epsilon 2
        expected = expected + 2 * (1 - (targets * log_probability.exp()).sum(1))
    torch.testing.assert_close(found, expected.mean())


def test_asymmetric_loss_focuses_on_what_is_wrong():
    right, wrong = 10.0 * F.one_hot(LABELS, 5).float(), 10.0 * F.one_hot((LABELS + 1) % 5, 5).float()
    loss = build_loss(Loss('asl'), 5)
    assert loss(right, LABELS) < 0.01 < 1 < loss(wrong, LABELS)


def test_divergence_of_versions():
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(2))
    found = build_loss(Loss('jsd'), 5, splits=3)(logits, LABELS)
    torch.testing.assert_close(found, JsdCrossEntropy(3, smoothing=0)(logits, LABELS))
    probability = logits.softmax(1).view(3, 8, 5)
    mean = probability.mean(0)
    divergence = sum((each * (each / mean).log()).sum() / 8 for each in probability) / 3
    torch.testing.assert_close(found, F.cross_entropy(logits[:8], LABELS) + 12 * divergence)


def test_weights_of_classes_are_torchs():
    weights = [1.0, 2.0, 0.0, 1.0, 0.5]
    targets = torch.rand(8, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    loss, expected = build_loss(Loss(class_weights=weights), 5), torch.nn.CrossEntropyLoss(torch.tensor(weights))
    torch.testing.assert_close(loss(LOGITS, LABELS), expected(LOGITS, LABELS) * torch.tensor(weights)[LABELS].mean())
    torch.testing.assert_close(loss(LOGITS, targets), expected(LOGITS, targets))


@pytest.mark.parametrize(('name', 'options'), [
    ('ce', {}), ('ce', {'smoothing': 0.1}),
    ('bce', {}), ('bce', {'smoothing': 0.1}), ('bce', {'bce_sum': True}),
    ('bce', {'smoothing': 0.1, 'bce_threshold': 0.2})])
def test_weights_of_classes_are_those_of_their_images(name, options):
    weights = [1.0, 2.0, 0.0, 1.0, 0.5]
    alone = build_loss(Loss(name, **options), 5)
    each = torch.stack([alone(LOGITS[i:i + 1], LABELS[i:i + 1]) for i in range(len(LABELS))])
    weighted = build_loss(Loss(name, class_weights=weights, **options), 5)
    torch.testing.assert_close(weighted(LOGITS, LABELS), (each * torch.tensor(weights)[LABELS]).mean())


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_weights_of_classes_are_the_same_of_labels_in_every_form(smoothing):
    """As torch takes them: bytes, one-hot targets, and those to ignore."""
    weights = [1.0, 50.0, 2.0, 0.0, 4.0]
    loss = build_loss(Loss('ce', smoothing, class_weights=weights), 5)
    expected = loss(LOGITS, LABELS)
    torch.testing.assert_close(loss(LOGITS, F.one_hot(LABELS, 5).float()), expected)
    ignored = torch.cat([LABELS, torch.full((8,), -100)])
    torch.testing.assert_close(loss(LOGITS.repeat(2, 1), ignored), expected / 2)
    for name in ('ce', 'bce'):
        loss = build_loss(Loss(name, smoothing, class_weights=weights), 5)
        torch.testing.assert_close(loss(LOGITS, LABELS.byte()), loss(LOGITS, LABELS))


def test_mixed_images_have_the_weights_of_the_images_of_which_they_are():
    """Cross-entropy is linear in the target."""
    smoothing, weights = 0.1, [1.0, 2.0, 0.5, 1.0, 4.0]
    mixed = 0.7 * F.one_hot(LABELS, 5) + 0.3 * F.one_hot(LABELS.flip(0), 5)
    loss = build_loss(Loss('ce', smoothing, class_weights=weights), 5, mixed=True)
    first, second = (torch.tensor(weights)[labels] * F.cross_entropy(
        LOGITS, labels, reduction='none', label_smoothing=smoothing) for labels in (LABELS, LABELS.flip(0)))
    found = loss(LOGITS, mixed * (1 - smoothing) + smoothing / 5)
    torch.testing.assert_close(found, (0.7 * first + 0.3 * second).mean(), rtol=1e-4, atol=1e-5)


def test_smoothing_teaches_no_other_class_of_a_large_weight():
    loss = build_loss(Loss('ce', 0.1, class_weights='balanced'), 2, labels=[0] * 990 + [1] * 10)
    logits = torch.zeros(1, 2, requires_grad=True)
    loss(logits, torch.tensor([0])).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


@pytest.mark.parametrize('name', ['ce', 'bce'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_weights_are_the_same_of_labels_and_of_targets_that_are_smoothed(name, smoothing):
    loss = Loss(name, smoothing, class_weights=[1.0, 2.0, 0.5, 1.0, 4.0])
    targets = F.one_hot(LABELS, 5) * (1 - smoothing) + smoothing / 5
    torch.testing.assert_close(
        build_loss(loss, 5, mixed=True)(LOGITS, targets), build_loss(loss, 5)(LOGITS, LABELS), rtol=1e-4, atol=1e-5)


def test_balanced_weights_are_inverse_to_the_number_of_images():
    loss = build_loss(Loss(class_weights='balanced'), 3, labels=[0] * 6 + [1] * 3 + [2] * 2)
    weights = torch.tensor([1 / 6, 1 / 3, 1 / 2])
    torch.testing.assert_close(loss.weight, weights * 11 / 3)  # of 11 images the mean is 1


@pytest.mark.parametrize('name', ['ce', 'bce'])
@pytest.mark.parametrize('weights', ['balanced', [3.0, 1.0, 5.0]])
def test_weights_change_the_scale_neither_with_mixed_labels_nor_with_the_division_of_a_step(weights, name):
    labels = torch.tensor([0] * 12 + [1] * 3 + [2])
    logits = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    loss = build_loss(Loss(name, class_weights=weights), 3, labels=labels.tolist())
    whole = loss(logits, labels)
    torch.testing.assert_close(torch.stack([loss(logits[i::4], labels[i::4]) for i in range(4)]).mean(), whole)
    mixed = build_loss(Loss(name, class_weights=weights), 3, mixed=True, labels=labels.tolist())
    torch.testing.assert_close(mixed(logits, F.one_hot(labels, 3).float()), whole)
    torch.testing.assert_close(loss(torch.zeros(16, 3), labels), torch.tensor({'ce': 3.0, 'bce': 2.0}[name]).log())
    tenfold = Loss(name, class_weights=[10 * each for each in loss.weight.tolist()])
    again = build_loss(tenfold, 3, labels=labels.tolist())
    torch.testing.assert_close(again.weight, loss.weight)


def test_weights_of_classes_without_images(refused):
    with refused('class_weights: 0 for all classes', 'nothing', 'balanced'):
        build_loss(Loss(class_weights=[0.0, 1.0]), 2, labels=[0, 0])


def test_weights_of_classes_may_be_whole_numbers():
    labels = [0, 0, 1, 2]
    whole, same = (build_loss(Loss(class_weights=weights), 3, labels=labels)
                   for weights in ([1, 2, 3], [1.0, 2.0, 3.0]))
    assert torch.equal(whole.weight, same.weight)


@pytest.mark.parametrize('name', ['ce', 'bce'])
@pytest.mark.parametrize('smoothing', [1.0, 1.5, -0.1])
def test_smoothing_that_is_no_share(refused, name, smoothing):
    with refused(f'model.loss.smoothing: {smoothing}', 'share', '0.1'):
        check_loss(Loss(name, smoothing), mixed=False)


@pytest.mark.parametrize(('loss', 'mixed', 'given', 'why', 'do'), [
    (Loss('jsd'), True, 'jsd with model.mix', 'not mixed', 'leave model.mix out'),
    (Loss('asl'), True, 'asl with model.mix', 'not mixed', 'ce, bce or poly'),
    (Loss('ce', bce_sum=True), False, 'with the loss ce', 'no effect', 'name: bce'),
    (Loss('poly', class_weights=[1.0]), False, 'with the loss poly', 'no weights', 'ce or bce')])
def test_settings_that_contradict_each_other(refused, loss, mixed, given, why, do):
    with refused(given, why, do):
        check_loss(loss, mixed)


@pytest.mark.parametrize(('loss', 'options', 'given', 'do'), [
    (Loss('jsd'), {}, 'jsd with data.augment.splits: 0', 'splits 3'), (Loss(), {'splits': 3}, 'ce with', 'or neither'),
    (Loss('bce', bce_threshold=1.5), {}, 'bce_threshold: 1.5', 'from 0 and below 1'),
    (Loss('bce', bce_threshold=-0.5), {}, 'bce_threshold: -0.5', 'from 0 and below 1'),
    (Loss('bce', smoothing=0.1, bce_threshold=0.01), {}, 'bce_threshold: 0.01', 'from 0.02 and below 0.92'),
    (Loss(class_weights=[1.0]), {}, 'class_weights: 1 numbers', 'or say balanced'),
    (Loss(class_weights=[1.0, 1.0, 1.0, 1.0, -2.0]), {}, 'class_weights: -2.0', 'from 0'),
    (Loss(class_weights=[0.0] * 5), {}, 'class_weights: all 0', 'not all of them 0'),
    (Loss(class_weights=[1.0] * 4 + [float('inf')]), {}, 'class_weights: inf', 'finite'),
    (Loss(class_weights='balanced'), {}, 'class_weights: balanced', 'data module of lightning_app')])
def test_settings_that_do_not_suit_the_data(refused, loss, options, given, do):
    with refused(given, '', do):
        build_loss(loss, 5, **options)


@pytest.mark.parametrize('smoothing', [0.0, 0.25])
def test_threshold_is_from_the_least_target_to_below_the_largest(refused, smoothing):
    """Of two classes. Targets that are equal to it become 0."""
    least, most = smoothing / 2, 1 - smoothing / 2
    found = build_loss(Loss('bce', smoothing, bce_threshold=least), 2)(torch.zeros(1, 2), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor(2.0).log())
    with refused(f'bce_threshold: {most}', 'all would become the same', f'from {least:g} and below {most:g}'):
        build_loss(Loss('bce', smoothing, bce_threshold=most), 2)
