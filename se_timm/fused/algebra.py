"""The end of a residual block in four passes over memory: the equations, in plain torch.

In training the end of a residual block is `u = gamma (x - mu) / sigma + beta` (batch norm), `z = mean_hw(u)`,
`s = excite(z)`, `y = relu(s u + shortcut)`. Written one after the other, forward and backward walk over full-size
tensors 27 to 29 times. Every sum that squeeze-and-excitation needs is one that batch norm takes already, so that these
passes are enough (M = N H W, `g = dy [y > 0]`; indices name the axes of a vector, i the image and c the channel):

| pass | reads | writes | gives |
|---|---|---|---|
| `moments` | x | | `m_ic` and `v_ic`: mean and sum of squared deviations of each channel of each image |
| `apply` | x, shortcut | y | `y = relu(a_ic (x - mu_c) + b_ic + shortcut)`, `a = s gamma / sigma`, `b = s beta` |
| `reduce` | dy, y, x | | `G1_ic = sum_hw g`, `G2_ic = sum_hw g (x - mu_c)` |
| `grad` | dy, y, x | dx, dshortcut | `dx = a_ic g + b_ic - c_c (x - mu_c)`, `dshortcut = g` |

All sums are centred and in float32 (float64 for float64): in the uncentred form a mean of 1e3 costs ten times the
precision. Vectors are `(N, C)` or `(C,)` in that dtype.
"""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['apply', 'combine', 'grad', 'moments', 'reduce', 'sum_dtype']


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over `x`: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations `(N, C)` of each channel of each image of `x (N, C, H, W)`."""
    variance, mean = torch.var_mean(x.to(sum_dtype(x)), (2, 3), correction=0)
    return mean, variance * (x.shape[2] * x.shape[3])


def combine(mean: Tensor, squares: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance `(C,)` over all images, from those of each image (Chan et al., 1979).

    Args:
        mean: Means `(N, C)`.
        squares: Sums of squared deviations `(N, C)`.
        pixels: Pixels of an image, H W.
    """
    total = mean.mean(0)
    between = (mean - total).square().sum(0) * pixels
    return total, (squares.sum(0) + between) / (len(mean) * pixels)


def apply(x: Tensor, shortcut: Tensor | None, mu: Tensor, a: Tensor, b: Tensor, relu: bool) -> Tensor:
    """Return `a (x - mu) + b + shortcut`, through a ReLU if `relu`, in the dtype of `x`.

    Args:
        x: `(N, C, H, W)`.
        shortcut: As `x`, or None.
        mu: `(C,)`.
        a: `(N, C)`.
        b: `(N, C)`.
        relu: Whether negative values become 0.
    """
    y = a[:, :, None, None] * (x - mu[:, None, None]) + b[:, :, None, None]
    if shortcut is not None:
        y = y + shortcut
    return (y.relu() if relu else y).to(x.dtype)


def reduce(dy: Tensor, y: Tensor | None, x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sum_hw g` and `sum_hw g (x - mu)`, both `(N, C)`, where `g` is `dy` where `y` is positive.

    Args:
        dy: Gradient of the output, `(N, C, H, W)`.
        y: The output; None if there was no ReLU.
        x: The input.
        mu: `(C,)`.
    """
    g = masked(dy, y).to(sum_dtype(x))
    return g.sum((2, 3)), (g * (x - mu[:, None, None])).sum((2, 3))


def grad(dy: Tensor, y: Tensor | None, x: Tensor, mu: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and shortcut, `a g + b - c (x - mu)` and `g`, in the dtypes of `x` and `dy`.

    Args:
        dy: As in `reduce`.
        y: As in `reduce`.
        x: As in `reduce`.
        mu: As in `reduce`.
        a: `(N, C)`.
        b: `(N, C)`.
        c: `(C,)`.
    """
    g = masked(dy, y)
    centred = x - mu[:, None, None]
    return (a[:, :, None, None] * g + b[:, :, None, None] - c[:, None, None] * centred).to(x.dtype), g


def masked(dy: Tensor, y: Tensor | None) -> Tensor:
    """Return the gradient before the ReLU whose output is `y`."""
    return dy if y is None else torch.where(y > 0, dy, 0)
