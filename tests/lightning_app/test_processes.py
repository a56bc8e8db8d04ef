"""A training that does not fit the processes that torchrun or srun have started is refused."""
import os

import pytest
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

from lightning_app.cli import main
from lightning_app.processes import check_devices, check_launch, check_restarts
from se_timm.errors import InputError

pytestmark = pytest.mark.usefixtures('in_tmp_path')

TORCHRUN = {'TORCHELASTIC_RUN_ID': '1', 'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '4', 'LOCAL_WORLD_SIZE': '2',
            'GROUP_RANK': '0', 'GROUP_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}
SRUN = {'SLURM_JOB_ID': '4711', 'SLURM_JOB_NAME': 'train', 'SLURM_NTASKS': '4', 'SLURM_NTASKS_PER_NODE': '2',
        'SLURM_NNODES': '2', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'SLURM_NODEID': '0',
        'SLURM_NODELIST': 'localhost', 'SLURM_JOB_NODELIST': 'localhost'}


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets what a launcher sets."""
    def launched(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return launched


@pytest.mark.parametrize(('variables', 'says', 'starts'), [
    (TORCHRUN, 'torchrun has started', 'torchrun --nnodes={} --nproc-per-node={}'),
    (SRUN, 'the job of SLURM is of', 'srun in a job with #SBATCH --nodes={} --ntasks-per-node={}')])
@pytest.mark.parametrize(('nodes', 'devices'), [(1, 1), (1, 2), (2, 1)])
def test_other_number_of_processes_is_refused(variables, says, starts, nodes, devices, on_photos, launched, cli_error):
    launched(variables)
    assert cli_error(['fit', *on_photos, f'--trainer.num_nodes={nodes}', f'--trainer.devices={devices}']) == (
        f'trainer.num_nodes: {nodes} with trainer.devices: {devices}',
        f'{says} 4 processes on 2 machines, not {nodes * devices}',
        f'say --trainer.num_nodes=2 --trainer.devices=2, or start it by {starts.format(nodes, devices)}')
    assert not os.path.exists('runs')


def test_tasks_that_lightning_does_not_count_are_refused_in_three_lines(on_photos, launched, cli_error):
    launched({name: value for name, value in SRUN.items() if name != 'SLURM_NTASKS_PER_NODE'})
    given, why, _ = cli_error(['fit', *on_photos])
    assert given == 'trainer'
    assert '`--ntasks-per-node=4` instead' in why


@pytest.mark.parametrize('variables', [TORCHRUN, SRUN])
def test_the_processes_that_there_are_are_taken(variables, launched):
    launched(variables)
    check_launch(Trainer(accelerator='cpu', num_nodes=2, devices=2, logger=False, enable_checkpointing=False))


def test_processes_that_shall_train_by_themselves_do(launched):
    # as in a sweep whose tasks SLURM starts
    launched(SRUN)
    check_launch(Trainer(
        accelerator='cpu', devices=1, plugins=[LightningEnvironment()], logger=False, enable_checkpointing=False))


def test_restarts_that_would_begin_again_are_refused(on_photos, launched, cli_error):
    launched({**TORCHRUN, 'TORCHELASTIC_MAX_RESTARTS': '3'})
    assert cli_error(['fit', *on_photos]) == (
        'torchrun: 3 restarts on 2 machines',
        'a restart would begin again from scratch, as torchrun counts them on each machine apart',
        'say --ckpt_path auto, with which the same command begins and goes on, or torchrun --max-restarts 0')
    with pytest.raises(InputError, match=r'begin again from other\.ckpt'):
        check_restarts('other.ckpt')


@pytest.mark.parametrize('variables', [
    {'TORCHELASTIC_MAX_RESTARTS': '3', 'GROUP_WORLD_SIZE': '1'}, {'TORCHELASTIC_MAX_RESTARTS': '0'},
    {'TORCHELASTIC_MAX_RESTARTS': '3', 'GROUP_WORLD_SIZE': ''}, {'TORCHELASTIC_MAX_RESTARTS': ''}])
def test_restarts_that_go_on_are_not_refused(variables, launched):
    launched({**TORCHRUN, **variables})
    check_restarts(None)
    launched({'TORCHELASTIC_MAX_RESTARTS': '3', 'GROUP_WORLD_SIZE': '2'})
    check_restarts('auto')
    check_restarts('last')


def test_synchronised_batch_norm_is_refused_on_the_cpu(on_photos, cli_error):
    _, why, remedy = cli_error(
        ['fit', *on_photos, '--trainer.sync_batchnorm=true', '--trainer.devices=2', '--trainer.strategy=ddp'])
    assert why == "torch's SyncBatchNorm under DDP works on GPUs alone"
    assert remedy.startswith('leave it out on the CPU')


def test_synchronised_batch_norm_of_one_process_is_that_of_its_images(on_photos):
    assert main(['fit', *on_photos, '--trainer.sync_batchnorm=true']).trainer.global_step == 3


def test_machines_that_are_not_told_are_one(on_photos, launched, cli_error):
    launched({name: value for name, value in SRUN.items() if name != 'SLURM_NNODES'})
    _, why, _ = cli_error(['fit', *on_photos, '--trainer.num_nodes=2', '--trainer.devices=1'])
    assert why == 'the job of SLURM is of 4 processes on 1 machines, not 2'


@pytest.mark.parametrize('variables', [TORCHRUN, SRUN])
def test_fewer_processes_than_the_trainer_counts_on_are_refused(variables, launched):
    launched(variables)
    with pytest.raises(InputError, match='4 processes on 2 machines, not 8'):
        check_launch(Trainer(accelerator='cpu', num_nodes=4, devices=2, logger=False, enable_checkpointing=False))


@pytest.mark.parametrize('accelerator', ['auto', 'gpu', 'cuda'])
@pytest.mark.parametrize('devices', ['auto', '-1', -1, '1', '0,', '1,3', '1, 3', '1,3,', 4, [0], [1, 3]])
def test_devices_as_lightning_takes_them(accelerator, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    check_devices(Namespace(accelerator=accelerator, devices=devices))


@pytest.mark.parametrize('devices', ['0', '-1', '[]', '[0]', '0,', '1,3', '\N{SUPERSCRIPT TWO}', '1.5'])
def test_no_number_of_cores(devices, on_photos, cli_error):
    _, why, remedy = cli_error(['fit', *on_photos, f'--trainer.devices={devices}'])
    assert why == 'it is no number of CPU cores'
    assert remedy.startswith('say --trainer.devices=auto')


@pytest.mark.parametrize('devices', ['-1', '[0]', '0,', '1,3'])
def test_gpus_that_are_not_there(devices, on_photos, cli_error):
    _, why, remedy = cli_error(['fit', *on_photos, '--trainer.accelerator=auto', f'--trainer.devices={devices}'])
    assert why == 'this machine has 0 GPUs'
    assert '--trainer.accelerator=cpu' in remedy
