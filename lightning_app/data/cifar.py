"""CIFAR-10 and CIFAR-100, by torchvision."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from se_timm.errors import InputError, meant, message

from .augment import Augment
from .base import ImageDataModule
from .locking import locked
from .sources import Source

__all__ = ['CIFAR10DataModule', 'CIFAR100DataModule', 'PixelSource']

# The paper's augmentation for CIFAR (Sec. 5.1): zero-pad by 4 pixels, random crop, flip.
CIFAR_AUGMENT = Augment(crop='pad')


class PixelSource(Source):
    """Images that lie in memory: `pixels (N, H, W, 3)`, uint8."""

    def __init__(self, title: str, pixels: np.ndarray, labels: list[int], classes: list[str]) -> None:
        self.title, self.pixels, self.labels, self.classes = title, pixels, labels, classes

    def name(self, index: int) -> str:
        """Return the title of the set and the number of the image."""
        return f'{self.title}[{index}]'

    def read(self, index: int) -> Image.Image:
        """Return image `index` as RGB."""
        return Image.fromarray(self.pixels[index])


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels; the test images are the validation set.

    Args:
        root: Folder with torchvision's copy of the data (`cifar-10-batches-py`), or where it is downloaded to.
        download: Download the data if they are not there.
        augment: Training augmentation; the default is the paper's for CIFAR.
        image_size: Side of the images in pixels.
        crop_pct: Share of the image that evaluation sees.
        **common: See `ImageDataModule`.

    Raises:
        InputError: If the data are not there and `download` is off or fails.
    """

    dataset: type[datasets.CIFAR10] = datasets.CIFAR10

    def __init__(
            self,
            root: str = 'data/cifar',
            download: bool = False,
            augment: Augment = CIFAR_AUGMENT,
            image_size: int = 32,
            crop_pct: float = 1.0,
            **common: Any,
    ) -> None:
        super().__init__(augment=augment, image_size=image_size, crop_pct=crop_pct, **common)
        self.root = os.path.expanduser(root)  # as torchvision does
        self.download = download

    def prepare_data(self) -> None:
        """Download the data once, if asked to; the processes of a training wait for the one that does it."""
        if not self.download or self._is_there():
            return
        try:
            with locked(Path(self.root, self.dataset.base_folder)):
                self.dataset(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(message(
                f'data.download: true, to {self.root}', f'{self.dataset.__name__} cannot be had from there ({error})',
                f'try again, or copy {self.dataset.base_folder}/ to {self.root} from a machine with a network',
            )) from error

    def _is_there(self) -> bool:
        try:
            self.dataset(self.root, train=False)  # checks all files
        except RuntimeError:
            return False
        return True

    def open(self, split: str) -> Source:
        """Return the training images, or for `val` and `test` the test images."""
        try:
            data = self.dataset(self.root, train=split == 'train')
        except RuntimeError as error:
            raise InputError(message(
                f'data.root: {self.root}', f'there is no complete copy of {self.dataset.__name__} ({error})',
                f'{self._meant()}name the folder that holds {self.dataset.base_folder}/, or say --data.download=true',
            )) from error
        return PixelSource(self.dataset.__name__, data.data, data.targets, data.classes)

    def _meant(self) -> str:
        """Return a question after a folder near by that holds the data, nothing if none does."""
        root = Path(self.root)
        near = [path for path in (root.parent, *sorted(root.glob('*'))) if (path / self.dataset.base_folder).is_dir()]
        return meant([str(path) for path in near[:1]])

    def find_classes(self) -> list[str] | None:
        """Return the names of the classes, or None where there is only a folder of images to predict."""
        if self.images is not None and not Path(self.root, self.dataset.base_folder).exists():
            return None
        self.prepare_data()
        return self.open('val').classes


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: as CIFAR-10, with 100 classes and `cifar-100-python`."""

    dataset = datasets.CIFAR100
