"""Mixup and CutMix of the images of a batch, on the device."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.data import Mixup

from se_timm.errors import InputError, message

__all__ = ['Mix', 'build_mixup', 'check_mix']


@dataclass(frozen=True)
class Mix:
    """Mixed images and targets; off by default.

    Attributes:
        mixup: Alpha of mixup (https://arxiv.org/abs/1710.09412), such as 0.2; 0 for none.
        cutmix: Alpha of CutMix (https://arxiv.org/abs/1905.04899), such as 1.0; 0 for none.
        prob: Probability that a batch is mixed.
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
    if not mix.on and mix != Mix():
        raise InputError(message(
            f'model.mix: {mix}', 'nothing is mixed, as mixup and cutmix are 0',
            'give model.mix.mixup or model.mix.cutmix, or leave model.mix out'))


def build_mixup(mix: Mix, num_classes: int, smoothing: float, batch_size: int | None) -> Mixup | None:
    """Return timm's mixing of images `(N, 3, H, W)`, in place, and labels `(N,)` to `(N, num_classes)`; None if off.

    It draws from NumPy's generator, which is seeded at each step.

    Args:
        mix: The settings.
        num_classes: Number of classes.
        smoothing: Label smoothing of the targets.
        batch_size: Images in a batch of one process, where it is known.

    Raises:
        InputError: If they are not an even number.
    """
    if not mix.on:
        return None
    if batch_size is not None and batch_size % 2:
        raise InputError(message(
            f'model.mix with {batch_size} images in a batch of each process', 'timm mixes them in pairs',
            'take a data.batch_size that gives each process an even number'))
    return Mixup(
        mixup_alpha=mix.mixup, cutmix_alpha=mix.cutmix, prob=mix.prob, switch_prob=mix.switch_prob, mode=mix.mode,
        label_smoothing=smoothing, num_classes=num_classes)
