"""Training augmentation as in the paper, and evaluation as torchvision would do it, to the pixel."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tvf

from lightning_app.data import Augment, CIFAR10DataModule
from lightning_app.data.augment import evaluation_transform, training_transform
from lightning_app.data.samples import seeded

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'interpolation': 'bilinear'}
PLAIN = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'interpolation': 'bilinear'}
DRAWS = 300


@pytest.fixture(scope='module')
def ramp():
    """An image of 256x256 pixels that tells where it was cut: red is x, green is y."""
    y, x = np.mgrid[0:256, 0:256]
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def draw(augment, image, size, count=DRAWS, **normalisation):
    """Return `count` random results, (count, 3, size, size)."""
    transform = training_transform(augment, size, **(normalisation or PLAIN))
    results = []
    for seed in range(count):
        with seeded(seed):
            results.append(transform(image))
    return torch.stack(results)


def boxes(images):
    """Return width, height, and whether it is flipped, for crops of `ramp`; sides as shares of the image's."""
    images = images * 255 / 256
    left, right = images[:, 0, 2:-2, 0].mean(1), images[:, 0, 2:-2, -1].mean(1)
    top, bottom = images[:, 1, 0].mean(1), images[:, 1, -1].mean(1)
    # from the centre of the first pixel to that of the last there is one pixel less than the whole
    whole = images.shape[-1] / (images.shape[-1] - 1)
    return (right - left).abs() * whole, (bottom - top) * whole, right < left


# Training


def test_defaults_are_the_paper_s():
    assert Augment() == Augment(
        crop='rrc', scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, vflip=0.0, color_jitter=0.0, auto_augment=None,
        random_erasing=0.0, cutout=0)


def test_default_crops(ramp):
    width, height, _ = boxes(draw(Augment(), ramp, 64))
    area, ratio = width * height, width / height
    assert area.min() > 0.07
    assert area.max() < 1.03
    assert ratio.min() > 0.72
    assert ratio.max() < 1.40
    # and the ranges are made use of: area is uniform, ratio is log-uniform, where the crop fits
    assert area.min() < 0.15
    assert area.max() > 0.85
    assert abs(area.mean() - 0.5) < 0.06
    assert ratio.min() < 0.8
    assert ratio.max() > 1.25


