"""Image files to RGB, whatever they hold, and images to files."""
from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

__all__ = ['UnreadableImage', 'decode', 'encode']


SIXTEEN_BITS = ('PNG', 'PPM')  # formats whose 16 bits may have Pillow's mode of 32, `I`
WHITE_IS_ZERO = 0  # of TIFF files, such as scans


class UnreadableImage(ValueError):
    """A file that is no image, or only part of one."""


def decode(data: bytes, shrink: int = 1) -> Image.Image:
    """Return the image in `data` (a JPEG, PNG, ... file) as 8-bit RGB.

    Greyscale is repeated over the channels, CMYK and palettes are converted, transparent pixels lie on white, 16-bit
    values are scaled by 255 / 65535 (Pillow alone would clip them), and 12-bit ones by 255 / 4095. EXIF orientation is
    not applied, as in timm and torchvision, so that accuracies stay comparable.

    Args:
        data: The file.
        shrink: 2, 4 or 8: of a JPEG file so many times fewer rows and columns (rounded up), which is less work.

    Raises:
        UnreadableImage: If the file is no image, is truncated, or holds values without a known range.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))  # of JPEG only
        image.load()
        return to_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its text has an address in memory
        raise UnreadableImage('it is no image, or of a kind that Pillow does not know') from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more, by format
        raise UnreadableImage(f'{type(error).__name__}: {error}') from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded Pillow image of any mode as 8-bit RGB."""
    if image.mode == 'RGB' and 'transparency' not in image.info:
        return image
    if (image.mode == 'I' and image.format in SIXTEEN_BITS) or image.mode.startswith('I;16'):
        bits, = getattr(image, 'tag_v2', {}).get(BITSPERSAMPLE, (16,))
        stored = np.asarray(image)
        values = stored * (255 / (2 ** bits - 1))
        if getattr(image, 'tag_v2', {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
            values = 255 - values
        if 'transparency' in image.info:  # one value
            values = np.where(stored == image.info['transparency'], 255, values)
        return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).convert('RGB')
    if image.mode in ('F', 'I'):
        kind = 'floating-point' if image.mode == 'F' else '32-bit'
        raise UnreadableImage(f'{kind} pixels have no known range; save the image with 8 or 16 bits')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
        opaque = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(opaque, image.convert('RGBA')).convert('RGB')
    return image.convert('RGB')


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file of an image, in one of Pillow's formats."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
