"""JPEG decoders: all but one give the same pixels, and one of them is the fastest here."""
from __future__ import annotations

import io
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image

from se_timm.errors import InputError, check_installed, is_installed, unknown

from .decode import decode

__all__ = [
    'ACCURATE', 'DECODERS', 'END', 'WHOLE', 'JpegDecoder', 'choose_decoder', 'installed', 'is_jpeg',
    'size_unless_turned',
]

ROUNDS = 6  # of the decoders, one after the other, through all files
SECONDS = 2.0  # after which they end early: files of large photos
COLOURS = ('L', 'RGB')  # of the others (CMYK) each library makes its own RGB
END = b'\xff\xd9'  # of a JPEG file that is whole
VERBOSITY = 'PYNVIMGCODEC_VERBOSITY'
NARROW = 16  # columns: in narrower parts nvImageCodec has other pixels, at times


class JpegDecoder(NamedTuple):
    """What turns JPEG files into pixels.

    All but the keys of `ACCURATE` are libjpeg-turbo at its most accurate: the pixels do not tell which.

    Attributes:
        packages: That it needs.
        size: From a file to its height and width, None if only Pillow should decode it.
        pixels: From a file to an array `(H, W, 3)`, uint8, RGB. May raise anything: then it is Pillow's to decide.
        shrinks: Whether `pixels` takes a second argument, 2, 4 or 8: so many times fewer rows and columns.
        part: From a file, rows and columns to the pixels of that part, if it takes less time than `pixels`. May raise
            anything: then the whole is to be decoded.
    """

    packages: tuple[str, ...]
    size: Callable[[bytes], tuple[int, int] | None]
    pixels: Callable[..., Any]
    shrinks: bool = False
    part: Callable[[bytes, slice, slice], Any] | None = None


def is_jpeg(data: bytes) -> bool:
    """Return whether a file begins as a JPEG file does."""
    return data[:3] == b'\xff\xd8\xff'


def size_by_pillow(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a greyscale or RGB file."""
    image = Image.open(io.BytesIO(data))
    return (image.height, image.width) if image.mode in COLOURS else None


def pixels_by_pillow(data: bytes, shrink: int = 1) -> Any:
    """Return the pixels by Pillow."""
    return np.array(decode(data, shrink))


def size_by_simplejpeg(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a greyscale or RGB file."""
    import simplejpeg  # optional: the extra `fast`

    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    return (height, width) if colours in ('Gray', 'RGB', 'YCbCr') else None


def pixels_by_simplejpeg(data: bytes, shrink: int = 1, fast: bool = False) -> Any:
    """Return the pixels by simplejpeg, which refuses damaged files that Pillow may take.

    Fast ones are libjpeg-turbo's by a shorter cosine transform, and without a filter of the colours.
    """
    import simplejpeg  # optional: the extra `fast`

    if shrink == 1:
        return simplejpeg.decode_jpeg(data, fastdct=fast, fastupsample=fast)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, min_height=-(-height // shrink), min_width=-(-width // shrink),
                                  fastdct=fast, fastupsample=fast)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Leave out what libraries in C write to the standard error."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


@contextmanager
def quiet_nvimgcodec() -> Iterator[None]:
    """Have nvImageCodec, where it is imported, say nothing: of files that it refuses, of codecs that are missing."""
    before = os.environ.get(VERBOSITY)
    os.environ.setdefault(VERBOSITY, '0')
    try:
        with without_stderr():
            yield
    finally:
        if before is None:
            del os.environ[VERBOSITY]


@cache
def nvimgcodec_of(process: int) -> tuple[Any, Any, Any]:
    """Return nvImageCodec, a decoder of its own for each process, as it cannot be forked, and its settings.

    The decoder needs no GPU, and does not look for one.
    """
    with quiet_nvimgcodec():
        from nvidia import nvimgcodec  # optional: the extra `fast`

        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)])
    return nvimgcodec, decoder, nvimgcodec.DecodeParams(
        color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False)


def part_by_nvimgcodec(data: bytes, down: slice, across: slice) -> Any:
    """Return the pixels of a part by nvImageCodec, which transforms and colours no more than that.

    It does not see that a file is cut off below the part.
    """
    if not data.endswith(END) or across.stop - across.start < NARROW:
        raise ValueError('left to another decoder')
    nvimgcodec, decoder, settings = nvimgcodec_of(os.getpid())
    pixels = np.empty((down.stop - down.start, across.stop - across.start, 3), np.uint8)
    region = nvimgcodec.Region([down.start, across.start], [down.stop, across.stop])
    stream = nvimgcodec.CodeStream(data).get_sub_code_stream(region=region)
    if decoder.decode(stream, image=nvimgcodec.as_image(pixels), params=settings) is None:
        raise ValueError('nvImageCodec cannot decode the file')
    return pixels


