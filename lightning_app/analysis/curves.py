"""The curves of runs beside each other."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from se_timm.errors import InputError, check_installed, message

from ..metrics import smaller_is_better
from .drawing import COLOURS, literal
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw', 'figure_files']

SUFFIXES = ('.png', '.svg')
LOSS = 'train/loss'
LINES = (*COLOURS, '#000000')
GREY = '#B8B8B8'
IN_COLOUR = 10  # with more runs, only the best has a colour
FEW = 3  # runs behind whose running means the values are drawn
POINTS = 40  # values of a curve that are drawn as points; of more over steps, a running mean is drawn
SIGNS = 65  # of the legend, beside each other in the width of a panel
BEGINNING = 0.15  # part of a longer curve that may lie outside
UNITS = {'top1': ' (%)', 'top5': ' (%)', 'error': ' (%)'}


Curve = Sequence[tuple[float, float]]  # places and values


class Style(NamedTuple):
    """How the curves of a run look, and what the legend says of them; nothing where it is None."""

    colour: str
    line: Literal['-', '--']
    label: str | None
    front: bool


def draw(runs: Sequence[Run], metric: str, labels: Sequence[str]) -> Figure:
    """Draw the metric of the runs over epochs or steps, and the loss of the training over steps.

    Args:
        runs: The best first.
        metric: The metric.
        labels: What the legend calls the runs.
    """
    from matplotlib.figure import Figure

    styles = styles_of(runs, metric, labels)
    panels = [metric, *([LOSS] if metric != LOSS and any(run.values(LOSS) for run in runs) else [])]
    shown = [style for style in styles if style.label is not None]
    width = SIGNS * len(panels)
    shown = [style._replace(label=shortened(str(style.label), width - 8)) for style in shown]
    columns = max(1, width // (8 + max(len(str(style.label)) for style in shown)))
    figure = Figure(figsize=(5.5 * len(panels), 4 + 0.2 * -(-len(shown) // columns)), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis = 'epoch' if name == metric and all(once_an_epoch(run, name) for run in runs) else 'step'
        draw_panel(axes, runs, styles, name, axis, mark_best=name == metric)
    add_legend(figure, shown, min(columns, 3), f'run: settings that differ (best {metric})')
    return figure


def shortened(text: str, length: int) -> str:
    """Return a text without what is in its middle if it is longer than `length`: runs differ in beginning and end."""
    half = length // 2 - 1
    return text if len(text) <= length else f'{text[:half]} ... {text[-half:]}'


def styles_of(runs: Sequence[Run], metric: str, labels: Sequence[str]) -> list[Style]:
    """Return how each run looks: all in colours, or the first in one and the others grey if they are many."""
    best = [run.best(metric) for run in runs]
    named = [label if row is None else f'{label} ({row[metric]:#.4g})'
             for label, row in zip(labels, best, strict=True)]
    if len(runs) <= IN_COLOUR:
        return [Style(LINES[index % len(LINES)], '-' if index < len(LINES) else '--', label, True)
                for index, label in enumerate(named)]
    others = Style(GREY, '-', None, False)
    return [Style(COLOURS[0], '-', f'the best: {named[0]}', True), *[others] * (len(runs) - 2),
            others._replace(label=f'the {len(runs) - 1} others')]


def once_an_epoch(run: Run, metric: str) -> bool:
    """Return whether each value of the metric is the only one of its epoch."""
    epochs = Counter(row.get('epoch') for row in run.values(metric))
    return None not in epochs and max(epochs.values(), default=1) == 1


def draw_panel(
        axes: Any, runs: Sequence[Run], styles: Sequence[Style], metric: str, axis: str, mark_best: bool) -> None:
    """Draw the metric of all runs over `axis`: over steps running means, of few runs the values behind them."""
    from matplotlib.ticker import MaxNLocator

    curves = [[(row[axis], row[metric]) for row in run.values(metric) if axis in row] for run in runs]
    window = max(1, max(map(len, curves)) // POINTS) if axis == 'step' else 1
    marked: list[float] = []
    for curve, style in zip(curves, styles, strict=True):
        draw_curve(axes, np.array(curve).reshape(-1, 2), style, window, behind=len(runs) <= FEW)
        if mark_best and style.front and curve:
            marked.append(draw_best(axes, curve, style, metric))
    axes.set_ylim(limits(curves, marked))
    unit = next((unit for name, unit in UNITS.items() if name in metric), '')
    mean = f', running mean of {window} values' if window > 1 else ''
    axes.set_title(f'{metric}{unit}{mean}', loc='left', fontsize='medium', fontweight='bold')
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color='#E4E4E4', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def draw_curve(axes: Any, curve: Any, style: Style, window: int, behind: bool) -> None:
    """Draw an array of places and values `(N, 2)`, averaged over `window` of them."""
    if window > 1 and behind:
        axes.plot(*curve.T, color=style.colour, linewidth=0.7, alpha=0.25, zorder=1)
    shown = [running_mean(each, min(window, len(curve))) for each in curve.T] if len(curve) else [[], []]
    axes.plot(*shown, color=style.colour, linestyle=style.line, linewidth=1.6 if style.front else 0.9,
              marker='o' if len(curve) <= POINTS else '', markersize=3 if style.front else 1.5,
              zorder=3 if style.front else 2)


def draw_best(axes: Any, curve: Curve, style: Style, metric: str) -> float:
    """Mark the best value of a curve by a circle, and return it."""
    pick = min if smaller_is_better(metric) else max
    place, value = pick(curve, key=lambda point: point[1])
    axes.plot(place, value, 'o', color=style.colour, markersize=7, markerfacecolor='white',
              markeredgewidth=1.6, zorder=4)
    return value


def limits(curves: Sequence[Curve], marked: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value to show, those of all curves but for the beginnings of long ones, and marks.

    A first loss or accuracy is far from all later ones, and would press those together.
    """
    values = [value for curve in curves for place, value in curve if len(curve) <= POINTS
              or place >= curve[0][0] + BEGINNING * (curve[-1][0] - curve[0][0])]
    values += marked
    margin = 0.06 * (max(values) - min(values)) or 0.06 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def running_mean(values: Sequence[float], window: int) -> Any:
    """Return the means of `window` values each that follow one another."""
    return np.convolve(np.asarray(values), np.ones(window) / window, mode='valid')


def add_legend(figure: Figure, styles: Sequence[Style], columns: int, title: str) -> None:
    """Add the legend beneath the panels, where it covers no curve."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=style.colour, linestyle=style.line, linewidth=1.8) for style in styles]
    figure.legend(lines, [literal(str(style.label)) for style in styles], loc='outside lower left', ncols=columns,
                  frameon=False, fontsize='small', title=title, title_fontsize='small', alignment='left')


# Files


def figure_files(output: str) -> list[Path]:
    """Return the files that an output asks for: the one it names, or without suffix a PNG and an SVG.

    Raises:
        InputError: If that is not possible, or matplotlib is missing.
    """
    path = Path(output)
    check_installed(f'output: {output}', 'analysis', 'matplotlib', otherwise='leave output out')
    if path.is_dir():
        raise InputError(message(f'output: {output}', 'it is a folder', f'name a file in it: {path / "compare.png"}'))
    if path.suffix not in ('', *SUFFIXES):
        raise InputError(message(f'output: {output}', f'the suffix is none of {", ".join(SUFFIXES)}',
                                 f'say {path.with_suffix(".png")}, {path.with_suffix(".svg")}, or no suffix for both'))
    return [path] if path.suffix else [path.with_suffix(suffix) for suffix in SUFFIXES]
