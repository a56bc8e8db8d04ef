"""Transforms by timm, from settings that fit in YAML."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from se_timm.errors import InputError, message

__all__ = ['Augment', 'evaluation_transform', 'training_transform']


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
    return transforms.Compose([geometry, colour, tensor])


def evaluation_transform(size: int, crop_pct: float, **normalisation: Any) -> Any:
    """Return the transform by which timm evaluates: shorter side to `size / crop_pct`, centre crop of `size`."""
    return create_transform(size, is_training=False, crop_pct=crop_pct, **normalisation)
