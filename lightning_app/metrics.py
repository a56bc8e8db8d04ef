"""Exact evaluation: each sample counts once, over any number of processes."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from se_timm.errors import InputError, meant, message, nearest, unknown

from .data.samples import IGNORE

__all__ = ['DATA_WAIT', 'SPEED', 'ClassificationMetrics', 'check_monitors', 'smaller_is_better', 'sum_dtype']

SPEED, DATA_WAIT = 'train/images_per_second', 'train/data_wait'  # as `callbacks.Throughput` logs them
SMALLER = ('loss', 'error', 'data_wait')  # in names of metrics of which less is better


class ClassificationMetrics(Metric):
    """Cross-entropy, top-1 and top-5 over all samples whose label is not `IGNORE`.

    Counts are integers and the loss is summed in float64, so that the result does not depend on how the samples are
    divided into batches and processes. (`MulticlassAccuracy` and `MeanMetric` would do, but for the float32 sum.)

    Args:
        num_classes: Number of classes; with fewer than five, top-5 is top-`num_classes`.
    """

    full_state_update = False
    loss_sum: Tensor
    top1: Tensor
    top5: Tensor
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.k = min(5, num_classes)
        self.add_state('loss_sum', torch.zeros((), dtype=sum_dtype()), dist_reduce_fx='sum')
        for name in ('top1', 'top5', 'count'):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx='sum')

    def _apply(self, *args: Any, **kwargs: Any) -> ClassificationMetrics:
        """Keep the dtype of the sum, also where a Trainer in true half precision converts the module."""
        super()._apply(*args, **kwargs)
        states: Iterable[dict[str, Any]] = (vars(self), self._defaults)
        for state in states:
            state['loss_sum'] = state['loss_sum'].to(sum_dtype())
        return self

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of logits `(N, C)` and labels `(N,)`; nothing waits for the device."""
        check_labels(labels)
        counts = labels != IGNORE
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction='none')
        self.loss_sum += loss.to(self.loss_sum.dtype).sum()
        numbers = ~logits.isnan().any(1, keepdim=True)  # else the first classes are the most probable
        correct = (logits.topk(self.k).indices == labels[:, None]) & numbers
        self.top1 += (correct[:, 0] & counts).sum()
        self.top5 += (correct.any(1) & counts).sum()
        self.count += counts.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `loss`, and `top1` and `top5` from 0 to 100; NaN if nothing was counted."""
        sums = {'loss': self.loss_sum, 'top1': 100 * self.top1, 'top5': 100 * self.top5}
        return {name: value.to(self.loss_sum.dtype) / self.count for name, value in sums.items()}

    def results(self, stage: str) -> dict[str, Tensor]:
        """Return the results under their logged names, such as `val/top1`, and the errors that the paper gives."""
        results = self.compute()
        errors = {f'{name}_error': 100 - results[name] for name in ('top1', 'top5')}
        return {f'{stage}/{name}': value for name, value in {**results, **errors}.items()}


def check_labels(labels: Tensor) -> None:
    """Raise `InputError` unless each image has one class."""
    if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.uint8):
        raise InputError(message(
            f'labels: {labels.dtype} of shape {tuple(labels.shape)}', 'an evaluation compares the most probable class '
            'with that of the image, of which it has one', 'give labels (N,) of int64, or override validation_step and '
            'test_step for several classes an image'))


def check_monitors(callbacks: Iterable[Any], given: Collection[str]) -> None:
    """Say which callbacks wait for a validation metric that is not given: Lightning does it after the first epoch.

    Args:
        callbacks: Those of a training.
        given: The metrics of the validation before it. Others may come with the epochs.

    Raises:
        InputError: For one that is to keep the best.
    """
    for callback in callbacks:
        monitor, kind = getattr(callback, 'monitor', None), type(callback).__name__
        if not isinstance(monitor, str) or not monitor.startswith('val') or monitor in given:
            continue
        if getattr(callback, 'keeps_best', False) and monitor.startswith('val/'):
            raise InputError(unknown(f'{kind}: monitor', monitor, given))
        if getattr(callback, 'strict', True):
            rank_zero_warn(f'{kind} waits for {monitor}, which the validation before the training does not give: '
                           f'{meant(nearest(monitor, given))}Without it the training ends after its first epoch')


def smaller_is_better(metric: str) -> bool:
    """Return whether the best value of a metric is the smallest."""
    return any(word in metric for word in SMALLER)


def sum_dtype() -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64
