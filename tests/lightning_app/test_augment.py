"""Training augmentation as in the paper, and evaluation as torchvision would do it, to the pixel."""
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tvf

from lightning_app.data import Augment, CIFAR10DataModule
from lightning_app.data.augment import Normalisation, evaluation_transform, training_transform
from lightning_app.data.collate import collate
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
    normalisation = normalisation or PLAIN
    transform = training_transform(augment, size, **normalisation)
    results = []
    for seed in range(count):
        with seeded(seed):
            results.append(transform(image))
    batch, _ = collate([(result, 0) for result in results])
    return Normalisation(normalisation['mean'], normalisation['std'])(batch)


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
    padding = {'padding': 0} if crop == 'pad' else {}
    _, _, flipped = boxes(draw(Augment(crop=crop, hflip=hflip, **padding), ramp, 64, count=200))
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


def test_padded_crops_are_flipped_vertically_if_that_is_asked_for(noise):
    plain, flipped = (draw(Augment(crop='pad', padding=0, hflip=0.0, vflip=vflip), noise(0, (32, 32)), 32, count=1)[0]
                      for vflip in (0.0, 1.0))
    assert torch.equal(flipped, plain.flip(1))


@pytest.mark.parametrize('name', ['bilinear', 'bicubic', 'lanczos'])
def test_interpolation_before_padded_crops(noise, name):
    image = noise(0, (64, 64))
    found = draw(Augment(crop='pad', padding=0, hflip=0.0), image, 32, count=1, **{**PLAIN, 'interpolation': name})[0]
    expected = tvf.to_tensor(image.resize((32, 32), getattr(Image.Resampling, name.upper())))
    torch.testing.assert_close(found, expected)


def test_negative_cutout(refused):
    with refused('data.augment.cutout: -1', 'side of a square', '16 for CIFAR-10'):
        training_transform(Augment(cutout=-1), 32, **PLAIN)


def test_rotation_turns_before_the_crop(ramp):
    turned = draw(Augment(crop='pad', padding=0, hflip=0.0, rotation=10), ramp, 256, count=40)
    # the direction in which red grows, near the centre
    along, down = turned[:, 0, 128, 160] - turned[:, 0, 128, 96], turned[:, 0, 160, 128] - turned[:, 0, 96, 128]
    angles = torch.rad2deg(torch.atan2(down, along))
    assert angles.abs().max() < 11
    assert angles.min() < -5
    assert angles.max() > 5


def test_pixel_jitter_adds_to_each_channel_its_own(noise):
    grey = Image.new('RGB', (8, 8), (128, 250, 5))
    changed = (draw(Augment(crop='pad', padding=0, pixel_jitter=20), grey, 8) * 255).round()
    assert torch.equal(changed.amin((2, 3)), changed.amax((2, 3)))  # the same for all pixels
    added = changed[:, :, 0, 0] - torch.tensor([128, 250, 5])
    assert set(added[:, 0].tolist()) == set(range(-20, 21))
    assert set(added[:, 1].tolist()) == set(range(-20, 6))  # values stay in 0..255
    assert set(added[:, 2].tolist()) == set(range(-5, 21))
    assert abs(np.corrcoef(added[:, 0], added[:, 1])[0, 1]) < 0.2


def test_grey_and_blurred_images(noise):
    image = noise(0, (32, 32))
    plain = {'crop': 'pad', 'padding': 0, 'hflip': 0.0}
    grey = draw(Augment(**plain, grayscale_prob=0.5), image, 32)
    assert 0.4 < (grey.amax(1) == grey.amin(1)).all(-1).all(-1).float().mean() < 0.6
    blurred = draw(Augment(**plain, gaussian_blur_prob=0.5), image, 32, count=60)
    assert 0.3 < (blurred.std((1, 2, 3)) < 0.9 * blurred.std((1, 2, 3)).max()).float().mean() < 0.7


def test_colour_jitter_with_a_probability(noise):
    plain = {'crop': 'pad', 'padding': 0, 'hflip': 0.0}
    same = draw(Augment(**plain), noise(0, (32, 32)), 32, 1)
    changed = draw(Augment(**plain, color_jitter=0.4, color_jitter_prob=0.5), noise(0, (32, 32)), 32)
    assert 0.4 < (changed == same).all(-1).all(-1).all(-1).float().mean() < 0.6


