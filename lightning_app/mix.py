"""Mixup and CutMix of the images of a batch, on the device."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.data import Mixup
from torch import Tensor

from se_timm.errors import InputError, message

__all__ = ['Mix', 'build_mixup', 'check_mix']


@dataclass(frozen=True)
class Mix:
    """Mixed images and targets; off by default.

    Attributes:
        mixup: Alpha of mixup (https://arxiv.org/abs/1710.09412), such as 0.2; 0 for none.
        cutmix: Alpha of CutMix (https://arxiv.org/abs/1905.04899), such as 1.0; 0 for none.
        prob: Probability that a batch is mixed, or in the other modes a pair or an image.
        switch_prob: Probability of CutMix where there are both.
        mode: `batch` mixes all images of a batch in the same way; `pair` and `elem` draw anew for each pair or image,
            one after another, and make the host wait for the device at each step.
        off_epoch: First epoch without; none by default.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal['batch', 'pair', 'elem'] = 'batch'
    off_epoch: int | None = None

    @property
    def on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


def check_mix(mix: Mix) -> None:
    """Raise `InputError` for settings that mean nothing, or have no effect."""
    for name in ('mixup', 'cutmix'):
        if getattr(mix, name) < 0:
            raise InputError(message(
                f'model.mix.{name}: {getattr(mix, name)}', 'it is the parameter of a Beta distribution',
                'take a number above 0, such as 0.2, or 0 for none'))
    for name in ('prob', 'switch_prob'):
        if not 0 <= getattr(mix, name) <= 1:
            raise InputError(message(
                f'model.mix.{name}: {getattr(mix, name)}', 'it is a probability', 'take a number from 0 to 1'))
    if (mix.on and not mix.prob) or (not mix.on and mix != Mix()):
        raise InputError(message(
            f'model.mix: {mix}', 'nothing is mixed, as ' + ('prob is 0' if mix.on else 'mixup and cutmix are 0'),
            'give model.mix.mixup or model.mix.cutmix and a prob above 0, or leave model.mix out'))
    if mix.off_epoch is not None and mix.off_epoch < 1:
        raise InputError(message(
            f'model.mix.off_epoch: {mix.off_epoch}', 'it is the first epoch without, counted from 0, and nothing would '
            'be mixed', 'take a number from 1, or leave model.mix out'))
    if mix.switch_prob != Mix.switch_prob and not (mix.mixup and mix.cutmix):
        raise InputError(message(
            f'model.mix.switch_prob: {mix.switch_prob} with mixup {mix.mixup} and cutmix {mix.cutmix}',
            'there is nothing to switch between', 'give both, or leave switch_prob out'))


def check_even(count: int) -> None:
    """Raise `InputError` for a batch of one process that is not even."""
    if count % 2:
        raise InputError(message(
            f'model.mix with {count} images in a batch of each process', 'timm mixes them in pairs',
            'take a data.batch_size that gives each process an even number; with a loader of your own, drop_last=True'))


class EvenMixup(Mixup):
    """timm's mixing, with a message for users; in a copy, where a batch may be a view of all images."""

    def __init__(self, in_place: bool, **options: Any) -> None:
        super().__init__(**options)
        self.in_place = in_place

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x (N, 3, H, W)`, mixed, and targets `(N, num_classes)` of the labels `target (N,)`."""
        check_even(len(x))
        return super().__call__(x if self.in_place else x.clone(), target)


def build_mixup(mix: Mix, num_classes: int, smoothing: float, batch_size: int | None) -> Mixup | None:
    """Return timm's mixing of images `(N, 3, H, W)` and labels `(N,)` to `(N, num_classes)`; None if off.

    It draws from NumPy's generator, which is seeded at each step.

    Args:
        mix: The settings.
        num_classes: Number of classes.
        smoothing: Label smoothing of the targets.
        batch_size: Images in a batch of one process, which are mixed in place; None for a loader of the user's.

    Raises:
        InputError: If they are not an even number.
    """
    if not mix.on:
        return None
    check_even(batch_size or 0)
    return EvenMixup(
        in_place=batch_size is not None, mixup_alpha=mix.mixup, cutmix_alpha=mix.cutmix, prob=mix.prob,
        switch_prob=mix.switch_prob, mode=mix.mode, label_smoothing=smoothing, num_classes=num_classes)
