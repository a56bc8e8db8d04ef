"""The gates as histograms, curves, pictures and a table of W&B."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .channels import sampled
from .gate_statistics import BlockGates

__all__ = ['COLUMNS', 'curves', 'histograms', 'pictures', 'scalars', 'table']

COLUMNS = ('mean', 'std', 'near_zero', 'near_one', 'class_specific')
ROW = 6  # pixels of a class in a picture, and of a channel
ROWS = 100  # classes in a picture


def scalars(results: Sequence[BlockGates]) -> dict[str, float]:
    """Return the numbers of each block, such as `gates/layer1_0/mean`; those that are not known are left out."""
    found = {f'gates/{result.key}/{name}': float(getattr(result, name)) for result in results for name in COLUMNS}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def histograms(results: Sequence[BlockGates]) -> dict[str, Any]:
    """Return a histogram of each block, with the same bins in all epochs."""
    import wandb

    return {f'gates_histogram/{result.key}': wandb.Histogram(
        np_histogram=(result.histogram.tolist(), result.edges.tolist())) for result in results}


def table(results: Sequence[BlockGates], epoch: int) -> dict[str, Any]:
    """Return the numbers of all blocks as one table."""
    import wandb

    rows = [[epoch, result.block.title, result.block.name, len(result.means), result.block.parameters,
             *(getattr(result, name) for name in COLUMNS)] for result in results]
    return {'gates/table': wandb.Table(
        columns=['epoch', 'block', 'module', 'channels', 'parameters', *COLUMNS], data=rows)}


def curves(results: Sequence[BlockGates], classes: Sequence[int], titles: Sequence[str]) -> dict[str, Any]:
    """Return the mean gate of channels for some classes and for all, as in the paper's Fig. 6."""
    import wandb

    charts = {}
    for result in results:
        channels = sampled(len(result.means))
        lines = [*(result.class_means[label, channels] for label in classes), result.means[channels]]
        names = [*(titles[label] for label in classes), 'all']
        charts[f'gates_by_class/{result.key}'] = wandb.plot.line_series(
            xs=list(channels), ys=[line.tolist() for line in lines], keys=names, title=result.block.title,
            xname='channel')
    return charts


def pictures(results: Sequence[BlockGates]) -> dict[str, Any]:
    """Return pictures of class x channel: the mean gate from black (its least value) to white."""
    import wandb

    images = {}
    for result in results:
        present = np.flatnonzero(result.counts)[:ROWS]
        block, channels = result.block, sampled(len(result.means))
        means = result.class_means[present][:, channels]
        grey = np.nan_to_num(np.clip((means - block.low) / (block.high - block.low), 0, 1))
        pixels = np.kron((255 * grey).round(), np.ones((ROW, ROW))).astype(np.uint8)
        images[f'gates_map/{result.key}'] = wandb.Image(
            pixels, caption=f'{block.title}: {len(present)} classes (rows) x every {channels.step}. channel, '
            f'{block.low:g} black, {block.high:g} white')
    return images
