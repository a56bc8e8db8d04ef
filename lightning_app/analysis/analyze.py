"""`python -m lightning_app analyze`: what the SE gates of a trained network do, in figures, numbers and words."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from se_timm.errors import InputError, check_installed, check_least, check_writable, message
from se_timm.gates import SEBlock, choose_blocks
from se_timm.pruning import prune_se
from se_timm.tables import write_csv

from ..checkpoints import load_checkpoint
from ..files import writing
from ..network import check_has_settings
from . import gate_figures
from .channels import default_blocks, default_classes, find_classes
from .findings import described, removable, variation
from .gate_media import COLUMNS
from .gate_statistics import BlockGates
from .grad_cam import check_known, draw_grad_cam
from .subject import Subject, Survey, open_subject, survey

__all__ = ['analyze']

WITHIN = 2  # classes of the figure of deviations; the paper's are goldfish and plane


def analyze(
        ckpt_path: str | None = None,
        name: str | None = None,
        network: dict[str, Any] | None = None,
        root: str | None = None,
        split: Literal['val', 'train', 'test'] = 'val',
        blocks: list[str] | None = None,
        classes: list[str | int] | None = None,
        images_per_class: int = 50,
        prune: list[str] | None = None,
        grad_cam: bool = False,
        output: str = 'gates',
        batch_size: int = 64,
        num_workers: int = 0,
        allow_unreadable: bool = False,
) -> list[Path]:
    """Draw and describe what the SE gates of a trained network do over images (Sec. 7.2, Figs. 6 and 7 of the paper).

    Written to `output`: `figure6` (mean gate by class) and `figure7` (mean and deviation within a class) as PNG, SVG
    and CSV, `blocks.csv` (statistics of every block), and `findings.txt`, which is printed too: which blocks are
    class-specific, which are saturated, which could be removed, what that saves, and the accuracy before and after.

    Args:
        ckpt_path: Checkpoint of a training.
        name: In its place a network of timm, with its pretrained weights.
        network: Arguments of `timm.create_model` for it, such as `checkpoint_path: FILE`.
        root: Folder of the images (`DIR/val/CLASS/FILE` or `DIR/val.tar`); those of the training where not given.
        split: Which images of it.
        blocks: Blocks of the figures, such as `SE_5_3`, `layer4.*`; the paper's, or the like, where not given.
        classes: Those of the figures, by name or number; the paper's, or four others. Figure 7 has first and third.
        images_per_class: Images of each class; the paper has 50.
        prune: Blocks to take out but for their mean gates, to see the accuracy without; the steady by default, or `[]`.
        grad_cam: Draw also for an image of each class where in it the network saw the class (needs captum).
        output: Folder to write to.
        batch_size: Images at a time.
        num_workers: Processes that load images.
        allow_unreadable: Leave images that cannot be read out instead of stopping, as `data.allow_unreadable` does.

    Raises:
        InputError: If there is no network with trained weights and SE, or no such image, class or block.

    Returns:
        What was written.
    """
    check_numbers(images_per_class, batch_size, num_workers)
    check_options(ckpt_path, name, network, grad_cam, {'blocks': blocks, 'classes': classes})
    subject = open_subject(
        checkpoint_of(ckpt_path), name, network or {}, root, split, images_per_class, allow_unreadable)
    every, shown, pruned = choose(subject.net, blocks, prune)
    named = [] if classes is None else classes_with_images(subject, classes)
    if grad_cam:
        check_known(subject)
    check_writable('output:', Path(output))
    see = partial(survey, subject, batch_size=batch_size, num_workers=num_workers)
    found = see(every)
    lines = drawn(named, subject.names, found.results[0].counts.tolist())
    removed = removable(found.results) if prune is None else [each for each in found.results if each.block in pruned]
    parts = summary(subject, see, found, removed, images_per_class)
    print('\n\n'.join(parts), end='\n\n')
    return write(Path(output), subject, found.results, shown, lines, parts, every[-1].name if grad_cam else None)


def drawn(named: Sequence[int], names: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Return the labels of the classes that are drawn: those that are named, or some, of which images could be read."""
    return [label for label in named if counts[label]] or default_classes(names, counts)


def write(
        folder: Path, subject: Subject, results: Sequence[BlockGates], shown: Sequence[SEBlock], lines: list[int],
        parts: Sequence[str], seen_at: str | None) -> list[Path]:
    """Write findings and figures, say where, and return it; `seen_at` is the module for Grad-CAM.

    Raises:
        InputError: If that is not possible.
    """
    with writing(f'output: {folder}', 'make room there, or name another folder'):
        written = write_findings(folder, results, parts)  # first what costs the time
        written += draw(folder, subject, [each for each in results if each.block in shown], lines)
        written += draw_seen(folder, subject, seen_at, lines) if seen_at else []
    print(*written, sep='\n')
    return written


def classes_with_images(subject: Subject, given: Sequence[str | int]) -> list[int]:
    """Return the labels of the classes that are named.

    Raises:
        InputError: If there is no such class, or no image of it.
    """
    labels = find_classes(subject.names, subject.titles, given)
    there = set(subject.labels.tolist())
    if without := [subject.short_titles[label] for label in labels if label not in there]:
        raise InputError(message(
            f'classes: {without[0]}', 'there is no image of it', 'name others, or other images by root and split'))
    return labels


def check_numbers(images_per_class: int, batch_size: int, num_workers: int) -> None:
    """Raise `InputError` for numbers that are too small."""
    check_least(1, images_per_class=images_per_class, batch_size=batch_size)
    check_least(0, num_workers=num_workers)


