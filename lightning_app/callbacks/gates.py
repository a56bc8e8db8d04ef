"""What the SE gates do, over the validation images."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from se_timm.errors import InputError, message
from se_timm.gates import GateReader, SEBlock, choose_blocks, find_se

from ..analysis import gate_media
from ..analysis.channels import class_titles, default_blocks, default_classes, find_classes, short_titles
from ..analysis.gate_statistics import BlockGates, GateStatistics
from ..logger import WandbLogger
from ..metrics import sum_dtype
from ..network import check_has_network

__all__ = ['Gates']


class Gates(Callback):
    """Logs what the gates of every SE block do over the validation images, for any network that has SE; not in tests.

    Numbers, to all loggers, under `gates/BLOCK/`: `mean`; `std`, over images, averaged over the channels; `near_zero`
    and `near_one`, shares of the gates within 0.1 of zero and one; `class_specific`, the share of the variance over
    images that lies between the classes. To W&B also a histogram of each block, curves by class of some blocks (Fig. 6
    of the paper), pictures of class x channel, and a table. Sums are of whole numbers: the results are those of a
    single process, to the bit, if the gates are.

    Args:
        every_n_epochs: Epochs between two such measurements; the last of `max_epochs` or `max_steps` has one in any
            case, if it is validated.
        by_class: Keep the classes apart; 8 bytes for each class and channel (SE-ResNet-50 on ImageNet: 121 MB).
        blocks: Blocks with curves and pictures, such as `SE_5_*` or `layer4.2`; where not given, the last of each stage
            and all of the last.
        classes: Classes with curves, by name or number; where not given the paper's four, or four others.
    """

    def __init__(
            self, every_n_epochs: int = 1, by_class: bool = True, blocks: list[str] | None = None,
            classes: list[str | int] | None = None) -> None:
        if every_n_epochs < 1:
            raise InputError(message(
                f'Gates: every_n_epochs {every_n_epochs}', 'it is a number of epochs', 'take a number from 1'))
        if not by_class and (given := classes or blocks):
            raise InputError(message(
                f'Gates: by_class false with {"classes" if classes else "blocks"} {given}',
                'curves and pictures need the classes apart', 'leave out one of the two'))
        self.every_n_epochs = every_n_epochs
        self.by_class = by_class
        self.blocks = blocks
        self.classes = classes
        self.reader: GateReader | None = None
        self.statistics: GateStatistics | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the SE blocks, and say so if there are none."""
        self.reader = None
        if stage not in ('fit', 'validate'):
            return
        check_has_network(pl_module, self, 'name', 'class_names')
        blocks = find_se(pl_module.net)
        if not blocks:
            if not pl_module.hparams.get('plain'):  # which is to have none
                rank_zero_info(
                    f'Gates: {pl_module.name} has no SE block of a kind that is known; there is nothing to read')
            return
        self.shown = self._chosen(pl_module, blocks)
        self.reader = GateReader(pl_module.net, blocks)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """See that the classes are there, before any work."""
        self._check_classes(pl_module)

    def _check_classes(self, pl_module: Any) -> None:
        if self.classes is not None:
            self._curves_of(pl_module, ())

    def _curves_of(self, pl_module: Any, counts: Sequence[int]) -> tuple[list[int], list[str]]:
        """Return the labels of the classes with curves, by default some that have images, and what to call all."""
        titles = class_titles(pl_module)
        names = pl_module.class_names or titles
        shown = default_classes(names, counts) if self.classes is None else find_classes(names, titles, self.classes)
        return shown, short_titles(names, titles)

    def _chosen(self, pl_module: Any, blocks: list[SEBlock]) -> list[SEBlock]:
        if self.blocks is None:
            return default_blocks(blocks)
        try:
            return choose_blocks(pl_module.net, self.blocks)
        except ValueError as error:
            raise InputError(f'Gates: {error}') from error

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin to read. In every validation: what torch.compile makes of the network in the first, it keeps."""
        if self.reader is None:
            return
        if trainer.state.fn != TrainerFn.FITTING:  # a fit has looked once, before its start
            self._check_classes(pl_module)
        self.reader.attach()
        if self._is_due(trainer):
            self.statistics = GateStatistics(self.reader.blocks, pl_module.net.num_classes if self.by_class else 1)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        epoch = trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        return epoch % self.every_n_epochs == 0 or is_last

    def on_validation_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
            dataloader_idx: int = 0) -> None:
        """Count the gates of a batch."""
        if self.reader is None or self.statistics is None:
            return
        gates = self.reader.gates
        if missing := [block.name for block in self.reader.blocks if block.name not in gates]:
            rank_zero_info(f'Gates: {missing[0]} was not seen in the validation; gates are not logged')
            self._stop()
            return
        self.statistics.update(gates, batch[1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log what was found."""
        if self.statistics is None:
            return
        self.statistics.reduce(lambda value: trainer.strategy.reduce(value, reduce_op='sum'))
        if results := self.statistics.results():
            pl_module.log_dict({name: torch.tensor(value, dtype=sum_dtype())
                                for name, value in gate_media.scalars(results).items()})
            loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
            if loggers and trainer.is_global_zero:
                media = self._media(results, pl_module, trainer.current_epoch)
                for logger in loggers:
                    # the step under which Lightning logs the numbers
                    logger.log_metrics(media, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _media(self, results: list[BlockGates], pl_module: Any, epoch: int) -> dict[str, Any]:
        media = {**gate_media.histograms(results), **gate_media.table(results, epoch)}
        if not self.by_class:
            return media
        shown = [result for result in results if result.block in self.shown]
        classes, titles = self._curves_of(pl_module, results[0].counts.tolist())
        return {**media, **gate_media.curves(shown, classes, titles), **gate_media.pictures(shown)}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read no more."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Read no more."""
        self._stop()

    def _stop(self) -> None:
        self.statistics = None
        if self.reader is not None:
            self.reader.detach()
