"""The best checkpoints of a training."""
from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ..folders import has_own_folder
from ..metrics import smaller_is_better
from ..resume import begins_anew

__all__ = ['BestCheckpoint']

SCORES = ('best_k_models', 'kth_best_model_path', 'kth_value', 'best_model_score', 'best_model_path', 'current_score')
OF_VALIDATION = ('val', 'gates/')  # as its metrics begin
DETAILS = '-{epoch}-{step}'  # of one among several
PATHS = ('kth_best_model_path', 'best_model_path', 'last_model_path')


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best by a validation metric: Lightning's `ModelCheckpoint`, with a name that does not change.

    If the disk is full, the best so far stays what it was.

    Args:
        monitor: The metric.
        mode: `max` if more is better, `min` if less is; by default as the metric's name says.
        keep: How many are kept; one is `best.ckpt`, several are `best-epoch=N-step=M.ckpt`. Beside those of another
            training the name begins with `best-v1`. Of two such callbacks the second has its metric in the name, such
            as `best-val-loss.ckpt`.
    """

    keeps_best = True  # for `check_monitors`

    def __init__(
            self, monitor: str = 'val/top1', mode: Literal['max', 'min'] | None = None, keep: int = 1) -> None:
        super().__init__(
            monitor=monitor, mode=mode or ('min' if smaller_is_better(monitor) else 'max'), save_top_k=keep,
            enable_version_counter=False)
        self.filename = f'best{self._details}'
        self.validated_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take a name of its own beside others that come before: they would overwrite each other's files."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._take_other_name(callbacks[:callbacks.index(self)])
        super().setup(trainer, pl_module, stage)

    def _take_other_name(self, others: Iterable[Callback]) -> None:
        taken = {each.filename for each in others if isinstance(each, BestCheckpoint)}
        words = [str(self.monitor).replace('/', '-'), self.mode, *map(str, range(2, 3 + len(taken)))]
        while self.filename in taken:
            self.filename = str(self.filename).replace('best', f'best-{words.pop(0)}', 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the best of another training in the folder what it is; on the command line each has its own folder."""
        if begins_anew(trainer):
            self._forget()
        if self.best_model_path:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # new in a training that goes on, it finds the files of those behind it
        self._take_other_name(each for each in callbacks if each is not self)
        own = has_own_folder(trainer)  # as the first process sees it
        self.filename = trainer.strategy.broadcast(self.filename if own else self._free_name())

    def _forget(self) -> None:
        worst = float('inf') if self.mode == 'min' else float('-inf')
        self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, '', ''
        self._last_global_step_saved = 0  # else nothing is saved at the step at which another training ended
        self.kth_value, self.best_model_score, self.current_score = torch.tensor(worst), None, None

    @property
    def _details(self) -> str:
        return DETAILS if self.save_top_k != 1 else ''

    def _free_name(self) -> str:
        """Return a name under which no other training has its best, in a folder that several have."""
        name = str(self.filename).removesuffix(self._details)
        names = itertools.chain([name], (f'{name}-v{number}' for number in itertools.count(1)))
        folder, end = glob.escape(str(self.dirpath)), ('-epoch=*-step=*' if self._details else '') + self.FILE_EXTENSION
        return next(each for each in names if not glob.glob(os.path.join(folder, each + end))) + self._details

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state, the latest score included, which Lightning leaves out, also in a run that was moved."""
        super().load_state_dict(self.moved(state_dict))
        self.current_score = state_dict['current_score']
        if self.best_model_path:
            self.filename = re.sub(r'-epoch=\d+-step=\d+$', '', Path(self.best_model_path).stem) + self._details

    def moved(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state with the folder that the run has now, or that of a new one if its files are not there.

        Lightning forgets the scores where the folder has another name, and would write over the best.
        """
        if state['dirpath'] == self.dirpath:
            return state
        files = {path: os.path.join(self.dirpath or '', os.path.basename(path)) for path in (
            *state['best_k_models'], *(state[name] for name in PATHS)) if path}
        if not all(map(os.path.isfile, files.values())):
            return self.state_dict()
        return {**state, 'dirpath': self.dirpath, **{name: files.get(state[name], '') for name in PATHS},
                'best_k_models': {files[path]: score for path, score in state['best_k_models'].items()}}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the step whose weights have the scores of now."""
        self.validated_step = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Leave out the end of a training by `trainer.max_steps`, for which Lightning has the scores of before."""
        of_validation = trainer.enable_validation and str(self.monitor).startswith(OF_VALIDATION)
        if self.validated_step == trainer.global_step or not of_validation:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before: dict[str, Any] = {name: getattr(self, name) for name in SCORES}
        before['best_k_models'] = dict(self.best_k_models)
        super()._update_best_and_save(current, trainer, monitor_candidates)
        failed = getattr(trainer.strategy.checkpoint_io, 'failed', None)  # known to rank 0, which writes
        if trainer.strategy.broadcast(failed is not None):
            for name, value in before.items():
                setattr(self, name, value)
