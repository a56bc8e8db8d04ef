"""What is erased on the device is what timm erases in normalised images, to the bit."""
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from lightning_app.data import Augment
from lightning_app.data.augment import Normalisation, training_transform
from lightning_app.data.collate import collate
from lightning_app.data.erase import Cutout, Erase, Erased
from lightning_app.data.samples import TrainingSamples, seeded
from lightning_app.data.sources import FolderSource

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'interpolation': 'bilinear'}
NORMALISE = Normalisation(IMAGENET['mean'], IMAGENET['std'])


def drawn(transform, image, count=20):
    """Return what a transform makes of an image, by `count` seeds."""
    results = []
    for seed in range(count):
        with seeded(seed):
            results.append(transform(image))
    return results


def batch_of(images):
    """Return images as they leave the loader."""
    return collate([(image, 0) for image in images])[0]


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
@pytest.mark.parametrize('settings', [
    {'random_erasing': 1.0}, {'random_erasing': 0.5, 'erasing_count': 3},
    {'random_erasing': 0.5, 'auto_augment': 'rand-m9-mstd0.5', 'vflip': 0.5}])
def test_erased_images_are_timm_s(noise, mode, settings):
    augment = Augment(**settings, erasing_mode=mode)
    timms = create_transform(
        32, is_training=True, color_jitter=None, auto_augment=augment.auto_augment, vflip=augment.vflip,
        re_prob=augment.random_erasing, re_mode=mode, re_count=augment.erasing_count, **IMAGENET)
    expected = torch.stack(drawn(timms, noise(0)))
    images = batch_of(drawn(training_transform(augment, 32, exact=True, **IMAGENET), noise(0)))
    assert torch.equal(NORMALISE(images), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(NORMALISE(images, dtype), expected.to(dtype))


@pytest.mark.parametrize('settings', [{'random_erasing': 1.0}, {'cutout': 8}, {'random_erasing': 0.5, 'cutout': 8}])
def test_what_is_not_erased_is_the_plain_image(noise, settings):
    plain = NORMALISE(batch_of(drawn(training_transform(Augment(), 32, **IMAGENET), noise(0))))
    images = batch_of(drawn(training_transform(Augment(**settings), 32, **IMAGENET), noise(0)))
    same = (NORMALISE(images) == plain).all(1)
    assert torch.equal(same.flatten().logical_not().nonzero().flatten(), images.places.sort().values)
    assert 0.02 < len(images.places) / same.numel() < 0.4


def test_erased_versions_of_an_image(noise):
    augment = Augment(auto_augment='augmix-m3-w3', splits=3, random_erasing=1.0, erasing_mode='const')
    images = drawn(training_transform(augment, 32, **IMAGENET), noise(0))
    result = NORMALISE(batch_of(images))
    assert result.shape == (20, 3, 3, 32, 32)
    assert torch.equal(result, torch.stack([NORMALISE(image) for image in images]))
    erased = (result == 0).all(2).flatten(2).any(2)
    assert not erased[:, 0].any()
    assert erased[:, 1:].all()


def test_images_of_a_batch_of_which_nothing_is_erased(noise):
    images = batch_of(drawn(training_transform(Augment(random_erasing=1e-9), 32, **IMAGENET), noise(0), 3))
    assert images.places.shape == (0,)
    assert images.values.shape == (0, 3)
    expected = batch_of(drawn(training_transform(Augment(), 32, **IMAGENET), noise(0), 3))
    assert torch.equal(NORMALISE(images), NORMALISE(expected))


def test_of_what_is_erased_twice_the_last_counts():
    def first(image):
        image[:, :2] = 1.0

    def second(image):
        image[:, :, 1:3] = torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)

    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    erased = Erase([first, second])(image)
    assert sorted(erased.places.tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 13, 14]
    result = erased.erase(image.float())
    assert torch.equal(result[:, 0], torch.tensor([[1.0, 2, 2, 1], [1, 3, 3, 1], [1, 4, 4, 1]]))
    assert torch.equal(result[:, 3], torch.tensor([[100.0, 2, 2, 100], [100, 3, 3, 100], [100, 4, 4, 100]]))


def test_workers_send_bytes_and_what_is_erased(tmp_path, write_images):
    source = FolderSource(write_images(tmp_path))
    samples = TrainingSamples(source, training_transform(Augment(random_erasing=0.5, cutout=4), 32, **IMAGENET))
    (here, _), = DataLoader(samples, len(samples), collate_fn=collate)
    (there, _), = DataLoader(samples, len(samples), num_workers=1, collate_fn=collate)
    assert isinstance(there, Erased)
    assert there.images.dtype == torch.uint8
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_cutout_erases_a_square_around_any_pixel():
    erased = torch.stack(drawn(lambda image: Cutout(16)(image.clone()), torch.ones(3, 32, 32), 300))
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
    assert not NORMALISE(image).any()