@pytest.mark.parametrize('policy', [
    'original', 'originalr', 'v0', 'v0r', '3a', 'rand-m9-mstd0.5', 'rand-m7-n3-inc1', 'rand-mstd1-tweights',
    'augmix-m3-w3', 'augmix-m5-w4-d2', 'original-mstd0.5'])
def test_every_kind_of_policy(noise, policy):
    image = noise(0, (32, 32))
    plain = draw(Augment(crop='pad', padding=0, hflip=0.0), image, 32, 1)
    changed = draw(Augment(crop='pad', padding=0, hflip=0.0, auto_augment=policy), image, 32, 20)
    assert changed.shape == (20, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in changed} - {plain[0].numpy().tobytes()}) > 3


@pytest.mark.parametrize('erasing', [0.0, 1.0])
def test_versions_of_an_image_share_their_crop_and_the_first_is_clean(ramp, erasing):
    augment = Augment(auto_augment='augmix-m3-w3', splits=3, random_erasing=erasing)
    clean = draw(Augment(), ramp, 64, 20)
    versions = draw(augment, ramp, 64, 20)
    assert versions.shape == (20, 3, 3, 64, 64)
    torch.testing.assert_close(versions[:, 0], clean)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(versions[:, first], versions[:, second])


@pytest.mark.parametrize(('settings', 'given', 'why'), [
    ({'splits': 1}, 'splits: 1', 'no other'), ({'pixel_jitter': -1}, 'pixel_jitter: -1', '0 to 255'),
    ({'color_jitter': 0.4, 'auto_augment': 'rand-m9'}, 'color_jitter: 0.4 with auto_augment rand-m9', 'leaves colour'),
    ({'color_jitter_prob': 0.5}, 'color_jitter_prob: 0.5 without', 'without strength'),
    ({'splits': 3}, 'splits: 3', 'all would be equal'), ({'splits': 3, 'rotation': 10}, 'splits: 3', 'would be equal'),
    ({'erasing_mode': 'const'}, 'erasing_mode: const without', 'nothing is erased'),
    ({'crop': 'pad', 'scale': (0.25, 1.0)}, 'scale: (0.25, 1.0) with crop pad', 'no use of it'),
    ({'crop': 'pad', 'ratio': (1.0, 1.0)}, 'ratio: (1.0, 1.0) with crop pad', 'no use of it'),
    ({'crop': 'rkrr', 'padding': 0}, 'padding: 0 with crop rkrr', 'no use of it'),
    ({'erasing_count': 2}, 'erasing_count: 2 without', 'nothing is erased'),
    ({'erasing_count': 0, 'random_erasing': 0.5}, 'erasing_count: 0', 'number of rectangles'),
    ({'rotation': -5}, 'rotation: -5', 'to both sides'), ({'rotation': 181}, 'rotation: 181', 'in degrees'),
    ({'scale': (8, 100)}, 'scale: [8, 100]', 'shares'), ({'scale': (-1, 0)}, 'scale: [-1, 0]', 'shares'),
    ({'scale': (1.0, 0.08)}, 'scale: [1.0, 0.08]', 'shares'), ({'ratio': (0, 1)}, 'ratio: [0, 1]', 'widths / heights'),
    ({'ratio': (1.5, 0.75)}, 'ratio: [1.5, 0.75]', 'widths / heights'),
    ({'crop': 'pad', 'padding': -8}, 'padding: -8', 'pixels on each side'),
    ({'hflip': 1.5}, 'hflip: 1.5', 'a probability'), ({'vflip': -0.1}, 'vflip: -0.1', 'a probability'),
    ({'grayscale_prob': 2.0}, 'grayscale_prob: 2.0', 'a probability'),
    ({'gaussian_blur_prob': -1.0}, 'gaussian_blur_prob: -1.0', 'a probability'),
    ({'random_erasing': 25.0}, 'random_erasing: 25.0', 'a probability'),
    ({'color_jitter': 0.4, 'color_jitter_prob': 3.0}, 'color_jitter_prob: 3.0', 'a probability')])
def test_settings_that_mean_nothing(refused, settings, given, why):
    with refused(given, why, ''):
        training_transform(Augment(**settings), 32, **PLAIN)


# Evaluation


