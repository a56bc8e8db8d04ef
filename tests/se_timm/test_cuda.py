"""What only a GPU can show of whole networks; the kernels' own tests run there too, see `fused/test_kernels.py`."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import se_timm  # registers the networks
from se_timm import explain, fuse, residual_tail
from se_timm.fused import kernels

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'),
    pytest.mark.filterwarnings('ignore:TensorFloat32 tensor cores'),  # torch.compile: float32 is meant here
]

NAME = 'se_resnet20_cifar'


def build(backend, name=NAME, norm=None, **arguments):
    """Return a network in float32 and channels-last, with batch norms that hide no errors."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **arguments)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    if norm is not None:
        net = norm.convert_sync_batchnorm(net)
    fuse(net, backend)
    return net.cuda().to(memory_format=torch.channels_last).train()


def images(batch=8, seed=1):
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x.cuda().contiguous(memory_format=torch.channels_last)


def step(net, x, dtype=None):
    """Return output, gradients and buffers of one training step."""
    net.zero_grad()
    with torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None):
        y = net(x)
        loss = F.cross_entropy(y, torch.arange(len(x), device='cuda') % 10)
    loss.backward()
    return y.detach().float(), {name: p.grad.clone() for name, p in net.named_parameters()}, {
        name: buffer.clone() for name, buffer in net.named_buffers()}


def distance(found, expected):
    """Return the relative distance of two steps: of the outputs, of all gradients and of all buffers, the largest."""
    def flat(tensors):
        return torch.cat([tensor.double().flatten() for tensor in tensors])

    pairs = [(found[0].double(), expected[0].double()),
             *((flat(found[i].values()), flat(expected[i].values())) for i in (1, 2))]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.fixture
def launches(monkeypatch):
    """Return a list that grows with each pass that Triton computes."""
    taken, original = [], kernels.launch
    monkeypatch.setattr(kernels, 'launch', lambda *arguments: taken.append(arguments[0]) or original(*arguments))
    return taken


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


@pytest.mark.parametrize('name', [NAME, 'se_resnet18', 'se_resnet50'])
def test_step_is_that_of_the_modules(name, launches):
    x = images()
    exact = step(build('reference', name).double(), x.double())
    allowed = distance(step(build('reference', name), x), exact)
    assert distance(step(build('fused', name), x), exact) <= max(1e-4, 5 * allowed)
    assert launches


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_that_of_the_modules(dtype, launches):
    x = images()
    exact = step(build('reference').double(), x.double())
    assert distance(step(build('fused'), x, dtype), exact) <= 1.5 * distance(step(build('reference'), x, dtype), exact)
    assert launches


def test_steps_are_the_same_bit_for_bit(launches):
    x = images()
    torch.testing.assert_close(step(build('fused'), x), step(build('fused'), x), rtol=0, atol=0)


def test_drop_path_and_recomputation(launches):
    torch.testing.assert_close(
        [step_with_seed(build(backend, drop_path_rate=0.5)) for backend in ('fused',)],
        [step_with_seed(build('reference', drop_path_rate=0.5))], rtol=1e-3, atol=1e-3)
    net = build('reference')
    expected = step(net, images())
    other = build('reference')
    fuse(other, 'fused', recompute=True)
    torch.testing.assert_close(step(other, images()), expected, rtol=1e-3, atol=1e-3)


def step_with_seed(net):
    torch.manual_seed(3)
    return step(net, images())


def test_auto_takes_the_kernels_for_large_inputs(launches, monkeypatch):
    net = build('auto')
    assert all(choice.fused for choice in explain(net).values())
    step(net, images())
    assert not launches
    monkeypatch.setattr(residual_tail, 'LEAST_VALUES', 0)
    step(net, images())
    assert launches


def test_cuda_graph_replays_the_step(launches):
    net, x = build('fused'), images()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = step(copy.deepcopy(net), x)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.  # warming up is not to change the statistics
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    target = torch.arange(len(x), device='cuda') % 10

    def once():
        for parameter in net.parameters():
            parameter.grad.zero_()
        F.cross_entropy(net(static), target).backward()

    static = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    static.copy_(x)
    graph.replay()
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['auto', 'fused'])
def test_compiled_training_is_that_of_the_modules(backend):
    one, other = build('reference'), build(backend)
    other.compile(fullgraph=True)
    for seed in range(3):
        x = images(seed=seed)
        torch.testing.assert_close(step(other, x), step(one, x), rtol=1e-3, atol=1e-3)


def run(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.backends.cudnn.allow_tf32 = False
    results = {backend: step(build(backend, norm=nn.SyncBatchNorm), images(6).split([4, 2])[rank])
               for backend in ('fused', 'reference')}
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_shared_moments_are_those_of_sync_batch_norm(tmp_path):
    """By gloo: NCCL refuses two processes on one GPU."""
    paths = [str(Path(se_timm.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
                 for rank in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    for rank in range(2):
        results = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(results['fused'], results['reference'], rtol=1e-3, atol=1e-3)


if __name__ == '__main__':
    run(int(sys.argv[1]), sys.argv[2])
