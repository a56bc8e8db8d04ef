"""WebDataset shards: tar files of samples, read in place and in any order."""
from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from se_timm.errors import InputError, message

from .compact import Texts
from .index_cache import cached_arrays, tell
from .sources import EXTENSIONS, Source, below_common_folder
from .tars import Place, TarFiles, places_in

__all__ = ['CLASSES', 'ShardSource', 'is_shard', 'lines_of', 'missing_shards', 'named', 'samples_in']

CLASSES = 'classes.txt'  # names of classes that are numbers
MAIN = ('', 'image', 'img', 'rgb', 'input')  # what the image is called among others
LABELS = ('cls', 'json')  # fields with a label: a number, and a number under `label`
A_SERIES = 100_000  # shards at most; larger numbers are dates, hashes or the like
WORDNET = re.compile(r'n\d{8}(?=_)')  # as the files of ImageNet are called


class Sample(NamedTuple):
    """An image in a shard, and its label: a number, or the folder that is its class; None until all are known."""

    name: str
    place: Place
    label: int | str | None


class ShardSource(Source):
    """Images in WebDataset shards, `KEY.jpg` and its label in `KEY.cls` or `KEY.json`, or `CLASS/.../KEY.jpg` alone.

    The positions of all members are read once, and kept in a cache (`index_cache`). Each image can be read at any time,
    so that batches, their order, and where a training resumes are those of the same images in class folders.

    Classes are folders of the keys, below those that hold all classes, or numbers, in all shards alike. Numbers have
    their names from `classes.txt` beside the shards, a name a line; or from the keys, where all of a class begin as
    files of ImageNet, `n01440764_10026`; or none.

    Args:
        paths: The shards.
        names: The `classes.txt`, where it does not lie beside them.

    Raises:
        InputError: If a shard cannot be read, an image has no label, or some have a number and others a folder.
    """

    def __init__(self, paths: Sequence[str | Path], names: Path | None = None) -> None:
        self.paths_of_shards = [str(path) for path in paths]
        arrays = cached_arrays('samples', self.paths_of_shards, lambda: index_of(self.paths_of_shards))
        self.paths = Texts.of(arrays['names'], arrays['name_ends'])
        numbers = list(Texts.of(arrays['classes'], arrays['class_ends']))
        self.labels, self.places, self.shards = arrays['labels'], arrays['places'], arrays['shards']
        names = names or Path(self.paths_of_shards[0]).parent / CLASSES
        if all(number.isdigit() for number in numbers):
            self.numbers = numbers
        if self.numbers and names.is_file():
            self.classes = named(numbers, names)
        else:
            wordnet = list(Texts.of(arrays['wordnet'], arrays['wordnet_ends']))
            self.classes = wordnet if all(wordnet) and len(set(wordnet)) == len(wordnet) else numbers
        self._tars = TarFiles(self.paths_of_shards)

    def name(self, index: int) -> str:
        """Return shard and member name of image `index`."""
        return f'{self.file(index)}:{self.paths[index]}'

    def file(self, index: int) -> str:
        """Return the path of the shard that has image `index`."""
        return self.paths_of_shards[self.shards[index]]

    def read(self, index: int) -> bytes:
        """Return the file of image `index`."""
        return self._tars.read(int(self.shards[index]), Place(*self.places[index].tolist()))


def is_shard(names: Iterable[str]) -> bool:
    """Return whether a tar file with members of these names is a shard with labels of its own, not class folders."""
    names = list(names)
    images = {name.rpartition('.')[0] for name in names if name.lower().endswith(EXTENSIONS)}
    return any(stem in images and kind in LABELS for stem, _, kind in (name.rpartition('.') for name in names))


# The index


def index_of(paths: Sequence[str]) -> dict[str, Any]:
    """Return the arrays that describe all images in the shards, by class and then by name."""
    samples = [(number, sample) for number, path in enumerate(paths) for sample in samples_in(path)]
    if not samples:
        raise InputError(message(
            f'shards: {several(paths)}', 'there is no image in them',
            f'a sample is KEY.jpg and KEY.cls, with one of {", ".join(EXTENSIONS)}'))
    samples = labelled(samples, paths)
    labels = sorted({sample.label for _, sample in samples}, key=lambda label: (isinstance(label, str), label))
    number_of = {label: number for number, label in enumerate(labels)}
    samples.sort(key=lambda each: (number_of[each[1].label], each[1].name))
    names, texts = Texts(sample.name for _, sample in samples), Texts(map(str, labels))
    wordnet = Texts(wordnet_name(sample.name for _, sample in group)
                    for _, group in itertools.groupby(samples, key=lambda each: each[1].label))
    return {
        'names': names.data, 'name_ends': names.ends, 'classes': texts.data, 'class_ends': texts.ends,
        'wordnet': wordnet.data, 'wordnet_ends': wordnet.ends,
        'labels': np.array([number_of[sample.label] for _, sample in samples], dtype=np.int64),
        'places': np.array([sample.place for _, sample in samples], dtype=np.int64),
        'shards': np.array([number for number, _ in samples], dtype=np.int64)}