@pytest.mark.parametrize(('hflip', 'expected'), [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize('crop', ['rrc', 'pad', 'rkrc', 'rkrr'])
def test_horizontal_flips(ramp, crop, hflip, expected):
    _, _, flipped = boxes(draw(Augment(crop=crop, hflip=hflip, padding=0), ramp, 64, count=200))
    assert abs(flipped.float().mean() - expected) < (0.1 if hflip == 0.5 else 1e-9)


def test_defaults_do_not_flip_vertically(ramp):
    _, height, _ = boxes(draw(Augment(), ramp, 64, count=50))
    assert height.min() > 0  # top above bottom
    _, height, _ = boxes(draw(Augment(vflip=1.0), ramp, 64, count=50))
    assert height.max() < 0


def test_defaults_do_not_change_colours():
    image = Image.new('RGB', (50, 40), (200, 100, 50))
    expected = tvf.normalize(tvf.to_tensor(image.resize((32, 32))), IMAGENET['mean'], IMAGENET['std'])
    results = draw(Augment(), image, 32, count=20, **IMAGENET)
    torch.testing.assert_close(results, expected.expand_as(results))


@pytest.mark.parametrize('option', [
    {'color_jitter': 0.4}, {'auto_augment': 'rand-m9-mstd0.5'}, {'random_erasing': 1.0}, {'cutout': 8},
    {'scale': (0.5, 0.6)}, {'ratio': (1.0, 1.1)}, {'vflip': 1.0}, {'hflip': 1.0}, {'crop': 'rkrc'}, {'crop': 'rkrr'},
    {'crop': 'pad'},
])
def test_each_setting_has_an_effect_and_is_reproducible(noise, option):
    image = noise(0, (50, 40))
    plain, one, two = (draw(Augment(**each), image, 32, count=12) for each in ({}, option, option))
    assert torch.equal(one, two)
    assert not torch.equal(one, plain)


def test_padding_has_an_effect(noise):
    one, two = (draw(Augment(crop='pad', padding=padding), noise(0), 32, count=12) for padding in (1, 4))
    assert not torch.equal(one, two)


def test_scale_as_a_list_from_yaml(ramp):
    width, height, _ = boxes(draw(Augment(scale=[0.3, 0.4]), ramp, 64, count=50))
    assert (width * height).min() > 0.27
    assert (width * height).max() < 0.43


def test_training_interpolation(ramp, noise):
    # not a random one, timm's default
    for name, mode in (('bilinear', Image.Resampling.BILINEAR), ('bicubic', Image.Resampling.BICUBIC)):
        whole = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
        results = draw(whole, noise(0, (64, 64)), 32, count=4, **{**PLAIN, 'interpolation': name})
        expected = tvf.to_tensor(noise(0, (64, 64)).resize((32, 32), mode))
        torch.testing.assert_close(results, expected.expand_as(results))


def test_the_default_draws_from_seeded_generators_only(ramp):
    transform = training_transform(Augment(), 32, **PLAIN)
    with seeded(3):
        expected = transform(ramp)
    random.seed(99)
    torch.manual_seed(99)
    with seeded(3):
        assert torch.equal(transform(ramp), expected)


def test_cifar_is_padded_by_zeros_cropped_and_flipped(noise):
    assert CIFAR10DataModule().augment == Augment(crop='pad', padding=4, hflip=0.5)
    image = noise(0, (32, 32))
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top:top + 32, left:left + 32]
            possible[crop.tobytes()] = top, left, False
            possible[crop[:, ::-1].tobytes()] = top, left, True
    results = (draw(CIFAR10DataModule().augment, image, 32, count=600) * 255).round().byte().permute(0, 2, 3, 1)
    found = [possible[result.numpy().tobytes()] for result in results]  # a KeyError is another image
    assert len({place[:2] for place in found}) == 81
    assert 0.45 < np.mean([place[2] for place in found]) < 0.55


def test_cutout_erases_a_square_around_any_pixel():
    erased = draw(Augment(crop='pad', padding=0, hflip=0.0, cutout=16), Image.new('RGB', (32, 32), 'white'), 32)
    assert set(erased.unique().tolist()) == {0., 1.}
    assert torch.equal(erased.amin(1), erased.amax(1))  # in all channels
    rows, columns = (erased[:, 0] == 0).any(2), (erased[:, 0] == 0).any(1)
    assert torch.equal(erased[:, 0] == 0, rows[:, :, None] & columns[:, None, :])
    for seen in (rows, columns):
        starts, heights = seen.int().argmax(1), seen.sum(1)
        centres = torch.where(starts > 0, starts + 8, heights - 8)
        assert set(centres.tolist()) == set(range(32))  # each pixel of a side, and nothing else
        assert torch.equal(heights, (centres + 8).clamp(max=32) - (centres - 8).clamp(min=0))


def test_cutout_erases_to_the_mean():
    image = training_transform(Augment(crop='pad', cutout=64), 32, **IMAGENET)(Image.new('RGB', (32, 32), 'white'))
    assert not image.any()


def test_negative_cutout(refused):
    with refused('data.augment.cutout: -1', 'side of a square', '16 for CIFAR-10'):
        training_transform(Augment(cutout=-1), 32, **PLAIN)


# Evaluation


@pytest.mark.parametrize(('size', 'crop_pct', 'resized'), [
    (224, 0.875, 256), (299, 0.849, 352), (320, 0.909, 352), (320, 0.875, 365), (320, 1.0, 320), (32, 1.0, 32)])
@pytest.mark.parametrize('shape', [(500, 375), (333, 501), (256, 256), (40, 90)])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_evaluation_is_torchvision_s(ramp, size, crop_pct, resized, shape, interpolation):
    y, x = np.mgrid[0:shape[1], 0:shape[0]]
    image = Image.fromarray((np.stack([x * 7, y * 5, x * y], 2) % 256).astype(np.uint8))
    expected = transforms.Compose([
        transforms.Resize(resized, transforms.InterpolationMode(interpolation)), transforms.CenterCrop(size),
        transforms.ToTensor(), transforms.Normalize(IMAGENET['mean'], IMAGENET['std'])])(image)
    transform = evaluation_transform(size, crop_pct, **{**IMAGENET, 'interpolation': interpolation})
    torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-6)  # 1 in 255 is 0.017 and more


def test_evaluation_is_not_random(noise):
    transform = evaluation_transform(32, 0.875, **IMAGENET)
    assert torch.equal(transform(noise(0)), transform(noise(0)))


@pytest.mark.parametrize(('shape', 'size'), [((32, 32), 64), ((32, 32), 24), ((40, 30), 64)])
def test_padding_takes_images_of_any_size(noise, shape, size):
    images = draw(Augment(crop='pad', padding=4), noise(0, shape), size, count=20)
    assert images.shape == (20, 3, size, size)
    assert len({image.numpy().tobytes() for image in images}) > 10
    if shape[0] == shape[1]:  # at most the padding is black
        assert (images[:, :, 4:-4, 4:-4].amax(dim=(1, 2, 3)) > 0).all()
        assert ((images == 0).all(1).sum(dim=(1, 2)) <= size * size - (size - 4) ** 2).all()


@pytest.mark.parametrize('policy', ['foo', 'rand-m9-foo1'])
def test_unknown_policy(refused, policy):
    with refused(f"auto_augment='{policy}'", 'timm', 'rand-m9-mstd0.5'):
        training_transform(Augment(auto_augment=policy), 32, **PLAIN)
