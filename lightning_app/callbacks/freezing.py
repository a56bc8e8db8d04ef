"""Parts of a network that do not train for a time: batch norm at the end, the backbone at the start."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from se_timm.errors import InputError, message

__all__ = ['FreezeBackbone', 'FreezeBatchNorm']


class Freeze(Callback):
    """Base: parts of the network do not train in some epochs.

    Gradients of frozen parameters are dropped before the optimiser's step, in place of `requires_grad = False`, which
    DistributedDataParallel does not allow to change once it is set up.
    """

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether it is frozen in `epoch`."""
        raise NotImplementedError

    def parameters(self, net: Any) -> Iterable[nn.Parameter]:
        """Return what does not train."""
        raise NotImplementedError

    def norms(self, net: nn.Module) -> list[_BatchNorm]:
        """Return the batch norms whose statistics do not change."""
        return [module for module in net.modules() if isinstance(module, _BatchNorm)]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Freeze where a training goes on within an epoch, whose start has no hook."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set batch norm to its statistics, or back to those of the batches; a validation leaves that as it is."""
        for norm in self.norms(pl_module.net):
            norm.train(not self.frozen(trainer, trainer.current_epoch))

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
    """

    def __init__(self, last_epochs: int, affine: bool = False) -> None:
        if last_epochs < 1:
            raise InputError(message(
                f'FreezeBatchNorm: last_epochs {last_epochs}', 'nothing would be frozen',
                'take a number from 1, or leave the callback out'))
        self.last_epochs, self.affine = last_epochs, affine

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether `epoch` is one of the last."""
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

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the backbone out of the training if it never joins it."""
        if stage == 'fit' and self.epochs is None:
            for parameter in self.parameters(pl_module.net):
                parameter.requires_grad_(False)

    def frozen(self, trainer: Trainer, epoch: int) -> bool:
        """Return whether `epoch` is one of the first."""
        return self.epochs is None or epoch < self.epochs

    def parameters(self, net: Any) -> Iterable[nn.Parameter]:
        """Return all parameters but the classifier's."""
        own = {id(parameter) for parameter in net.get_classifier().parameters()}
        return [parameter for parameter in net.parameters() if id(parameter) not in own]

    def norms(self, net: nn.Module) -> list[_BatchNorm]:
        """Return all batch norms, unless they shall follow."""
        return [] if self.train_batch_norm else super().norms(net)
