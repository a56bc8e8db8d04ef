"""What lies under a root: folders, tar files, shards or data sets of other libraries, and the splits of each."""
from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from se_timm.errors import InputError, meant, message, nearby, nearest

from ..files import is_url
from .hugging_face import HuggingFaceSource, hub_splits, names_of, open_hub, open_saved
from .object_store import local_copy, names_at
from .optimised import LitDataSource, chunks_of
from .shards import CLASSES, ShardSource, is_shard, missing_shards
from .sources import FolderSource, Source, TarSource, is_hidden
from .tars import places_in

__all__ = ['RANGE', 'RECORD', 'has_split', 'located', 'open_split', 'read_record']

HUB = 'hf://'
SAVED = 'dataset_dict.json'  # in a folder that save_to_disk of Hugging Face's datasets wrote, with splits
RECORD = 'prepared.json'  # beside shards that `prepare` makes: what they follow from, and how many there shall be
SPLIT_NAMES = {'train', 'test', *names_of('val')}
NUMBER = re.compile('[0-9a-f]*[0-9][0-9a-f]*|[0-9a-f]{6,}|of')  # or a hash, in names of shards
RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')


def open_split(root: str | Path, split: str, key: str = 'data.root', label_column: str | None = None) -> Source:
    """Return the images of a split, in whatever form they are there.

    Args:
        root: Folder that holds the splits; its URL in an object store, from where the split is copied into a cache; or
            `hf://NAME`, a data set of Hugging Face's hub.
        split: Name of a folder, tar file or split, such as `train`, or of shards, such as `train-{0000..0146}.tar`;
            further below, `sub/train`.
        key: What messages call `root`.
        label_column: Column with the class, of a data set of Hugging Face that has several.

    Raises:
        InputError: If there is no such split, or not all of it.
    """
    if str(root).startswith(HUB):
        return open_hub(str(root).removeprefix(HUB), split, label_column)
    with readable(root, key):
        source = open_there(root, split, key, label_column)
    if label_column and not isinstance(source, HuggingFaceSource):
        raise InputError(message(
            f'label_column: {label_column}', f'{root} is no data set of Hugging Face, and has no columns',
            'leave it out, or say label_column=null where a checkpoint has it'))
    return source


def open_there(root: str | Path, split: str, key: str, label_column: str | None) -> Source:
    """Return the images of a split in a folder or an object store; as `open_split`."""
    root, split = located(root, split)
    names = names_in(root, key)
    entries = entries_of(names, split)
    if not entries:
        close = nearest(split, names)
        raise InputError(message(
            f'{key}: {root}', f'it holds neither {split}/ nor {split}.tar, nor shards {split}-*.tar',
            meant(close)
            + f'it holds: {", ".join(names[:8]) or "nothing"}; name the splits by data.train_split and data.val_split'))
    if is_url(root):
        root = local_copy(root, names if entries == [SAVED] else [*entries, CLASSES, RECORD], key)
    if entries == [SAVED]:
        return open_saved(Path(root), split, label_column)
    if any(entries[0] in places_of(each) for each in names_of(split)):
        return open_place(Path(root, entries[0]), split, label_column)
    return open_shards(Path(root), split, [Path(root, name) for name in entries])


def has_split(root: str | Path, split: str) -> bool:
    """Return whether there is such a split, or something of its name."""
    if str(root).startswith(HUB):
        return any(name in hub_splits(str(root).removeprefix(HUB)) for name in names_of(split))
    root, split = located(root, split)
    with readable(root, 'data.root'):
        if not is_url(root) and not Path(root).is_dir():
            return False
        names = names_in(root)
    entries = entries_of(names, split)
    if entries == [SAVED]:  # beside which each split has a folder
        return any(name in names for name in names_of(split))
    return bool(entries)


@contextmanager
def readable(root: str | Path, key: str) -> Iterator[None]:
    """Raise `InputError` for what the system has against the reading of a root, or of something in it."""
    try:
        yield
    except OSError as error:
        raise InputError(message(
            f'{key}: {error.filename or root}', f'it cannot be read ({error.strerror or error})',
            'see that it is there, on a disk that is mounted, and that you may read it')) from error


def located(root: str | Path, split: str) -> tuple[str, str]:
    """Return the folder that a split such as `sub/train` lies in, and what it is called there."""
    below, _, name = split.rstrip('/').rpartition('/')
    return os.path.join(root, below) if below else str(root), name


def names_in(root: str | Path, key: str = 'data.root') -> list[str]:
    """Return the sorted names of what is in a root.

    Raises:
        InputError: If there is no such root.
    """
    if is_url(root):
        return names_at(str(root), key)
    root = Path(root)
    if not root.is_dir():
        raise InputError(message(
            f'{key}: {root}', 'there is no such folder',
            nearby(root, 'name the folder that holds train/ and val/, or train.tar and val.tar')))
    return sorted(entry.name for entry in root.iterdir())


