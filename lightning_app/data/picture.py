"""An image that is decoded when it is known how much of it is needed."""
from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from .decode import decode
from .jpeg import DECODERS, is_jpeg

__all__ = ['Picture']


class Picture:
    """An image file in memory, or an RGB image.

    Attributes:
        file: The file; None of an image.

    Args:
        content: The file, or the image.
        decoder: What decodes it if it is a JPEG file, a key of `DECODERS`; other files, and those that this decoder
            refuses, are Pillow's.
    """

    def __init__(self, content: bytes | Image.Image, decoder: str = 'pillow') -> None:
        self.file = content if isinstance(content, bytes) else None
        self._decoder = DECODERS[decoder]
        if not isinstance(content, bytes):
            self._whole = content

    @classmethod
    def of(cls, image: Picture | Image.Image) -> Picture:
        """Return a picture as it is, or an image as a picture."""
        return image if isinstance(image, Picture) else cls(image)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            UnreadableImage: If the file is no image.
        """
        return self._jpeg_size or (self._whole.height, self._whole.width)

    @property
    def is_measured(self) -> bool:
        """Whether its size is known without decoding it."""
        return self._jpeg_size is not None or self.file is None

    def image(self) -> Image.Image:
        """Return the image as 8-bit RGB.

        Raises:
            UnreadableImage: If the file is no image, or only part of one.
        """
        if self._jpeg_size is None or self._decoder is DECODERS['pillow']:
            return self._whole
        return Image.fromarray(self.pixels())

    def pixels(self, shrink: int = 1) -> Any:
        """Return the pixels `(H, W, 3)`, uint8; of a JPEG file, 2, 4 or 8 times fewer rows and columns if asked for.

        All of them where a side is shorter than that.

        Raises:
            UnreadableImage: If the file is no image, or only part of one.
        """
        if self.file is None or not is_jpeg(self.file) or (shrink == 1 and self._jpeg_size is None):
            return np.array(self._whole)
        if shrink > min(self.size):
            shrink = 1
        if self._jpeg_size is not None and (shrink == 1 or self._decoder.shrinks):
            # of each library's; Pillow takes some files that others refuse, and says what the rest lack
            with suppress(Exception):
                return self._decoder.pixels(self.file, *([shrink] if shrink > 1 else []))
        return np.array(decode(self.file, shrink))

    def part(self, down: slice, across: slice) -> Any:
        """Return the pixels of these rows and columns `(H, W, 3)`, uint8, and hold no others.

        Raises:
            UnreadableImage: If the file is no image, or only part of one.
        """
        if self.file is not None and self._jpeg_size is not None and self._decoder.part is not None:
            with suppress(Exception):  # as above
                return self._decoder.part(self.file, down, across)
        return self.pixels()[down, across].copy()

    @cached_property
    def _jpeg_size(self) -> tuple[int, int] | None:
        if self.file is None or not is_jpeg(self.file):
            return None
        try:
            return self._decoder.size(self.file)
        except Exception:  # as above
            return None

    @cached_property
    def _whole(self) -> Image.Image:
        assert self.file is not None
        return decode(self.file)
