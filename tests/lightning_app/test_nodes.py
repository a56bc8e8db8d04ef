"""Two machines, each a network namespace with a name and an address: the numbers of one; and SLURM's tasks."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_app.cli import main

pytestmark = [pytest.mark.usefixtures('in_tmp_path'), pytest.mark.slow]

# Runs a command on both of two machines joined by a cable. All of it ends with the shell, and nothing of it is seen
# outside: `ip` keeps its names in a /run of its own, and each machine finds the other in an /etc/hosts of its own.
NODES = '''
set -e
mount -t tmpfs tmpfs /run
printf '127.0.0.1 localhost\\n10.77.0.10 node0\\n10.77.0.11 node1\\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
for node in 0 1; do
    ip netns add node$node
    ip -n node$node link set lo up
done
ip link add eth0 netns node0 type veth peer name eth0 netns node1
for node in 0 1; do
    ip -n node$node address add 10.77.0.1$node/24 dev eth0
    ip -n node$node link set eth0 up
done
on() { node=$1; shift; ip netns exec $node unshare --uts sh -c 'hostname $0; exec "$@"' $node "$@"; }
on node0 "$@" & first=$!
on node1 "$@" & second=$!
wait $first
wait $second
'''
IN_NODES = ['unshare', '--user', '--map-root-user', '--net', '--mount', '--uts', '--pid', '--fork', '--kill-child',
            '--mount-proc', 'sh', '-c', NODES, 'sh']
TORCHRUN = ['--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', '--rdzv-endpoint=node0:29500', '--rdzv-id=1',
            '-m', 'lightning_app']


@pytest.fixture
def nodes(program):
    """Return a function that runs the program on two machines by torchrun."""
    if missing := [name for name in ('unshare', 'ip') if shutil.which(name) is None]:
        pytest.skip(f'{missing[0]} is not installed')
    trial = subprocess.run([*IN_NODES, 'true'], capture_output=True, text=True, check=False)
    if trial.returncode:
        pytest.skip(f'no network namespaces here: {trial.stderr.strip()}')
    return lambda *args, **options: program(
        *TORCHRUN, *args, module='torch.distributed.run', prefix=IN_NODES, **options)


@pytest.fixture
def on_csv(on_photos, write_yaml):
    """Arguments of a training on the photos that writes metrics and its last weights."""
    return ['fit', *on_photos, '--data.eval_batch_size=4', '--model.optim.lr=0.02', '--config', write_yaml('csv.yaml', {
        'trainer': {'logger': [{'class_path': 'lightning_app.logger.CsvLogger'}], 'callbacks': [
            {'class_path': 'lightning_app.callbacks.ResultLine'},
            {'class_path': 'ModelCheckpoint', 'init_args': {'filename': 'only'}}]}})]


def weights(folder):
    return torch.load(f'{folder}/version_0/checkpoints/only.ckpt', weights_only=True)['state_dict']


def last_row(folder, read_csv):
    return {name: read_csv(f'{folder}/version_0', f'val/{name}')[-1][1] for name in ('loss', 'top1', 'top5')}


def check_same_training(read_csv, found, expected):
    """The weights and the loss but for rounding, and exact counts."""
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=1e-6, msg=name)
    metrics, reference = last_row(found, read_csv), last_row(expected, read_csv)
    assert metrics['loss'] == pytest.approx(reference['loss'], abs=1e-5)
    assert (metrics['top1'], metrics['top5']) == pytest.approx((reference['top1'], reference['top5']), abs=1e-4)


def test_the_machines_have_names_and_addresses_of_their_own(nodes, program):
    # in one piece, as both write to one pipe
    code = ("import socket, sys; sys.stdout.write("
            "f'{socket.getfqdn()} {socket.gethostbyname(socket.gethostname())}\\n')")
    done = program('-c', code, module=None, prefix=IN_NODES)
    assert sorted(done.stdout.splitlines()) == ['node0 10.77.0.10', 'node1 10.77.0.11']
    assert not Path('/run/netns/node0').exists()


def test_training_of_two_machines_is_that_of_one(nodes, on_csv, write_yaml, read_csv, read_wandb):
    # a network without batch norm, whose statistics are those of each process's images; seven images to validate
    wandb = write_yaml('wandb.yaml', {'trainer': {'logger': [
        {'class_path': f'lightning_app.logger.{name}'} for name in ('CsvLogger', 'WandbLogger')]}})
    args = [*on_csv, '--model.name=test_convnext', '--trainer.max_epochs=2']
    done = nodes(*args, '--config', wandb, '--trainer.num_nodes=2', '--trainer.default_root_dir=two')
    main([*args, '--trainer.default_root_dir=one'])
    check_same_training(read_csv, 'two', 'one')
    assert os.listdir('two') == ['version_0']
    kinds = [record.WhichOneof('record_type') for record in read_wandb('two')]
    assert kinds.count('run') == 1
    assert done.stdout.count('best: top-1') + done.stderr.count('best: top-1') == 1
    assert 'Starting with 2 processes' in done.stderr


def test_batch_norm_of_two_machines_is_that_of_two_processes(nodes, on_csv, program, read_csv):
    # each process has the statistics of its own images; the same sums in the same order, so the same bits
    args = [*on_csv, '--model.name=se_resnet20_cifar', '--trainer.max_epochs=2']
    nodes(*args, '--trainer.num_nodes=2', '--trainer.default_root_dir=machines')
    program(*args, '--trainer.devices=2', '--trainer.strategy=ddp', '--trainer.default_root_dir=processes')
    found, expected = weights('machines'), weights('processes')
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert last_row('machines', read_csv) == last_row('processes', read_csv)


def test_two_machines_go_on_from_the_folder_that_they_share(nodes, on_csv):
    args = [*on_csv, '--model.name=test_convnext', '--trainer.num_nodes=2', '--trainer.default_root_dir=two']
    nodes(*args)
    first = weights('two')
    nodes(*args, '--trainer.max_epochs=2', '--ckpt_path=two/version_0/checkpoints/only.ckpt')
    assert os.listdir('two') == ['version_0']
    checkpoint = torch.load('two/version_0/checkpoints/only.ckpt', weights_only=True)
    assert (checkpoint['epoch'], checkpoint['global_step']) == (1, 6)
    assert any(not torch.equal(value, first[name]) for name, value in checkpoint['state_dict'].items())


def slurm(rank, nodes):
    """Return what `srun --nodes NODES --ntasks-per-node 2 / NODES` sets for the task `rank` of two."""
    # the port follows from the id: the two jobs may run beside each other
    shared = {'SLURM_JOB_ID': str(4711 + nodes), 'SLURM_JOB_NAME': 'train', 'SLURM_NTASKS': '2', 'SLURM_NPROCS': '2',
              'SLURM_NTASKS_PER_NODE': str(2 // nodes), 'SLURM_NNODES': str(nodes), 'SLURM_JOB_NUM_NODES': str(nodes),
              'SLURM_NODELIST': 'localhost', 'SLURM_JOB_NODELIST': 'localhost'}
    local, node = (rank, 0) if nodes == 1 else (0, rank)
    return {**shared, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(local), 'SLURM_NODEID': str(node)}


@pytest.mark.parametrize('count', [1, 2])
def test_two_tasks_of_slurm_are_one_training(count, on_csv, program, read_csv):
    args = [*on_csv, '--model.name=test_convnext']
    two = [*args, f'--trainer.devices={2 // count}', f'--trainer.num_nodes={count}', '--trainer.default_root_dir=two']
    with ThreadPoolExecutor(2) as pool:  # both at once: they wait for each other
        done = list(pool.map(lambda rank: program(*two, **slurm(rank, count)), range(2)))
    main([*args, '--trainer.default_root_dir=one'])
    check_same_training(read_csv, 'two', 'one')
    assert os.listdir('two') == ['version_0']
    assert sum((each.stdout + each.stderr).count('best: top-1') for each in done) == 1
    assert Path('two/version_0/launch.txt').read_text() == f'slurm {4711 + count}'
