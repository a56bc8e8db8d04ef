"""The paper's ablations as studies: a table, a sweep file, and a W&B group of the same name."""
from __future__ import annotations

from se_timm import tables
from se_timm.errors import InputError, unknown
from se_timm.paper import (
    EXCITATION,
    NO_SQUEEZE,
    PLACEMENT,
    REDUCTION,
    SE_3X3,
    SQUEEZE,
    STAGES,
    Ablation,
    Table,
)

__all__ = ['STUDIES', 'find_study', 'markdown', 'settings']

STUDIES: dict[str, Table[Ablation]] = {
    'reduction': REDUCTION, 'squeeze': SQUEEZE, 'excitation': EXCITATION, 'stages': STAGES, 'placement': PLACEMENT,
    '3x3': SE_3X3, 'no_squeeze': NO_SQUEEZE}
NUMBERS = {'top-1 error': '.2f', 'top-5 error': '.2f', 'GFLOPs': '.2f', 'parameters (millions)': '.1f'}


def find_study(name: str) -> Table[Ablation]:
    """Return the paper's table of a study.

    Raises:
        InputError: If there is none of this name.
    """
    if name not in STUDIES:
        raise InputError(unknown('report', name, STUDIES))
    return STUDIES[name]


def settings(table: Table[Ablation]) -> list[str]:
    """Return the arguments of the network that tell the rows of a table apart, such as `reduction` and `se`.

    Not `bias`: it goes with the others.
    """
    return list(dict.fromkeys(name for row in table.rows for name in row.arguments if name != 'bias'))


def markdown(table: Table[Ablation]) -> str:
    """Return a table of the paper in Markdown; what it does not print is empty."""
    rows = []
    for row in table.rows:
        numbers = zip((*row.errors, *row.cost), NUMBERS.values(), strict=True)
        rows.append([row.variant, f'`{row.arguments}`', *(
            '' if value is None else f'{value:{form}}' for value, form in numbers)])
    return tables.markdown(['variant', 'arguments', *NUMBERS], rows)
