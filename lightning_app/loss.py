"""The training loss by timm's factory, from settings that fit in YAML."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.loss import BinaryCrossEntropy, create_classification_loss
from timm.loss.class_weights import compute_class_weights
from torch import nn
from torch.nn import functional as F

from se_timm.errors import InputError, message

__all__ = ['Loss', 'build_loss', 'check_loss']


@dataclass(frozen=True)
class Loss:
    """The training loss; evaluation always uses plain cross-entropy.

    Attributes:
        name: `ce` (cross-entropy), `bce` (one binary cross-entropy a class), `asl` (asymmetric), `poly` (Poly-1), or
            `jsd` (cross-entropy and Jensen-Shannon divergence of the versions that `data.augment.splits` makes).
        smoothing: Label smoothing.
        bce_sum: Sum the binary cross-entropies over the classes, in place of their mean.
        bce_threshold: Make mixed targets 1 above it and 0 below (`bce`).
        class_weights: A weight for the images of each class (`ce`, `bce`), or `balanced`: inverse to the number of its
            training images. Their scale is of no consequence: it becomes 1 on average over the training images.
    """

    name: Literal['ce', 'bce', 'asl', 'poly', 'jsd'] = 'ce'
    smoothing: float = 0.0
    bce_sum: bool = False
    bce_threshold: float | None = None
    class_weights: list[float] | Literal['balanced'] | None = None


def check_loss(loss: Loss, mixed: bool) -> None:
    """Raise `InputError` for settings that contradict each other; `build_loss` looks at those that need the data."""
    if not 0 <= loss.smoothing < 1:
        raise InputError(message(
            f'model.loss.smoothing: {loss.smoothing}', 'it is the share of the target that goes to all classes',
            'take a number from 0 up to, but not, 1, such as 0.1'))
    if mixed and loss.name in ('asl', 'jsd'):
        raise InputError(message(
            f'model.loss.name: {loss.name} with model.mix', 'it takes the labels of images that are not mixed',
            'leave model.mix out, or take the loss ce, bce or poly'))
    if loss.name != 'bce' and (loss.bce_sum or loss.bce_threshold is not None):
        raise InputError(message(
            f'model.loss.bce_sum or bce_threshold with the loss {loss.name}', 'they have no effect on it',
            'take model.loss.name: bce, or leave them out'))
    if loss.class_weights is not None and loss.name not in ('ce', 'bce'):
        raise InputError(message(
            f'model.loss.class_weights with the loss {loss.name}', 'it takes no weights of classes',
            'take model.loss.name: ce or bce, or leave them out'))


def build_loss(
        loss: Loss, num_classes: int, mixed: bool = False, splits: int = 0, labels: Sequence[int] | None = None,
) -> nn.Module:
    """Return the training criterion of logits `(N, num_classes)` and labels `(N,)`, or targets `(N, num_classes)`.

    Args:
        loss: The settings.
        num_classes: Number of classes.
        mixed: Targets are soft, and smoothed already, see `Mix`.
        splits: Versions of each image in a batch, see `Augment.splits`.
        labels: Of all training images, for weights of classes.

    Raises:
        InputError: For settings that contradict each other or the data.
    """
    check_loss(loss, mixed)
    if (loss.name == 'jsd') != (splits > 1):
        raise InputError(message(
            f'model.loss.name: {loss.name} with data.augment.splits: {splits}',
            'jsd compares versions of images, of which there must be two or more, and no other loss knows them',
            'take both, with splits 3 and auto_augment augmix-m3-w3 as published, or neither'))
    check_threshold(loss, num_classes)
    weight = class_weights(loss, num_classes, labels)
    # timm's factory has no weights for `ce`, and for `bce` those of outputs, not of images
    if weight is not None and loss.name == 'ce':
        return WeightedCrossEntropy(weight, loss.smoothing, mixed)
    if weight is not None:
        return WeightedBinaryCrossEntropy(
            weight, loss.smoothing, mixed, loss.bce_sum, target_threshold=loss.bce_threshold)
    options: dict[str, Any] = {'jsd_splits': splits} if splits else {}
    return create_classification_loss(
        loss.name, smoothing=loss.smoothing, soft_targets=mixed, bce_sum=loss.bce_sum,
        bce_target_thresh=loss.bce_threshold, **options)


def check_threshold(loss: Loss, num_classes: int) -> None:
    """Raise `InputError` for a threshold which the targets of all classes are above, or those of none."""
    least = loss.smoothing / num_classes
    most = 1 - loss.smoothing + least
    if loss.bce_threshold is not None and not least <= loss.bce_threshold < most:
        raise InputError(message(
            f'model.loss.bce_threshold: {loss.bce_threshold}',
            f'with a smoothing of {loss.smoothing:g}, targets are {least:g} and {most:g}: all would become the same',
            f'take a number from {least:g} and below {most:g}, such as 0.2'))


class WeightedLoss(nn.Module):
    """A loss of images that have the weights of their classes; mixed targets are smoothed already."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, smoothing: float, mixed: bool) -> None:
        super().__init__()
        self.register_buffer('weight', weight)
        self.smoothing = smoothing
        self.smoothed = smoothing * mixed

    def weighted(self, target: torch.Tensor) -> torch.Tensor:
        """Return the share of each class in the images of targets `(N, num_classes)`, times its weight."""
        return (target - self.smoothed / target.shape[-1]) / (1 - self.smoothed) * self.weight


