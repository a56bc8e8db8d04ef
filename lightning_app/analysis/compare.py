"""Runs beside each other, from their folders: a table, the settings in which they differ, and curves."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from se_timm.errors import InputError, message, unknown
from se_timm.tables import aligned, write_csv

from ..files import writing
from ..metrics import SPEED, smaller_is_better
from ..network import architecture
from .curves import draw, figure_files
from .drawing import write_figure
from .printed import printed
from .runs import Row, Run, read_runs, value_at
from .settings import differing, labels, settings, stopped_early, with_other_seeds

__all__ = ['compare']

TOP1, TOP5, LOSS = 'val/top1', 'val/top5', 'train/loss'
LOSSES = (LOSS, 'val/loss')

Lines = list[list[str]]
Column = Callable[[Run], str]


def compare(*runs: str, metric: str = TOP1, output: str | None = None, csv: str | None = None) -> list[Run]:
    """Print trainings beside each other, and draw their curves, from the folders that they have written.

    Args:
        *runs: Folders of trainings, such as runs/paper/version_0, or folders that hold several, such as runs/paper.
        metric: The metric by whose best value the runs are sorted, and which is drawn.
        output: File of the curves, PNG or SVG by its suffix; without suffix both are written.
        csv: File to which the table is written, with the settings that differ.

    Returns:
        The runs, the best first.

    Raises:
        InputError: If there is nothing to show, or a file cannot be written.
    """
    files = figure_files(output) if output is not None else []
    found, problems = read_runs(runs)
    check_metric(metric, found)
    found.sort(key=lambda run: rank(run, metric))
    table, differences = overview(found, metric), settings_table(found)
    parts = [aligned(table, left=[index for index, name in enumerate(table[0]) if name in ('run', 'network')])]
    if len(differences[0]) > 1:
        parts.append(f'settings that differ:\n{aligned(narrower(differences), left=(0,))}')
    parts += [seeds_part(found, metric), paper_part(found), notes_part(found, metric, problems)]
    print('\n\n'.join(filter(None, parts)))
    if csv is not None:
        write(lambda: write_csv(Path(csv), [[*line, *more[1:]] for line, more in zip(table, differences, strict=True)]),
              [Path(csv)])
    if files:
        write(lambda: write_figure(draw(found, metric, labels(found)), files), files)
    return found


def check_metric(metric: str, runs: Sequence[Run]) -> None:
    """Raise `InputError` if no run has a value of the metric."""
    if not any(run.values(metric) for run in runs):
        if any(metric in run.metrics for run in runs):
            raise InputError(message(f'metric: {metric}', 'it has no finite value in any run', 'name another'))
        names = {name for run in runs for name in run.metrics}
        raise InputError(unknown('metric', metric, names))


def rank(run: Run, metric: str) -> tuple[bool, float]:
    """Return the key that sorts runs: the best first, those without a value last."""
    best = run.best(metric)
    return best is None, 0.0 if best is None else best[metric] if smaller_is_better(metric) else -best[metric]


# The table: what stands in each column


def number(value: float | None, form: str = '.2f') -> str:
    """Return a number as text, nothing for None."""
    return '' if value is None else format(value, form)


def value_of(row: Row | None, metric: str, form: str = '.2f') -> str:
    """Return a value of a row as text, nothing if it is not there."""
    return number((row or {}).get(metric), form)


def best_of(metric: str, shown: str | None = None, form: str = '.2f') -> Column:
    """Return a column: what the row with the best value of a metric holds of it, or of another."""
    return lambda run: value_of(run.best(metric), shown or metric, form)


def last_of(metric: str, form: str = '.2f') -> Column:
    """Return a column: the last value of a metric."""
    return lambda run: value_of(run.last(metric), metric, form)


def error_of(metric: str) -> Column:
    """Return a column: the error that belongs to an accuracy, at the best top-1 accuracy."""
    def error(run: Run) -> str:
        accuracy = (run.best(TOP1) or {}).get(metric)
        return number(None if accuracy is None else 100 - accuracy)

    return error


def network_of(run: Run) -> str:
    """Return the name of the network, and what makes it another than the one of this name."""
    arguments = dict(architecture(run.setting('model.network')) or {})
    add_se = run.setting('model.add_se')
    words = [f'{name}={value}' for name, value in arguments.items()]
    words += ['plain'] if run.setting('model.plain') else ['with SE'] if add_se is not None else []
    return ', '.join([run.setting('model.name') or '', *words])


def epochs_of(run: Run) -> str:
    """Return what is done of what was planned, in epochs if they are planned."""
    if run.planned_epochs is None and run.planned_steps is not None:
        return f'{run.steps}/{run.planned_steps} steps'
    return f'{run.epochs}/{run.planned_epochs}' if run.planned_epochs is not None else str(run.epochs)


def paper_of(run: Run) -> str:
    """Return the errors that the paper prints for the network, those of its main table if there are several."""
    return next((errors_text(each.errors) for each in printed(run)), '')


def errors_text(errors: Any) -> str:
    """Return top-1 and top-5 error as text."""
    return ' / '.join(number(error) for error in errors if error is not None)


def speed_of(run: Run) -> str:
    """Return the median speed."""
    values = [row[SPEED] for row in run.values(SPEED)]
    return number(statistics.median(values), '.1f') if values else ''


def cost_of(name: str, unit: float) -> Column:
    """Return a column: what the loggers were told of the size of the network."""
    def cost(run: Run) -> str:
        value = value_at(run.hparams, f'network.{name}')
        return number(value / unit) if isinstance(value, (int, float)) else ''

    return cost


COLUMNS: dict[str, Column] = {
    'run': lambda run: run.name,
    'network': network_of,
    'epochs': epochs_of,
    f'best {TOP1}': best_of(TOP1),
    'at epoch': best_of(TOP1, 'epoch', '.0f'),
    f'last {TOP1}': last_of(TOP1),
    'top-1 error': error_of(TOP1),
    'top-5 error': error_of(TOP5),
    'paper': paper_of,
    LOSS: last_of(LOSS, '#.4g'),
    'images/s': speed_of,
    'M parameters': cost_of('parameters', 1e6),
    'G multiply-adds': cost_of('multiply_adds', 1e9),
}


def overview(runs: Sequence[Run], metric: str) -> Lines:
    """Return the table of the runs: a header, and a line for each; columns without any entry are left out."""
    other = {f'best {metric}': best_of(metric, form='#.4g'), f'{metric} at epoch': best_of(metric, 'epoch', '.0f')}
    columns = {**COLUMNS, **(other if metric != TOP1 else {})}
    filled = [[name, *cells] for name, column in columns.items() if any(cells := [column(run) for run in runs])]
    return [list(line) for line in zip(*filled, strict=True)]


# Beneath it


def settings_table(runs: Sequence[Run]) -> Lines:
    """Return the settings in which the runs differ: a header of keys, and a line for each run; `-` is not set."""
    known = [settings(run) for run in runs if run.config]
    keys = differing(known)
    return [['run', *keys], *([run.name, *(settings(run).get(key, '-') for key in keys)] for run in runs)]


def narrower(lines: Lines) -> Lines:
    """Return the table, or with lines for columns, whichever is narrower."""
    turned = [list(column) for column in zip(*lines, strict=True)]
    return min(lines, turned, key=lambda each: max(map(len, aligned(each).splitlines())))


def seeds_part(runs: Sequence[Run], metric: str) -> str:
    """Return mean and standard deviation of the runs that differ in their seed only, as text; nothing if none do.

    Of each group, only runs count that have values, and have come as far as the furthest of them; where they may stop
    early, those that have, and those that came to the end.
    """
    columns = [TOP1, *([metric] if metric != TOP1 else [])]
    lines = [['network', 'seeds', *(f'best {name}' for name in columns), 'runs']]
    for group in with_other_seeds(runs):
        even = [run for run in as_far(group) if all(run.values(name) for name in columns)]
        spreads = [spread([row[name] for run in even if (row := run.best(name)) is not None]) for name in columns]
        lines.append([network_of(group[0]), str(len(even)), *spreads, ', '.join(run.name for run in even)])
    last = len(columns) + 2
    return f'mean and standard deviation over seeds:\n{aligned(lines, left=(0, last))}' if len(lines) > 1 else ''


def as_far(group: Sequence[Run]) -> list[Run]:
    """Return the runs that have come as far as the furthest of them, or as they would by themselves."""
    ended = [run for run in group if stopped_early(run)]
    if ended:
        return [run for run in group if run in ended or not run.unfinished]
    furthest = max(run.progress for run in group)
    return [run for run in group if run.progress == furthest]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation (of a sample) as text."""
    if len(values) < 2:
        return number(next(iter(values), None), '#.4g')
    return f'{statistics.mean(values):#.4g} +- {statistics.stdev(values):#.2g}'


