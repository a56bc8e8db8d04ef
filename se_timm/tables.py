"""Tables as text, and as files."""
from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ['aligned', 'markdown', 'write_csv']


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a table as text, the columns `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join('  '.join(
        cell.ljust(width) if index in left else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *rows))


def write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV, its head first."""
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(lines)
