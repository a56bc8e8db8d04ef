"""The end of a residual block in four passes over memory: the equations, in plain torch.

In training the end of a residual block is `u = gamma (x - mu) / sigma + beta` (batch norm), `z = mean_hw(u)`,
`s = excite(z)`, `y = relu(s u + shortcut)`. Written one after the other, forward and backward walk over full-size
tensors 27 to 29 times. Every sum that squeeze-and-excitation needs is one that batch norm takes already, so that these
eleven are enough (M = N H W, `g = dy [y > 0]`; indices name the axes of a vector, i the image and c the channel):

| pass | reads | writes | gives |
|---|---|---|---|
| `moments` | x | | `m_ic` and `v_ic`: mean and sum of squared deviations of each channel of each image |
| `apply` | x, shortcut | y | `y = relu(a_ic (x - mu_c) + b_ic + shortcut)`, `a = s gamma / sigma`, `b = s beta` |
| `reduce` | dy, y, x | g | `G1_ic = sum_hw g`, `G2_ic = sum_hw g (x - mu_c)`; `g` is the gradient of the shortcut |
| `grad` | g, x | dx | `dx = a_ic g + b_ic - c_c (x - mu_c)` |

A shortcut that is a batch norm itself (of a projection) joins: `apply` normalises it while it reads it, so that the
normalised shortcut is never written.

All sums are centred and in float32 (float64 for float64): in the uncentred form a mean of 1e3 costs ten times the
precision. Vectors are `(N, C)` or `(C,)` in that dtype.
"""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['apply', 'cast', 'combine', 'grad', 'moments', 'reduce', 'sum_dtype']


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over `x`: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` in that dtype.

    As `value.to(dtype)`, which gives the tensor itself where there is nothing to do. In an autograd function that torch
    2.11 compiles, such a tensor is another output of the function as well, and gradients of the first one are lost.
    """
    return value if value.dtype == dtype else value.to(dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations `(N, C)` of each channel of each image of `x (N, C, H, W)`."""
    variance, mean = torch.var_mean(cast(x, sum_dtype(x)), (2, 3), correction=0)
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


def apply(
        x: Tensor, shortcut: Tensor | None, mu: Tensor, a: Tensor, b: Tensor, shortcut_mu: Tensor | None,
        shortcut_scale: Tensor | None, relu: bool,
) -> Tensor:
    """Return `a (x - mu) + b + shortcut`, through a ReLU if `relu`, in the dtype of `x`.

    Args:
        x: `(N, C, H, W)`.
        shortcut: As `x`, or None.
        mu: `(C,)`.
        a: `(N, C)`.
        b: `(N, C)`.
        shortcut_mu: `(C,)`; where it is given, `shortcut_scale (shortcut - shortcut_mu)` takes the shortcut's place.
        shortcut_scale: `(C,)`, with `shortcut_mu`.
        relu: Whether negative values become 0.
    """
    y = a[:, :, None, None] * (x - mu[:, None, None]) + b[:, :, None, None]
    if shortcut is not None and shortcut_mu is not None and shortcut_scale is not None:
        y = y + shortcut_scale[:, None, None] * (shortcut - shortcut_mu[:, None, None])
    elif shortcut is not None:
        y = y + shortcut
    return cast(y.relu() if relu else y, x.dtype)


def reduce(dy: Tensor, y: Tensor | None, x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `sum_hw g` and `sum_hw g (x - mu)`, both `(N, C)`, and `g`, which is `dy` where `y` is positive, else 0.

    Args:
        dy: Gradient of the output, `(N, C, H, W)`.
        y: The output; None if there was no ReLU, and `g` is then empty, `(0,)`: it would be `dy` itself.
        x: The input.
        mu: `(C,)`.
    """
    g = dy if y is None else torch.where(y > 0, dy, 0)
    wide = cast(g, sum_dtype(x))
    sums = wide.sum((2, 3)), (wide * (x - mu[:, None, None])).sum((2, 3))
    return *sums, dy.new_empty(0) if y is None else g


def grad(g: Tensor, x: Tensor, mu: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the gradient of the input, `a g + b - c (x - mu)`, in the dtype of `x`.

    Args:
        g: Gradient before the ReLU, see `reduce`.
        x: The input.
        mu: `(C,)`.
        a: `(N, C)`.
        b: `(N, C)`.
        c: `(C,)`.
    """
    centred = x - mu[:, None, None]
    return cast(a[:, :, None, None] * g + b[:, :, None, None] - c[:, None, None] * centred, x.dtype)
