"""Transforms by timm, from settings that fit in YAML."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import CenterCropOrPad, RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, hflip

from se_timm.errors import InputError, message, unknown

from .erase import Cutout, Erase, Erased
from .resample import FastCrop, FastResize, as_image

__all__ = [
    'INTERPOLATIONS', 'OWN', 'Augment', 'Normalisation', 'PixelJitter', 'Splits', 'Views', 'evaluation_transform',
    'timm_settings', 'training_transform',
]

BILINEAR = InterpolationMode.BILINEAR
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # timm's
FAST = ('bilinear', 'bicubic')  # interpolations that torch does in bytes
VIEWS = ('center', 'flip', 'ten')
CENTRE_CROPS = (transforms.CenterCrop, CenterCropOrPad)
CROP_MODES = ('center', 'squash', 'border')  # timm's, of evaluation
PROBABILITIES = ('hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'random_erasing')
RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {  # what fits, what it is, and what to take
    'scale': (lambda value: 0 < value[0] <= value[1] <= 1, "it is a range of shares of the image's area",
              'take two numbers above 0 and up to 1, the smaller one first, such as [0.08, 1.0]'),
    'ratio': (lambda value: 0 < value[0] <= value[1], 'it is a range of widths / heights',
              'take two numbers above 0, the smaller one first, such as [0.75, 1.3333]'),
    'padding': (lambda value: value >= 0, 'it is a number of pixels on each side',
                'take a number from 0, or as published 4 for CIFAR'),
    'rotation': (lambda value: 0 <= value <= 180, 'it is the largest angle to both sides, in degrees',
                 "take 0 for none, or the authors' 10"),
    'erasing_count': (lambda value: value >= 1, 'it is the largest number of rectangles',
                      'take a number from 1; random_erasing 0 erases none'),
    'cutout': (lambda value: value >= 0, 'it is the side of a square, in pixels',
               'take 0 for none, or as published 16 for CIFAR-10 and 8 for CIFAR-100'),
    'pixel_jitter': (lambda value: 0 <= value <= 255, 'it is added to values from 0 to 255',
                     "take 0 for none, or the authors' 20"),
    'splits': (lambda value: not value or value >= 2, 'one version of an image can be compared with no other',
               'take 0 for none, or 3 as published'),
}
CHANGES = ('color_jitter', 'grayscale_prob', 'gaussian_blur_prob', 'pixel_jitter', 'auto_augment', 'random_erasing',
           'cutout')  # what tells the versions of an image apart
OWN = ('padding', 'rotation', 'pixel_jitter', 'cutout', 'splits')  # settings that timm has not, beside the crop `pad`


@dataclass(frozen=True)
class Augment:
    """Training augmentation. The defaults are the paper's: random resized crop and horizontal flip.

    Attributes:
        crop: `rrc` (random resized crop), timm's `rkrc` and `rkrr` (resize keeping the ratio, then crop at the centre
            or at random), or `pad` (shorter side to the size, zero-pad by `padding` pixels and crop at random: CIFAR).
        scale: Range of the crop's area, as a share of the image's (all but `pad`).
        ratio: Range of the crop's aspect ratio (all but `pad`).
        padding: Pixels on each side (`pad`).
        rotation: Largest angle, in degrees to both sides, by which an image is turned before it is cropped; the
            authors' README has 10.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        color_jitter_prob: Probability of that jitter; always where not given.
        grayscale_prob: Probability of turning an image grey.
        gaussian_blur_prob: Probability of blurring an image.
        pixel_jitter: Largest number, of 255, that is added to a channel, drawn for each; the authors' README has 20.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5`, `original`, `3a` or `augmix-m3-w3`; none by
            default.
        random_erasing: Probability of erasing rectangles.
        erasing_mode: What they are filled with: `pixel` (noise), `rand` (a colour) or `const` (the mean).
        erasing_count: Largest number of rectangles in an image.
        cutout: Side in pixels of a square that is erased in every image, by `Cutout`; none by default.
        splits: Versions of each image: the first is only cropped and flipped, the others are augmented each on its
            own, as for AugMix with `model.loss.name: jsd` (3 as published); none by default.
    """

    crop: Literal['rrc', 'rkrc', 'rkrr', 'pad'] = 'rrc'
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    padding: int = 4
    rotation: float = 0.0
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    pixel_jitter: int = 0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    erasing_mode: Literal['pixel', 'rand', 'const'] = 'pixel'
    erasing_count: int = 1
    cutout: int = 0
    splits: int = 0


class PixelJitter:
    """Add to each channel of an image a whole number of its own, from `-largest` to `largest`; values stay in 0..255.

    The authors' README lists "pixel jitter [-20, 20]" without saying more; this is a reading of it.

    Args:
        largest: Of 255.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a changed copy of an RGB image."""
        added = torch.randint(-self.largest, self.largest + 1, (3,)).numpy()
        return Image.fromarray((np.asarray(image) + added).clip(0, 255).astype(np.uint8))

    def __repr__(self) -> str:
        return f'PixelJitter(largest={self.largest})'


class Splits:
    """Several versions of an image, `(count, 3, size, size)`: the first clean, the others augmented each on its own.

    timm's `AugMixDataset` does the same, but returns a tuple, and erases on the device.

    Args:
        geometry: What all versions share.
        augment: What the others have beside it, from image to tensor.
        tensor: From image to tensor.
        count: Number of versions.
    """

    def __init__(self, geometry: Any, augment: Any, tensor: Any, count: int) -> None:
        self.geometry, self.augment, self.tensor, self.count = geometry, augment, tensor, count

    def __call__(self, image: Image.Image) -> Tensor | Erased:
        """Return the versions of an RGB image."""
        image = self.geometry(image)
        versions = [self.tensor(image), *(self.augment(image) for _ in range(self.count - 1))]
        if any(isinstance(version, Erased) for version in versions):
            return Erased.stack([Erased.of(version) for version in versions])
        return torch.stack(versions)


class Views:
    """What evaluation sees of an image, `(views, 3, size, size)`.

    Args:
        steps: From image to tensor, as by timm: resized, centre crop, tensor.
        views: `flip` (the crop and its mirror image) or `ten` (centre and corners, and the mirror images).
    """

    def __init__(self, steps: list[Any], views: str) -> None:
        centre = next(place for place, step in enumerate(steps) if isinstance(step, CENTRE_CROPS))
        crop = transforms.TenCrop(steps[centre].size) if views == 'ten' else Mirrored(steps[centre])
        self.before, self.after = transforms.Compose(steps[:centre]), transforms.Compose(steps[centre + 1:])
        self.crop = crop

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the views of an RGB image."""
        return torch.stack([self.after(view) for view in self.crop(self.before(image))])


