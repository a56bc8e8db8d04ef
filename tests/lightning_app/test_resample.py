"""Fast crops are timm's crops, with pixels within a bound of Pillow's."""
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomResizedCrop, Resize

from lightning_app.data import Augment
from lightning_app.data.augment import evaluation_transform, training_transform
from lightning_app.data.picture import Picture
from lightning_app.data.resample import Drawn, FastCrop, FastResize
from lightning_app.data.samples import seeded

SETTINGS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
INTERPOLATIONS = ['bilinear', 'bicubic']


def crops(image, size, exact, count=40, augment=Augment(), **settings):  # noqa: B008  (frozen)
    """Return `count` random crops as whole numbers, (count, 3, size, size)."""
    transform = training_transform(augment, size, exact=exact, **{**SETTINGS, 'interpolation': 'bilinear', **settings})
    results = []
    for seed in range(count):
        with seeded(seed):
            results.append(transform(image()))
    assert {each.dtype for each in results} == {torch.uint8}
    return torch.stack(results).int()


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize('size', [224, 64])
def test_same_crops_within_a_level_of_pillow(photo, size, interpolation):
    """As long as nothing is left out in decoding."""
    fast, exact = (crops(lambda: Picture(photo), size, each, interpolation=interpolation) for each in (False, True))
    assert_within_a_level(fast, exact, interpolation)
    assert (fast != exact).float().mean() < 0.02


def assert_within_a_level(fast, exact, interpolation):
    """Bicubic edges overshoot, and each library clips them at another moment."""
    difference = (fast.int() - exact.int()).abs()
    assert (difference > 1).float().mean() <= (2e-4 if interpolation == 'bicubic' else 0)
    assert difference.max() <= (12 if interpolation == 'bicubic' else 1)


def test_other_flips_and_colours_stay_timm_s(photo):
    augment = Augment(vflip=0.5, color_jitter=0.4, grayscale_prob=0.3)
    fast, exact = (crops(lambda: photo, 64, each, augment=augment) for each in (False, True))
    assert (fast - exact).abs().max() <= 4  # of a level, jitter makes a few


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize('decoder', ['pillow', 'simplejpeg', 'torchcodec'])
def test_crops_that_are_decoded_smaller_look_the_same(photo, decoder, interpolation):
    """libjpeg halves by averages of 2x2 pixels, before the interpolation: another filter, nearly the same image."""
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=95)
    fast, exact = (crops(lambda: Picture(file.getvalue(), decoder), 48, each, interpolation=interpolation)
                   for each in (False, True))
    difference = (fast - exact).abs().float()
    assert difference.mean((1, 2, 3)).max() < 6  # levels, of the worst crop
    assert 1 < difference.mean() < 3
    assert (fast - exact).float().mean((1, 2, 3)).abs().max() < 1  # no brighter or darker


def test_smaller_decoding_is_made_use_of(photo, monkeypatch):
    shrinks = []
    whole = Picture.pixels
    monkeypatch.setattr(Picture, 'pixels', lambda self, shrink=1: shrinks.append(shrink) or whole(self, shrink))
    for size, expected in {16: {4, 8}, 32: {2, 4}, 64: {1, 2}, 224: {1}}.items():  # of 427 lines
        shrinks.clear()
        crops(lambda: Picture(photo), size, False, 100)
        assert set(shrinks) == expected


def test_no_side_is_decoded_at_less_than_twice_what_is_needed(photo):
    photo.save(file := io.BytesIO(), 'JPEG')
    cut = FastCrop(RandomResizedCropAndInterpolation(32)).cut
    for rows, columns, shape in ((400, 40, (400, 40, 3)), (40, 400, (40, 400, 3)), (400, 400, (100, 100, 3))):
        assert cut(Picture(file.getvalue(), 'pillow'), Drawn(0, 0, rows, columns, False)).shape == shape
    photo.crop((0, 0, 640, 40)).save(file := io.BytesIO(), 'JPEG')
    resize = FastResize(Resize((32, 32)))
    assert torch.equal(resize(Picture(file.getvalue(), 'pillow')), resize(Image.open(file).convert('RGB')))


