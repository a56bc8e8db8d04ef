"""The end of a training in three lines."""
from __future__ import annotations

import os
import shlex

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..checkpoints import describe
from ..data.base import data_of
from ..resume import begins_anew
from ..verbs import PROG

__all__ = ['ResultLine']


class ResultLine(Callback):
    """Prints the best validation result, where its checkpoint lies, and the command that evaluates it."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.validated = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the result of another training."""
        self.validated = not begins_anew(trainer)  # or it may be
        if begins_anew(trainer):
            self.best = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the result if it is the best so far."""
        metrics = trainer.callback_metrics
        self.validated |= not trainer.sanity_checking
        if trainer.sanity_checking or 'val/top1' not in metrics:
            return
        if metrics['val/top1'] > self.best.get('top1', -1.0):  # never if it is NaN
            self.best = {'top1': float(metrics['val/top1']), 'epoch': trainer.current_epoch}
            if 'val/top5' in metrics:
                self.best['top5'] = float(metrics['val/top5'])

    def state_dict(self) -> dict[str, float]:
        """Return the best result, which a resumed training goes on with."""
        return dict(self.best)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over the best result of the training that is resumed."""
        self.best = dict(state_dict)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the result."""
        unreadable = count_unreadable(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if not self.best:
            if trainer.enable_validation and not self.validated:
                print('\nbest: none, as the training ended before a validation')
            return
        path = getattr(trainer.checkpoint_callback, 'best_model_path', '')
        chosen = getattr(trainer.checkpoint_callback, 'monitor', None)  # else the file is the last one
        best = (told_by(path) if chosen else {}) or self.best
        accuracies = ', '.join(f'top-{each[3:]} {best[each]:.2f} %' for each in ('top1', 'top5') if each in best)
        print(f'\nbest: {accuracies}, epoch {best["epoch"]}')
        if unreadable:
            print(f'unreadable training images replaced, in all epochs: {unreadable} (named in the log)')
        if path:
            program = getattr(pl_module, 'program', PROG)
            print(f'checkpoint: {path}\nevaluate:   {program} validate --ckpt_path {shlex.quote(path)}')


def told_by(path: str) -> dict[str, float]:
    """Return the result that was written into a checkpoint, which may be the best by another metric."""
    told = describe(path) if os.path.isfile(path) else {}
    return {'epoch': told['epoch'], 'top1': told['val/top1'], 'top5': told['val/top5']} if 'val/top1' in told else {}


def count_unreadable(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return how often an unreadable image was replaced in this training, over all processes. Collective."""
    samples = getattr(data_of(trainer), 'training', None)
    count = getattr(samples, 'unreadable', torch.zeros((), dtype=torch.int64))
    return int(trainer.strategy.reduce(count.to(pl_module.device), reduce_op='sum'))
