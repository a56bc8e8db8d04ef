"""The norm of the gradient at the logging steps."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..network import check_has_network
from ..steps import logs_next_step
from .freezing import Freeze

__all__ = ['GradientNorm']


class GradientNorm(Callback):
    """Logs `train/grad_norm`, the Euclidean norm of the gradient of a whole step, before it is clipped.

    Without the gradients that a callback drops. At logging steps only, and without a wait for the device.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """See that there is a network."""
        check_has_network(pl_module, self)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the norm if metrics are logged after this step."""
        if not logs_next_step(trainer):
            return
        dropped = {id(parameter) for each in trainer.callbacks  # type: ignore[attr-defined]
                   if isinstance(each, Freeze) and each.frozen(trainer, trainer.current_epoch)
                   for parameter in each.parameters(pl_module.net)}
        norm = get_total_norm([each.grad for each in pl_module.net.parameters()
                               if each.grad is not None and id(each) not in dropped])
        scaler = getattr(trainer.precision_plugin, 'scaler', None)
        if scaler is not None and scaler.is_enabled() and getattr(optimizer, '_step_supports_amp_scaling', False):
            # fused optimisers divide by the scale themselves, in the step; on the device, as `get_scale` waits for it
            norm = norm / scaler._get_scale_async()
        pl_module.log('train/grad_norm', norm)