def test_views(noise):
    image = noise(0, (60, 40))
    resized = image.resize((54, 36), Image.Resampling.BILINEAR)
    centre = evaluation_transform(32, 32 / 36, **IMAGENET)(image)
    flipped = evaluation_transform(32, 32 / 36, 'flip', **IMAGENET)(image)
    assert torch.equal(flipped, torch.stack([centre, centre.flip(2)]))
    ten = evaluation_transform(32, 32 / 36, 'ten', **IMAGENET)(image)
    expected = torch.stack([tvf.pil_to_tensor(view) for view in tvf.ten_crop(resized, 32)])
    assert torch.equal(ten, expected)


def test_unknown_views(refused):
    with refused("data.eval_views: 'fliped'", 'no such', 'did you mean flip?'):
        evaluation_transform(32, 0.875, 'fliped', **IMAGENET)


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
    assert torch.equal(Normalisation(IMAGENET['mean'], IMAGENET['std'])(transform(image)), expected)


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0])
@pytest.mark.parametrize('shape', [(500, 375), (90, 301), (40, 64), (1600, 1200)])
def test_evaluation_is_timm_s_in_every_crop_mode(noise, crop_mode, crop_pct, shape):
    image = noise(0, shape)
    expected = timm.data.create_transform(64, is_training=False, crop_pct=crop_pct, crop_mode=crop_mode, **PLAIN)(image)
    transform = evaluation_transform(64, crop_pct, crop_mode=crop_mode, **PLAIN)
    normalise = Normalisation(PLAIN['mean'], PLAIN['std'])
    assert torch.allclose(normalise(transform(image)), expected, atol=1e-6)
    fast = normalise(evaluation_transform(64, crop_pct, exact=False, crop_mode=crop_mode, **PLAIN)(image))
    assert (fast - expected).abs().mean() < 0.03


@pytest.mark.parametrize(('crop_mode', 'of'), [('center', 'square '), ('squash', '')])
def test_views_that_are_all_the_same(crop_mode, of, noise, caplog):
    transform = evaluation_transform(32, 1.0, 'ten', crop_mode=crop_mode, **IMAGENET)
    assert f'crop_pct: 1: of {of}images all five crops are the same' in caplog.text
    views = transform(noise(0, (40, 40)))
    assert all(torch.equal(view, views[0]) for view in views[1:5])


@pytest.mark.parametrize(('views', 'crop_pct'), [('ten', 0.875), ('flip', 1.0)])
def test_views_that_differ_are_not_told_of(views, crop_pct, caplog):
    evaluation_transform(32, crop_pct, views, **IMAGENET)
    assert not caplog.text


def test_views_of_an_image_with_borders(refused, noise):
    settings = {'crop_mode': 'border', **IMAGENET}
    centre, flipped = (evaluation_transform(32, 0.875, views, **settings)(noise(0, (60, 40)))
                       for views in ('center', 'flip'))
    assert torch.equal(flipped, torch.stack([centre, centre.flip(2)]))
    with refused('data.eval_views: ten with data.crop_mode: border', 'borders', 'crop_mode'):
        evaluation_transform(32, 0.875, 'ten', crop_mode='border', **IMAGENET)
    with refused('data.eval_views: ten with data.crop_pct: 1.15', 'borders', 'crop_pct'):
        evaluation_transform(32, 1.15, 'ten', **IMAGENET)


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


@pytest.mark.parametrize(('policy', 'part'), [
    ('rand-m9-foo', 'foo'), ('rand-m9-inc', 'inc'), ('rand-m', 'm'), ('rand-mstdinf', 'mstdinf'), ('rand-', ''),
    ('augmix-m3-blend', 'blend'), ('original-mstd', 'mstd'), ('3a-foo', 'foo')])
def test_parts_of_a_policy_that_timm_would_leave_out(refused, policy, part):
    with refused(f'auto_augment: {policy}', f"leaves out '{part}'", 'mstd0.5'):
        training_transform(Augment(auto_augment=policy), 32, **PLAIN)


@pytest.mark.parametrize('policy', ['foo', 'randx-m9', 'v1', '3ab', 'rand-m9.5', 'rand-m9-foo1', 'augmix-foo1'])
def test_unknown_policy(refused, policy):
    with refused(f"auto_augment='{policy}'", 'timm', 'rand-m9-mstd0.5'):
        training_transform(Augment(auto_augment=policy), 32, **PLAIN)
