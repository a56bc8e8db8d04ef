"""Mixup and CutMix: images are mixtures of two, targets the same mixtures, and the draws follow from the step."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_app import ImageClassifier
from lightning_app.loss import Loss
from lightning_app.mix import Mix, build_mixup, check_mix
from lightning_app.optim import Optim


def mixed(mix, seed, size=8, smoothing=0.0):
    """Return images that show their number, mixed, and their targets."""
    np.random.seed(seed)
    images = torch.arange(float(size)).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    return build_mixup(mix, size, smoothing, size)(images, torch.arange(size))


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_mixup(mode):
    shares = set()
    for seed in range(20):
        images, targets = mixed(Mix(mixup=0.4, mode=mode), seed)
        assert torch.equal(images.amin((1, 2, 3)), images.amax((1, 2, 3)))
        torch.testing.assert_close(images[:, 0, 0, 0], targets @ torch.arange(8.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        shares |= set(targets[:, 0].tolist())
    assert len(shares) > 20


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_cutmix(mode):
    for seed in range(20):
        images, targets = mixed(Mix(cutmix=1.0, mode=mode), seed)
        assert torch.equal(images, images.round())  # pixels are of one or the other
        torch.testing.assert_close(images[:, 0].mean((1, 2)), targets @ torch.arange(8.0))


def test_either_and_neither():
    kinds = []
    for seed in range(300):
        images, _ = mixed(Mix(mixup=0.4, cutmix=1.0, prob=0.5, switch_prob=0.25), seed)
        plain = torch.equal(images[:, 0, 0, 0], torch.arange(8.0)) and torch.equal(
            images.amin((1, 2, 3)), images.amax((1, 2, 3)))
        kinds.append('plain' if plain else 'cutmix' if torch.equal(images, images.round()) else 'mixup')
    assert 0.4 < kinds.count('plain') / 300 < 0.65
    assert 0.25 < kinds.count('mixup') / 300 < 0.5
    assert 0.05 < kinds.count('cutmix') / 300 < 0.2


def test_smoothing_is_in_the_targets():
    _, targets = mixed(Mix(mixup=0.4, prob=0.0), 0, smoothing=0.1)
    torch.testing.assert_close(targets, F.one_hot(torch.arange(8), 8) * 0.9 + 0.1 / 8)


@pytest.mark.parametrize('mix', [Mix(mixup=0.8), Mix(cutmix=1.0, mode='pair')])
def test_images_of_the_user_stay_what_they_are(mix, make_trainer):
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 3
    before = images.clone()
    loader = DataLoader([(images[:8], labels[:8]), (images[8:], labels[8:])], batch_size=None)
    make_trainer(limit_val_batches=0).fit(ImageClassifier('test_resnet', num_classes=3, mix=mix), loader)
    assert torch.equal(images, before)


def test_training_takes_mixtures_that_follow_from_the_step_until_they_end(make_trainer, photo_data):
    def run():
        seen = []
        torch.manual_seed(0)
        model = ImageClassifier('test_resnet', num_classes=3, optim=Optim(lr=0.01), mix=Mix(mixup=1.0, off_epoch=1),
                                loss=Loss('bce', smoothing=0.1))
        data = photo_data()
        model.net.register_forward_pre_hook(lambda net, images: seen.append(images[0].clone()))
        make_trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
        return torch.stack(seen), data

    images, data = run()
    again, _ = run()
    assert torch.equal(images, again)
    for epoch, mixed_images in enumerate(images.flatten(0, 1).split(24)):
        data.sampler.set_epoch(epoch)
        originals = torch.stack([data.normalisation(data.training[key][0]) for key in data.sampler])
        distance = (mixed_images.flatten(1)[:, None] - originals.flatten(1)).abs().amax(2).amin(1)
        assert (distance > 0.1).sum() > 12 if epoch == 0 else torch.equal(distance, torch.zeros(24))


@pytest.mark.parametrize(('mix', 'given'), [
    (Mix(mixup=-1), 'model.mix.mixup: -1'), (Mix(mixup=1, prob=2), 'model.mix.prob: 2'),
    (Mix(prob=0.5), 'model.mix: '), (Mix(mixup=1, prob=0), 'model.mix: '), (Mix(cutmix=1, off_epoch=0), 'off_epoch: 0'),
    (Mix(mixup=1, switch_prob=0.9), 'switch_prob: 0.9')])
def test_settings_that_mean_nothing(refused, mix, given):
    with refused(given, '', ''):
        check_mix(mix)


def test_odd_batches_are_refused_before_the_training(make_trainer, photo_data, refused):
    with refused('model.mix with 3 images', 'in pairs', 'an even number'):
        make_trainer().fit(ImageClassifier('test_resnet', num_classes=3, mix=Mix(mixup=0.2)), photo_data(batch_size=3))


def test_odd_batches_of_a_plain_loader_are_refused(make_trainer, refused):
    loader = DataLoader(TensorDataset(torch.randn(3, 3, 32, 32), torch.arange(3)), batch_size=3)
    with refused('model.mix with 3 images', 'in pairs', 'an even number'):
        make_trainer().fit(ImageClassifier('test_resnet', num_classes=3, mix=Mix(mixup=0.2)), loader)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('mix', [{'mixup': 1.0}, {'cutmix': 1.0}], ids=str)
def test_memory_format_is_kept(mix, mode):
    np.random.seed(0)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    mixed, _ = build_mixup(Mix(mode=mode, **mix), 3, 0.0, 4)(images.clone(), torch.tensor([0, 1, 2, 0]))
    assert not torch.equal(mixed, images)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
