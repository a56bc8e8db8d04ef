"""Trainings, read from their folders."""
from __future__ import annotations

import csv
import functools
import itertools
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from se_timm.errors import InputError, meant, message, nearest

from ..checkpoints import mapped, step_checkpoints, step_of
from ..metrics import smaller_is_better

__all__ = ['Row', 'Run', 'cut_off', 'natural', 'read_runs', 'value_at']

CONFIG, METRICS, HPARAMS = 'config.yaml', 'metrics.csv', 'hparams.yaml'
# of what kind values are, where something follows from them; a file may have been edited
KINDS: dict[str, dict[str, type]] = {
    CONFIG: {'model': dict, 'model.name': str, 'model.network': dict, 'data': dict, 'data.class_path': str,
             'data.init_args': dict, 'trainer': dict},
    HPARAMS: {'network': dict, 'provenance': dict, 'provenance.data': dict},
}

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Run:
    """A training, as its folder tells of it.

    Attributes:
        folder: Its folder.
        name: The end of the folder's path that tells it from the other runs.
        config: The resolved configuration; empty if it was not recorded.
        hparams: What the loggers were told besides.
        rows: The rows of `metrics.csv`, `step` and mostly `epoch` (from 0) among the columns.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    hparams: dict[str, Any]
    rows: list[Row]

    @property
    def metrics(self) -> set[str]:
        """The metrics that were logged."""
        return set[str]().union(*self.rows) - {'step', 'epoch'}

    def values(self, metric: str) -> list[Row]:
        """Return the rows that hold a finite value of the metric."""
        return [row for row in self.rows if math.isfinite(row.get(metric, math.nan))]

    def last(self, metric: str) -> Row | None:
        """Return the last row with a value of the metric, None if there is none."""
        return next(reversed(self.values(metric)), None)

    def best(self, metric: str) -> Row | None:
        """Return the row with the best value of the metric, the first of equal ones; None if there is no value."""
        pick = min if smaller_is_better(metric) else max
        return pick(self.values(metric), key=lambda row: row[metric], default=None)

    def setting(self, key: str) -> Any:
        """Return a setting of the configuration by its dotted key, None if it is not there."""
        return value_at(self.config, key)

    @cached_property
    def newest_checkpoint(self) -> Path | None:
        """The newest of those to go on from, None if there is none."""
        return next(reversed(step_checkpoints(self.folder)), None)

    @cached_property
    def epochs(self) -> int:
        """The epochs that are done, as the newest checkpoint tells, else as the rows do."""
        told = told_by(self.newest_checkpoint, 'position', 'epoch') if self.newest_checkpoint else None
        return self.validated_epochs if told is None else told

    @property
    def validated_epochs(self) -> int:
        """The epochs that are done by the rows: the last one is if it was validated, as often as any other."""
        last = max((int(row['epoch']) for row in self.rows if 'epoch' in row), default=0)
        validations = Counter(int(row['epoch']) for row in self.rows if 'val/loss' in row and 'epoch' in row)
        return last + (validations[last] == max(validations.values(), default=1))

    @property
    def steps(self) -> int:
        """The steps that are done, up to the last that was logged or has a checkpoint."""
        logged = [1 + int(row['step']) for row in self.rows]
        return max([*logged, step_of(self.newest_checkpoint) if self.newest_checkpoint else 0])

    @property
    def planned_epochs(self) -> int | None:
        """`trainer.max_epochs`, if it is a limit."""
        return limit(self.setting('trainer.max_epochs'))

    @property
    def planned_steps(self) -> int | None:
        """`trainer.max_steps`, if it is a limit."""
        return limit(self.setting('trainer.max_steps'))

    @property
    def progress(self) -> tuple[int, int]:
        """How far it has come: its epochs, and its steps where these are planned."""
        return self.epochs, self.steps if self.planned_epochs is None else 0

    @property
    def unfinished(self) -> bool:
        """Whether it has come to none of the ends that were planned."""
        plans = [(self.epochs, self.planned_epochs), (self.steps, self.planned_steps)]
        known = [done >= planned for done, planned in plans if planned is not None]
        return bool(known) and not any(known)

    @cached_property
    def classes(self) -> int | None:
        """The number of classes: what was set, else what the loggers or a checkpoint tell; None if none does."""
        told = self.setting('data.init_args.num_classes') or value_at(self.hparams, 'provenance.data.classes')
        return told or next(filter(None, (told_by(path, 'hyper_parameters', 'num_classes') for path in sorted(
            self.folder.glob('checkpoints/*.ckpt')))), None)


def cut_off(folder: Path) -> bool:
    """Return whether `trainer.max_time` has ended the newest training in a folder before its end."""
    newest = run_folders(folder)[-1]
    config = read_yaml(newest / CONFIG)
    if value_at(config, 'trainer.max_time') is None:
        return False
    try:
        rows = read_metrics(newest / METRICS)
    except InputError:  # there are none
        rows = []
    run = Run(newest, newest.name, config, {}, rows)
    return bool(rows or run.newest_checkpoint) and run.unfinished


def value_at(content: dict[str, Any], key: str) -> Any:
    """Return a value in mappings by its dotted key, None if it is not there."""
    value: Any = content
    for name in key.split('.'):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def limit(value: Any) -> int | None:
    """Return a limit of the Trainer, None if it is none."""
    return value if isinstance(value, int) and value > 0 else None


def told_by(checkpoint: Path, *keys: str) -> int | None:
    """Return a number that stands in a checkpoint, None if it does not."""
    try:
        return int(functools.reduce(operator.getitem, keys, mapped(checkpoint)))
    except Exception:  # a damaged file is of many kinds, and its number is not needed
        return None


def natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts `version_10` after `version_9`."""
    return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', text)]


