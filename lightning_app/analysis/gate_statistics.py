"""Statistics of SE gates over images and classes, from sums that do not depend on the order of the images."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from se_timm.gates import SEBlock

from ..data.samples import IGNORE

__all__ = ['BINS', 'NEAR', 'BlockGates', 'GateStatistics', 'key_of']

RESOLUTION = 1e-14  # of variances: what is below is of rounding
BINS = 20  # of the histograms, over the range of the gate
NEAR = 0.1  # what is near zero, and near one
UNIT = 2**20  # gates are counted in whole numbers of 1 / UNIT: sums are then the same in any order, to the bit
LIMIT = 8 * UNIT  # larger gates, which an excitation by ReLU can have, count as 8: squares of 2^17 images fit int64


@dataclass(frozen=True)
class BlockGates:
    """What the gates of one SE block did over many images; NaN if one of them is not finite.

    Attributes:
        block: The block.
        counts: Images of each class `(K,)`.
        class_means: Mean gate of each class and channel `(K, C)`; NaN for classes without images.
        class_stds: Standard deviation over the images of each class `(K, C)`; None where it was not kept.
        means: Mean gate of each channel over all images `(C,)`.
        stds: Standard deviation of each channel over all images `(C,)`.
        near_zero: Share of all gates, of images and channels, below 0.1 in size.
        near_one: Share of those that are within 0.1 of one.
        class_specific: Share of the variance over images that lies between the classes, from 0 (classes agree) to 1
            (the gates depend on the class alone). By epsilon squared, an estimate that is 0 on average where the class
            plays no part, for however few images (Kelley 1935). NaN with fewer than two classes, or one image a class.
        histogram: Number of gates in each bin `(BINS,)`; those outside of the range are in the outermost.
        edges: Of the bins `(BINS + 1,)`.
    """

    block: SEBlock
    counts: np.ndarray
    class_means: np.ndarray
    class_stds: np.ndarray | None
    means: np.ndarray
    stds: np.ndarray
    near_zero: float
    near_one: float
    class_specific: float
    histogram: np.ndarray
    edges: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over images and channels."""
        return float(self.means.mean())

    @property
    def std(self) -> float:
        """Standard deviation over images, averaged over the channels."""
        return float(self.stds.mean())

    @property
    def key(self) -> str:
        """Name of the block as it is logged, see `key_of`."""
        return key_of(self.block)


def key_of(block: SEBlock) -> str:
    """Return the name of a block as it is logged: W&B takes dots as nesting."""
    return block.name.replace('.', '_')


