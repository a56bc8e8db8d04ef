"""Smaller training images in the first epochs."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from se_timm.errors import InputError, message

from ..data import ImageDataModule

__all__ = ['ProgressiveSize']


class ProgressiveSize(Callback):
    """Trains on crops that grow from `start_size` to the data's `image_size`, which saves time; evaluation stays.

    The size is a function of the epoch, so that a resumed training has the right one. In the manner of FFCV's recipes
    for ImageNet (https://github.com/libffcv/ffcv-imagenet). With `model.compile` the network is compiled a second time
    when the size first changes, then for all sizes.

    Args:
        start_size: Side of the crops in pixels, up to `start_epoch`.
        start_epoch: Epoch from which on they grow, linearly.
        end_epoch: First epoch with crops of `data.image_size`.
        multiple: Sides between the two are multiples of it.
    """

    def __init__(self, start_size: int = 128, start_epoch: int = 0, end_epoch: int = 10, multiple: int = 32) -> None:
        self.start_size, self.start_epoch, self.end_epoch = start_size, start_epoch, end_epoch
        self.multiple = multiple
        for name, above in (('start_size', 0), ('multiple', 0), ('end_epoch', start_epoch)):
            if getattr(self, name) <= above:
                raise InputError(message(
                    f'ProgressiveSize: {name} {getattr(self, name)}',
                    'sizes grow from start_epoch to a later end_epoch',
                    'take start_size and multiple from 1, and end_epoch after start_epoch'))
        self.end_size = 0

    def size(self, epoch: int) -> int:
        """Return the side of the crops in an epoch."""
        done = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        if done <= 0:
            return self.start_size
        if done >= 1:
            return self.end_size
        size = self.start_size + done * (self.end_size - self.start_size)
        return min(max(round(size / self.multiple) * self.multiple, self.start_size), self.end_size)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data the sizes, and say them."""
        if stage != 'fit':
            return
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise InputError(message(
                f'ProgressiveSize with trainer.overfit_batches: {trainer.overfit_batches}',  # type: ignore[attr-defined]
                'Lightning reads the images in order then, all of one size', 'leave out one of the two'))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageDataModule) or data.train_size <= self.start_size:
            size = data.train_size if isinstance(data, ImageDataModule) else 'unknown'
            raise InputError(message(
                f'ProgressiveSize: start_size {self.start_size}', f'the size of the training images is {size}',
                'take a smaller start_size, or a larger data.image_size, of a data module of lightning_app'))
        self.end_size = data.train_size
        data.size_of_epoch = self.size
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None  # -1 and None: without end
        rank_zero_info('training images: ' + ', '.join(
            f'{self.size(epoch)} px from epoch {epoch}' for epoch in range(self.end_epoch + 1)[:epochs]
            if epoch == 0 or self.size(epoch) != self.size(epoch - 1))
            + (f'; {self.end_size} px are not reached, as max_epochs is {epochs}'
               if epochs and self.size(epochs - 1) < self.end_size else '')
            + ('; the network is compiled again at the first change' if pl_module.hparams.get('compile') else ''))