def size_unless_turned(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a greyscale or RGB file; of one that EXIF turns None, as TorchCodec turns it."""
    image = Image.open(io.BytesIO(data))
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return (image.height, image.width) if image.mode in COLOURS and upright else None


def pixels_by_torchcodec(data: bytes) -> Any:
    """Return the pixels by TorchCodec."""
    from torchcodec.decoders import decode_jpeg  # optional: the extra `torchcodec`

    return decode_jpeg(data).permute(1, 2, 0).numpy()


def pixels_by_torchvision(data: bytes) -> Any:
    """Return the pixels by torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # it will be gone from torchvision one day: where it is, TorchCodec and simplejpeg are as well
        warnings.filterwarnings('ignore', 'The image decoding and encoding capabilities')
        warnings.filterwarnings('ignore', 'The given buffer is not writable')
        file = torch.frombuffer(data, dtype=torch.uint8)
        return decode_jpeg(file, ImageReadMode.RGB).permute(1, 2, 0).numpy()


DECODERS = {
    'nvimgcodec': JpegDecoder(
        ('simplejpeg', 'nvidia.nvimgcodec'), size_by_simplejpeg, pixels_by_simplejpeg, shrinks=True,
        part=part_by_nvimgcodec),
    'simplejpeg': JpegDecoder(('simplejpeg',), size_by_simplejpeg, pixels_by_simplejpeg, shrinks=True),
    'simplejpeg-fast': JpegDecoder(
        ('simplejpeg',), size_by_simplejpeg, partial(pixels_by_simplejpeg, fast=True), shrinks=True),
    'torchcodec': JpegDecoder(('torchcodec',), size_unless_turned, pixels_by_torchcodec),
    'torchvision': JpegDecoder(('torchvision',), size_by_pillow, pixels_by_torchvision),
    'pillow': JpegDecoder(('PIL',), size_by_pillow, pixels_by_pillow, shrinks=True),
}
EXTRAS = {'nvimgcodec': 'fast', 'simplejpeg': 'fast', 'simplejpeg-fast': 'fast', 'torchcodec': 'torchcodec'}
ACCURATE = {'simplejpeg-fast': 'simplejpeg'}  # decoders whose pixels are not those of all others: what has them
WHOLE = {'nvimgcodec': 'simplejpeg'}  # decoders of parts: what decodes whole files for them


def installed() -> list[str]:
    """Return the names of the decoders that are there."""
    return [name for name, decoder in DECODERS.items() if all(map(is_installed, decoder.packages))]


def choose_decoder(name: str = 'auto', examples: Iterable[bytes] = (), accurate: bool = False) -> str:
    """Return the name of a decoder: the given one, or the accurate one that is the fastest with `examples` here.

    Args:
        name: `auto`, or a key of `DECODERS`.
        examples: Files; those that are no JPEG are left out. Without one, the first decoder that is there.
        accurate: Take an accurate one where another is given.

    Raises:
        InputError: If there is no decoder of this name, or its package is not installed.
    """
    if name != 'auto' and name not in DECODERS:
        raise InputError(unknown('data.decoder', name, ['auto', *DECODERS]))
    if name in DECODERS:
        check_installed(
            f'data.decoder: {name}', EXTRAS.get(name, ''), *DECODERS[name].packages,
            otherwise='leave data.decoder out')
        return ACCURATE.get(name, name) if accurate else name
    files = [data for data in examples if is_jpeg(data)]
    names = [each for each in installed() if each not in ACCURATE]
    seconds = decoding_seconds(names, files)
    return min(seconds, key=lambda each: seconds[each]) if seconds else names[0]


def decoding_seconds(names: Sequence[str], files: Sequence[bytes], rounds: int = ROUNDS) -> dict[str, float]:
    """Return for each decoder the time for crops of `files`, in seconds, each the median of its rounds.

    Those that fail on one are left out. All have decoded the same files; of large ones not all.
    """
    count = len(files)
    times: dict[str, list[float]] = {name: [] for name in names if files}
    end = time.perf_counter() + SECONDS
    for number, data in enumerate([*files] * rounds):  # the first loads libraries, and does not count
        if number > 1 and time.perf_counter() > end:
            break
        for name in list(times):
            start = time.perf_counter()
            try:
                decode_crop(DECODERS[name], data)
            except Exception:  # a damaged example, or a library that does not work here
                del times[name]
                continue
            times[name].append(time.perf_counter() - start)
    return {name: sum(statistics.median(own) for first in range(count) if (own := each[first::count][first == 0:]))
            for name, each in times.items()}


def decode_crop(decoder: JpegDecoder, data: bytes) -> None:
    """Decode what a usual crop needs: half of the pixels."""
    size = decoder.size(data)
    if decoder.part and size and data.endswith(END):
        decoder.part(data, *(slice(side * 3 // 20, side * 17 // 20) for side in size))
    else:
        decoder.pixels(data)
