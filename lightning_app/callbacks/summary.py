"""The network in one line at the start."""
from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from se_timm.cost import cost

from ..data.base import data_of
from ..network import check_has_network, refused_images

__all__ = ['NetworkSummary']


class NetworkSummary(Callback):
    """Prints parameters and multiply-adds of the network, as the paper counts them, and what it is trained on.

    The loggers get them as `network/parameters` and `network/multiply_adds` of the configuration.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the summary."""
        check_has_network(pl_module, self, 'name')
        size = getattr(data_of(trainer), 'input_size', None) or pl_module.net.pretrained_cfg['input_size']
        try:
            described = cost(pl_module.net, size)
        except (AssertionError, RuntimeError) as error:
            raise refused_images(pl_module.name, pl_module.net, size[-1], error) from error
        rank_zero_info(
            f'{pl_module.name}: {described} at {size[-2]}x{size[-1]} px, {pl_module.net.num_classes} classes')
        for logger in trainer.loggers:
            logger.log_hyperparams({'network': described._asdict()})
