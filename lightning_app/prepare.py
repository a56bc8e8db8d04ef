"""Images into WebDataset shards: large files that any storage reads fast, with the short side limited if wanted."""
from __future__ import annotations

import glob
import io
import itertools
import json
import multiprocessing
import re
import secrets
import signal
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from filelock import Timeout
from PIL import Image
from tqdm import tqdm

from se_timm.errors import InputError, message

from .data.decode import UnreadableImage, decode, encode
from .data.imagenet import relabel, take_names
from .data.locking import locked
from .data.shards import CLASSES, lines_of, samples_in
from .data.sources import Source, first_files
from .data.splits import RANGE, RECORD, has_split, located, open_split, read_record
from .data.tars import TarFiles
from .data.workers import cores, deaf, handled, heed_the_parent, start_method
from .files import is_url, replaced

__all__ = ['Settings', 'prepare']

SECONDS_DEAF = 0.2  # at most, until Ctrl-C is heard where shards are waited for
# of the files of Pillow's formats that are kept as they are
ENDINGS = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png', 'WEBP': 'webp', 'TIFF': 'tif', 'BMP': 'bmp', 'PPM': 'ppm'}


@dataclass(frozen=True)
class Settings:
    """What the shards follow from; a folder of shards holds those of one.

    Attributes:
        short_side: Larger images are scaled down to this shorter side, in pixels; none where None.
        quality: Of JPEG files of those, up to 100.
        images_per_shard: In each shard but the last.
        seed: Of the order.
    """

    short_side: int | None
    quality: int
    images_per_shard: int
    seed: int


def prepare(
        root: str, output: str, splits: Sequence[str] = ('train', 'val'), short_side: int | None = None,
        quality: int = 90, images_per_shard: int = 1000, seed: int = 0, workers: int | None = None,
        label_column: str | None = None) -> dict[str, int]:
    """Write the images of class folders, or of any other form that is read, into WebDataset shards.

    Each shard is read again before it gets its name, so that a shard that is there is whole: the same command goes on
    where it was interrupted. Images that cannot be read are left out, named and counted. Files are kept as they are, to
    the byte, but for images whose short side is limited. Points in names become `_`, at which keys would end: if that
    changes the order of the names, trainings have their images in another order than in folders.

    Args:
        root: Folder that holds the splits, or `hf://NAME`.
        output: Folder for the shards, `SPLIT-0000.tar` and so on, and `classes.txt`.
        splits: The splits.
        short_side: Scale larger images down to this shorter side, in pixels: 256 is enough for training at 224 px, and
            about a quarter of ImageNet's size.
        quality: Of the JPEG files of those.
        images_per_shard: Images in a shard.
        seed: Of the order of the images, which is random, as some readers want classes mixed.
        workers: Processes; one a core where not given.
        label_column: Column with the class, of a data set of Hugging Face that has several.

    Returns:
        How many images each split has in its shards.

    Raises:
        InputError: For numbers, names and splits that cannot be, and if the output holds shards of other settings.
        SystemExit: With status 130 at Ctrl-C, 143 at SIGTERM; shards that are done stay.
    """
    settings = Settings(short_side, quality, images_per_shard, seed)
    check(settings, workers)
    check_places(root, output, splits)
    opened = partial(open_split, root, key='root', label_column=label_column)
    sources = {split: opened(split) for split in splits}
    name_alike(sources, root, opened)
    folder = Path(output)
    counts = {}
    try:
        with handled(interrupt, 'SIGTERM'), locked(folder / RECORD, timeout=0):  # two would write the same files
            begin(folder, settings, sources)
            for split, source in sources.items():
                skipped = write_split(folder, split, source, settings, workers or cores())
                counts[split] = len(source.labels) - len(skipped)
                report(folder, split, counts[split], skipped)
    except KeyboardInterrupt as stop:
        print(f'interrupted; the same command goes on in {folder}', file=sys.stderr)
        sys.exit(128 + (stop.args or [signal.SIGINT])[0])
    except Timeout as error:
        raise InputError(message(
            f'output: {folder}', 'another prepare is writing there', 'wait for it, or name another folder')) from error
    except OSError as error:
        raise InputError(message(
            f'output: {folder}', f'it cannot be written ({error})',
            'make room there, or name another folder; the same command goes on where it was')) from error
    return counts


