"""Data sets of Hugging Face: on disk as `save_to_disk` leaves them, or from the hub."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from se_timm.errors import InputError, check_installed, meant, message, nearest

from .decode import UnreadableImage
from .sources import IMAGES, LABELS, Source, check_labels

__all__ = ['HuggingFaceSource', 'hub_splits', 'names_of', 'open_hub', 'open_saved', 'split_named']

SPLITS = {'val': ('val', 'validation', 'valid', 'dev')}  # what our names are called elsewhere, first come first


class HuggingFaceSource(Source):
    """Images of a data set with a column of images and one of class labels.

    Args:
        dataset: A `datasets.Dataset`.
        title: What messages call it.
        label: The column of class labels; not needed where there is one, or one with a usual name.

    Raises:
        InputError: If it lacks such columns.
    """

    def __init__(self, dataset: Any, title: str, label: str | None = None) -> None:
        import datasets  # optional: the extra `datasets`

        self.title = title
        self.image = column_of(
            dataset, datasets.Image, title, 'images', IMAGES,
            f'call the one that is meant {IMAGES[0]}, by its rename_column, and save it again')
        label = named_column(dataset, datasets.ClassLabel, title, label) if label else column_of(
            dataset, datasets.ClassLabel, title, 'class labels', LABELS, 'say which by label_column')
        self.classes: list[str] = list(dataset.features[label].names)
        column = dataset.select_columns([label]).with_format('arrow')[:][label]
        self.labels = column.to_numpy().astype(np.int64)
        check_labels(f'data set: {title}', self.labels)
        self.dataset = dataset.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        """Return the title of the set and the number of the image."""
        return f'{self.title}[{index}]'

    def read(self, index: int) -> bytes | Image.Image:
        """Return the file of image `index`."""
        value = self.dataset[index][self.image]
        if value is None:
            raise UnreadableImage('the data set has no image in this row')
        return value['bytes'] if value['bytes'] is not None else Path(value['path']).read_bytes()


def columns_of(dataset: Any, kind: type) -> list[str]:
    """Return the names of the columns of a kind."""
    return [str(name) for name, feature in dataset.features.items() if isinstance(feature, kind)]


def named_column(dataset: Any, kind: type, title: str, name: str) -> str:
    """Return the name of a column; raise `InputError` if there is none of the kind with it."""
    columns = columns_of(dataset, kind)
    if name not in columns:
        raise InputError(message(
            f'label_column: {name}', f'{title} has {", ".join(columns) or "no column"} of class labels',
            meant(nearest(name, columns)) + 'name one of them, or cast the column to datasets.ClassLabel'))
    return name


def column_of(dataset: Any, kind: type, title: str, what: str, usual: Sequence[str], remedy: str) -> str:
    """Return the name of the column of a kind, of several of that with a usual name.

    Raises:
        InputError: If there is none, or several of which it cannot be told; `remedy` is for those.
    """
    columns = columns_of(dataset, kind)
    named = [name for each in usual for name in columns if name.lower() == each]
    if len(columns) == 1 or named:
        return [*named, *columns][0]
    if columns:
        raise InputError(message(
            f'data set: {title}', f'it has several columns of {what}: {", ".join(columns)}', remedy))
    raise InputError(message(
        f'data set: {title}', f'it has no column of {what}, but {", ".join(dataset.features)}',
        'cast its columns to datasets.Image and datasets.ClassLabel, and save it again'))


def open_saved(folder: Path, split: str, label: str | None = None) -> HuggingFaceSource:
    """Return the split of what `save_to_disk` left in `folder`, or in `folder/split`, its classes of column `label`."""
    datasets = library()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(message(
            f'data set: {folder}', f'it cannot be read ({error})', 'save it again, by its save_to_disk')) from error
    if isinstance(loaded, datasets.DatasetDict):
        return HuggingFaceSource(loaded[split_named(split, list(loaded), str(folder))], f'{folder}:{split}', label)
    return HuggingFaceSource(loaded, str(folder), label)


def open_hub(name: str, split: str, label: str | None = None) -> HuggingFaceSource:
    """Return the split of a data set of the hub, such as `ILSVRC/imagenet-1k`; it is downloaded to the hub's cache."""
    chosen = split_named(split, hub_splits(name), f'hf://{name}')
    with reached(name):
        loaded = library().load_dataset(name, split=chosen)
    return HuggingFaceSource(loaded, f'hf://{name}:{chosen}', label)


@cache
def hub_splits(name: str) -> list[str]:
    """Return what the splits of a data set of the hub are called.

    Raises:
        InputError: If the hub does not say it.
    """
    datasets = library()
    with reached(name):
        return list(datasets.get_dataset_split_names(name))


@contextmanager
def reached(name: str) -> Iterator[None]:
    """Raise `InputError` for what comes in the way of a data set of the hub."""
    try:
        yield
    except Exception as error:  # of the network, the hub, the file formats
        raise InputError(message(
            f'data.root: hf://{name}', f'the hub does not give it ({type(error).__name__}: {error})',
            'see that the name is right and that there is a network; for some sets agree to their terms on its page, '
            'and say: hf auth login')) from error


def names_of(split: str) -> tuple[str, ...]:
    """Return what a split may be called."""
    return SPLITS.get(split, (split,))


def split_named(split: str, names: list[str], title: str) -> str:
    """Return the one of `names` that is the split, which may be called otherwise there.

    Raises:
        InputError: If there is none.
    """
    for name in names_of(split):
        if name in names:
            return name
    close = nearest(split, names)
    raise InputError(message(
        f'split: {split} of {title}', f'it has {", ".join(names) or "none"}',
        meant(close) + 'name the splits by data.train_split and data.val_split'))


def library() -> Any:
    """Return the library.

    Raises:
        InputError: If it is not installed.
    """
    check_installed('data.root: a data set of Hugging Face', 'datasets', 'datasets')
    import datasets

    return datasets
