"""Batch norm over several processes: the moments of their joint batch, and the sums of its gradients."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['joint_moments', 'joint_sums']


def joint_moments(mu: Tensor, variance: Tensor, values: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance `(C,)` and number of values `()` of the joint batch (Chan et al., 1979).

    The processes may hold batches of different sizes. Every process adds in the order of the ranks, so that all get
    the same bits.

    Args:
        mu: Mean `(C,)` of this process's batch.
        variance: Its biased variance `(C,)`.
        values: Its number of values `()`.
        group: The process group.
    """
    own = torch.cat([mu, variance, values[None]])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    means, variances, counts = torch.stack(every).split([len(mu), len(mu), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    squares = ((variances + (means - mean).square()) * counts).sum(0)
    return mean, squares / total, total


def joint_sums(d_beta: Tensor, d_gamma: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return the sums of two vectors `(C,)` over the processes."""
    both = torch.stack([d_beta, d_gamma])
    dist.all_reduce(both, group=group)
    return both[0], both[1]
