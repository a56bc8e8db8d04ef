"""The paper's figures of the gates, as pictures with their numbers."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from se_timm.tables import write_csv

from .channels import sampled
from .drawing import COLOURS, literal, write_figure
from .gate_statistics import BlockGates

__all__ = ['draw_by_class', 'draw_within_class', 'save', 'write_by_class', 'write_within_class']

COLUMNS = 3
STYLES = ('-', '--', ':')  # of as many classes as there are colours each


def draw_by_class(results: Sequence[BlockGates], classes: Sequence[int], titles: Sequence[str], heading: str) -> Any:
    """Return a figure like Fig. 6 of the paper: the mean gate of channels, a line for each class and one for all."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    labels = [*(literal(titles[label]) for label in classes), 'all']
    in_a_row = max(1, min(6, len(labels), int(60 * columns / (6 + max(map(len, labels))))))  # 60 signs beneath a panel
    height = 2.9 * rows + 0.3 + 0.22 * -(-len(labels) // in_a_row)
    figure = Figure(figsize=(4.6 * columns, height), layout='constrained')
    for axes, result in zip(figure.subplots(rows, columns, squeeze=False).flat, results, strict=False):
        channels = sampled(len(result.means))
        for position, label in enumerate(classes):
            axes.plot(channels, result.class_means[label, channels], lw=1, marker='.', ms=3,
                      color=COLOURS[position % len(COLOURS)], ls=STYLES[position // len(COLOURS) % len(STYLES)])
        axes.plot(channels, result.means[channels], lw=1.4, color='black')
        finish(axes, result)
    for axes in figure.axes[len(results):]:
        axes.remove()
    # not by the labels of the lines, among which matplotlib leaves out those that begin with _
    figure.legend(figure.axes[0].lines, labels, loc='outside lower center', ncols=in_a_row, frameon=False)
    figure.suptitle(heading, wrap=True)
    return figure


def draw_within_class(
        results: Sequence[BlockGates], classes: Sequence[int], titles: Sequence[str], heading: str) -> Any:
    """Return a figure like Fig. 7: mean and standard deviation over the images of a class, a row for each class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.2 * len(results), 5), 2.6 * len(classes) + 0.6), layout='constrained')
    panels = figure.subplots(len(classes), len(results), squeeze=False, sharey='col')
    for position, label in enumerate(classes):
        for axes, result in zip(panels[position], results, strict=True):
            channels = list(sampled(len(result.means)))
            mean, std = result.class_means[label, channels], stds_of(result)[label, channels]
            colour = COLOURS[position % len(COLOURS)]
            axes.fill_between(channels, mean - std, mean + std, color=colour, alpha=0.3, lw=0)
            axes.plot(channels, mean, lw=1, color=colour)
            finish(axes, result)
            axes.set_title(literal(f'{result.block.title}: {titles[label]}'), fontsize=10)
    figure.suptitle(heading, wrap=True)
    return figure


def stds_of(result: BlockGates) -> np.ndarray:
    """Return the deviations within the classes, which must have been kept."""
    assert result.class_stds is not None
    return result.class_stds


def finish(axes: Any, result: BlockGates) -> None:
    """Set what all panels share."""
    block = result.block
    axes.set_title(block.title, fontsize=10)
    axes.set_xlabel('channel', fontsize=9)
    axes.set_ylabel('gate', fontsize=9)
    values = [value for line in axes.lines for value in line.get_ydata()]
    low, high = block.low, block.high
    if np.nanmin(values) < low or np.nanmax(values) > high:  # the gates have no bounds
        low, high = min(low, axes.dataLim.y0), max(high, axes.dataLim.y1)
    margin = 0.03 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(-0.01 * len(result.means), 1.01 * len(result.means))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[['top', 'right']].set_visible(False)


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, and return where."""
    paths = [path.with_suffix(suffix) for suffix in ('.png', '.svg')]
    write_figure(figure, paths)
    return paths


def write_by_class(path: Path, results: Sequence[BlockGates], classes: Sequence[int], titles: Sequence[str]) -> None:
    """Write the numbers of `draw_by_class`: block, channel, class, mean; the class of all images is `all`."""
    write_csv(path, (('block', 'channel', 'class', 'mean'), *(
        (result.block.title, channel, title, f'{value:.6f}')
        for result in results for channel in sampled(len(result.means))
        for title, value in (*((titles[label], result.class_means[label, channel]) for label in classes),
                             ('all', result.means[channel])))))


def write_within_class(
        path: Path, results: Sequence[BlockGates], classes: Sequence[int], titles: Sequence[str]) -> None:
    """Write the numbers of `draw_within_class`: block, channel, class, mean, std."""
    write_csv(path, (('block', 'channel', 'class', 'mean', 'std'), *(
        (result.block.title, channel, titles[label], f'{result.class_means[label, channel]:.6f}',
         f'{stds_of(result)[label, channel]:.6f}')
        for result in results for label in classes for channel in sampled(len(result.means)))))
