"""What figures share: the colours of lines, and how they are written."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['COLOURS', 'literal', 'write_figure']

# Okabe and Ito's, which the colour-blind tell apart, without the yellow, which is faint on white, and black
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')


def literal(label: str) -> str:
    """Return a label in which matplotlib sees no formula between dollar signs."""
    return label.replace('$', r'\$')


def write_figure(figure: Figure, files: Sequence[Path]) -> None:
    """Write the figure to files, in the format of their suffixes; the same figure gives the same files."""
    from matplotlib import rc_context

    with rc_context({'svg.hashsalt': 'se-timm'}):
        for path in files:
            figure.savefig(path, dpi=150, metadata={'Date': None} if path.suffix == '.svg' else None)
            figure.set_layout_engine('none')  # what is laid out stays so: it takes most of the time
