"""Batch norm over two processes: what `nn.BatchNorm2d` gives on the joint batch."""
import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from se_timm import SqueezeExcite, explain, fuse
from se_timm.fused import operators
from se_timm.residual_blocks import Tail
from se_timm.residual_tail import residual_tail

C = 8
SIZES = (3, 2)  # images of each process


def build(norm_class):
    torch.manual_seed(0)
    tail = Tail(nn.Identity(), norm_class(C), SqueezeExcite(C, 4), None,
                nn.Sequential(nn.Conv2d(C, C, 1), norm_class(C)), nn.ReLU())
    modules = nn.ModuleList(module for module in tail if module is not None).double()
    for parameter in modules.parameters():
        nn.init.normal_(parameter)
    return tail, modules


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, sum(SIZES), C, 5, 4, generator=generator, dtype=torch.float64) * 2 + 1


def step(tail, modules, x, shortcut, dy, function):
    x, shortcut = x.clone().requires_grad_(), shortcut.clone().requires_grad_()
    y = function(tail, x, shortcut)
    y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in modules.named_parameters()}
    return y.detach(), x.grad, shortcut.grad, gradients, dict(modules.named_buffers())


def by_modules(tail, x, shortcut):
    return tail.act(tail.se(tail.norm(x)) + tail.downsample(shortcut))


def build_network(backend):
    torch.manual_seed(0)
    net = timm.create_model('se_resnet20_cifar').double().train()
    fuse(net, backend)
    for module in net.modules():  # frozen, so that the images of one process do not matter to those of the other
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def gradients_of(net, x):
    net(x).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def photos():
    return torch.randn(sum(SIZES), 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=len(SIZES))
    operators.compiler_available = lambda: False  # plain torch: this process need not compile
    tail, modules = build(nn.SyncBatchNorm)
    own = [part.split(SIZES)[rank] for part in images()]
    torch.save(step(tail, modules, *own, residual_tail), f'{folder}/{rank}.pt')
    net = build_network('fused')
    assert all(choice.fused for choice in explain(net).values())
    torch.save(gradients_of(DistributedDataParallel(net), photos().split(SIZES)[rank]), f'{folder}/ddp{rank}.pt')
    dist.destroy_process_group()


def check_network(folder):
    """The gradients of a fused network under DDP are those of one process on the joint batch, by the modules."""
    expected = gradients_of(build_network('reference'), photos())
    for rank in range(len(SIZES)):
        found = torch.load(folder / f'ddp{rank}.pt')  # DDP takes the mean over the processes
        torch.testing.assert_close([len(SIZES) * each for each in found], expected, rtol=1e-9, atol=1e-9)


def test_two_processes_are_one_batch_norm_on_the_joint_batch(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(len(SIZES))]
    assert [process.wait(timeout=120) for process in processes] == [0] * len(SIZES)
    check_network(tmp_path)
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(len(SIZES))]
    y, dx, d_shortcut, gradients, buffers = step(*build(nn.BatchNorm2d), *images(), by_modules)
    for index, expected in ((0, y), (1, dx), (2, d_shortcut)):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), expected, rtol=1e-9, atol=1e-9)
    for name, expected in gradients.items():  # each process has its share; DDP adds them
        found = sum(part[3][name] for part in parts)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, expected in buffers.items():
        for part in parts:
            torch.testing.assert_close(part[4][name], expected, rtol=1e-9, atol=1e-9)


def test_one_process_alone_has_its_own_moments():
    tail, modules = build(nn.SyncBatchNorm)
    plain, plain_modules = build(nn.BatchNorm2d)
    values = images()
    torch.testing.assert_close(step(tail, modules, *values, residual_tail),
                               step(plain, plain_modules, *values, by_modules), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_statistics_do_not_depend_on_who_computes_them(momentum):
    tail, modules = build(nn.BatchNorm2d)
    tail.norm.momentum = momentum
    other, other_modules = copy.deepcopy((tail, modules))
    for _ in range(3):
        step(tail, modules, *images(), residual_tail)
        step(other, other_modules, *images(), by_modules)
    torch.testing.assert_close(dict(modules.named_buffers()), dict(other_modules.named_buffers()))


if __name__ == '__main__':
    run(int(sys.argv[1]), sys.argv[2])
