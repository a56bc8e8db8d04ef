"""Crops and resizing in bytes, faster than Pillow's and nearly the same.

Bilinear values are within one level of Pillow's but for less than 1 in a million, which differ by two (crops of photos
to 224 px), and so are bicubic ones but for 1 in 5,000, at edges that overshoot.
Where a JPEG file is decoded at half its size or less, a crop is on average within 3 levels, as its filter is another.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import to_pil_image

from .erase import Erase, Erased
from .picture import Picture

__all__ = ['Drawn', 'FastCrop', 'FastResize', 'as_image', 'crop_pixels']

SHRINKS = (8, 4, 2)  # what libjpeg-turbo computes fast, and Pillow as well
GAP = 2  # so many times the rows and columns that are needed must be left, as in Pillow's thumbnails


def as_image(image: Picture | Image.Image | Tensor) -> Image.Image:
    """Return a picture, or pixels `(3, H, W)`, as an RGB image of Pillow's."""
    if isinstance(image, Tensor):
        return to_pil_image(image)
    return image.image() if isinstance(image, Picture) else image


def shrink_of(length: int, needed: int) -> int:
    """Return how many times fewer pixels than `length` may be decoded, where `needed` are to be computed from them."""
    return next((shrink for shrink in SHRINKS if length // shrink >= GAP * needed), 1)


class Drawn(NamedTuple):
    """What is random about a crop: its box in the picture, in pixels, whether it is mirrored, and what is erased."""

    top: int
    left: int
    rows: int
    columns: int
    mirrored: bool
    erased: tuple[Tensor, Tensor] | None = None


class FastCrop:
    """timm's random resized crop and flip, with its draws, on bytes: a picture to a tensor `(3, size, size)`, uint8.

    To `Erased` where something is erased.

    A picture that is far larger than needed is decoded at half its size or less, so that the crop is still at least
    twice as large as what it becomes.

    Args:
        crop: timm's `RandomResizedCropAndInterpolation`.
        flip: torchvision's `RandomHorizontalFlip`.
        erase: What is erased of it.
    """

    def __init__(self, crop: Any, flip: Any = None, erase: Erase | None = None) -> None:
        self.crop, self.flip, self.erase = crop, flip, erase

    def __call__(self, image: Picture | Image.Image) -> Tensor | Erased:
        """Return a random crop."""
        picture = Picture.of(image)
        drawn = self.draw(picture)
        return self.finish(self.cut(picture, drawn), drawn)

    def draw(self, picture: Picture) -> Drawn:
        """Draw a crop of a picture."""
        top, left, rows, columns = self.crop.get_params(area(*picture.size), self.crop.scale, self.crop.ratio)
        mirrored = self.flip is not None and torch.rand(1).item() < self.flip.p
        erased = self.erase.draw(torch.Size((3, *self.crop.size))) if self.erase else None
        return Drawn(top, left, rows, columns, mirrored, erased)

    def cut(self, picture: Picture, drawn: Drawn) -> Any:
        """Return the part of a picture that was drawn, `(H, W, 3)`, uint8; nothing else of the picture is kept."""
        height, width = picture.size
        size = self.crop.size
        shrink = min(shrink_of(drawn.rows, size[0]), shrink_of(drawn.columns, size[1]))
        if shrink == 1:
            return picture.part(
                scaled(drawn.top, drawn.rows, height, height), scaled(drawn.left, drawn.columns, width, width))
        pixels = picture.pixels(shrink)
        down = scaled(drawn.top, drawn.rows, height, pixels.shape[0])
        across = scaled(drawn.left, drawn.columns, width, pixels.shape[1])
        return pixels[down, across].copy()

    def finish(self, pixels: Any, drawn: Drawn) -> Tensor | Erased:
        """Return the crop of the part of a picture that was drawn."""
        image = resize(pixels, list(self.crop.size), self.crop.interpolation)
        image = image.flip(-1) if drawn.mirrored else image
        return image if drawn.erased is None else Erased(image, *drawn.erased)


def crop_pixels(pixels: Tensor, drawn: Drawn, size: list[int], interpolation: Any) -> Tensor:
    """Return a crop of pixels `(3, H, W)`, uint8, as `(3, *size)`, uint8, on their device, and as drawn mirrored."""
    crop = pixels[None, :, drawn.top:drawn.top + drawn.rows, drawn.left:drawn.left + drawn.columns]
    if not pixels.is_cuda:
        image = interpolate(crop, size, mode=interpolation.value, antialias=True)[0]
    else:  # which does not resize bytes
        image = interpolate(crop.float(), size, mode=interpolation.value, antialias=True)[0]
        image = image.round_().clamp_(0, 255).byte()
    return image.flip(-1) if drawn.mirrored else image


@lru_cache(maxsize=1024)
def area(height: int, width: int) -> Tensor:
    """Return an image of this size, without pixels."""
    return torch.empty(1, 1, 1).expand(1, height, width)


def scaled(start: int, length: int, whole: int, decoded: int) -> slice:
    """Return the part of a side, of which `decoded` of `whole` pixels are there: at least one pixel."""
    factor = decoded / whole
    first = min(round(start * factor), decoded - 1)
    return slice(first, max(round((start + length) * factor), first + 1))


class FastResize:
    """torchvision's `Resize` of the shorter side, or of both, on bytes: a picture to a tensor `(3, H, W)`, uint8.

    Args:
        resize: torchvision's transform.
    """

    def __init__(self, resize: Any) -> None:
        self.size, self.interpolation = resize.size, resize.interpolation

    def __call__(self, image: Picture | Image.Image) -> Tensor:
        """Return the picture in another size."""
        picture = Picture.of(image)
        height, width = picture.size
        size = new_size(height, width, self.size) if isinstance(self.size, int) else list(self.size)
        shrink = min(shrink_of(height, size[0]), shrink_of(width, size[1]))
        return resize(picture.pixels(shrink), size, self.interpolation)


def new_size(height: int, width: int, shorter: int) -> list[int]:
    """Return height and width where the shorter side becomes `shorter`; rounded as by torchvision."""
    longer = int(shorter * max(height, width) / min(height, width))
    return [shorter, longer] if height <= width else [longer, shorter]


def resize(pixels: Any, size: list[int], interpolation: Any) -> Tensor:
    """Return pixels `(H, W, 3)` as a tensor `(3, *size)`, uint8, which lie as before."""
    # torch takes more than twice as long for a part of a larger array, and a half longer where NumPy adds the dimension
    # (whose stride is then 0)
    batch = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    return interpolate(batch, size, mode=interpolation.value, antialias=True)[0]
