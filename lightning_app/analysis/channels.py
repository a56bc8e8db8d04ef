"""Which channels, classes and blocks figures of the gates show, the paper's or others, and what classes are called."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo

from se_timm.errors import InputError, unknown
from se_timm.gates import SEBlock

__all__ = [
    'PAPER_BLOCKS', 'PAPER_CLASSES', 'class_titles', 'default_blocks', 'default_classes', 'find_classes', 'sampled',
    'short_titles', 'titles_of',
]

PAPER_BLOCKS = ('SE_2_3', 'SE_3_4', 'SE_4_6', 'SE_5_1', 'SE_5_2', 'SE_5_3')
# WordNet ids of goldfish, pug, plane and cliff. "Plane" is the carpenter's tool: Fig. 8 shows it
PAPER_CLASSES = ('n01443537', 'n02110958', 'n03954731', 'n09246464')
CHANNELS = 50
FEW = 4  # classes of a figure


def sampled(channels: int) -> range:
    """Return the channels that Figs. 6 and 7 show: every ceil(C / 50)th, which their points are spaced by."""
    return range(0, channels, -(-channels // CHANNELS))


def default_blocks(blocks: Sequence[SEBlock]) -> list[SEBlock]:
    """Return the last block of each stage, and all of the last stage: those of the paper for an SE-ResNet-50.

    A stage is what the names have in common up to their last number. At most the six last.
    """
    stages: dict[str, list[SEBlock]] = {}
    for block in blocks:
        stages.setdefault(stage_of(block.name), []).append(block)
    chosen = [each[-1] for each in stages.values()]
    last = list(stages.values())[-1]
    return [*chosen[:-1], *last][-len(PAPER_BLOCKS):]


def stage_of(name: str) -> str:
    """Return the part of a block's name before its last number."""
    parts = name.split('.')
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return '.'.join(parts[:numbers[-1]]) if numbers else ''


def default_classes(names: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Return the labels of the paper's four classes if they have images, else of four spread over those that have."""
    there = [label for label, count in enumerate(counts) if count]
    paper = [label for name in PAPER_CLASSES for label in there if names[label] == name]
    if len(paper) == len(PAPER_CLASSES):
        return paper
    few = min(FEW, len(there))
    return [there[index * (len(there) - 1) // max(few - 1, 1)] for index in range(few)]


def class_titles(model: Any) -> list[str]:
    """Return a title for each class of an `ImageClassifier`, see `titles_of`."""
    names = model.class_names or model.net.pretrained_cfg.get('label_names')  # as in the folder of an export
    return titles_of(names if names and len(names) == model.net.num_classes else None, model.net.num_classes)


def titles_of(names: list[str] | None, count: int) -> list[str]:
    """Return a title for each of `count` classes: their names, ImageNet's in words, or numbers."""
    imagenet = ImageNetInfo()
    if names is None and count == len(imagenet.label_names()):
        names = imagenet.label_names()
    if names is None:
        return [str(label) for label in range(count)]
    words = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name, detailed=False) if name in words else name for name in names]


def short_titles(names: Sequence[str], titles: Sequence[str]) -> list[str]:
    """Return what figures call the classes: of ImageNet's words the first, `goldfish` of `goldfish, Carassius auratus`.

    With its name where another class has the same word, as the cranes have, and as text where the name is none.
    """
    words = [title if title == name else title.split(', ')[0] for name, title in zip(names, titles, strict=True)]
    times = Counter(words)
    return [as_text(word if times[word] == 1 else f'{word} ({name})') for name, word in zip(names, words, strict=True)]


def as_text(name: str) -> str:
    """Return the name of a folder with signs for bytes that are no text, which neither files nor figures take."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def find_classes(names: Sequence[str], titles: Sequence[str], given: Sequence[str | int]) -> list[int]:
    """Return the labels of classes that are given by name, by title or a part of it (`goldfish`), or as numbers.

    Raises:
        InputError: For one that is not there, with the nearest.
    """
    labels: dict[str, int] = {}
    parts = [(label, part) for label, title in enumerate(titles) for part in title.split(', ')]
    numbers = [(label, str(label)) for label in range(len(names))]
    every = (*enumerate(names), *enumerate(titles), *parts, *numbers)
    for write in (str, str.lower):  # first as they are written
        for label, name in every:
            labels.setdefault(write(name), label)
    found = []
    for given_name in map(str, given):
        key = given_name if given_name in labels else given_name.lower()
        if key not in labels:
            raise InputError(unknown('class', given_name, dict.fromkeys([*short_titles(names, titles), *names])))
        found.append(labels[key])
    return list(dict.fromkeys(found))