# From folders


def read_runs(paths: Iterable[str]) -> tuple[list[Run], list[str]]:
    """Return the runs in the given folders, and the messages for those that cannot be read.

    Args:
        paths: Folders of runs, or folders that hold them, directly or one level further down.

    Raises:
        InputError: If there is no run that can be read.
    """
    problems: list[str] = []
    folders: dict[str, Path] = {}
    for path in paths:
        try:
            folders.update({os.path.realpath(folder): folder for folder in run_folders(Path(path))})
        except InputError as error:
            problems.append(str(error))
    runs = []
    for name, folder in zip(short_names(list(folders)), folders.values(), strict=True):
        try:
            runs.append(read_run(folder, name))
        except InputError as error:
            problems.append(str(error))
    if not runs:
        raise InputError(problems[0])
    return runs, problems


def run_folders(path: Path) -> list[Path]:
    """Return the folder if it is a run's, else those of the runs in it.

    Raises:
        InputError: If there are none.
    """
    if not path.is_dir():
        reason = 'it is a file' if path.exists() else 'there is no such folder'
        raise InputError(message(f'RUN: {path}', reason, suggestion(path)))
    if is_run(path):
        return [path]
    below = [*filter(is_run, path.glob('*'))]
    below += [folder for folder in path.glob('*/*') if is_run(folder) and folder.parent not in below]  # not evaluations
    if below:
        return sorted(below, key=lambda folder: natural(str(folder)))
    raise InputError(message(
        f'RUN: {path}', f'neither it nor a folder in it holds {CONFIG} or {METRICS}, as a run does', suggestion(path)))


def is_run(folder: Path) -> bool:
    """Return whether a training has written to the folder."""
    return any(os.path.isfile(folder / name) for name in (CONFIG, METRICS))


def suggestion(path: Path) -> str:
    """Return what to name in place of `path`: the run that it lies in, or a folder with a name like it."""
    inside = [str(folder) for folder in path.parents if is_run(folder)]
    existing = next((folder for folder in path.parents if folder.is_dir()), Path())
    beside = {str(folder) for pattern in ('*', '*/*') for folder in existing.glob(pattern)
              if os.path.isdir(folder) and not folder.name.startswith('.')}
    close = inside[:1] or nearest(str(path), beside - {str(path)})
    return meant(close) or (
        'name the folder of a training, such as runs/paper/version_0, or one that holds such folders')


def short_names(folders: Sequence[str]) -> list[str]:
    """Return the shortest ends of the paths in which all differ; of a single one the last two parts."""
    names: list[str] = []
    for count in itertools.count(1 if len(folders) > 1 else 2):
        names = [os.path.join(*Path(folder).parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path, name: str) -> Run:
    """Return the run in the folder.

    Raises:
        InputError: If it has no metrics, or a file of it cannot be read.
    """
    return Run(folder, name, read_yaml(folder / CONFIG), read_yaml(folder / HPARAMS), read_metrics(folder / METRICS))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a file, nothing if there is none.

    Raises:
        InputError: If it cannot be read, or a value is of another kind than a training writes.
    """
    try:
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(message(
            f'RUN: {path}', f'it cannot be read ({error})', 'correct it, or leave the run out')) from error
    content = {} if content is None else content
    kinds = KINDS[path.name] if isinstance(content, dict) else {}
    wrong = [f'{key}: {value}' for key, kind in kinds.items()
             if not isinstance(value := value_at(content, key), kind | None)]
    if wrong or not kinds:
        raise InputError(message(
            f'RUN: {path}', f'a training writes something else than {wrong[0] if wrong else content}',
            'correct it, or leave the run out'))
    return content


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of `metrics.csv`, as numbers.

    Raises:
        InputError: If there are none.
    """
    if not path.is_file():
        raise InputError(message(
            f'RUN: {path.parent}', f'it has no {METRICS}: nothing was logged yet, or not to that file',
            'leave the run out; list lightning_app.logger.CsvLogger in trainer.logger of the next'))
    try:
        with open(path, newline='') as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise InputError(message(
            f'RUN: {path}', f'it is no table of numbers ({error})', 'correct it, or leave the run out')) from error
    rows = [row for row in rows if math.isfinite(row.get('step', math.nan)) and math.isfinite(row.get('epoch', 0))]
    if not rows:
        raise InputError(message(
            f'RUN: {path}', 'it is empty: the training has logged nothing yet',
            'wait for it, or leave the run out; trainer.log_every_n_steps says how often is logged'))
    return rows