def entries_of(names: list[str], split: str) -> list[str]:
    """Return which of the `names` in a root are a split: a folder, a tar file, or shards.

    Or `SAVED`, where the root is a data set of Hugging Face with its splits.
    """
    for name in (*places_of(split), SAVED):
        if name in names:
            return [name]
    if RANGE.search(split):
        return expanded(split)
    if glob.has_magic(split):
        return [name for name in fnmatch.filter(names, split) if not is_hidden(name)]
    for each in names_of(split):
        if found := [name for name in places_of(each) if name in names][:1] or shards_of(names, each):
            return found
    return []


def shards_of(names: list[str], split: str) -> list[str]:
    """Return which of the `names` are shards of a split, `[PREFIX-]SPLIT-REST.tar`.

    Those whose rest is of numbers alone, or all where none is; where some are not, that is said.

    Raises:
        InputError: If they have several prefixes, as those of `v1-val` and of `v2-val` have.
    """
    found: dict[str, list[tuple[str, bool]]] = {}
    for name in names:
        match = re.fullmatch(rf'(.*[-_.])?{re.escape(split)}[-_.](.+)\.tar', name)
        words = {word for word in re.split('[-_.]', match[2]) if not NUMBER.fullmatch(word)} if match else set()
        if match and not is_hidden(name) and not words & SPLIT_NAMES:
            found.setdefault(match[1] or '', []).append((name, not words))
    if '' not in found and len(found) > 1:
        first, second, *_ = found
        raise InputError(message(
            f'shards: {split}', f'those of {first}{split} and of {second}{split} lie here',
            f'name those that are meant, such as {first}{split}, by data.train_split and data.val_split'))
    series = found.get('', next(iter(found.values()), []))
    chosen = [name for name, is_number in series if is_number] or [name for name, _ in series]
    if len(chosen) < len(series):
        other = next(name for name, _ in series if name not in chosen)
        rank_zero_warn(f'shards: {split}: {len(chosen)} are taken that are numbered alone, such as {chosen[0]}, and '
                       f'{len(series) - len(chosen)} others are not, such as {other}; {split}-*.tar names all')
    return chosen


def places_of(split: str) -> list[str]:
    """Return which names mean that all of a split is there."""
    return [split, f'{split}.tar']


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern with a range `{0000..0146}` stands for."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [name for number in numbers
            for name in expanded(f'{pattern[:match.start()]}{number:0{len(match[1])}}{pattern[match.end():]}')]


def open_place(place: Path, split: str, label_column: str | None) -> Source:
    """Return the images in a folder or a file."""
    if place.is_file():
        places = places_in(place)
        return ShardSource([place]) if is_shard(places) else TarSource(place, places)
    if (place / SAVED).is_file() or (place / 'state.json').is_file():
        return open_saved(place, split, label_column)
    names = next((folder / CLASSES for folder in (place, place.parent) if (folder / CLASSES).is_file()), None)
    if chunks_of(place):
        return LitDataSource(place, names)
    with os.scandir(place) as entries:  # class folders, beside which an archive may have been left
        folders = any(entry.is_dir() and not is_hidden(entry.name) for entry in entries)
    shards = [] if folders else sorted(path for path in place.glob('*.tar') if not is_hidden(path.name))
    return open_shards(place, split, shards, names) if shards else FolderSource(place)


def open_shards(folder: Path, split: str, shards: list[Path], names: Path | None = None) -> ShardSource:
    """Return the images in shards; say which a series lacks, but for those that are named one by one.

    Raises:
        InputError: If a shard that was named is not there, or `prepare` has not written all of them yet.
    """
    absent = [path for path in shards if not path.is_file()]
    if absent:
        raise InputError(message(
            f'shards: {split} in {folder}', f'{len(absent)} of {len(shards)} are missing: {absent[0].name}',
            nearby(absent[0], 'copy the missing ones there, or name fewer')))
    if not RANGE.search(split):
        check_prepared(folder, shards)
        if missing := missing_shards([path.name for path in shards]):
            rank_zero_warn(f'{folder}: {len(missing)} shards are missing by their numbers, and with them their images: '
                           f'{", ".join(missing[:3])}')
    return ShardSource(shards, names)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `prepare` wrote down beside its shards; nothing where it made none.

    Raises:
        InputError: If it cannot be read.
    """
    file = folder / RECORD
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (OSError, TypeError, ValueError) as error:
        raise InputError(message(
            f'shards: {file}', f'it cannot be read ({error})',
            'copy it again, or remove it and the shards, and prepare them anew')) from error


def check_prepared(folder: Path, shards: list[Path]) -> None:
    """Raise `InputError` if `prepare` has begun to write more shards into `folder` than there are."""
    splits = read_record(folder).get('splits', {})
    for split, there in Counter(path.name.rpartition('-')[0] for path in shards).items():
        count = splits.get(split, {}).get('shards', 0)
        if there < count:
            raise InputError(message(
                f'shards: {split} in {folder}', f'{there} of the {count} shards are there that prepare began to write',
                f'give the same prepare again, which goes on, or copy all; or name some, {split}-{{0000..0001}}.tar'))