class WeightedCrossEntropy(WeightedLoss):
    """The mean over the images of their smoothed cross-entropies, each times the weight of its class.

    Torch divides by the sum of the weights, but not of soft targets: mixing, and how a step is divided into batches,
    would change the scale of the gradients. And it weighs the targets after smoothing: what that gives to a class of a
    large weight could become the largest target.
    """

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch."""
        if target.ndim == 1:
            losses = F.cross_entropy(logits, target, reduction='none', label_smoothing=self.smoothing)
            return (self.weight[target.long().clamp(min=0)] * losses).mean()  # of -100 the loss is 0
        weighted = self.weighted(target)
        return F.cross_entropy(logits, torch.lerp(weighted, weighted.mean(-1, keepdim=True), self.smoothing))


class WeightedBinaryCrossEntropy(WeightedLoss):
    """The mean over the images of their binary cross-entropies, each times the weight of its class, or classes."""

    def __init__(
            self, weight: torch.Tensor, smoothing: float, mixed: bool, sum_classes: bool, **options: Any) -> None:
        super().__init__(weight, smoothing, mixed)
        self.sum_classes = sum_classes
        self.entropies = BinaryCrossEntropy(reduction='none', smoothing=smoothing, **options)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch."""
        entropies = self.entropies(logits, target)
        weight = self.weight[target.long()] if target.ndim == 1 else self.weighted(target).sum(-1)
        return (weight * (entropies.sum(-1) if self.sum_classes else entropies.mean(-1))).mean()


def class_weights(loss: Loss, num_classes: int, labels: Sequence[int] | None) -> torch.Tensor | None:
    """Return the weights of the classes, 1 on average over the training images where `labels` tell; None for none."""
    if loss.class_weights is None:
        return None
    if loss.class_weights == 'balanced':
        if labels is None:
            raise InputError(message(
                'model.loss.class_weights: balanced', 'the labels of the training images are not known to the model',
                'use a data module of lightning_app, or give a number for each class'))
        counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
        return of_mean_one(compute_class_weights(counts, len(labels), method='inv_freq')[1], labels)
    if len(loss.class_weights) != num_classes:
        raise InputError(message(
            f'model.loss.class_weights: {len(loss.class_weights)} numbers', f'there are {num_classes} classes',
            'give a number from 0 for each, in the order of the sorted names, or say balanced'))
    if not all(0 <= weight < math.inf for weight in loss.class_weights) or not any(loss.class_weights):
        wrong = [weight for weight in loss.class_weights if not 0 <= weight < math.inf]
        raise InputError(message(
            f'model.loss.class_weights: {wrong[0] if wrong else "all 0"}', 'the loss would not be a number, or grow as '
            'the network learns', 'give finite numbers from 0, not all of them 0, or say balanced'))
    return of_mean_one(torch.tensor(loss.class_weights, dtype=torch.float32), labels)


def of_mean_one(weights: torch.Tensor, labels: Sequence[int] | None) -> torch.Tensor:
    """Return the weights scaled so that they are 1 on average over `labels`, and the learning rate stays what it is."""
    mean = 1.0 if labels is None else float(weights[torch.as_tensor(labels)].mean())
    if mean == 0:
        raise InputError(message(
            'model.loss.class_weights: 0 for all classes of which there are training images',
            'nothing would be learned', 'give a class with images a number above 0, or say balanced'))
    return weights / mean
