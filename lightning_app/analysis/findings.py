"""What the gates of a network tell, in words."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from se_timm.tables import aligned

from .gate_statistics import BlockGates

__all__ = ['described', 'removable', 'variation']

SPECIFIC, SHARED = 0.5, 0.1  # shares of the variance between the classes
SATURATED = 0.9  # share of the gates near zero or one
STEADY = 0.1  # deviation over images, relative to the gates themselves, below which constants would do


def variation(result: BlockGates) -> float:
    """Return the root mean square of the deviations over images, relative to that of the gates."""
    size = float(np.sqrt((result.means**2 + result.stds**2).mean()))
    return float(np.sqrt((result.stds**2).mean())) / size if size else 0.


def removable(results: Sequence[BlockGates]) -> list[BlockGates]:
    """Return the blocks whose gates are nearly the same for all images: constants could stand for them."""
    return [result for result in results if variation(result) < STEADY]


def described(results: Sequence[BlockGates]) -> str:
    """Return a table of all blocks, and sentences on those that are class-specific, saturated or steady."""
    rows = [['block', 'module', 'channels', 'mean', 'std', 'near 0', 'near 1', 'class-specific', 'variation']]
    for result in results:
        rows.append([
            result.block.title, result.block.module, str(len(result.means)), f'{result.mean:.3f}', f'{result.std:.3f}',
            *(f'{100 * share:.1f} %' for share in (result.near_zero, result.near_one)),
            'not known' if np.isnan(result.class_specific) else f'{100 * result.class_specific:.1f} %',
            f'{100 * variation(result):.1f} %'])
    return '\n'.join([aligned(rows, left=(0, 1)), '', *sentences(results)])


def sentences(results: Sequence[BlockGates]) -> list[str]:
    """Return what there is to say of the blocks, a line each."""
    kinds = {
        f'class-specific (more than {100 * SPECIFIC:.0f} % of the variance over images lies between the classes)':
            [result for result in results if result.class_specific > SPECIFIC],
        f'shared by the classes (less than {100 * SHARED:.0f} %)':
            [result for result in results if result.class_specific < SHARED],
        f'saturated near one (more than {100 * SATURATED:.0f} % of the gates within 0.1 of it)':
            [result for result in results if result.near_one > SATURATED],
        f'saturated near zero (more than {100 * SATURATED:.0f} %)':
            [result for result in results if result.near_zero > SATURATED],
        f'steady (they vary by less than {100 * STEADY:.0f} % over the images: constants could stand for them)':
            removable(results),
    }
    return [f'{kind}: {", ".join(result.block.title for result in found) or "none"}' for kind, found in kinds.items()]
