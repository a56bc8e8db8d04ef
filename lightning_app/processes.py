"""Whether a training fits the devices of the machine, and the processes that torchrun or srun have started."""
from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy

from se_timm.errors import InputError, message

from .folders import NEWEST, number_in

if TYPE_CHECKING:
    from jsonargparse import Namespace

__all__ = ['check_clock', 'check_devices', 'check_launch', 'check_restarts', 'check_sync_batchnorm']

# what says how many processes there are, where it says on how many machines, and what starts as many as the Trainer has
LAUNCHERS: dict[type, tuple[str, str, str]] = {
    TorchElasticEnvironment: (
        'torchrun has started', 'GROUP_WORLD_SIZE', 'torchrun --nnodes={nodes} --nproc-per-node={devices}'),
    SLURMEnvironment: (
        'the job of SLURM is of', 'SLURM_NNODES',
        'srun in a job with #SBATCH --nodes={nodes} --ntasks-per-node={devices}')}


def check_devices(trainer: Namespace) -> None:
    """Raise `InputError` if more devices are asked for than there are."""
    accelerator, devices = trainer.accelerator, trainer.devices
    text = str(devices)
    named = isinstance(devices, list) or bool(re.fullmatch(r'-1|\d+( *, *\d+)+|\d+( *, *\d+)*,', text))  # GPUs, or all
    count = len(devices) if isinstance(devices, list) else int(text) if text.isdecimal() else 1
    if not count or not (named or text == 'auto' or text.isdecimal()) or (named and accelerator == 'cpu'):
        raise InputError(message(
            f'trainer.devices: {devices}', 'it is no number of CPU cores' if accelerator == 'cpu' else
            'it is neither a number of devices nor a list of them', 'say --trainer.devices=auto, or a number from 1'))
    gpus = torch.cuda.device_count()
    on_gpu = accelerator in ('gpu', 'cuda') or (accelerator == 'auto' and gpus > 0)
    available = gpus if on_gpu or (accelerator == 'auto' and (named or count > 1)) else os.cpu_count() or 1
    if accelerator in ('auto', 'cpu', 'gpu', 'cuda') and not torch.backends.mps.is_available() and count > available:
        kind = 'GPUs' if on_gpu or accelerator == 'auto' else 'CPU cores'
        raise InputError(message(
            f'trainer.devices: {devices} with trainer.accelerator: {accelerator}',
            f'this machine has {available} {kind}',
            'say --trainer.devices=auto for all that there are'
            + (', or --trainer.accelerator=cpu to run on the CPU' if kind == 'GPUs' else '')))


def check_launch(trainer: Trainer) -> None:
    """Raise `InputError` if there is another number of processes than the Trainer counts on.

    Lightning refuses that later, without saying what to do, and not at all where the Trainer counts on one device: each
    process would then train by itself, on all images.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment  # the one that a plugin gives, too
    if (named := LAUNCHERS.get(type(environment))) is None:
        return
    says, variable, starts = named
    started, counted = environment.world_size(), trainer.num_nodes * trainer.num_devices
    if started != counted:
        nodes = number_in(variable, 1)
        raise InputError(message(
            f'trainer.num_nodes: {trainer.num_nodes} with trainer.devices: {trainer.num_devices}',
            f'{says} {started} processes on {nodes} machines, not {counted}',
            f'say --trainer.num_nodes={nodes} --trainer.devices={started // nodes}, or start it by '
            + starts.format(nodes=trainer.num_nodes, devices=trainer.num_devices)))


def check_clock(trainer: Any) -> None:
    """Raise `InputError` if several processes would begin a validation each by its own clock."""
    if trainer.world_size > 1 and trainer._val_check_time_interval is not None:
        raise InputError(message(
            f'trainer.val_check_interval: {trainer._val_check_time_interval:g} seconds, with {trainer.world_size} '
            'processes', 'each goes by its own clock: one would validate while another still trains, and both hang',
            'count batches, over the epochs with trainer.check_val_every_n_epoch: null'))


def check_restarts(ckpt_path: str | None) -> None:
    """Raise `InputError` if torchrun would start the training again, and it would not go on where it was.

    On one machine torchrun counts its restarts, by which a training knows that it is one. On several each agent counts
    for itself, and some not at all.
    """
    machines, restarts = number_in('GROUP_WORLD_SIZE'), number_in('TORCHELASTIC_MAX_RESTARTS')
    if machines > 1 and restarts and ckpt_path not in NEWEST:
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
