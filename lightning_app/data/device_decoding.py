"""Training images that are decoded, cropped and resized on the device: workers draw the crops and send the files.

TorchCodec decodes on CUDA by nvJPEG, a whole batch at once. Its pixels are not libjpeg-turbo's to the bit.
"""
from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from se_timm.errors import InputError, check_installed, message

from .decode import encode
from .jpeg import END, is_jpeg, size_unless_turned
from .picture import Picture
from .resample import Drawn, FastCrop, crop_pixels

__all__ = ['Encoded', 'File', 'check_device_decoding', 'decode', 'for_device']


class File(NamedTuple):
    """A training image that is left to the device.

    Attributes:
        content: Its JPEG file.
        crop: What was drawn of it.
        key: Of the sample.
    """

    content: bytes
    crop: Drawn
    key: Any


class Encoded:
    """Images of a batch of which some, or all, are still files. It stays on the CPU, where decoders want the files.

    Args:
        images: Each a `File`, or `(3, H, W)`, uint8, of what a worker had to decode.
    """

    def __init__(self, images: Sequence[File | Tensor]) -> None:
        files = [image for image in images if isinstance(image, File)]
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'The given buffer is not writable')
            self.content = torch.cat([torch.frombuffer(file.content, dtype=torch.uint8) for file in files])
        self.lengths = [len(file.content) for file in files]
        self.images = [image._replace(content=b'') if isinstance(image, File) else image for image in images]

    def files(self) -> list[Tensor]:
        """Return the files, `(bytes,)`, uint8."""
        ends = list(itertools.accumulate(self.lengths))
        return [self.content[end - length:end] for length, end in zip(self.lengths, ends, strict=True)]


def check_device_decoding(transform: Any) -> None:
    """Raise `InputError` if the images of `transform`, of training, cannot be decoded on a device."""
    check_installed(
        'data.decode_on_device: true', 'torchcodec', 'torchcodec', otherwise='leave data.decode_on_device out')
    if not isinstance(transform, FastCrop) or transform.erase:
        raise InputError(message(
            'data.decode_on_device: true', 'the device crops at random and flips, and data.augment or data.exact ask '
            'for what workers do to decoded images', 'leave data.decode_on_device out, or the rest of data.augment'))


def for_device(picture: Picture) -> bytes | None:
    """Return the file of a picture that the device can decode; None of one that is no, or no whole, or no usual JPEG.

    Such are left to Pillow, which takes some, and says what is wrong with the others.
    """
    content = picture.file
    if content is None or not is_jpeg(content) or not content.endswith(END):
        return None
    try:
        return content if size_unless_turned(content) else None
    except Exception:  # whatever Pillow has against its header
        return None


def decode(
        batch: Encoded, labels: Tensor, device: torch.device, transform_of: Callable[[Any], Any],
        instead: Callable[[Any], tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return images `(N, 3, H, W)`, uint8, and labels `(N,)` of a batch, on the device.

    Args:
        batch: The images.
        labels: Their labels.
        device: Where to decode.
        transform_of: From a key to its `FastCrop`.
        instead: From the key of a file that the device cannot decode to its image or another, and the label of that.
    """
    pixels = iter(decode_files(batch.files(), device))
    images = []
    labels = labels.clone()
    for place, image in enumerate(batch.images):
        if isinstance(image, File):
            whole = next(pixels)
            if whole is None:
                image, labels[place] = instead(image.key)
            else:
                crop = transform_of(image.key).crop
                image = crop_pixels(whole, image.crop, list(crop.size), crop.interpolation)
        images.append(image.to(device))
    return torch.stack(images), labels.to(device)


def decode_files(files: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Return the pixels `(3, H, W)` of each file on the device; None of one that its decoder refuses.

    Raises:
        InputError: If it refuses all, whatever they are.
    """
    from torchcodec.decoders import decode_jpeg  # optional: the extra `torchcodec`

    try:
        return list(decode_jpeg(list(files), device=device))
    except Exception:  # it does not say which
        if len(files) > 1:
            return [pixels for file in files for pixels in decode_files([file], device)]
    try:
        decode_jpeg(encode(Image.new('RGB', (16, 16)), 'JPEG'), device=device)  # a file that is good
    except Exception as error:
        raise InputError(message(
            'data.decode_on_device: true', f'TorchCodec decodes nothing on {device}: {error}',
            'install a torchcodec for this device, or leave data.decode_on_device out')) from error
    return [None]
