"""Transforms by timm, from settings that fit in YAML."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from se_timm.errors import InputError, message

__all__ = ['Augment', 'Cutout', 'evaluation_transform', 'training_transform']


@dataclass(frozen=True)
class Augment:
    """Training augmentation. The defaults are the paper's: random resized crop and horizontal flip.

    Attributes:
        crop: `rrc` (random resized crop), timm's `rkrc` and `rkrr` (resize keeping the ratio, then crop), or `pad`
            (shorter side to the size, zero-pad by `padding` pixels and crop at random: CIFAR).
        scale: Range of the crop's area, as a share of the image's (`rrc`).
        ratio: Range of the crop's aspect ratio (`rrc`).
        padding: Pixels on each side (`pad`).
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5`; none by default.
        random_erasing: Probability of erasing a rectangle.
        cutout: Side in pixels of a square that is erased in every image, see `Cutout`; none by default.
    """

    crop: Literal['rrc', 'rkrc', 'rkrr', 'pad'] = 'rrc'
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    padding: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    cutout: int = 0


class Cutout:
    """Set a square of a normalised image to zero, which is the mean (DeVries and Taylor, https://arxiv.org/abs/1708.04552).

    Its centre is drawn uniformly from all pixels, so that a part of it may lie outside; timm's random erasing keeps its
    rectangles inside.

    Args:
        side: Of the square, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        """Return `image (C, H, W)`, changed in place."""
        top, left = (int(torch.randint(length, ())) - self.side // 2 for length in image.shape[1:])
        image[:, max(top, 0):max(top + self.side, 0), max(left, 0):max(left + self.side, 0)] = 0
        return image

    def __repr__(self) -> str:
        return f'Cutout(side={self.side})'


def training_transform(augment: Augment, size: int, **normalisation: Any) -> Any:
    """Return the transform from an RGB image to a float tensor `(3, size, size)`.

    Args:
        augment: The settings.
        size: Height and width in pixels.
        **normalisation: `mean`, `std` and `interpolation` for `timm.data.create_transform`.

    Raises:
        InputError: For settings that timm does not know.
    """
    try:
        geometry, colour, tensor = create_transform(
            size, is_training=True, separate=True,
            train_crop_mode=None if augment.crop == 'pad' else augment.crop,
            scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip, vflip=augment.vflip,
            color_jitter=augment.color_jitter or None, auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing, re_mode='pixel', **normalisation)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(message(
            f'data.augment: {augment}', f'timm makes no transform of it ({str(error) or type(error).__name__})',
            'correct data.augment; policies of auto_augment are such as rand-m9-mstd0.5, original, augmix-m3-w3')
        ) from error
    if augment.crop == 'pad':
        geometry = transforms.Compose([
            transforms.Resize(size, str_to_interp_mode(normalisation.get('interpolation', 'bilinear'))),
            transforms.RandomCrop(size, padding=augment.padding),
            transforms.RandomHorizontalFlip(augment.hflip),
            transforms.RandomVerticalFlip(augment.vflip),
        ])
    if augment.cutout < 0:
        raise InputError(message(
            f'data.augment.cutout: {augment.cutout}', 'it is the side of a square, in pixels',
            'take 0 for none, or as published 16 for CIFAR-10 and 8 for CIFAR-100'))
    erased = [Cutout(augment.cutout)] if augment.cutout else []
    return transforms.Compose([geometry, colour, tensor, *erased])


def evaluation_transform(size: int, crop_pct: float, **normalisation: Any) -> Any:
    """Return the transform by which timm evaluates: shorter side to `size / crop_pct`, centre crop of `size`."""
    return create_transform(size, is_training=False, crop_pct=crop_pct, **normalisation)