def labelled(samples: list[tuple[int, Sample]], paths: Sequence[str]) -> list[tuple[int, Sample]]:
    """Return samples, each with the number of its shard; with the folders of their classes where they have no numbers.

    Raises:
        InputError: If only some have a number, or they have no folders either.
    """
    numbered = [each for each in samples if each[1].label is not None]
    if len(numbered) == len(samples):
        return samples
    unnumbered = [each for each in samples if each[1].label is None]
    folders = {} if numbered else below_common_folder((sample.name for _, sample in samples), several(paths))
    if not folders:
        number, sample = (numbered if 0 < len(numbered) < len(unnumbered) else unnumbered)[0]
        why = 'it has no label, neither in KEY.cls, nor as label in KEY.json, nor a folder'
        if sample.label is not None:
            why = f'its label is {sample.label}, and {len(unnumbered)} images have none in KEY.cls or KEY.json'
        elif numbered:
            why = f'it has no label in KEY.cls or KEY.json, and {len(numbered)} images have one'
        raise InputError(message(
            f'sample: {paths[number]}:{sample.name}', why,
            'make the shards anew, such as by python -m lightning_app prepare'))
    return [(number, sample._replace(label=folders[sample.name][0]))
            for number, sample in samples if sample.name in folders]


def several(paths: Sequence[str]) -> str:
    """Return what messages call shards."""
    return str(paths[0]) + (f' and {len(paths) - 1} more' if len(paths) > 1 else '')


def samples_in(path: str) -> Iterator[Sample]:
    """Yield the images of a shard, labelled by number if at all; say what has none.

    Raises:
        InputError: If the shard cannot be read, or a label is no number.
    """
    places = places_in(path)
    fields: dict[str, dict[str, str]] = {}  # of a key: kind of file -> name
    for name in places:
        if not PurePosixPath(name).name.startswith('.'):
            folder, _, file = name.rpartition('/')
            key, _, kind = file.partition('.')
            same = fields.setdefault(f'{folder}/{key}', {})
            if kind.lower() in same and (kind.lower() in LABELS or images_among([kind.lower()])):
                raise several_images(path, f'{folder}/{key}', [same[kind.lower()], name])
            same[kind.lower()] = name
    tar = TarFiles([path])
    images = {key: image_of(names) for key, names in fields.items()}
    if without := [key for key, image in images.items() if image is None]:
        tell(f'{path}: {len(without)} samples have no image and are left out: {without[0].lstrip("/")}')
    for key, names in fields.items():
        check_sample(path, key, names)
        if image := images[key]:
            yield Sample(image, places[image], label_of(tar, path, names, places))


def check_sample(path: str, key: str, names: dict[str, str]) -> None:
    """Raise `InputError` if it cannot be told which file is the image, or a label belongs to a longer key."""
    images = images_among(names)
    least = min((kind.count('.') for kind in images), default=0)
    has_label = bool(names.keys() & set(LABELS))
    if len(images) > 1 and not has_label:
        raise several_images(path, key, [names[kind] for kind in images])
    plain = [kind for kind in images if kind.count('.') == least]
    if len(plain) > 1 and not any(kind.rpartition('.')[0] in MAIN and is_photo(kind) for kind in plain):
        raise InputError(message(
            f'sample: {path}:{key.lstrip("/")}', f'which image is meant: {", ".join(names[kind] for kind in plain)}?',
            'leave one in it, or call it KEY.jpg'))
    further = {kind.rpartition('.')[0] for kind in images} - {''}
    if not has_label and (longer := [kind for kind in names for part in further if kind == f'{part}.cls']):
        raise InputError(message(
            f'sample: {path}:{names[longer[0]]}', 'a key ends at the first point, so that this is not its label',
            'name the files without other points, such as by lightning_app prepare'))


