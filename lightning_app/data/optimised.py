"""Data sets in the form of litdata's `optimize`."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from se_timm.errors import InputError, check_installed, message

from .index_cache import cached_arrays
from .shards import CLASSES, named
from .sources import IMAGES, LABELS, Source, check_labels

__all__ = ['LitDataSource', 'chunks_of']

SLACK = 1e-3  # of rounding
FILE = bytes | bytearray | memoryview  # as which litdata may give what was written as bytes


class LitDataSource(Source):
    """Images of a data set that litdata's `optimize` wrote, local or in an object store.

    A sample is a dictionary or a pair of an image (its file as bytes, an image of Pillow's, or pixels) and its class, a
    whole number. The classes, numbers that there are images of, are read once, and kept in a cache; a `classes.txt`
    names them, a name a line, else they are called by number.

    Args:
        root: The folder with `index.json`.
        names: The `classes.txt`, where it does not lie in it.

    Raises:
        InputError: If litdata is not installed, a file or a label is missing, or the samples are of another kind.
    """

    def __init__(self, root: str | Path, names: Path | None = None) -> None:
        self.root = str(root)
        chunks = chunks_of(Path(self.root))
        files = ['index.json', *(chunk['filename'] for chunk in chunks)]
        check_chunks(self.root, files[1:])
        self.dataset = open_dataset(self.root)
        self._length = sum(chunk['chunk_size'] for chunk in chunks)  # len(dataset) is one process's share
        first = self.dataset[0]
        self.image, self.label = keys_of(first, self.root)
        check_pixels(first[self.image], self.root)
        paths = [os.path.join(self.root, file) for file in files]
        self.labels = cached_arrays('litdata-labels', paths, self._labels)['labels']
        check_labels(f'data.root: {root}', self.labels)
        there, self.labels = np.unique(self.labels, return_inverse=True)
        self.numbers = [str(number) for number in there]
        names = names or Path(self.root, CLASSES)
        self.classes = named(self.numbers, names) if names.is_file() else self.numbers
        self.dataset = None  # it has threads and open files: each worker opens its own

    def _labels(self) -> dict[str, Any]:
        return {'labels': np.array([int(self.dataset[index][self.label]) for index in range(self._length)])}

    def name(self, index: int) -> str:
        """Return the folder of the set and the number of the image."""
        return f'{self.root}[{index}]'

    def read(self, index: int) -> bytes | Image.Image:
        """Return the file of image `index`, or the image."""
        if self.dataset is None:
            self.dataset = open_dataset(self.root)
        value = self.dataset[index][self.image]
        if isinstance(value, FILE):
            return bytes(value)
        return (value if isinstance(value, Image.Image) else to_pil_image(value)).convert('RGB')

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'dataset': None}


def chunks_of(folder: Path) -> list[dict[str, Any]]:
    """Return what such a data set tells of its files; nothing of other folders, with an `index.json` or not."""
    try:
        index = json.loads((folder / 'index.json').read_bytes())
    except (OSError, ValueError):
        return []
    chunks = index.get('chunks') if isinstance(index, dict) else None
    return chunks if isinstance(chunks, list) else []


def check_chunks(root: str, names: list[str]) -> None:
    """Raise `InputError` if there are not all files with samples: litdata would wait for them."""
    there = set(os.listdir(root))
    if missing := [name for name in names if name not in there]:
        raise InputError(message(
            f'data.root: {root}', f'{len(missing)} of its {len(names)} files with samples are missing: {missing[0]}',
            'copy the missing ones there'))


def open_dataset(root: str) -> Any:
    """Return litdata's data set, which gives JPEG files as they are.

    Raises:
        InputError: If litdata is not installed.
    """
    os.environ.setdefault('LITDATA_DISABLE_VERSION_CHECK', '1')  # read once, by the import
    check_installed(f'data.root: {root}', 'litdata', 'litdata')
    from litdata import StreamingDataset
    from litdata.streaming.serializers import JPEGSerializer

    class JpegFile(JPEGSerializer):
        def deserialize(self, data: bytes) -> bytes:
            return bytes(data)

    return StreamingDataset(root, serializers={'jpeg': JpegFile()})


def check_pixels(value: Any, root: str) -> None:
    """Raise `InputError` for an array that is no image as `to_pil_image` takes them: it would wrap round, or fail."""
    if isinstance(value, FILE | Image.Image):
        return
    channels = value.shape[0 if isinstance(value, Tensor) else -1]
    is_float = 'float' in str(value.dtype)
    low, high = value.min(), value.max()
    in_range = low >= -SLACK and high <= 1 + SLACK if is_float else 'uint8' in str(value.dtype)
    if channels not in (1, 2, 3, 4) or 'bfloat16' in str(value.dtype) or not in_range:
        raise InputError(message(
            f'data.root: {root}',
            f'its pixels are {value.dtype} of shape {tuple(value.shape)}, from {low:g} to {high:g}',
            'write files as bytes, or arrays (H, W, 3) or tensors (3, H, W), of uint8, or of floats from 0 to 1'))


def keys_of(sample: Any, root: str) -> tuple[Any, Any]:
    """Return under which keys a sample has its image and its class.

    Raises:
        InputError: If there is none of one kind.
    """
    items = list(sample.items() if isinstance(sample, dict) else enumerate(sample)) if isinstance(
        sample, dict | tuple | list) else []
    image = [key for key, value in items if isinstance(value, FILE | Image.Image) or getattr(value, 'ndim', 0) == 3]
    image = [key for key in image if str(key).lower() in IMAGES] or image
    label = [key for key, value in items if isinstance(value, int) or getattr(value, 'ndim', -1) == 0]
    label = [key for key in label if str(key).lower() in LABELS] or label  # not a number of the image, or its width
    if not image or len(label) != 1:
        raise InputError(message(
            f'data.root: {root}',
            f'its samples hold {", ".join(str(key) for key, _ in items) or "nothing"}: no image, or not one class',
            'write it with samples such as {"image": FILE AS BYTES, "label": NUMBER}'))
    return image[0], label[0]
