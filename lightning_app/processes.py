"""Whether a training fits the processes that torchrun or srun have started."""
from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy

from se_timm.errors import InputError, message

__all__ = ['check_launch', 'check_restarts', 'check_sync_batchnorm']

# what has started the processes, and where it says on how many machines
LAUNCHERS: dict[type, tuple[str, str]] = {
    TorchElasticEnvironment: ('torchrun', 'GROUP_WORLD_SIZE'), SLURMEnvironment: ('srun', 'SLURM_NNODES')}


def check_launch(trainer: Trainer) -> None:
    """Raise `InputError` if there is another number of processes than the Trainer counts on.

    Lightning refuses that later, without saying what to do, and not at all where the Trainer counts on one device: each
    process would then train by itself, on all images.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment  # the one that a plugin gives, too
    if (named := LAUNCHERS.get(type(environment))) is None:
        return
    launcher, variable = named
    started, counted = environment.world_size(), trainer.num_nodes * trainer.num_devices
    if started != counted:
        nodes = int(os.environ.get(variable, 1))
        raise InputError(message(
            f'trainer.num_nodes: {trainer.num_nodes} with trainer.devices: {trainer.num_devices}',
            f'{launcher} has started {started} processes on {nodes} machines, not {counted}',
            f'say --trainer.num_nodes={nodes} --trainer.devices={started // nodes}'))


def check_restarts(ckpt_path: str | None) -> None:
    """Raise `InputError` if torchrun would start the training again, and it would not go on where it was.

    On one machine torchrun counts its restarts, by which a training knows that it is one. On several each agent counts
    for itself, and some not at all.
    """
    machines, restarts = (int(os.environ.get(name, 0)) for name in ('GROUP_WORLD_SIZE', 'TORCHELASTIC_MAX_RESTARTS'))
    if machines > 1 and restarts and ckpt_path not in ('auto', 'last'):
        raise InputError(message(
            f'torchrun: {restarts} restarts on {machines} machines',
            f'a restart would begin again {f"from {ckpt_path}" if ckpt_path else "from scratch"}, as torchrun counts '
            'them on each machine apart',
            'say --ckpt_path auto, with which the same command begins and goes on, or torchrun --max-restarts 0'))


def check_sync_batchnorm(trainer: Trainer, wanted: bool) -> None:
    """Raise `InputError` if batch norm is `wanted` over all processes where torch has it for GPUs alone."""
    if wanted and isinstance(trainer.accelerator, CPUAccelerator) and isinstance(trainer.strategy, DDPStrategy):
        raise InputError(message(
            'trainer.sync_batchnorm: true', "torch's SyncBatchNorm under DDP works on GPUs alone",
            'leave it out on the CPU: batch norm then takes the statistics of the images of each process'))
