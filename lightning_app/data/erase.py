"""Random erasing and cutout, drawn by a worker, and done by the device once it has normalised the images.

Workers so send bytes, and of the noise only what is seen: a quarter of what normalised images take, or little more.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ['Cutout', 'Erase', 'Erased']


class Erased(NamedTuple):
    """Images, and what is to be written into them once they are normalised.

    Attributes:
        images: `(..., 3, H, W)`, uint8.
        places: Pixels that are erased, `(K,)`, int64, none twice: their numbers, counted through all images, rows and
            columns.
        values: What becomes of their channels, `(K, 3)`, float32.
    """

    images: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, image: Tensor | Erased) -> Erased:
        """Return an image of which something is erased as it is, and any other as one of which nothing is."""
        return image if isinstance(image, Erased) else cls(image, torch.empty(0, dtype=torch.int64), torch.empty(0, 3))

    @classmethod
    def stack(cls, images: Sequence[Erased], stack: Callable[[list[Tensor]], Any] = torch.stack) -> Erased:
        """Return one of many, all of the same shape.

        Args:
            images: The many.
            stack: Makes one tensor of theirs.
        """
        pixels = images[0].images[..., 0, :, :].numel()
        places = torch.cat([image.places + number * pixels for number, image in enumerate(images)])
        return cls(stack([image.images for image in images]), places, torch.cat([image.values for image in images]))

    def erase(self, normalised: Tensor) -> Tensor:
        """Return `normalised (..., 3, H, W)`, contiguous, changed in place. The host does not wait for the device."""
        height, width = normalised.shape[-2:]
        image, pixel = self.places // (height * width), self.places % (height * width)
        normalised.view(-1, 3, height * width)[image, :, pixel] = self.values.to(normalised.dtype)
        return normalised


class Erase:
    """Draw what is erased of an image `(3, H, W)`, uint8.

    Args:
        steps: What erases, each from a normalised image to the same, of which it asks for the size and assigns to
            rectangles in all channels, such as timm's `RandomErasing`.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Tensor) -> Erased:
        """Return an image and what is erased of it."""
        return Erased(image, *self.draw(image.shape))

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Draw `places` and `values` of an image of this shape, see `Erased`."""
        noted = Noted(shape)
        for step in self.steps:
            step(noted)
        return noted.written()


class Noted:
    """In place of a normalised image: it has no pixels, and takes down what is assigned to its parts.

    To make an image, and to look for what has changed in it, takes as long as a quarter of the decoding.

    Args:
        shape: `(C, H, W)`.
    """

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self._assigned: list[tuple[Any, Tensor]] = []

    def size(self) -> torch.Size:
        """Return `(C, H, W)`."""
        return self.shape

    def __setitem__(self, part: tuple[slice, slice, slice], values: Tensor | float) -> None:
        places = numbers(*self.shape[1:])[part[1:]]
        values = torch.as_tensor(values, dtype=self.dtype).expand(self.shape[0], *places.shape)
        self._assigned.append((places.flatten(), values.flatten(1).T))

    def written(self) -> tuple[Tensor, Tensor]:
        """Return the places `(K,)` of all pixels that were assigned to, none twice, and what was last, `(K, C)`."""
        if not self._assigned:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, self.shape[0])
        places, values = map(torch.cat, zip(*self._assigned, strict=True))
        if len(self._assigned) > 1:
            _, last = np.unique(places.numpy()[::-1], return_index=True)
            kept = torch.from_numpy(len(places) - 1 - last)
            places, values = places[kept], values[kept]
        return places, values


@lru_cache(maxsize=16)
def numbers(height: int, width: int) -> Tensor:
    """Return the numbers of the pixels, `(height, width)`, int64."""
    return torch.arange(height * width).view(height, width)


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