def interrupt(number: int, frame: Any) -> None:
    """Raise `KeyboardInterrupt` with the number of a signal: SIGTERM, by which schedulers stop a job."""
    raise KeyboardInterrupt(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Hear Ctrl-C and SIGTERM at the end of this alone.

    What they raise within a pool could leave a lock taken that its threads wait for.
    """
    heard: list[int] = []
    try:
        with handled(lambda number, _: heard.append(number), 'SIGINT', 'SIGTERM'):
            yield
    finally:
        if heard:
            signal.raise_signal(heard[0])


def name_alike(sources: dict[str, Source], root: str, opened: Callable[[str], Source]) -> None:
    """Give classes that are numbers the names that another split, or the training images, have: see `take_names`."""
    numbered = [source for source in sources.values() if source.numbers]
    named = next((source for source in numbered if source.classes != source.numbers), None)
    if numbered and named is None and 'train' not in sources and has_split(root, 'train'):
        named = opened('train')
    if named is not None:
        for source in numbered:
            take_names(source, named)


def check(settings: Settings, workers: int | None) -> None:
    """Raise `InputError` for numbers that mean nothing."""
    given = {**asdict(settings), 'workers': workers}
    for name, least, most in (
            ('short_side', 1, None), ('quality', 1, 100), ('images_per_shard', 1, None), ('seed', 0, None),
            ('workers', 1, None)):
        value = given[name]
        if value is not None and (value < least or (most is not None and value > most)):
            raise InputError(message(
                f'{name}: {value}', f'it must be at least {least}' + (f' and at most {most}' if most else ''),
                'correct it, or leave it out'))


def check_places(root: str, output: str, splits: Sequence[str]) -> None:
    """Raise `InputError` if shards cannot be written there, or not be called as the splits."""
    if is_url(output):
        raise InputError(message(
            f'output: {output}', 'shards are written to a folder of this machine',
            'name a folder, and copy it to the store when all is done'))
    if not splits:
        raise InputError(message('splits: []', 'there is nothing to write', 'name some, such as [train,val]'))
    for split in splits:
        folder, name = located(root, split)
        if name != split:
            raise InputError(message(
                f'splits: {split}', 'shards are called as the split, which is no path then',
                f'say --root {folder} --splits [{name}]'))
        if RANGE.search(split) or glob.has_magic(split):
            raise InputError(message(
                f'splits: {split}', 'shards are called as the split, which is no pattern then',
                'name the split itself, such as train; a folder with links to some shards only is a root, too'))


def begin(folder: Path, settings: Settings, sources: dict[str, Source]) -> None:
    """Write down what the shards in `folder` follow from, and number the classes of all splits as there.

    Raises:
        InputError: If there are such that follow from something else, or a split has a class that the first has not.
    """
    names = folder / CLASSES
    before = read_record(folder)
    there = sorted(path.name for split in sources for path in folder.glob(f'{split}-*.tar'))
    if there and not before:
        raise InputError(message(
            f'output: {folder}', f'it holds {there[0]}, which was not made by prepare', 'name another folder'))
    for name, value in asdict(settings).items():
        if before.get(name, value) != value:
            raise InputError(message(
                f'output: {folder}', f'its shards were made with {name} {before[name]}, now it is {value}',
                'give the same to go on with them, or name another folder'))
    splits = before.get('splits', {})
    for split, source in sources.items():
        now = {'images': len(source.labels), 'shards': len(shard_paths(folder, split, source, settings)),
               'digest': digest(source)}
        if (then := splits.get(split, now)) != now:
            raise InputError(message(
                f'output: {folder}', f'its shards were made of other images of {split}, {then["images"]} in number, '
                f'not of these {now["images"]}', 'give the same root to go on with them, or name another folder'))
        splits[split] = now  # also how part of a split is told from all of it
    classes = next(iter(sources.values())).classes
    if names.is_file():
        classes = lines_of(names)
        known = set(classes)
        if new := [name for source in sources.values() for name in source.classes if name not in known]:
            raise InputError(message(
                f'class: {new[0]}', f'{names} has none of this name: an earlier prepare made it of other splits',
                'begin in another folder, with all splits, or first with the one that has all classes'))
    if unfit := [name for name in classes if re.search('[\t\r\n]', name)]:
        raise InputError(message(
            f'class: {unfit[0]!r}', f'{CLASSES} has a name a line, up to a tab', 'call its folder otherwise'))
    for split, source in sources.items():
        relabel(source, classes, split)
    for unfinished in (each for split in sources for each in folder.glob(f'{split}-*.partial')):
        unfinished.unlink(missing_ok=True)
    names.write_text(''.join(f'{name}\n' for name in classes), 'utf-8', 'surrogateescape')
    with replaced(folder / RECORD) as unfinished:
        unfinished.write_text(json.dumps({**before, **asdict(settings), 'splits': splits}))


def digest(source: Source) -> int:
    """Return a number that tells the images of a source from others, wherever they lie.

    It follows from their names and classes, and from a few files, as those of other sets may be called the same.
    """
    names = '\n'.join(getattr(source, 'paths', ())).encode('utf-8', 'surrogateescape')
    labels = np.asarray(source.labels, dtype=np.int64).tobytes()
    return reduce(lambda crc, content: zlib.crc32(content, crc), (names, labels, *first_files(source)), 0)


# A split


def shard_paths(folder: Path, split: str, source: Source, settings: Settings) -> list[Path]:
    """Return the paths of all shards of a split."""
    count = -(-len(source.labels) // settings.images_per_shard)
    digits = max(4, len(str(count - 1)))
    return [folder / f'{split}-{number:0{digits}}.tar' for number in range(count)]


def write_split(
        folder: Path, split: str, source: Source, settings: Settings, workers: int) -> list[tuple[str, str]]:
    """Write the shards of a split that are not there; return name and reason of each image that was left out."""
    order = np.random.default_rng(settings.seed).permutation(len(source.labels))
    shards = [order[start:start + settings.images_per_shard]
              for start in range(0, len(order), settings.images_per_shard)]
    paths = shard_paths(folder, split, source, settings)
    todo = {path: shard for path, shard in zip(paths, shards, strict=True) if not path.is_file()}
    with tqdm(total=len(order), initial=len(order) - sum(len(shard) for shard in todo.values()), desc=split,
              unit=' images', disable=None) as bar:
        for path in write_shards(todo, source, settings, workers):
            bar.update(todo[path].size)
    return [(name, reason) for path in paths for name, reason in skipped_beside(path)]


def write_shards(
        todo: dict[Path, Any], source: Source, settings: Settings, workers: int) -> Iterator[Path]:
    """Write shards, each in a process; yield each path as it is done."""
    if workers == 1 or len(todo) <= 1:
        for path, shard in todo.items():
            write_shard(path, shard, source, settings)
            yield path
        return
    context = multiprocessing.get_context(start_method(1))
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _keep, (source, settings))
    remaining = iter(todo.items())
    pending: dict[Future[None], Path] = {}
    try:
        while True:
            with deferred(), deaf():  # the workers: signals to all processes are for the one that has all shards
                for path, shard in itertools.islice(remaining, 2 * workers - len(pending)):  # so that none waits
                    pending[pool.submit(_write, path, shard)] = path
            if not pending:
                break
            with deferred():
                done, _ = wait(pending, SECONDS_DEAF, FIRST_COMPLETED)
            for future in done:
                future.result()
                yield pending.pop(future)
    finally:
        with deferred():
            pool.shutdown(cancel_futures=True)


_kept: list[Any] = []


def _keep(*shared: Any) -> None:
    """Keep what all shards of a process need."""
    _kept[:] = shared
    heed_the_parent()


def _write(path: Path, shard: Any) -> None:
    write_shard(path, shard, *_kept)


# A shard


def write_shard(path: Path, indices: Any, source: Source, settings: Settings) -> None:
    """Write some images of a source to a shard, read them again, and only then give it its name."""
    unfinished = path.with_suffix(f'.tar.{secrets.token_hex(4)}.partial')  # one that was killed may still be writing
    written: dict[str, int] = {}
    keys: set[str] = set()
    skipped = []
    with tarfile.open(unfinished, 'w') as tar:
        for index in indices.tolist():
            try:
                content, ending = image_file(source.read(index), settings)
            except (UnreadableImage, OSError) as error:
                skipped.append((source.name(index), str(error)))
                continue
            key = unique(key_of(source, index), keys)
            written[f'{key}.{ending}'] = zlib.crc32(content)
            add(tar, f'{key}.{ending}', content)
            add(tar, f'{key}.cls', str(int(source.labels[index])).encode())
    verify(unfinished, written)
    record = skipped_file(path)
    if skipped:
        record.write_text(json.dumps(skipped))
    else:
        record.unlink(missing_ok=True)
    unfinished.replace(path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar file, the same bytes at any time and by any user."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def image_file(content: bytes | Image.Image, settings: Settings) -> tuple[bytes, str]:
    """Return the file of an image for a shard, and its ending.

    Raises:
        UnreadableImage: If it is no image, or only part of one.
    """
    image = decode(content) if isinstance(content, bytes) else content
    if settings.short_side is not None and min(image.size) > settings.short_side:
        return encode(scaled_down(image, settings.short_side), 'JPEG', quality=settings.quality), 'jpg'
    if isinstance(content, bytes) and (ending := ENDINGS.get(Image.open(io.BytesIO(content)).format or '')):
        return content, ending
    return encode(image, 'PNG'), 'png'


def scaled_down(image: Image.Image, short_side: int) -> Image.Image:
    """Return a larger image with this shorter side, in pixels."""
    scale = short_side / min(image.size)
    width, height = (max(round(side * scale), short_side) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def key_of(source: Source, index: int) -> str:
    """Return the key of an image: its class, and the name of its file without points, at which a key would end."""
    stem = PurePosixPath(source.name(index).rpartition(':')[2]).stem
    return f'{source.classes[source.labels[index]]}/{stem.replace(".", "_")}'


def unique(key: str, keys: set[str]) -> str:
    """Return a key that is not among `keys`, and add it."""
    candidates = itertools.chain([key], (f'{key}-{number}' for number in itertools.count(1)))
    chosen = next(each for each in candidates if each not in keys)
    keys.add(chosen)
    return chosen


def verify(path: Path, written: dict[str, int]) -> None:
    """Raise `OSError` unless a shard holds the images that were written to it."""
    tar = TarFiles([str(path)])
    found = {sample.name: zlib.crc32(tar.read(0, sample.place)) for sample in samples_in(str(path))}
    if found != written:
        raise OSError(f'{path}: {len(written)} images were written, and other ones were read again; '
                      'see that the disk is sound and not full')


# What was left out


def skipped_file(path: Path) -> Path:
    """Return where the images that a shard lacks are named."""
    return path.with_suffix('.skipped.json')


def skipped_beside(path: Path) -> list[tuple[str, str]]:
    """Return name and reason of the images that a shard lacks."""
    file = skipped_file(path)
    return [(name, reason) for name, reason in json.loads(file.read_text())] if file.is_file() else []


def report(folder: Path, split: str, count: int, skipped: list[tuple[str, str]]) -> None:
    """Say what was written, and what was left out."""
    print(f'{split}: {count} images in {folder}/{split}-*.tar')
    if skipped:
        print(f'{split}: {len(skipped)} images cannot be read and were left out:', file=sys.stderr)
        for name, reason in skipped[:10]:
            print(f'  {name}: {reason}', file=sys.stderr)
        if len(skipped) > 10:
            print(f'  and {len(skipped) - 10} more: {folder}/{split}-*.skipped.json', file=sys.stderr)