def several_images(path: str, key: str, names: Iterable[str]) -> InputError:
    """Return the error for files of a shard of which each should be a sample of its own."""
    return InputError(message(
        f'sample: {path}:{key.lstrip("/")}', f'several images have this key: {", ".join(names)}',
        'a key ends at the first point, and upper case counts for nothing after it: name the files otherwise, such as '
        'by lightning_app prepare'))


def image_of(names: dict[str, str]) -> str | None:
    """Return the image among the files of a sample."""
    kinds = sorted(images_among(names), key=lambda kind: (  # KEY.jpg before KEY.png, and both before KEY.mask.png
        kind.count('.'), kind.rpartition('.')[0] not in MAIN, not is_photo(kind), kind))
    return names[kinds[0]] if kinds else None


def is_photo(kind: str) -> bool:
    """Return whether a kind of files is JPEG: what is beside it, and is not, says something of the image."""
    return kind.endswith(('jpg', 'jpeg'))


def images_among(kinds: Iterable[str]) -> list[str]:
    """Return those of the kinds of files, such as `jpg`, `mask.png` and `cls`, that are images."""
    return [kind for kind in kinds if f'.{kind}'.endswith(EXTENSIONS)]


def label_of(tar: TarFiles, path: str, names: dict[str, str], places: dict[str, Place]) -> int | None:
    """Return the label of a sample, if it has one other than its folder.

    Raises:
        InputError: If it is no number.
    """
    for kind in LABELS:
        if kind in names:
            text = tar.read(0, places[names[kind]]).decode('utf-8', 'replace').strip()
            try:
                value = json.loads(text)
            except ValueError:
                value = int(text) if re.fullmatch('[0-9]+', text) else text  # 007 is no JSON
            if isinstance(value, dict) and 'label' in value:
                value = value['label']
            elif kind == 'json' and type(value) is not int:  # of something else
                continue
            if type(value) is not int or value < 0:
                raise InputError(message(
                    f'sample: {path}:{names[kind]}', f'its label is {value!r}, and no whole number from 0',
                    'write the number of its class; a classes.txt beside the shards may name them, a name a line'))
            return value
    return None


def wordnet_name(names: Iterable[str]) -> str:
    """Return what WordNet calls a class of which these are the files; an empty text where they do not tell."""
    found = {match[0] if (match := WORDNET.match(PurePosixPath(name).name)) else '' for name in names}
    return found.pop() if len(found) == 1 else ''


def named(classes: list[str], file: Path) -> list[str]:
    """Return the names of classes that are numbers, of which a line of `file` begins with that of each.

    Raises:
        InputError: If there are not enough lines.
    """
    lines = [line.split('\t')[0] for line in lines_of(file)]
    if max(map(int, classes)) >= len(lines):
        raise InputError(message(
            f'{file}: {len(lines)} lines', f'there is a class {max(map(int, classes))} in the shards beside it',
            'let it have a name a line, in the order of the numbers, or remove it'))
    names = [lines[int(number)] for number in classes]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(message(
            f'{file}: {twice[0]}', 'two classes have this name, and labels could not be told apart by it',
            f'give each a name of its own, such as {twice[0]} 2'))
    return names


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text, as those who write it count them: other signs that may end one belong to a name."""
    lines = file.read_text('utf-8-sig', 'surrogateescape').split('\n')
    return lines if lines[-1] else lines[:-1]


def missing_shards(names: Sequence[str]) -> list[str]:
    """Return the names of shards that a series lacks: of `a-00.tar`, `a-02.tar` it is `a-01.tar`."""
    matches = [match for name in names if (match := re.fullmatch(r'(.*?)(\d+)(-of-(\d+)\.tar|\D*\.tar)', name))]
    series: dict[tuple[str, str, str | None], list[str]] = {}
    for match in matches:
        series.setdefault((match[1], match[3], match[4]), []).append(match[2])
    missing = []
    for (before, after, total), numbers in series.items():
        present = {int(number) for number in numbers}
        if total:
            first = int(int(total) in present)
            end = first + int(total)
        else:
            first, end = min(*present, 1), max(present) + 1
        if end <= (A_SERIES if total or is_padded(numbers) else 2 * len(present) + 2):
            missing += [f'{before}{number:0{len(numbers[0])}}{after}'
                        for number in range(first, end) if number not in present]
    return missing


def is_padded(numbers: Sequence[str]) -> bool:
    """Return whether numbers are filled up with zeros, as those of a series are, and dates, times or hashes are not."""
    return len(set(map(len, numbers))) == 1 and any(number.startswith('0') and number != '0' for number in numbers)
