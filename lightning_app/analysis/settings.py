"""The settings in which runs differ, and runs that differ in their seed only."""
from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .runs import Run, natural, value_at

__all__ = ['differing', 'labels', 'settings', 'stopped_early', 'with_other_seeds']

SEED = 'seed_everything'
# where a run is written, and what it tells of itself
LEFT_OUT = (
    'ckpt_path', 'trainer.callbacks.NetworkSummary', 'trainer.callbacks.ProgressBar', 'trainer.callbacks.ResultLine',
    'trainer.default_root_dir', 'trainer.enable_autolog_hparams', 'trainer.enable_model_summary',
    'trainer.enable_progress_bar', 'trainer.log_every_n_steps', 'trainer.logger', 'weights_only')
WITHOUT_EFFECT = ('data.num_workers', 'data.prefetch')  # on what a training comes to, but on its speed
GROUPS = ('model', 'data', SEED, 'trainer')  # the order in which they are shown
FOLDERS = ('data.root',)  # the last part of the path tells the data; the rest is of the machine
IN_LABEL = 4
DATA = ('classes', 'train_images', 'val_images')  # of the record of a run
EARLY = 'trainer.callbacks.EarlyStopping'  # key of settings
PATIENCE = 3  # Lightning's default
LIMITS = {'stopping_threshold': 1, 'divergence_threshold': -1}  # of a metric, and whether it ends above or below

Settings = dict[str, str]


def settings(run: Run) -> Settings:
    """Return the settings of a run by the keys of the command line; those that are null or empty are left out."""
    found = dict(flat('', run.config))
    return {key: Path(value).name if key in FOLDERS else value for key, value in found.items()
            if not any(key == name or key.startswith(f'{name}.') for name in LEFT_OUT)}


def flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings in a value of a config, those of a class by its name and the names of its options."""
    prefix = f'{key}.' if key else ''
    if names_class(value):
        yield key, value['class_path'].rpartition('.')[2]
        value = value.get('init_args') or {}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(f'{prefix}{name}', item)
    elif isinstance(value, list) and value and all(map(names_class, value)):
        names: Counter[str] = Counter()
        for item in value:
            name = item['class_path'].rpartition('.')[2]
            names[name] += 1
            name = name if names[name] == 1 else f'{name}_{names[name]}'  # another of the same class
            yield f'{prefix}{name}', 'true'
            yield from flat(f'{prefix}{name}', item.get('init_args') or {})
    elif isinstance(value, float):
        yield key, f'{value:.12g}'  # 3 * 0.1 is 0.3
    elif value is not None:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def names_class(value: Any) -> bool:
    """Return whether a value of a config is a class, and perhaps its options."""
    return isinstance(value, dict) and isinstance(value.get('class_path'), str)


def differing(found: Sequence[Settings]) -> list[str]:
    """Return the keys whose values are not the same in all; options of a class only of those that have the class."""
    keys = sorted({key for each in found for key in each}, key=lambda key: (place(key), key))
    owners = {key: max((other for other in keys if key.startswith(f'{other}.')), key=len, default=None) for key in keys}
    return [key for key, owner in owners.items()
            if len({each.get(key) for each in found if owner is None or owner in each}) > 1]


def place(key: str) -> int:
    """Return where the group of a key stands."""
    group = key.partition('.')[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def with_other_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the groups of runs whose settings, and numbers of images and classes, are the same but for the seed.

    Of several runs with a seed, it is the one that came furthest, the last of those: never the best, as the mean over
    the seeds would be too good.
    """
    groups: dict[Any, dict[str | None, Run]] = {}
    for run in sorted(runs, key=lambda run: (*run.progress, natural(str(run.folder)))):
        if run.config:
            found = settings(run)
            seed = found.pop(SEED, 'false')
            for name in WITHOUT_EFFECT:
                found.pop(name, None)
            data = {name: value_at(run.hparams, f'provenance.data.{name}') for name in DATA}
            seed = str(run.folder) if seed == 'false' else seed  # each begins otherwise
            groups.setdefault(frozenset({**found, **data}.items()), {})[seed] = run
    return [[run for run in runs if run in group.values()] for group in groups.values() if len(group) > 1]


def stopped_early(run: Run) -> bool:
    """Return whether EarlyStopping has ended a run: its metric is past a limit, or has been no better for long."""
    found = {key.removeprefix(f'{EARLY}.'): value for key, value in settings(run).items() if key.startswith(EARLY)}
    if not found:
        return False
    monitor, sign = found.get('monitor', ''), 1 if found.get('mode') == 'max' else -1
    values = [sign * value for value in watched(run, monitor)]
    if found.get('check_finite') != 'false' and not all(map(math.isfinite, values)):
        return True
    for name, way in LIMITS.items():
        if name in found and any(way * (value - sign * float(found[name])) > 0 for value in values):
            return True
    best, waited = -math.inf, 0
    for value in values:
        better = value - float(found.get('min_delta', 0)) > best
        best, waited = (value, 0) if better else (best, waited + 1)
    return waited >= max(int(found.get('patience', PATIENCE)), 1)


def watched(run: Run, monitor: str) -> list[float]:
    """Return the values of a metric as EarlyStopping sees them: of each validation, or at the end of each epoch."""
    rows = [row for row in run.rows if monitor in row]
    if monitor.startswith('val'):
        return [row[monitor] for row in rows]
    trainer = run.config.get('trainer', {})  # what is logged within epochs, too
    whole = trainer.get('val_check_interval') in (None, 1.0) and trainer.get('check_val_every_n_epoch', 1) == 1
    if whole:
        return list({row.get('epoch'): row[monitor] for row in rows}.values())
    found: dict[float, float] = {}
    latest = None
    for row in run.rows:
        latest = row.get(monitor, latest)
        if latest is not None and any(name.startswith('val') for name in row):
            found[row['step']] = latest
    return list(found.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """Return for each run its name and the settings in which it differs from others, as short as is clear."""
    found = [settings(run) for run in runs]
    keys = differing([each for each, run in zip(found, runs, strict=True) if run.config])
    ends = [key.rpartition('.')[2] for key in keys]
    short = {key: 'seed' if key == SEED else '' if key == 'model.name' else end if ends.count(end) == 1 else key
             for key, end in zip(keys, ends, strict=True)}
    return [label(run.name, [f'{short[key]} {each[key]}'.strip() for key in keys if key in each])
            for run, each in zip(runs, found, strict=True)]


def label(name: str, words: Sequence[str]) -> str:
    """Return a name and words about it, the first ones if they are many."""
    shown = [*words[:IN_LABEL], *(['...'] if len(words) > IN_LABEL else [])]
    return f'{name}: {", ".join(shown)}' if shown else name
