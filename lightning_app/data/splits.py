"""What lies under a root: folders or tar files, and the splits of each."""
from __future__ import annotations

from pathlib import Path

from se_timm.errors import InputError, message, nearest

from .sources import FolderSource, Source, TarSource, nearby

__all__ = ['has_split', 'open_split']


def open_split(root: str | Path, split: str, key: str = 'data.root') -> Source:
    """Return the images of `root/split/` or `root/split.tar`.

    Args:
        root: Folder that holds the splits.
        split: Name of the split, such as `train`.
        key: What messages call `root`.

    Raises:
        InputError: If there is neither.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(message(
            f'{key}: {root}', 'there is no such folder',
            nearby(root, 'name the folder that holds train/ and val/, or train.tar and val.tar')))
    place = find_split(root, split)
    if place is not None:
        return FolderSource(place) if place.is_dir() else TarSource(place)
    found = sorted(entry.name for entry in root.iterdir())
    close = nearest(split, found)
    raise InputError(message(
        f'{key}: {root}', f'it holds neither {split}/ nor {split}.tar',
        (f'did you mean {" or ".join(close)}? ' if close else '') +
        f'it holds: {", ".join(found[:8]) or "nothing"}; name the splits by data.train_split and data.val_split'))


def has_split(root: str | Path, split: str) -> bool:
    """Return whether there is such a split."""
    return find_split(Path(root), split) is not None


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder or file of a split; None if there is none."""
    return next((root / name for name in (split, f'{split}.tar') if (root / name).exists()), None)