def paper_part(runs: Sequence[Run]) -> str:
    """Return where the paper prints errors for the networks of the runs, as text; nothing if nowhere."""
    told = [(network_of(run), '; '.join(f'{errors_text(each.errors)} ({each.table})' for each in printed(run)))
            for run in runs]
    lines = [f'  {network}: {errors}' for network, errors in dict.fromkeys(told) if errors]
    return '\n'.join(['paper, top-1 / top-5 error:', *lines]) if lines else ''


def notes_part(runs: Sequence[Run], metric: str, problems: Sequence[str]) -> str:
    """Return what must be known of single runs, and what is not shown, as text; nothing if there is nothing."""
    notes = [f'{run.name}: {note}' for run in runs for note in notes_of(run, metric)]
    notes += [f'{given.removeprefix("RUN: ")}: not shown, {why.removeprefix("  why: ")}'
              for given, why, _ in (problem.split('\n') for problem in problems)]
    return '\n'.join(['notes:', *(f'  {note}' for note in notes)]) if notes else ''


def notes_of(run: Run, metric: str) -> list[str]:
    """Return what must be known of a run."""
    cases = {
        'no config.yaml, its settings are not known': not run.config,
        f'not finished, {epochs_of(run)}': run.unfinished,
        'its first epochs are in another folder': begins_late(run),
        f'no {metric}, it is sorted last and not drawn': not run.values(metric),
        **{f'diverged, its last {loss} is not finite': diverged(run, loss) for loss in LOSSES},
    }
    return [note for note, holds in cases.items() if holds]


def begins_late(run: Run) -> bool:
    """Return whether the first epoch of which there is something comes after the first validation."""
    every = run.config.get('trainer', {}).get('check_val_every_n_epoch', 1)
    first = min((row.get('epoch', 0) for row in run.rows), default=0)
    return isinstance(every, int) and bool(first >= every)  # of null: validations count steps, over the epochs


def diverged(run: Run, loss: str) -> bool:
    """Return whether the last loss of that name is not finite."""
    rows = [row for row in run.rows if loss in row]
    return bool(rows) and rows[-1] not in run.values(loss)


# Files


def write(function: Callable[[], None], paths: Sequence[Path]) -> None:
    """Write files by `function`, and say so.

    Raises:
        InputError: If that is not possible.
    """
    names = ' '.join(map(str, paths))
    with writing(names, 'name a file in a folder that can be written'):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        function()
    print(f'\nwritten: {names}')
