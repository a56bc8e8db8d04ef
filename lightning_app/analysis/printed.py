"""What the paper prints for the network of a run."""
from __future__ import annotations

from typing import Any, NamedTuple

from se_timm.paper import (
    ABLATIONS,
    CIFAR10,
    CIFAR100,
    IMAGENET,
    MOBILE,
    MOBILE_CVPR,
    PLACES365,
    REDUCTION_CVPR,
    SINGLE_CROP,
    Ablation,
    Crop,
    Errors,
    Pair,
    Table,
)
from se_timm.se_resnet import SE_DEFAULTS

from ..network import INITIAL_WEIGHTS, arguments_of
from .runs import Run

__all__ = ['Printed', 'printed']

# the class of the data, its number of classes, and the tables with errors on such data
TABLES: tuple[tuple[str, int, tuple[Table[Any], ...]], ...] = (
    ('ImageNetDataModule', 1000, (IMAGENET, MOBILE, MOBILE_CVPR, SINGLE_CROP, *ABLATIONS)),
    ('ImageNetDataModule', 365, (PLACES365,)),
    ('CIFAR10DataModule', 10, (CIFAR10,)),
    ('CIFAR100DataModule', 100, (CIFAR100,)),
)
ABLATED = 'se_resnet50'
ABLATION_SCHEDULE = 'multistep'  # of configs/imagenet/ablation.yaml
LONGER = [table for table in ABLATIONS if table is not REDUCTION_CVPR]  # trained by it; all others by the main one
BLOCK = SE_DEFAULTS.keys() - {'se'}  # arguments of SE
# what the networks do where nothing is said; which stages there are, each has in numbers of its own
DEFAULTS = {name: value for name, value in SE_DEFAULTS.items() if name != 'stages'}


class Printed(NamedTuple):
    """Errors, and in which table of the paper they stand."""

    errors: Errors
    table: str


def printed(run: Run) -> list[Printed]:
    """Return the errors that the paper prints for the network of a run on such data, each once.

    They are several where the paper trained the network by several recipes: those of the ablations first where the run
    has their form of schedule, else those of the main one, so that the rows of a sweep are of one. A network that began
    with trained weights, or that is no network of the paper's, has none.
    """
    network, plain = run.setting('model.network') or {}, bool(run.setting('model.plain'))
    if run.setting('model.add_se') is not None or any(network.get(name) for name in INITIAL_WEIGHTS):
        return []
    name, arguments = run.setting('model.name'), not_default(arguments_of(network, plain, None))
    found: dict[Errors, Printed] = {}
    ablated = run.setting('model.schedule.name') == ABLATION_SCHEDULE
    for table in sorted(tables_of(run), key=lambda table: (table in LONGER) != ablated):
        for row in table.rows:
            errors = errors_of(row, name, arguments)
            if errors is not None:
                found.setdefault(errors, Printed(errors, title(table)))
    return list(found.values())


def tables_of(run: Run) -> tuple[Table[Any], ...]:
    """Return the tables with errors on the data of the run; none if their classes are not known."""
    data = str(run.setting('data.class_path')).rpartition('.')[2]
    return next((tables for kind, classes, tables in TABLES if kind == data and classes == run.classes), ())


def not_default(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that change the network, lists as tuples."""
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    without = BLOCK if changed.get('se') is False else ()  # what has no effect
    return {name: value for name, value in changed.items() if name not in (*INITIAL_WEIGHTS, *without)
            and (name not in DEFAULTS or value != DEFAULTS[name])}


def errors_of(row: Pair | Ablation | Crop, name: str, arguments: dict[str, Any]) -> Errors | None:
    """Return the errors of a row if it is that network."""
    if isinstance(row, Ablation):
        return row.errors if name == ABLATED and arguments == not_default(row.arguments) else None
    if isinstance(row, Crop):
        return row.small if row.name == name and not arguments else None
    plain = arguments == {'se': False}
    return (row.plain if plain else row.se) if row.name == name and (plain or not arguments) else None


def title(table: Table[Any]) -> str:
    """Return what the table is called."""
    number = f'Table {table.number}' if isinstance(table.number, int) else str(table.number)
    return number if table.version == 'v4' else f'{number} of {table.version.upper()}'