class Mirrored:
    """A crop and its mirror image."""

    def __init__(self, crop: Any) -> None:
        self.crop = crop

    def __call__(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Return both."""
        image = self.crop(image)
        return image, hflip(image)


def training_transform(augment: Augment, size: int, exact: bool = False, **normalisation: Any) -> Any:
    """Return the transform from a `Picture` or RGB image to a tensor `(3, size, size)`, or `(splits, 3, size, size)`.

    It is uint8, to be normalised on the device; where something is erased it comes with that, as `Erased`.

    Args:
        augment: The settings.
        size: Height and width in pixels.
        exact: Crop and resize as timm does, by Pillow, to the pixel, also where the same crop can be had faster.
        **normalisation: `mean`, `std` and `interpolation` for `timm.data.create_transform`.

    Raises:
        InputError: For settings that timm does not know, or that would have no effect.
    """
    check(augment)
    geometry, colours, tensor, erasing = timm_transforms(augment, size, normalisation)
    if augment.crop == 'pad':
        geometry = [
            transforms.Resize(size, str_to_interp_mode(normalisation.get('interpolation', 'bilinear'))),
            transforms.RandomCrop(size, padding=augment.padding),
            transforms.RandomHorizontalFlip(augment.hflip),
            transforms.RandomVerticalFlip(augment.vflip),
        ]
    if augment.rotation:
        geometry = [transforms.RandomRotation(augment.rotation, BILINEAR), *geometry]
    if augment.pixel_jitter:
        colours = [*colours, PixelJitter(augment.pixel_jitter)]
    if augment.cutout:
        erasing = [*erasing, Cutout(augment.cutout)]
    steps = in_bytes(geometry, exact or augment.crop == 'pad', normalisation.get('interpolation', 'bilinear'))
    erase = Erase(erasing) if erasing else None
    changes = [*colours, *tensor, *([erase] if erase else [])]
    if colours or augment.splits:
        steps = [*steps, as_image]
    elif [type(step) for step in steps] == [FastCrop]:
        return FastCrop(steps[0].crop, steps[0].flip, erase)  # which `TrainingSamples` knows
    if augment.splits:
        shared, others, clean = map(transforms.Compose, (steps, changes, tensor))
        return Splits(shared, others, clean, augment.splits)
    return transforms.Compose([*steps, *changes])


def in_bytes(steps: list[Any], exact: bool, interpolation: str = 'bilinear') -> list[Any]:
    """Return `steps` of torchvision's and timm's with those that have a faster form in it, from a `Picture` on.

    Where the first has none, the picture becomes an image of Pillow's.
    """
    first, *rest = steps
    if exact or interpolation not in FAST:
        return [as_image, *steps]
    if type(first) is transforms.Resize:
        return [FastResize(first), *rest]
    if type(first) is not RandomResizedCropAndInterpolation:
        return [as_image, *steps]
    if rest and type(rest[0]) is transforms.RandomHorizontalFlip:
        return [FastCrop(first, rest[0]), *rest[1:]]
    return [FastCrop(first), *rest]


def timm_settings(augment: Augment) -> dict[str, Any]:
    """Return the arguments of timm's `create_transform` and `create_loader` that stand for `augment`, but for erasing.

    timm has none for the settings in `OWN`.
    """
    same = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob',
            'auto_augment')
    return {**{name: getattr(augment, name) for name in same}, 'color_jitter': augment.color_jitter or None,
            'train_crop_mode': None if augment.crop == 'pad' else augment.crop}


def timm_transforms(augment: Augment, size: int, normalisation: dict[str, Any]) -> list[list[Any]]:
    """Return timm's transforms: geometry, colour, to a tensor, and what erases of normalised images."""
    try:
        erasing = [RandomErasing(
            augment.random_erasing, mode=augment.erasing_mode, max_count=augment.erasing_count, device='cpu',
        )] if augment.random_erasing else []
        return [*(part.transforms for part in create_transform(
            size, is_training=True, separate=True, normalize=False, **timm_settings(augment), **normalisation)),
            erasing]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(message(
            f'data.augment: {augment}', f'timm makes no transform of it ({str(error) or type(error).__name__})',
            'correct data.augment; policies of auto_augment are such as rand-m9-mstd0.5, original, augmix-m3-w3')
        ) from error


def check(augment: Augment) -> None:
    """Raise `InputError` for settings that mean nothing, or have no effect."""
    check_ranges(augment)
    check_policy(augment)
    if augment.splits and not any(getattr(augment, name) for name in CHANGES):
        raise InputError(message(
            f'data.augment.splits: {augment.splits}', 'nothing changes the versions of an image, all would be equal',
            'say what does, such as auto_augment augmix-m3-w3'))
    if augment.color_jitter_prob is not None and not augment.color_jitter:
        raise InputError(message(
            f'data.augment.color_jitter_prob: {augment.color_jitter_prob} without color_jitter',
            'it is the probability of a jitter without strength', 'give color_jitter, such as 0.4, or leave it out'))
    for name in (('scale', 'ratio') if augment.crop == 'pad' else ('padding',)):
        value = getattr(augment, name)
        if (tuple(value) if isinstance(value, list) else value) != getattr(Augment, name):
            raise InputError(message(
                f'data.augment.{name}: {value} with crop {augment.crop}', 'this crop makes no use of it',
                f'leave it out, or take crop {"rrc" if augment.crop == "pad" else "pad"}'))
    for name in ('erasing_mode', 'erasing_count'):
        if not augment.random_erasing and (value := getattr(augment, name)) != getattr(Augment, name):
            raise InputError(message(
                f'data.augment.{name}: {value} without random_erasing', 'nothing is erased',
                'give random_erasing, such as 0.25, or leave it out'))


def check_ranges(augment: Augment) -> None:
    """Raise `InputError` for numbers out of their range."""
    for name in PROBABILITIES:
        if (value := getattr(augment, name)) is not None and not 0 <= value <= 1:
            raise InputError(message(
                f'data.augment.{name}: {value}', 'it is a probability', 'take a number from 0 to 1'))
    for name, (fits, reason, remedy) in RANGES.items():
        value = getattr(augment, name)
        if not fits(value):
            raise InputError(message(
                f'data.augment.{name}: {list(value) if isinstance(value, tuple) else value}', reason, remedy))


def check_policy(augment: Augment) -> None:
    """Raise `InputError` for parts of the policy, or settings beside it, that timm leaves out in silence."""
    kind, *parts = (augment.auto_augment or '').split('-')
    for part in parts:
        named = kind == 'rand' and part.startswith('t')  # a set of transforms; all others are numbers
        if not named and not any(character.isdigit() for character in part):
            raise InputError(message(
                f'data.augment.auto_augment: {augment.auto_augment}', f'timm leaves out {part!r}, which has no number',
                'give it one, such as m9, mstd0.5 or inc1, or remove it'))
    if kind and augment.color_jitter and '3a' not in kind:
        raise InputError(message(
            f'data.augment.color_jitter: {augment.color_jitter} with auto_augment {augment.auto_augment}',
            'timm leaves colour jitter out where a policy changes the colours', 'leave one of them out'))


def evaluation_transform(
        size: int, crop_pct: float, views: str = 'center', exact: bool = True, crop_mode: str = 'center',
        **normalisation: Any) -> Any:
    """Return the transform by which timm evaluates: shorter side to `size / crop_pct`, centre crop of `size`.

    Args:
        size: Height and width in pixels.
        crop_pct: Side of the crop / shorter side of the resized image.
        views: `center`, or `flip` or `ten`, see `Views`.
        exact: Resize as timm does, by Pillow, to the pixel.
        crop_mode: `center`; `squash`, both sides to `size / crop_pct`; or `border`, the longer side, and the shorter
            filled up with the mean.
        **normalisation: `mean`, `std` and `interpolation` for `timm.data.create_transform`.

    Returns:
        `Picture` or RGB image to uint8 tensor, `(3, size, size)` or `(views, 3, size, size)`, to be normalised on the
        device.

    Raises:
        InputError: For unknown views or modes, or the corners of an image with borders.
    """
    for key, value, valid in (('eval_views', views, VIEWS), ('crop_mode', crop_mode, CROP_MODES)):
        if value not in valid:
            raise InputError(unknown(f'data.{key}', value, valid))
    if views == 'ten' and (crop_mode == 'border' or crop_pct > 1):
        setting = 'crop_mode: border' if crop_mode == 'border' else f'crop_pct: {crop_pct:g}'
        raise InputError(message(
            f'data.eval_views: {views} with data.{setting}', 'the corners of such an image are its borders',
            f'leave eval_views out, or take another {setting.partition(":")[0]}'))
    if views == 'ten' and crop_pct == 1:
        what = 'images' if crop_mode == 'squash' else 'square images'
        rank_zero_info(f'data.eval_views: {views} with data.crop_pct: 1: of {what} all five crops are the '
                       'same; say data.crop_pct: 0.875, or eval_views: flip')
    timms = create_transform(
        size, is_training=False, crop_pct=crop_pct, crop_mode=crop_mode, normalize=False, **normalisation).transforms
    steps = in_bytes(timms, exact, normalisation.get('interpolation', 'bilinear'))
    return transforms.Compose(steps) if views == 'center' else Views(steps, views)


class Normalisation:
    """From images of 0 to 255 to normalised ones, on their device; the same numbers as torchvision's.

    Args:
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.values = torch.tensor([mean, std]).view(2, -1, 1, 1)

    def __call__(self, images: Tensor | Erased, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `images (..., 3, H, W)` normalised, and erased; those that are float are normalised."""
        if isinstance(images, Erased):
            return images.erase(self(images.images, dtype))
        if images.is_floating_point():
            return images
        if self.values.device != images.device:  # once; at each step the host would wait for the copy
            self.values = self.values.to(images.device)
        mean, std = self.values
        return images.contiguous().float().div_(255).sub_(mean).div_(std).to(dtype)