class GateStatistics:
    """Sums over images, from which `results` follow; of several processes, by `reduce`.

    Args:
        blocks: The SE blocks.
        num_classes: Number of classes, K; 1 keeps no classes apart.
        within: Keep the squares of each class too, for the deviation within it: twice the memory, which is
            8 bytes for each class and channel.
    """

    def __init__(self, blocks: Sequence[SEBlock], num_classes: int, within: bool = False) -> None:
        self.blocks = list(blocks)
        self.num_classes = num_classes
        self.within = within
        self.channels: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}

    def update(self, gates: Mapping[str, Tensor], labels: Tensor) -> None:
        """Count a batch; nothing waits for the device.

        Args:
            gates: `(N, C)` of each block, or `(N * V, C)` of V views of each image, which are averaged.
            labels: `(N,)`; those that are `IGNORE` do not count.
        """
        values = torch.cat([gates[block.name].float() for block in self.blocks], 1)
        values = values.unflatten(0, (len(labels), -1)).mean(1)
        if not self.sums:
            self.channels = {block.name: gates[block.name].shape[1] for block in self.blocks}
            self._begin(values.device)
        counts = labels != IGNORE
        finite = values.isfinite()
        classes = labels.clamp(min=0) if self.num_classes > 1 else torch.zeros_like(labels)
        units = (values.nan_to_num(0) * UNIT).round().clamp(-LIMIT, LIMIT).long() * counts[:, None]
        self.sums['broken'] += (~finite & counts[:, None]).sum(0)
        self.sums['counts'].index_add_(0, classes, counts.long())
        self.sums['sums'].index_add_(0, classes, units)
        self.sums['squares'].index_add_(0, classes if self.within else torch.zeros_like(classes), units.square())
        for row, edge in zip(self.sums['below'], self.edges[1:-1], strict=True):
            row += ((values < edge) & counts[:, None]).sum(0)
        for row, level in zip(self.sums['near'], (0, 1), strict=True):
            row += (((values - level).abs() < NEAR) & counts[:, None]).sum(0)

    def _begin(self, device: torch.device) -> None:
        total = sum(self.channels.values())
        rows = {'sums': self.num_classes, 'squares': self.num_classes if self.within else 1, 'below': BINS - 1,
                'near': 2, 'broken': 1}
        self.sums = {name: torch.zeros(count, total, dtype=torch.int64, device=device) for name, count in rows.items()}
        self.sums['counts'] = torch.zeros(self.num_classes, dtype=torch.int64, device=device)
        # (BINS + 1, C): the edges of each channel's bins
        self.edges = torch.cat([torch.linspace(block.low, block.high, BINS + 1, device=device)[:, None].expand(
            -1, self.channels[block.name]) for block in self.blocks], 1)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace each sum by its total over all processes."""
        self.sums = {name: total(value) for name, value in self.sums.items()}

    def results(self) -> list[BlockGates]:
        """Return what the gates of each block did; nothing if there was no image."""
        if not self.sums or not self.sums['counts'].any():
            return []
        counts = self.sums['counts'].cpu().numpy()
        parts = {name: self.sums[name].cpu().split(list(self.channels.values()), 1)
                 for name in ('sums', 'squares', 'below', 'near', 'broken')}
        broken = parts.pop('broken')
        found = [block_gates(block, counts, self.within, *(parts[name][index].numpy() for name in parts))
                 for index, block in enumerate(self.blocks)]
        return [without_numbers(result) if gates.any() else result for result, gates in zip(found, broken, strict=True)]


def without_numbers(result: BlockGates) -> BlockGates:
    """Return the statistics of a block of which some gates are not finite: NaN, like the loss of such a network."""
    arrays = {name: np.full_like(value, np.nan) for name in ('class_means', 'class_stds', 'means', 'stds')
              if (value := getattr(result, name)) is not None}
    numbers = dict.fromkeys(('near_zero', 'near_one', 'class_specific'), float('nan'))
    return replace(result, **arrays, **numbers, histogram=np.zeros_like(result.histogram))  # type: ignore[arg-type]


def block_gates(
        block: SEBlock, counts: np.ndarray, within: bool, sums: np.ndarray, squares: np.ndarray, below: np.ndarray,
        near: np.ndarray) -> BlockGates:
    """Return the statistics of one block from its sums: `(K,)`, `(K, C)`, `(K or 1, C)`, `(BINS - 1, C)`, `(2, C)`.

    With `within`, squares are of each class.
    """
    images, gates = counts.sum(), counts.sum() * sums.shape[1]
    with np.errstate(invalid='ignore', divide='ignore'):
        class_means = sums / counts[:, None] / UNIT
    means = sums.sum(0) / images / UNIT
    variances = squares.sum(0) / images / UNIT**2 - means**2
    variances[variances < RESOLUTION] = 0
    cumulative = np.concatenate([[0], below.sum(1), [gates]])
    return BlockGates(
        block, counts, class_means, within_class(counts, class_means, squares) if within else None,
        means, np.sqrt(variances), float(near[0].sum() / gates), float(near[1].sum() / gates),
        between_classes(counts, class_means, means, variances),
        np.diff(cumulative), np.linspace(block.low, block.high, BINS + 1))


def within_class(counts: np.ndarray, class_means: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the standard deviation over the images of each class `(K, C)`."""
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.sqrt(np.maximum(squares / counts[:, None] / UNIT**2 - class_means**2, 0))


def between_classes(
        counts: np.ndarray, class_means: np.ndarray, means: np.ndarray, variances: np.ndarray) -> float:
    """Return epsilon squared, see `BlockGates.class_specific`."""
    present = counts > 0
    classes, images = present.sum(), counts.sum()
    if classes < 2 or images <= classes:
        return float('nan')
    total = images * variances.sum()
    if total == 0:
        return 0.
    between = (counts[present, None] * (class_means[present] - means)**2).sum()
    by_chance = (classes - 1) * (total - between) / (images - classes)
    return float(np.clip((between - by_chance) / total, 0, 1))
