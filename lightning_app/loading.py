"""How fast images are loaded here, a core, beside timm's loader and bare decoding; and how many cores a GPU needs."""
from __future__ import annotations

import io
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from torch.utils.data import DataLoader, Dataset

from se_timm.errors import InputError, check_least, message
from se_timm.tables import aligned

from .data.augment import OWN, Augment, timm_settings, training_transform
from .data.collate import collate
from .data.decode import UnreadableImage, encode
from .data.jpeg import ACCURATE, WHOLE, choose_decoder, installed, is_jpeg
from .data.picture import Picture
from .data.samples import SeededSampler, TrainingSamples
from .data.sources import Source, first_files
from .data.splits import open_split
from .data.workers import cores

__all__ = ['loading']

NORMALISATION: dict[str, Any] = {
    'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD, 'interpolation': 'bilinear'}
EXAMPLES = 32  # files by which the fastest decoder is chosen
QUALITY = 95  # of the files that are made
WARMUP = 4  # batches that are not counted, at least one of each worker: it starts, and loads libraries
TIMM = "timm's create_loader, 1 worker"

Row = Callable[[], float]


class Part(Source):
    """The first images of a source, with their files in memory where they are to be of another size.

    Those that cannot be read are left out, as timm's loader stops at them, and counted on the standard error.

    Args:
        source: The images.
        count: How many of them.
        size: Width and height of the files in pixels; those of the source where None.
    """

    def __init__(self, source: Source, count: int, size: Sequence[int] | None = None) -> None:
        self.source, self.classes = source, source.classes
        self.indices: list[int] = []
        self.files: list[bytes] | None = None if size is None else []
        unreadable = []
        for index in range(min(count, len(source.labels))):
            try:
                image = source.load(index)
            except (UnreadableImage, OSError):
                unreadable.append(source.name(index))
                continue
            self.indices.append(index)
            if self.files is not None and size is not None:
                self.files.append(made(image, size))
        self.labels = np.asarray(source.labels)[self.indices]
        if unreadable:
            print(f'{len(unreadable)} images cannot be read and are left out: {unreadable[0]}', file=sys.stderr)

    def name(self, index: int) -> str:
        """Return the name of the image."""
        return self.source.name(self.indices[index])

    def file(self, index: int) -> str | None:
        """Return the file on the disk that holds it."""
        return self.source.file(self.indices[index]) if self.files is None else None

    def read(self, index: int) -> bytes | Image.Image:
        """Return its file, or the image."""
        return self.source.read(self.indices[index]) if self.files is None else self.files[index]


def made(image: Image.Image, size: Sequence[int]) -> bytes:
    """Return a JPEG file of an image in another size, width and height."""
    return encode(image.resize((size[0], size[1]), Image.Resampling.LANCZOS), 'JPEG', quality=QUALITY)


class Decoded(Dataset[int]):
    """Images that are read and decoded, and left."""

    def __init__(self, source: Source, decoder: str) -> None:
        self.source, self.decoder = source, decoder

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> int:
        Picture(self.source.read(index), self.decoder).pixels()
        return index


class Opened(Dataset[tuple[Any, int]]):
    """Images as timm's data set has them: opened by Pillow, then transformed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.transform: Any = None  # timm's create_loader puts it there

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        content = self.source.read(index)
        image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content)).convert('RGB')
        return self.transform(image), int(self.source.labels[index])


def timed(rows: Mapping[str, Callable[[], float]], rounds: int, cold: Sequence[Source]) -> dict[str, list[float]]:
    """Return the speed of each row in each round; the system forgets the sources that shall be cold."""
    speeds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row, run in rows.items():
            for source in cold:
                forget(source)
            speeds[row].append(run())
    return speeds


def loading(
        *roots: str, split: str = 'train', size: int = 224, batch_size: int = 64, images: int = 2000, rounds: int = 5,
        decoder: str = 'auto', made_size: tuple[int, int] | None = None, workers: int = 2, cold: bool = False,
        images_per_second: float | None = None, augment: Augment = Augment(),  # noqa: B008
        label_column: str | None = None) -> dict[str, float]:
    """Time the loading of training batches, random crops that may be flipped, beside timm's loader and bare decoding.

    With one worker and several, each a core. Rounds alternate between all rows, ratios are within a round, and their
    median is printed.

    Args:
        *roots: Folders with the split, in any form that `data.root` takes; the first is loaded by timm as well.
        split: The split.
        size: Side of the crops in pixels.
        batch_size: Images in a batch.
        images: How many of the split are loaded in a round, its first.
        rounds: How often all rows are run.
        decoder: As `data.decoder`.
        made_size: Width and height: load JPEG files of this size, in memory, made from the images.
        workers: Most worker processes.
        cold: Have the system forget the files before each row: as from storage, not from memory.
        images_per_second: That a GPU trains on, as `train/images_per_second` says: how many cores it needs is printed.
        augment: As `data.augment`, of what timm has as well.
        label_column: As `data.label_column`.

    Returns:
        Images a second for each row.

    Raises:
        InputError: If there are too few images, they cannot be had from storage, or timm cannot augment so.
    """
    made = dict(zip(('width of made_size', 'height of made_size'), made_size or (), strict=False))
    check_least(1, size=size, batch_size=batch_size, images=images, rounds=rounds, workers=workers,
                **made, images_per_second=images_per_second)
    sources = {root: Part(open_split(root, split, 'root', label_column), images, made_size) for root in roots}
    first = sources[roots[0]]
    check(first, batch_size, workers, cold)
    check_augment(augment, size)
    chosen = choose_decoder(decoder, first_files(first, EXAMPLES))
    rows = rows_of(sources, size, batch_size, chosen, workers, augment)
    speeds = timed(rows, rounds, list(sources.values()) if cold else [])
    print_table(speeds, chosen)
    print(f'\n{describe(first)}, crops of {size} px in batches of {batch_size}, decoder {chosen}; '
          f'medians of {rounds} rounds, {"cold" if cold else "warm"}; {cores()} cores; timm {timm.__version__}, '
          f'torch {torch.__version__}, Python {platform.python_version()}')
    medians = {row: statistics.median(values) for row, values in speeds.items()}
    if workers > 1:
        several = ratio(speeds, worker_row(roots[0], workers), worker_row(roots[0], 1))
        decoded = ratio(speeds, decoding_row(chosen, workers), decoding_row(chosen))
        print(f'{workers} workers load {several} times what one does; where they only decode, {decoded} times.')
    if images_per_second is not None:
        one = medians[worker_row(roots[0], 1)]
        needed = math.ceil(images_per_second / one)
        print(f'A GPU that trains on {images_per_second:.0f} images/s needs {needed} core{"s" * (needed > 1)}, each of '
              f'which loads {one:.0f} images/s; this machine has {cores()}.')
    return medians


def check(source: Source, batch_size: int, workers: int, cold: bool) -> None:
    """Raise `InputError` if there are not enough images for a measurement, or they cannot be forgotten."""
    least = 2 * uncounted(workers)
    if len(source.labels) < least * batch_size:
        raise InputError(message(
            f'batch_size: {batch_size}',
            f'{least} batches are needed, as the first {least // 2} do not count, and there are only '
            f'{len(source.labels)} images',
            f'take a batch size of at most {max(len(source.labels) // least, 1)}, or more images'))
    if cold and not hasattr(os, 'posix_fadvise'):
        raise InputError(message('cold: true', 'this system does not forget files when asked', 'measure on Linux'))
    if cold and source.file(0) is None:
        raise InputError(message(
            f'cold: true with {source.name(0)}', 'its file is in memory, or in the hands of another library',
            'measure class folders, tar files or shards, without made_size'))


def check_augment(augment: Augment, size: int) -> None:
    """Raise `InputError` for augmentation that cannot be, or that timm's loader cannot do."""
    training_transform(augment, size, **NORMALISATION)
    missing = ['crop'] if augment.crop == 'pad' else [
        name for name in OWN if getattr(augment, name) != getattr(Augment, name)]
    if missing:
        raise InputError(message(
            f'augment.{missing[0]}: {getattr(augment, missing[0])}', "timm's loader, the other side, has no such thing",
            'leave it out'))


def rows_of(
        sources: dict[str, Part], size: int, batch_size: int, decoder: str, workers: int,
        augment: Augment) -> dict[str, Row]:
    """Return what is timed in each row; it returns images a second."""
    name, first = next(iter(sources.items()))
    rows: dict[str, Row] = {TIMM: partial(timms, first, size, batch_size, augment)}
    ours = partial(own, size=size, batch_size=batch_size, decoder=decoder, augment=augment)
    for root, source in sources.items():
        rows[worker_row(root, 1)] = partial(ours, source)
    rows[f'{name}, exact, 1 worker'] = partial(ours, first, exact=True, decoder=ACCURATE.get(decoder, decoder))
    if workers > 1:
        rows[worker_row(name, workers)] = partial(ours, first, workers=workers)
    for each in installed():
        if each not in WHOLE:
            rows[decoding_row(each)] = partial(decoding, first, each)
    if workers > 1:
        rows[decoding_row(decoder, workers)] = partial(
            decoding, first, decoder, batch_size=batch_size, workers=workers)
    return rows


def worker_row(root: str, workers: int) -> str:
    """Return how the row of so many workers is called."""
    return f'{root}, {workers} worker' + 's' * (workers > 1)


def decoding_row(decoder: str, workers: int = 0) -> str:
    """Return how the row of what decodes whole files is called, here or in so many workers."""
    return f'decoding alone, {WHOLE.get(decoder, decoder)}' + f', {workers} workers' * (workers > 0)


# What is timed


def own(
        source: Source, size: int, batch_size: int, decoder: str, augment: Augment, exact: bool = False,
        workers: int = 1) -> float:
    """Return images a second of our loading, to the batch of bytes, which is normalised and erased on the device."""
    samples = TrainingSamples(source, training_transform(augment, size, exact, **NORMALISATION), decoder=decoder)
    sampler = SeededSampler(len(samples), 1, 0, seed=0, multiple=batch_size)
    batches = DataLoader(
        samples, batch_size, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=collate)
    return speed(batches, batch_size, workers)


def timms(source: Source, size: int, batch_size: int, augment: Augment) -> float:
    """Return images a second of timm's loading, to the batch of bytes, which its prefetcher normalises and erases."""
    batches = create_loader(
        Opened(source), size, batch_size, is_training=True, num_workers=1, persistent_workers=False,
        device=torch.device('cpu'), pin_memory=False, **timm_settings(augment), **NORMALISATION)
    return speed(batches.loader, batch_size)


def speed(batches: Iterable[Any], batch_size: int, workers: int = 1) -> float:
    """Return images a second, once the first batches are there.

    Workers load batches in turn, and as many of each are counted: one that still works at the end is not all of them.
    """
    arrivals = [time.perf_counter() for _ in batches]
    start = uncounted(workers) - 1
    counted = (len(arrivals) - 1 - start) // workers * workers
    return counted * batch_size / (arrivals[start + counted] - arrivals[start])


def uncounted(workers: int) -> int:
    """Return how many batches do not count, as many of each worker."""
    return math.ceil(WARMUP / workers) * workers


def decoding(source: Source, decoder: str, batch_size: int = 1, workers: int = 0) -> float:
    """Return images a second of reading and decoding alone, in this process or in workers that pass nothing on."""
    images = Decoded(source, decoder)
    if workers:
        batches = DataLoader(images, batch_size, num_workers=workers, drop_last=True, collate_fn=len)
        return speed(batches, batch_size, workers)
    start = time.perf_counter()
    for index in range(len(images)):
        images[index]
    return len(images) / (time.perf_counter() - start)


def forget(source: Source) -> None:
    """Let the system forget what is in the files of a source; where they are, it still knows."""
    for file in {source.file(index) for index in range(len(source.labels))} - {None}:
        descriptor = os.open(str(file), os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# What is printed


def describe(source: Source) -> str:
    """Return number, size and form of the images."""
    files = [content for content in map(source.read, range(len(source.labels))) if isinstance(content, bytes)]
    sides = [min(Picture(content).size) for content in files]
    jpegs = sum(map(is_jpeg, files))
    return f'{len(source.labels)} images' + (
        f', {jpegs} of them JPEG files, medians {statistics.median(map(len, files)) / 1000:.0f} kB and '
        f'{statistics.median(sides):.0f} px on the shorter side' if files else '')


def ratio(speeds: dict[str, list[float]], row: str, other: str) -> str:
    """Return how many times faster a row is than another: the median of the rounds."""
    return f'{statistics.median(a / b for a, b in zip(speeds[row], speeds[other], strict=True)):.2f}'


def print_table(speeds: dict[str, list[float]], decoder: str) -> None:
    """Print images a second for each row, and relative to timm's loader and to the decoding."""
    against = {"/ timm's": TIMM, '/ decoding': decoding_row(decoder)}
    print(aligned([['', 'images/s', *against], *(
        [row, f'{statistics.median(values):.0f}', *(ratio(speeds, row, other) for other in against.values())]
        for row, values in speeds.items())]))
