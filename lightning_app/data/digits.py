"""scikit-learn's handwritten digits: real images that come with a package."""
from __future__ import annotations

from typing import Any

import numpy as np

from se_timm.errors import check_installed

from .augment import Augment
from .base import ImageDataModule
from .cifar import PixelSource
from .sources import Source

__all__ = ['DigitsDataModule']

SCALE = 4  # 8x8 pixels to 32x32
HELD_OUT = 5  # every fifth image is for validation


class DigitsDataModule(ImageDataModule):
    """1,797 digits of 8x8 pixels, enlarged to 32x32; every fifth of each class is held out for validation.

    Needs scikit-learn (`pip install 'se-timm[quickstart]'`), nothing is downloaded.

    Args:
        augment: Training augmentation; the default moves the digits by up to 4 pixels and does not flip them.
        image_size: Side of the images in pixels.
        crop_pct: Share of the image that evaluation sees.
        num_workers: Worker processes; the images are so small that none is fastest.
        **common: See `ImageDataModule`.
    """

    def __init__(
            self,
            augment: Augment = Augment(crop='pad', hflip=0.0),  # noqa: B008  (frozen)
            image_size: int = 32,
            crop_pct: float = 1.0,
            num_workers: int = 0,
            **common: Any,
    ) -> None:
        super().__init__(
            augment=augment, image_size=image_size, crop_pct=crop_pct, num_workers=num_workers, **common)

    def open(self, split: str) -> Source:
        """Return four fifths of the digits for `train`, and the held-out fifth for `val` and `test`."""
        check_installed('data: digits', 'quickstart', 'sklearn')
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = np.zeros(len(digits.target), dtype=bool)
        for label in range(10):
            held_out[np.flatnonzero(digits.target == label)[::HELD_OUT]] = True
        chosen = ~held_out if split == 'train' else held_out
        grey = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        pixels = grey.repeat(SCALE, axis=1).repeat(SCALE, axis=2)[..., None].repeat(3, axis=3)
        return PixelSource('digits', pixels, digits.target[chosen].tolist(), self.class_names or [])

    def find_classes(self) -> list[str]:
        """Return the names of the ten digits."""
        return [str(digit) for digit in range(10)]
