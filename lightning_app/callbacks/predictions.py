"""Predictions as a CSV file."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import distributed

from se_timm.errors import InputError, check_file, message

from ..analysis.channels import class_titles
from ..data.base import data_of
from ..data.samples import IGNORE, PredictionSamples

__all__ = ['PredictionWriter']


class PredictionWriter(BasePredictionWriter):
    """Writes the most probable classes of each image, best first: `image, class1, probability1, class2, ...`.

    One row an image, in the order of the folder, for any number of processes. An image that cannot be read has the row
    `image, (unreadable)`.

    Args:
        path: The CSV file.

    Raises:
        InputError: If the file cannot be written, or the names of the images are not known; at the end, if not one
            image could be read.
    """

    def __init__(self, path: str = 'predictions.csv') -> None:
        super().__init__(write_interval='batch')
        self.path = Path(path)
        self.rows: dict[int, list[tuple[int, float]]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows of an earlier prediction, and see that these can be written."""
        self.rows = {}
        if getattr(data_of(trainer), 'prediction', None) is None:
            raise InputError(message(
                'trainer.callbacks: PredictionWriter', 'the names of images come from a data module of lightning_app',
                'give predict the data module, datamodule=data, or leave the callback out'))
        if trainer.is_global_zero:
            check_file('PredictionWriter: path', self.path, 'predictions.csv')

    def write_on_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, prediction: dict[str, torch.Tensor],
            batch_indices: Sequence[int] | None, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Keep a batch of predictions (a few numbers an image)."""
        columns = (prediction[name].tolist() for name in ('index', 'label', 'probability'))
        for index, labels, probabilities in zip(*columns, strict=True):
            if index >= 0:
                self.rows[index] = list(zip(labels, probabilities, strict=True))
            elif index != IGNORE:
                self.rows[PredictionSamples.position(index)] = []

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all processes and write them."""
        rows = self.rows
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            distributed.all_gather_object(gathered, rows)
            rows = {index: row for part in gathered for index, row in part.items()}
        if trainer.is_global_zero:
            self._write(rows, trainer, pl_module)
        if rows and not any(rows.values()):
            raise InputError(message(
                f'data.images: {data_of(trainer).images}',
                f'none of {len(rows)} images could be read', 'look at the log for the reasons; they may be damaged, '
                'or no images'))

    def _write(self, rows: dict[int, list[tuple[int, float]]], trainer: Trainer, pl_module: LightningModule) -> None:
        source = data_of(trainer).prediction.source
        titles = class_titles(pl_module)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        width = max((len(row) for row in rows.values()), default=0)
        # names of files need not be text
        with open(self.path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            writer = csv.writer(file)
            writer.writerow(['image'] + [f'{what}{rank}' for rank in range(1, width + 1)
                                         for what in ('class', 'probability')])
            for index in sorted(rows):
                cells = [cell for label, probability in rows[index]
                         for cell in (titles[label], f'{probability:.6f}')]
                writer.writerow([source.name(index)] + (cells or ['(unreadable)']))
        unreadable = sum(not row for row in rows.values())
        print(f'predictions of {len(rows) - unreadable} images: {self.path}'
              + (f'; {unreadable} could not be read' if unreadable else ''))
