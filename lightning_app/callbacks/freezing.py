"""Parts of a network that do not train for a time: batch norm at the end, the backbone at the start."""
from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from se_timm.errors import InputError, message

from ..network import check_has_network

__all__ = ['Freeze', 'FreezeBackbone', 'FreezeBatchNorm']


class Freeze(Callback):
    """Base: parts of the network do not train in some epochs.

    Gradients of frozen parameters are dropped before the optimiser's step, in place of `requires_grad = False`, which
    DistributedDataParallel does not allow to change once it is set up.
    """

    by_hand: Set[_BatchNorm] | None = None

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether it is frozen in `epoch`."""
        raise NotImplementedError

    def parameters(self, net: Any) -> Iterable[nn.Parameter]:
        """Return what does not train."""
        raise NotImplementedError

    def norms(self, net: nn.Module) -> list[_BatchNorm]:
        """Return the batch norms whose statistics do not change."""
        return [module for module in net.modules() if isinstance(module, _BatchNorm)]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note which batch norms were set to their statistics by hand."""
        check_has_network(pl_module, self)
        self.by_hand = {norm for norm in self.norms(pl_module.net) if not norm.training}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Freeze where a training goes on within an epoch, whose start has no hook."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set batch norm to its statistics, or back to those of the batches; a validation leaves that as it is."""
        every = [each for each in trainer.callbacks if isinstance(each, Freeze)]  # type: ignore[attr-defined]
        frozen = {norm for each in every if each.frozen(trainer, trainer.current_epoch)
                  for norm in each.norms(pl_module.net)} | (self.by_hand or set())
        for norm in self.norms(pl_module.net):
            norm.train(norm not in frozen)  # another callback may still freeze it

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Let all of it train again: from Python, another training may follow."""
        if self.by_hand is None:  # the training was refused before it began
            return
        for norm in self.norms(pl_module.net):
            norm.train(norm not in self.by_hand)
        self.by_hand = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let all of it train again."""
        self.on_fit_end(trainer, pl_module)

    def on_before_optimizer_step(
            self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Drop the gradients."""
        if self.frozen(trainer, trainer.current_epoch):
            for parameter in self.parameters(pl_module.net):
                parameter.grad = None  # the optimiser leaves it alone: no decay, no momentum


class FreezeBatchNorm(Freeze):
    """Fixes the statistics of batch norm in the last epochs, as for SENet-154, which makes training and test agree.

    Args:
        last_epochs: How many.
        affine: Fix its weights and biases too.
        from_epoch: First of them, counted from 0, in place of `last_epochs`.
    """

    def __init__(self, last_epochs: int | None = None, affine: bool = False, from_epoch: int | None = None) -> None:
        if (last_epochs is None) == (from_epoch is None):
            raise InputError(message(
                f'FreezeBatchNorm: last_epochs {last_epochs}, from_epoch {from_epoch}',
                'each says by itself which epochs', 'give one of them, such as last_epochs: 5'))
        if (last_epochs is not None and last_epochs < 1) or (from_epoch is not None and from_epoch < 0):
            raise InputError(message(
                f'FreezeBatchNorm: last_epochs {last_epochs}, from_epoch {from_epoch}', 'nothing would be frozen',
                'take last_epochs from 1, or from_epoch from 0, or leave the callback out'))
        self.last_epochs, self.affine, self.from_epoch = last_epochs, affine, from_epoch

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what would freeze nothing, and warn of what freezes batch norm before it has seen an image."""
        end = trainer.max_epochs or 0
        if stage != 'fit' or getattr(trainer, 'fast_dev_run', False):
            return
        if 0 < end <= (self.from_epoch or 0):
            raise InputError(message(
                f'FreezeBatchNorm: from_epoch {self.from_epoch}',
                f'the training has {end} epochs, counted from 0, and nothing would be frozen',
                f'take a number up to {end - 1}, or leave the callback out'))
        if self.frozen(trainer, 0) and hasattr(pl_module, 'net') and not any(
                norm.running_mean.any() for norm in self.norms(pl_module.net) if norm.running_mean is not None):
            rank_zero_warn('FreezeBatchNorm: all epochs of this training are among the last, so that the statistics of '
                           'batch norm stay those it was built with: take fewer, or more epochs')

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether `epoch` is one of the last."""
        if self.last_epochs is None:
            return epoch >= (self.from_epoch or 0)
        return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch + self.last_epochs

    def parameters(self, net: nn.Module) -> Iterable[nn.Parameter]:
        """Return weights and biases of batch norm, if they are frozen."""
        return [parameter for norm in self.norms(net) for parameter in norm.parameters()] if self.affine else []


class FreezeBackbone(Freeze):
    """Trains the classifier alone in the first epochs, to fine-tune a network on other classes.

    Args:
        epochs: How many; all of them where null, which saves the backward pass.
        train_batch_norm: Let the statistics of batch norm follow the new images.
    """

    def __init__(self, epochs: int | None = None, train_batch_norm: bool = False) -> None:
        if epochs is not None and epochs < 1:
            raise InputError(message(
                f'FreezeBackbone: epochs {epochs}', 'nothing would be frozen',
                'take a number from 1, null for all epochs, or leave the callback out'))
        self.epochs, self.train_batch_norm = epochs, train_batch_norm
        self.taken_out: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the backbone out of the training if it never joins it.

        Raises:
            InputError: If nothing would be left to train.
        """
        if stage != 'fit':
            return
        check_has_network(pl_module, self)
        if not any(True for head in classifiers(pl_module.net) for _ in head.parameters()):
            raise InputError(message(
                f'FreezeBackbone with {pl_module.net.num_classes} classes', 'without a classifier nothing would train',
                'give the network a classifier, or leave the callback out'))
        if self.epochs is None:
            self.taken_out = [parameter for parameter in self.parameters(pl_module.net) if parameter.requires_grad]
            for parameter in self.taken_out:
                parameter.requires_grad_(False)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Let the backbone train again."""
        super().on_fit_end(trainer, pl_module)
        for parameter in self.taken_out:
            parameter.requires_grad_()
        self.taken_out = []

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether `epoch` is one of the first."""
        return self.epochs is None or epoch < self.epochs

    def parameters(self, net: Any) -> Iterable[nn.Parameter]:
        """Return all parameters but the classifier's."""
        own = {id(parameter) for head in classifiers(net) for parameter in head.parameters()}
        return [parameter for parameter in net.parameters() if id(parameter) not in own]

    def norms(self, net: nn.Module) -> list[_BatchNorm]:
        """Return those of the backbone, unless they shall follow."""
        own = {module for head in classifiers(net) for module in head.modules()}
        return [] if self.train_batch_norm else [norm for norm in super().norms(net) if norm not in own]


def classifiers(net: Any) -> tuple[nn.Module, ...]:
    """Return the classifier of a network of timm; some have several, such as distilled ones."""
    found = net.get_classifier()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)