def check_options(
        ckpt_path: str | None, name: str | None, network: dict[str, Any] | None, grad_cam: bool,
        shown: dict[str, Any]) -> None:
    """Raise `InputError` for options that cannot be honoured."""
    if ckpt_path is not None and name is not None:
        raise InputError(message(
            f'ckpt_path: {ckpt_path} with name: {name}', 'each names a network', 'leave one of them out'))
    if ckpt_path is not None and network:
        raise InputError(message(
            f'network: {network} with ckpt_path', 'the network is that of the checkpoint', 'leave one of them out'))
    for what, names in shown.items():
        if names == []:
            raise InputError(message(f'{what}: []', 'nothing would be drawn', 'name one, or leave it out'))
    check_installed('analyze', 'analysis', 'matplotlib', *(['captum'] if grad_cam else []))


def checkpoint_of(ckpt_path: str | None) -> dict[str, Any] | None:
    """Return the checkpoint of a training, None where none is named."""
    if ckpt_path is None:
        return None
    checkpoint = load_checkpoint(ckpt_path)
    check_has_settings(ckpt_path, checkpoint)
    return checkpoint


def choose(
        net: Any, blocks: list[str] | None, prune: list[str] | None,
) -> tuple[list[SEBlock], list[SEBlock], list[SEBlock]]:
    """Return all SE blocks, those of the figures, and those that are to be taken out."""
    try:
        every = choose_blocks(net, '*')
        shown = default_blocks(every) if blocks is None else choose_blocks(net, blocks)
        return every, shown, choose_blocks(net, prune) if prune else []
    except ValueError as error:
        raise InputError(str(error)) from error


def summary(
        subject: Subject, see: Callable[..., Survey], found: Survey, removed: Sequence[BlockGates],
        images_per_class: int) -> list[str]:
    """Return what there is to say: what was looked at, what was found, and what becomes of it without some blocks."""
    said = [heading(subject, found.results[0].counts, images_per_class), described(found.results)]
    return [*said, pruning(subject, see, found, removed)] if removed else said


def heading(subject: Subject, counts: np.ndarray, images_per_class: int) -> str:
    """Return what was looked at, and which classes have fewer images than asked for."""
    text = f'{subject.title}: gates over {counts.sum()} images of {len(subject.names)} classes, {subject.size} px'
    if unreadable := len(subject.labels) - counts.sum():
        text += f'\nimages that could not be read, named in the log and left out: {unreadable}'
    if (fewer := counts < images_per_class).any():
        least = int(counts.argmin())
        text += (f'\nfewer than {images_per_class} images: {fewer.sum()} of {len(counts)} classes, the fewest '
                 f'{subject.short_titles[least]} with {counts[least]}; means of few images are uncertain')
    return text


def pruning(subject: Subject, see: Callable[..., Survey], before: Survey, removed: Sequence[BlockGates]) -> str:
    """Take the blocks out, and return what that saves and what becomes of the accuracy on the same images."""
    means = {result.block.name: torch.from_numpy(result.means).float() for result in removed}
    pruned = prune_se(subject.net, list(means), means, input_size=(3, subject.size, subject.size))
    after = see([], pruned.net)
    titles = ', '.join(f'{result.block.title} ({100 * variation(result):.1f} %)' for result in removed)
    text = (f'taken out, with their mean gates as constants (variation): {titles}\n'
            f'saved: {pruned.parameters:,} parameters, {pruned.multiply_adds / 1e6:.2f} M multiply-adds an image')
    if before.metrics is None or after.metrics is None:
        return f'{text}\naccuracy: not known, the network was trained on other classes'
    top1, top5 = (tuple(each[name] for each in (before.metrics, after.metrics)) for name in ('top1', 'top5'))
    return (f'{text}\naccuracy on these images: top-1 {top1[0]:.2f} % before, {top1[1]:.2f} % after; '
            f'top-5 {top5[0]:.2f} % before, {top5[1]:.2f} % after')


def draw(folder: Path, subject: Subject, shown: Sequence[BlockGates], lines: list[int]) -> list[Path]:
    """Draw the figures and write their numbers; return where."""
    within = lines[::2][:WITHIN] if len(lines) > WITHIN else lines
    titles = subject.short_titles
    images = f'{subject.title}, {shown[0].counts.sum()} images'
    by_class = gate_figures.draw_by_class(shown, lines, titles, f'Mean gates by class: {images}')
    within_class = gate_figures.draw_within_class(
        shown, within, titles, f'Gates within a class, mean and deviation: {images}')
    written = gate_figures.save(by_class, folder / 'figure6') + gate_figures.save(within_class, folder / 'figure7')
    numbers = [folder / 'figure6.csv', folder / 'figure7.csv']
    gate_figures.write_by_class(numbers[0], shown, lines, titles)
    gate_figures.write_within_class(numbers[1], shown, within, titles)
    return [*written, *numbers]


def draw_seen(folder: Path, subject: Subject, layer: str, lines: list[int]) -> list[Path]:
    """Draw where in an image of each class the network sees it; return where that lies."""
    return gate_figures.save(draw_grad_cam(subject, layer, lines), folder / 'grad_cam')


def write_findings(folder: Path, results: Sequence[BlockGates], parts: Sequence[str]) -> list[Path]:
    """Write the statistics of all blocks and the words; return where."""
    folder.mkdir(parents=True, exist_ok=True)
    table, words = folder / 'blocks.csv', folder / 'findings.txt'
    write_csv(table, (('block', 'module', 'channels', 'parameters', *COLUMNS, 'variation'), *(
        (result.block.title, result.block.module, len(result.means), result.block.parameters,
         *(f'{getattr(result, column):.6f}' for column in COLUMNS), f'{variation(result):.6f}') for result in results)))
    words.write_text('\n\n'.join(parts) + '\n')
    return [table, words]
