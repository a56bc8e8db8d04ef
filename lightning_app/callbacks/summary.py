"""The network in one line at the start."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from se_timm.cost import cost

__all__ = ['NetworkSummary']


class NetworkSummary(Callback):
    """Prints parameters and multiply-adds of the network, as the paper counts them, and what it is trained on."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the summary."""
        datamodule = getattr(trainer, 'datamodule', None)
        size = getattr(datamodule, 'input_size', None) or pl_module.net.pretrained_cfg['input_size']
        rank_zero_info(
            f'{pl_module.name}: {cost(pl_module.net, size)} at {size[-2]}x{size[-1]} px, '
            f'{pl_module.net.num_classes} classes')