def test_crops_are_as_those_of_torchvision():
    """The same distribution of places and sides: a two-sample test of each, at one in ten thousand."""
    y, x = np.mgrid[0:200, 0:256]
    ramp = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    ours = crops(lambda: ramp, 64, False, 3000, Augment(hflip=0.0)).float()
    corners = torch.stack([ours[:, 0, 32, 0], ours[:, 0, 32, -1], ours[:, 1, 0, 32], ours[:, 1, -1, 32]], 1)
    torch.manual_seed(0)
    boxes = torch.tensor([RandomResizedCrop.get_params(torch.empty(1, 200, 256), (0.08, 1.), (3 / 4, 4 / 3))
                          for _ in range(3000)]).float()
    top, left, height, width = boxes.T
    theirs = torch.stack([left, left + width - 1, top, top + height - 1], 1)
    for one, other in zip(corners.T, theirs.T, strict=True):
        # a pixel of a crop is an average about its middle: sides are known to a pixel or two
        assert distance(one.sort().values, other.sort().values) < 2.23 * (2 / 3000) ** 0.5 + 0.02


def distance(one, other):
    """Return the largest difference of two distribution functions (Kolmogorov and Smirnov)."""
    every = torch.cat([one, other]).sort().values
    return float((torch.searchsorted(one, every, right=True) / len(one)
                  - torch.searchsorted(other, every, right=True) / len(other)).abs().max())


@pytest.mark.parametrize('probability', [0.3, 1.0])
def test_flips_are_torchvision_s(photo, probability):
    """In a transform of one step, and before other steps."""
    for colours in ({}, {'grayscale_prob': 1e-9}):
        fast, exact = (crops(lambda: Picture(photo), 32, each, augment=Augment(hflip=probability, **colours))
                       for each in (False, True))
        assert (fast - exact).abs().max() <= 1
    assert (fast != fast.flip(-1)).any()


def test_crops_depend_on_python_s_generator_as_timm_s_do(photo):
    transform = training_transform(Augment(hflip=0.0), 32, **SETTINGS, interpolation='bilinear')
    random.seed(5)
    first = transform(photo)
    random.seed(5)
    assert torch.equal(transform(photo), first)


@pytest.mark.parametrize('shape', [(1, 1), (1, 300), (300, 1), (9, 7), (4000, 30)])
@pytest.mark.parametrize('decoder', ['pillow', 'simplejpeg', 'nvimgcodec'])
def test_crops_of_images_of_any_shape(noise, shape, decoder):
    file = io.BytesIO()
    noise(1, shape).save(file, 'JPEG')
    assert crops(lambda: Picture(file.getvalue(), decoder), 16, False, 20).shape == (20, 3, 16, 16)


# Evaluation


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize('views', ['center', 'flip', 'ten'])
@pytest.mark.parametrize(('size', 'crop_pct'), [(224, 0.875), (320, 1.0), (64, 0.875)])
def test_evaluation_within_a_level_of_pillow(photo, size, crop_pct, views, interpolation):
    for image in (photo, photo.transpose(Image.Transpose.TRANSPOSE)):
        exact, fast = (
            evaluation_transform(size, crop_pct, views, exact, **SETTINGS, interpolation=interpolation)(Picture(image))
            for exact in (True, False))
        assert fast.shape == exact.shape
        assert fast.dtype == torch.uint8
        assert_within_a_level(fast, exact, interpolation)


def test_evaluation_of_a_file_decoded_smaller(photo):
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=95)
    exact, fast = (evaluation_transform(64, 0.875, 'center', each, **SETTINGS, interpolation='bilinear')(
        Picture(file.getvalue(), 'simplejpeg')) for each in (True, False))
    assert 0.5 < (fast.int() - exact.int()).abs().float().mean() < 3
