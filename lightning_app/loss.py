"""The training loss by timm's factory, from settings that fit in YAML."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.loss import create_classification_loss
from torch import nn

from se_timm.errors import InputError, message

__all__ = ['Loss', 'build_loss']


@dataclass(frozen=True)
class Loss:
    """The training loss; evaluation always uses plain cross-entropy.

    Attributes:
        name: `ce` (cross-entropy) or `bce` (one binary cross-entropy a class).
        smoothing: Label smoothing.
    """

    name: Literal['ce', 'bce'] = 'ce'
    smoothing: float = 0.0


def build_loss(loss: Loss) -> nn.Module:
    """Return timm's training criterion of logits `(N, C)` and labels `(N,)`.

    Raises:
        InputError: For a smoothing that is no share.
    """
    if not 0 <= loss.smoothing < 1:
        raise InputError(message(
            f'model.loss.smoothing: {loss.smoothing}', 'it is the share of the target that goes to all classes',
            'take a number from 0 up to, but not, 1, such as 0.1'))
    return create_classification_loss(loss.name, smoothing=loss.smoothing)
