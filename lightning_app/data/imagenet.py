"""ImageNet, and any other set of images in class folders or in tar files of the same layout."""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from se_timm.errors import InputError, meant, message, nearest

from .base import ImageDataModule
from .sources import Source
from .splits import has_split, open_split

__all__ = ['ImageNetDataModule', 'relabel', 'take_names']


class ImageNetDataModule(ImageDataModule):
    """Images in `root/train/CLASS/FILE` and `root/val/CLASS/FILE`, or in another form that is found there.

    That is `root/train.tar` of the same layout, WebDataset shards, what Hugging Face's `save_to_disk` or litdata's
    `optimize` wrote, or as root `hf://NAME`, such as `hf://ILSVRC/imagenet-1k`.

    Any classes: their names are the folders' in sorted order, as in torchvision and timm, and their number is found.

    Args:
        root: Folder that holds the splits; also of an object store (`s3://...`, `gs://...`), or `hf://NAME`.
        train_split: Name of the training folder, tar file or split, or of shards, such as `train-{0000..0146}.tar`.
        val_split: The same for the validation, which may be called `validation`, `valid` or `dev` there.
        test_split: The same for the test; the validation images where not given.
        label_column: Column with the class, of a data set of Hugging Face that has several, such as `coarse_label`.
        **common: See `ImageDataModule`.

    Raises:
        InputError: If a folder is missing or empty, or a validation class is not among the training classes.
    """

    def __init__(
            self,
            root: str = 'data/imagenet',
            train_split: str = 'train',
            val_split: str = 'val',
            test_split: str | None = None,
            label_column: str | None = None,
            **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = os.path.expanduser(root)
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.label_column = label_column
        self._sources: dict[str, Source] = {}
        self._trained = 'the training images'  # for messages

    def open(self, split: str) -> Source:
        """Return the images of `train`, `val` or `test`, with the labels of the training classes."""
        folder = {'train': self.train_split, 'val': self.val_split, 'test': self.test_split or self.val_split}[split]
        if folder not in self._sources:
            self._sources[folder] = self._open(folder)
            if split != 'train':
                self._relabel(self._sources[folder], folder)
        return self._sources[folder]

    def _open(self, split: str) -> Source:
        return open_split(self.root, split, label_column=self.label_column)

    def _relabel(self, source: Source, split: str) -> None:
        classes = self.class_names or []
        # the training images are opened for their names only where those of `source` do not do
        fits = set(source.classes) <= set(classes)
        if source.numbers and (
                self.train_split in self._sources or (not fits and has_split(self.root, self.train_split))):
            take_names(source, self.open('train'))
        relabel(source, classes, split, self._trained)

    def use_classes(self, names: list[str]) -> None:
        """Number the labels of evaluations as in `names`; the training images are then not looked at."""
        self.class_names, self._trained = list(names), 'the training images of the checkpoint'

    def find_classes(self) -> list[str] | None:
        """Return the training classes, or those of the validation images where there are no training images."""
        if not has_split(self.root, self.train_split):
            if has_split(self.root, self.val_split):
                return self._open(self.val_split).classes
            if self.images is not None:
                return None
        return self.open('train').classes


def take_names(source: Source, training: Source) -> None:
    """Call classes as the training images do that have the same numbers, where only one of the two has names for them.

    So are the public shards of ImageNet: WordNet's names are in the keys of the training images alone.
    """
    if source.numbers and training.numbers and (
            source.classes == source.numbers or training.classes == training.numbers):
        names = dict(zip(training.numbers, training.classes, strict=True))
        source.classes = [names.get(number, name) for number, name in zip(source.numbers, source.classes, strict=True)]


def relabel(source: Source, classes: list[str], split: str, trained: str = 'the training images') -> None:
    """Number the labels of `source` as in `classes`, which are those of what messages call `trained`.

    Raises:
        InputError: If `source` has a class that is not among them.
    """
    index = {name: label for label, name in enumerate(classes)}
    foreign = [name for name in source.classes if name not in index]
    if foreign and source.numbers and set(source.numbers) <= index.keys():  # `classes` are of before they had names
        source.classes, foreign = source.numbers, []
    if foreign:
        close = nearest(foreign[0], classes)
        remedy = 'remove it, or train with images of it'
        if source.classes == source.numbers:
            remedy = 'let a classes.txt beside the shards name the numbers as the training images are, a name a line'
        raise InputError(message(
            f'class {foreign[0]} in {split}' + (f', and {len(foreign) - 1} more' if len(foreign) > 1 else ''),
            f'{trained} have {len(classes)} classes, and this is none of them',
            meant(close) + remedy))
    source.labels = np.array([index[name] for name in source.classes])[np.asarray(source.labels)]
    source.classes, source.numbers = classes, None
