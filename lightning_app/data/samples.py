"""Sources as PyTorch data sets whose samples depend on nothing but (seed, epoch, position)."""
from __future__ import annotations

import logging
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from se_timm.errors import InputError, message

from .decode import UnreadableImage
from .device_decoding import File, for_device
from .jpeg import is_jpeg
from .picture import Picture
from .resample import Drawn, FastCrop
from .sources import Source

__all__ = [
    'IGNORE', 'EvaluationSamples', 'Key', 'PadToMultiple', 'PredictionSamples', 'SeededSampler', 'TrainingSamples',
    'run_seed', 'seeded', 'set_seed',
]

IGNORE = -1  # label of a sample that does not count
JPEG_ENDINGS = ('.jpg', '.jpeg')
AHEAD = 64  # images that are read before the first of them is decoded
CUT = 16  # images that are decoded before the first of them is resized
_logger = logging.getLogger(__name__)

T = TypeVar('T')
Transform = Callable[[Picture], Any]  # to a tensor or `Erased`


def run_seed() -> int:
    """Return the seed of the run, `seed_everything`; 0 where that is off."""
    return int(os.environ.get('PL_GLOBAL_SEED', 0))


def set_seed(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (of all devices) by any number of integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch (CPU) within the context, and restore them afterwards.

    Not in a worker of a loader, where nothing else draws from them: it takes as long as a tenth of the decoding.
    """
    if get_worker_info():
        seed_generators(seed)
        yield
        return
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (CPU)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)


class Key(NamedTuple):
    """What a training sample follows from: the number of its image, a seed, and the side of its crop in pixels."""

    image: int
    seed: int
    size: int | None = None

    @classmethod
    def of(cls, key: Key | tuple[int, int] | int) -> Key:
        """Return the key of an image and a seed, or of an index, which is its own seed."""
        return cls(*key) if isinstance(key, tuple) else cls(key, key)


class SeededSampler(DistributedSampler[Any]):
    """A shuffled share of the data for each process; yields the keys of `TrainingSamples`.

    The permutation depends on (seed, epoch) and each sample's seed on (seed, epoch, position in the permutation), so
    that the batches are the same for any number of workers, and the global batches for any number of processes.

    Args:
        length: Number of samples.
        num_replicas: Number of processes.
        rank: This process.
        seed: Seed of the run.
        multiple: The epoch is cut to a multiple of it: the images of a step over all processes and accumulated batches,
            else the last step would be smaller. `num_replicas` where not given.
        start: An epoch, and how many images of it (over all processes) are left out, as a training that is resumed has
            seen them; they are not loaded. Its length is that of the whole epoch, as Lightning counts in those.
        repeats: Each image stands so many times in a row, with other seeds, and as fewer of them in an epoch.
        size_of_epoch: The side of the crops in an epoch.
    """

    def __init__(
            self, length: int, num_replicas: int, rank: int, seed: int, multiple: int | None = None,
            start: tuple[int, int] = (0, 0), repeats: int = 1,
            size_of_epoch: Callable[[int], int] | None = None) -> None:
        super().__init__(
            range(length), num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.total_size = length // (multiple or num_replicas) * (multiple or num_replicas)
        self.num_samples = self.total_size // num_replicas
        self.start = start
        self.repeats = repeats
        self.size_of_epoch = size_of_epoch

    def order(self) -> Tensor:
        """Return the permutation of the epoch, as torch's DistributedSampler draws it."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]

    def seeds(self) -> Any:
        """Return the seed of each position of the epoch, 32 bits; drawn one by one they would delay the training."""
        words = np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch))).random_raw(self.total_size)
        return words >> np.uint64(32)

    def __iter__(self) -> Iterator[Key]:
        order, seen = self.order().tolist(), self.start[1] if self.epoch == self.start[0] else 0
        size = self.size_of_epoch(self.epoch) if self.size_of_epoch else None
        seeds = self.seeds()
        for position in range(seen + self.rank, self.total_size, self.num_replicas):
            yield Key(order[position // self.repeats], int(seeds[position]), size)

    def digest(self) -> int:
        """Return a number that is the same in all processes if they divide the same order among them."""
        return zlib.crc32(self.order().numpy().tobytes(), self.seed)


class ReadSamples(Dataset[tuple[Any, int]]):
    """Images of a source as pictures; those that are misnamed are named in the log, once in each process.

    An image that another library left out, or took for something else, is read as what it is: ImageNet has a PNG file
    called JPEG.

    Args:
        source: The images.
        decoder: Of JPEG files, see `Picture`.
    """

    def __init__(self, source: Source, decoder: str) -> None:
        self.source = source
        self.decoder = decoder
        self.unreadable = torch.zeros((), dtype=torch.int64).share_memory_()
        self._named: set[int] = set()  # in this process

    def __len__(self) -> int:
        return len(self.source.labels)

    def picture(self, index: int) -> Picture:
        """Return image `index`; raise `UnreadableImage` or `OSError` if that is not possible."""
        content = self.source.read(index)
        if isinstance(content, bytes) and not is_jpeg(content) and index not in self._named:
            self._named.add(index)
            if self.source.name(index).lower().endswith(JPEG_ENDINGS):
                _logger.warning('misnamed image, no JPEG file, and read as what it is: %s', self.source.name(index))
        return Picture(content, self.decoder)


class TrainingSamples(ReadSamples):
    """Training images: keys are those of `SeededSampler`, items pairs of the transformed image and its label.

    An image is a tensor, or `Erased` where the transform erases something.

    A bare index, as from the sampler that Lightning puts in for `overfit_batches`, is its own seed.
    An unreadable image is named in the log, counted (`unreadable`, over all workers) and replaced by the next one.

    Args:
        source: The images.
        transform: From picture to image.
        transform_of_size: The same for another side of the crop, in pixels.
        decoder: Of JPEG files, see `Picture`.
        encoded: Leave the decoding to the device: images of batches are `File` where that can do it. The transform must
            be a `FastCrop`.
    """

    def __init__(
            self, source: Source, transform: Transform,
            transform_of_size: Callable[[int], Transform] | None = None, decoder: str = 'pillow',
            encoded: bool = False) -> None:
        super().__init__(source, decoder)
        self.transform = transform
        self.transform_of_size = transform_of_size
        self.encoded = encoded
        self._sized: dict[int, Transform] = {}

    @cached_property
    def digests(self) -> dict[str, int | None]:
        """Numbers that tell these `labels`, and `names` of files, from others; None of images that are not files.

        Names are without folders, endings and points: they are the same in class folders, tar files and shards.
        """
        paths = getattr(self.source, 'paths', ())
        names = '\n'.join([path.rpartition('/')[2].rpartition('.')[0] for path in paths])
        return {'labels': zlib.crc32(np.asarray(self.source.labels, dtype=np.int64).tobytes()),
                'names': zlib.crc32(names.replace('.', '_').encode('utf-8', 'surrogateescape')) if names else None}

    @property
    def digest(self) -> int:
        """A number that tells these files and labels from others."""
        return zlib.crc32(repr(self.digests).encode())

    def transform_of(self, key: Key) -> Transform:
        """Return the transform of a sample."""
        size = key.size
        if size is None or self.transform_of_size is None:
            return self.transform
        if size not in self._sized:
            self._sized[size] = self.transform_of_size(size)
        return self._sized[size]

    def __getitems__(self, keys: Sequence[Key | tuple[int, int] | int]) -> list[tuple[Any, int]]:
        """Return the samples of a batch: many are read, then drawn, then decoded, then resized.

        The processor's caches make each of these faster when it is done many times in a row.
        """
        samples = []
        for start in range(0, len(keys), AHEAD):
            some = [Key.of(key) for key in keys[start:start + AHEAD]]
            transforms = [self.transform_of(key) for key in some]
            crops = [transform if isinstance(transform, FastCrop) else None for transform in transforms]
            pictures = tried(lambda _, key: self.picture(key.image), crops, some)
            drawn = tried(drawn_ahead, crops, pictures, some)
            images = tried(file_of, pictures, drawn, some) if self.encoded else taken(crops, pictures, drawn)
            samples += [self._sample(*each) for each in zip(some, pictures, images, strict=True)]
        return samples

    def _sample(self, key: Key, picture: Picture | None, image: Any) -> tuple[Any, int]:
        """Return the sample of a key, of which there are the picture and the image, or not."""
        if image is None and picture is not None:
            with suppress(UnreadableImage, OSError), seeded(key.seed):
                image = self.transform_of(key)(copy(picture))  # which holds, and not `picture`, what is decoded
        return self[key] if image is None else (image, int(self.source.labels[key.image]))

    def __getitem__(self, key: Key | tuple[int, int] | int) -> tuple[Any, int]:
        key = Key.of(key)
        index, seed, _ = key
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                picture = self.picture(candidate)
                with seeded(seed):
                    return self.transform_of(key)(picture), int(self.source.labels[candidate])
            except (UnreadableImage, OSError) as error:
                self.unreadable += 1
                _logger.warning('unreadable image %d, replaced in training by the next: %s: %s',
                                self.unreadable.item(), self.source.name(candidate), error)
        raise InputError(message(
            f'training images: {self.source.name(index)} and all others',
            'none of them can be read', 'look at the log for the reasons; the files may be damaged or no images'))


def tried(function: Callable[..., T | None], *columns: Sequence[Any]) -> list[T | None]:
    """Return what a function makes of each row of `columns`; None where a row lacks something, or cannot be read."""
    results: list[T | None] = []
    for row in zip(*columns, strict=True):
        results.append(None)
        if all(each is not None for each in row):
            with suppress(UnreadableImage, OSError):
                results[-1] = function(*row)
    return results


def drawn_ahead(crop: FastCrop, picture: Picture, key: Key) -> Drawn | None:
    """Return what is random about a crop; None of a picture that must be decoded for its size."""
    if not picture.is_measured:
        return None
    with seeded(key.seed):
        return crop.draw(picture)


def file_of(picture: Picture, drawn: Drawn, key: Key) -> File | None:
    """Return what is left to the device; None of a picture that it cannot decode."""
    content = for_device(picture)
    return File(content, drawn, key) if content else None


def taken(
        crops: list[FastCrop | None], pictures: list[Picture | None], drawn: list[Drawn | None]) -> list[Any]:
    """Return the crops of pictures; None where something is missing, or cannot be decoded."""
    images: list[Any] = []
    for start in range(0, len(crops), CUT):
        some = slice(start, start + CUT)
        pixels = tried(FastCrop.cut, crops[some], pictures[some], drawn[some])
        images += tried(FastCrop.finish, crops[some], pixels, drawn[some])
    return images


class EvaluationSamples(ReadSamples):
    """Images and labels for evaluation or prediction, in order.

    Args:
        source: The images.
        transform: Image to tensor.
        allow_unreadable: Give an unreadable image the label `IGNORE`, name it in the log and count it (`unreadable`);
            otherwise it is an error, since the accuracy would be another set's.
        decoder: Of JPEG files, see `Picture`.
    """

    def __init__(
            self, source: Source, transform: Transform, allow_unreadable: bool = False,
            decoder: str = 'pillow') -> None:
        super().__init__(source, decoder)
        self.transform = transform
        self.allow_unreadable = allow_unreadable

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(self.picture(index)), int(self.source.labels[index])
        except (UnreadableImage, OSError) as error:
            if not self.allow_unreadable:
                raise InputError(message(
                    f'image: {self.source.name(index)}', f'it cannot be read ({error})',
                    'replace or remove it, or say --data.allow_unreadable=true (analyze: --allow_unreadable) to leave '
                    'such images out of the count',
                )) from error
            self.unreadable += 1
            _logger.warning('unreadable image %d, left out: %s: %s',
                            self.unreadable.item(), self.source.name(index), error)
            return self.left_out(index)

    def left_out(self, index: int) -> tuple[Tensor, int]:
        """Return what stands for the unreadable image `index`."""
        return self.blank()

    def blank(self) -> tuple[Tensor, int]:
        """Return a sample that does not count."""
        return self.transform(Picture(Image.new('RGB', (32, 32)))), IGNORE


class PredictionSamples(EvaluationSamples):
    """Images for prediction, whose labels are their indices; an unreadable image has a negative one."""

    def __init__(self, source: Source, transform: Transform, decoder: str = 'pillow') -> None:
        super().__init__(source, transform, allow_unreadable=True, decoder=decoder)

    def left_out(self, index: int) -> tuple[Tensor, int]:
        """Return a blank image, and a label from which `position` gets `index`."""
        return self.blank()[0], IGNORE - 1 - index

    @staticmethod
    def position(label: int) -> int:
        """Return the index of the unreadable image that has the negative `label`."""
        return IGNORE - 1 - label


class PadToMultiple(Dataset[tuple[Tensor, int]]):
    """`samples`, lengthened to a multiple of `multiple`; the added samples have the label `IGNORE`.

    With it every process gets equally many samples, and each real one counts exactly once.
    """

    def __init__(self, samples: EvaluationSamples, multiple: int) -> None:
        self.samples = samples
        self.length = -(-len(samples) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index] if index < len(self.samples) else self.samples.blank()
