"""What a step of a network costs: time and memory of its variants, measured in turns."""
from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch.nn import functional as F

from .fold import fold
from .residual_blocks import Tail
from .residual_tail import residual_tail
from .se_resnet import TIMM_NAMES
from .surgery import fuse

__all__ = [
    'MODES', 'PRECISIONS', 'Budget', 'Comparison', 'Result', 'Results', 'Settings', 'Spread', 'all_labels', 'busy',
    'compare', 'copy_bandwidth', 'our_networks', 'ratio_of', 'ratios', 'say', 'spread', 'tax', 'usual_labels']

PRECISIONS: dict[str, torch.dtype | None] = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
SHORTEST = 0.05  # seconds that are timed at a time: shorter steps are repeated, so that launches do not count
MODES = {
    'train': ('eager', 'fused', 'fused+recomputed', 'compiled', 'fused+compiled'),
    'infer': ('eager', 'folded', 'compiled', 'folded+compiled'),
    'tail': ('eager', 'compiled', 'fused'),
}
# how far what a variant computes first may be from what the modules compute: below what a missing gate makes
TOLERANCE = {'fp32': 0.02, 'bf16': 0.1, 'fp16': 0.05}
TAIL_CHANNELS, TAIL_REDUCTION = 256, 4  # of the first stage of SE-ResNet-50: a quarter of the image's height and width
TAIL_PASSES = 11  # full-size reads and writes of the fused tail, forward and backward: the table of `fused.algebra`
# seconds of compiling for each module, at first; what is measured takes their place
COMPILING = {'train': 0.25, 'infer': 0.12, 'tail': 3.}
FUSING = 0.05  # the same, of the passes of the fused tail alone
CACHED = 0.4  # of that is still to be done with what torch has in its cache
LEAST_ROUNDS = 5
OUT_OF_MEMORY = 'the memory of the device is too small'


class Work(NamedTuple):
    """One step, in two parts: `finish(forward())`.

    Attributes:
        net: The module that works.
        forward: Returns what the step computes: the loss of a training, the outputs of an inference or of a tail.
        finish: Takes that, and does the rest: backward pass and update.
        device: Where.
    """

    net: nn.Module
    forward: Callable[[], Tensor]
    finish: Callable[[Tensor], None]
    device: torch.device

    def __call__(self) -> Tensor:
        """Do one step, and return what it computed."""
        result = self.forward()
        self.finish(result)
        return result


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a precision, a key of `PRECISIONS`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def training(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Work:
    """Return a training step: forward, cross-entropy, backward, SGD with momentum. The optimiser is the same for all.

    Args:
        net: The network, in training mode.
        images: `(N, 3, H, W)`.
        labels: `(N,)`.
        precision: A key of `PRECISIONS`, by autocast.
    """
    # a small step: the same batch comes again and again, and weights that run away would be another workload
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)

    def forward() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with autocast(images.device, precision):
            return F.cross_entropy(net(images), labels)

    def finish(loss: Tensor) -> None:
        loss.backward()
        optimiser.step()

    return Work(net, forward, finish, images.device)


def inference(net: nn.Module, images: Tensor, precision: str) -> Work:
    """Return an inference of `images (N, 3, H, W)` by `net`, which is in eval mode."""
    @torch.no_grad()
    def forward() -> Tensor:
        with autocast(images.device, precision):
            return net(images)

    return Work(net, forward, lambda outputs: None, images.device)


class TailModule(nn.Module):
    """The end of a residual block, by its modules as timm's blocks have them, or fused.

    Args:
        channels: C.
        se: With SE of the reduction 16, or without.
        fused: Through `se_timm.residual_tail.residual_tail`.
    """

    def __init__(self, channels: int, se: bool, fused: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.se = SEModule(channels, rd_channels=channels // 16) if se else None
        self.act = nn.ReLU(inplace=True)
        self.fused = fused

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return the output, for the last convolution's output and the shortcut, all `(N, C, H, W)`."""
        if self.fused:
            return residual_tail(Tail(nn.Identity(), self.norm, self.se, None, None, self.act), x, shortcut)
        x = self.norm(x)
        if self.se is not None:
            x = self.se(x)
        x += shortcut
        return self.act(x)


def tail_pass(net: nn.Module, x: Tensor, shortcut: Tensor, dy: Tensor, precision: str) -> Work:
    """Return forward and backward pass of a tail, for the gradient `dy` of its output; all are `(N, C, H, W)`."""
    x, shortcut = x.detach().requires_grad_(), shortcut.detach().requires_grad_()  # gradients of its own
    leaves = [x, shortcut, *net.parameters()]

    def forward() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        with autocast(x.device, precision):
            return net(x, shortcut)

    return Work(net, forward, lambda y: y.backward(dy), x.device)


@torch.no_grad()
def calibrate(net: nn.Module, images: Tensor) -> None:
    """Give the batch norms the statistics of `images`: with the initial ones the values of a deep network run away."""
    norms: list[Any] = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    # a single image, which has no variance where its maps are 1x1, with its mirror image
    net.train()(torch.cat([images, images.flip(3)]) if len(images) == 1 else images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def replayed(work: Work) -> Work:
    """Return a step that CUDA replays, without the launches: of a tail alone they would be most of the time.

    In a network the host is ahead of the GPU. On the CPU it is `work` itself.
    """
    if work.device.type != 'cuda':
        return work
    stream, graph = torch.cuda.Stream(work.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(work.device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(work.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        result = work()

    def forward() -> Tensor:
        graph.replay()
        return result

    return Work(work.net, forward, lambda _: None, work.device)


# Right or wrong


def is_finite(work: Work, result: Tensor) -> bool:
    """Return whether what a step computed, and the gradients it left, are finite."""
    gradients = [p.grad for p in work.net.parameters() if p.grad is not None]
    return all(bool(value.isfinite().all()) for value in (result, *gradients))


def difference(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to that of `expected`."""
    wide = expected.detach().float()
    return float((result.detach().float() - wide).norm() / wide.norm())


# Time


class WarmUp(NamedTuple):
    """Seconds of a step, and those that the first steps took beyond that: compiling, and choosing algorithms."""

    step: float
    compiling: float


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(work: Work, repeats: int = 1) -> float:
    """Return the seconds of a step, the mean of `repeats` ones without a pause: by events on CUDA."""
    synchronise(work.device)
    if work.device.type != 'cuda':
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / repeats


def warm_up(work: Work, least: int, most: int = 20) -> WarmUp:
    """Repeat a step until it is compiled and two in a row take about the same time.

    Args:
        work: The step.
        least: Steps after the first, at least.
        most: Steps at most.
    """
    times: list[float] = []
    while len(times) <= least or (len(times) < most and abs(times[-1] - times[-2]) > 0.2 * times[-1]):
        start = time.perf_counter()
        work()
        synchronise(work.device)
        times.append(time.perf_counter() - start)
    return WarmUp(times[-1], max(0., sum(times) - len(times) * times[-1]))


def interleave(works: Mapping[str, Work], step_seconds: Mapping[str, float], rounds: int) -> dict[str, list[float]]:
    """Time the steps in turns (A B C A B C ...), so that whatever slows the machine down slows all of them.

    Args:
        works: Steps by name, warmed up.
        step_seconds: About how long each takes.
        rounds: How often each is timed.

    Returns:
        Seconds of a step, for each name and round.
    """
    repeats = {name: max(1, math.ceil(SHORTEST / max(step_seconds[name], 1e-6))) for name in works}
    times: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(seconds(work, repeats[name]))
    finally:
        gc.enable()
    return times


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Return median, lower and upper quartile."""
    if len(values) == 1:
        return Spread(*values * 3)
    low, median, high = statistics.quantiles(values, n=4, method='inclusive')
    return Spread(median, low, high)


def ratios(times: list[float], others: list[float]) -> Spread:
    """Return median and quartiles of the ratios of each round."""
    return spread([mine / other for mine, other in zip(times, others, strict=True)])


def busy() -> str:
    """Return in words that others use this machine, or an empty text; to be asked before one uses it oneself."""
    load, cores = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0., os.cpu_count() or 1
    if load <= 0.25 * cores:
        return ''
    return f'the load average is {load:.1f} on {cores} cores: others use this machine, and the times will be noisy'


# Memory


def memory(work: Work, before: int, compiled: bool) -> int | None:
    """Return the bytes that a step needs, None where that cannot be told.

    On CUDA the peak of what is allocated, weights included. On the CPU, where nothing counts that, what is saved for
    the backward pass, of a step that is not compiled.

    Args:
        work: The step, warmed up.
        before: Bytes allocated before its network was built, see `allocated`.
        compiled: Whether the network is compiled.
    """
    if work.device.type == 'cuda':
        gc.collect()
        torch.cuda.reset_peak_memory_stats(work.device)
        work()
        synchronise(work.device)
        return torch.cuda.max_memory_allocated(work.device) - before
    return None if compiled else saved_bytes(work)


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors take on a CUDA device; 0 elsewhere."""
    if device.type != 'cuda':
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def saved_bytes(work: Work) -> int | None:
    """Return the bytes that the forward pass saves for the backward pass, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*work.net.parameters(), *work.net.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work.forward()
    return sum(saved.values()) or None


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second, read and written, at which the device copies a tensor that no cache holds."""
    source = torch.zeros(2**28 if device.type == 'cuda' else 2**25, device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    work = Work(nn.Identity(), lambda: target.copy_(source), lambda _: None, device)
    work()
    return 2 * source.nbytes / statistics.median(seconds(work) for _ in range(5))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is timed in turns.

    Attributes:
        model: A network of this package; for a tail `'tail'`.
        task: A key of `MODES`.
        batch: Images.
        size: Height and width of an image; a tail has a quarter.
        precision: A key of `PRECISIONS`.
        channels_last: Memory format.
        labels: The variants, those that matter most first.
    """

    model: str
    task: str
    batch: int
    size: int
    precision: str
    channels_last: bool
    labels: tuple[str, ...]

    @property
    def pixels(self) -> int:
        """Height and width of what goes in."""
        return self.size // TAIL_REDUCTION if self.task == 'tail' else self.size

    @property
    def memory_format(self) -> torch.memory_format:
        """As torch calls it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        layout = 'channels_last' if self.channels_last else 'contiguous'
        channels = f'{TAIL_CHANNELS} channels, ' if self.task == 'tail' else ''
        name = self.model if self.task == 'tail' else f'{self.model}, {self.task}'
        return f'{name}: batch {self.batch}, {channels}{self.pixels} px, {self.precision}, {layout}'


@dataclasses.dataclass
class Result:
    """What was measured of one variant.

    Attributes:
        comparison: In which it was measured.
        label: The variant.
        seconds: Of a step, in each round; empty if it was not measured.
        compiling: Seconds of compiling and choosing of algorithms.
        memory: Bytes, see `memory`.
        bytes_moved: Bytes that a step reads and writes, where they are known.
        parameters: Their number.
        problem: In words why it was not measured.
        failed: Whether that is an error, not a choice.
    """

    comparison: Comparison
    label: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    compiling: float = 0.
    memory: int | None = None
    bytes_moved: int | None = None
    parameters: int = 0
    problem: str = ''
    failed: bool = False

    @property
    def time(self) -> Spread:
        """Seconds of a step."""
        return spread(self.seconds)


Results = dict[str, Result]  # of one comparison, by label


# Networks


def our_networks() -> list[str]:
    """Return the names of the networks that this package registers."""
    return [name for name in timm.list_models()
            if timm.models.model_entrypoint(name).__module__.partition('.')[0] == __package__]


def all_labels(task: str) -> list[str]:
    """Return every variant of a task."""
    labels = [f'{who}/{net}/{mode}' for who in ('timm', 'ours') for net in ('plain', 'se') for mode in MODES[task]]
    # of a tail there are timm's modules and the fused function
    return [label for label in labels if task != 'tail' or label.startswith('ours') == label.endswith('/fused')]


def usual_labels(task: str) -> list[str]:
    """Return the variants of a task that are measured if none are named: timm's networks as timm has them."""
    return [label for label in all_labels(task)
            if label.startswith('ours') or not ('fused' in label or 'folded' in label)]


def network(model: str, who: str, se: bool) -> nn.Module:
    """Build a network or its plain twin, ours or timm's, with weights of a fixed seed.

    The last batch norms of the branches are not initialised to zero, since multiplying by zero would hide errors.
    """
    torch.manual_seed(0)
    if model not in TIMM_NAMES:
        return timm.create_model(model, se=se)
    common: dict[str, Any] = {'zero_init_last': False, 'drop_rate': 0.}
    if who == 'ours':
        return timm.create_model(model, se=se, topology='v1.5', **common)
    name = TIMM_NAMES[model][1]
    twin = name.replace('se', '', 1)
    if se or timm.models.is_model(twin):
        return timm.create_model(name if se else twin, **common)
    return timm.create_model(name, block_args={'attn_layer': None}, **common)  # SENet-154


def missing(model: str, label: str) -> str:
    """Return in words why a model has no such variant, or an empty text."""
    if label.startswith('timm/') and model not in (*TIMM_NAMES, 'tail'):
        return f'timm has no counterpart of {model}'
    return ''


# One variant


def tensors(comparison: Comparison, device: torch.device) -> list[Tensor]:
    """Return the images and labels, or what a tail takes: its two inputs and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    batch, pixels = comparison.batch, comparison.pixels

    def random(channels: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(batch, channels, pixels, pixels, generator=generator)
        return values.to(device, dtype, memory_format=comparison.memory_format)

    if comparison.task == 'tail':
        return [random(TAIL_CHANNELS, PRECISIONS[comparison.precision] or torch.float32) for _ in range(3)]
    labels = torch.randint(10, (batch,), generator=generator)  # every network has ten classes
    return [random(3, torch.float32), labels.to(device)]


def placed(net: nn.Module, comparison: Comparison, device: torch.device) -> nn.Module:
    """Move a network to where and how it is measured."""
    return net.to(device=device, memory_format=comparison.memory_format)  # type: ignore[call-overload]


def by_modules(work: Work) -> Tensor:
    """Return what a step computes before its network is changed."""
    with torch.no_grad():
        return work.forward().clone()


def gradient_norm(net: nn.Module) -> float:
    """Return the norm of the gradients of all parameters."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None))


def fused(net: nn.Module, recompute: bool) -> None:
    """Fuse the tails of a network, and `recompute` the ReLUs before them.

    Raises:
        ValueError: If some are left: the variant would not be what its name says.
    """
    fusion = fuse(net, 'fused', recompute)
    if fusion.left or fusion.kept:
        raise ValueError(' '.join(str(fusion).split()))


class Expected(NamedTuple):
    """What a step is to compute, how far from it, relatively, it may be, and the norm of all gradients after it."""

    value: Tensor
    tolerance: float
    gradient: float | None = None


def train_work(
        comparison: Comparison, label: str, data: list[Tensor], device: torch.device) -> tuple[Work, Expected]:
    """Return the training step of a variant, and the loss to be expected."""
    who, kind, mode = label.split('/')
    net = placed(network(comparison.model, who, kind == 'se'), comparison, device).train()
    if who == 'ours':
        with contextlib.suppress(ValueError):  # it has no residual blocks
            fuse(net, 'reference')
    work = training(net, data[0], data[1], comparison.precision)
    loss = work.forward()
    loss.backward()
    expected = Expected(loss.detach().clone(), TOLERANCE[comparison.precision], gradient_norm(net))
    net.zero_grad()
    if 'fused' in mode:
        fused(net, 'recomputed' in mode)
    return work, expected


def infer_work(
        comparison: Comparison, label: str, data: list[Tensor], device: torch.device) -> tuple[Work, Expected]:
    """Return the inference of a variant, and the outputs to be expected: those of the modules without autocast.

    With random weights an error grows from block to block, and what a half precision gives may be far from that. A
    variant may be half as far again as the modules are.
    """
    who, kind, mode = label.split('/')
    net = placed(network(comparison.model, who, kind == 'se'), comparison, device)
    calibrate(net, data[0][:8])
    work = inference(net.eval(), data[0], comparison.precision)
    exact, tolerance = by_modules(inference(net, data[0], 'fp32')), TOLERANCE[comparison.precision]
    expected = Expected(exact, max(tolerance, 1.5 * difference(by_modules(work), exact)))
    if 'folded' in mode:
        work = inference(fold(net), data[0], comparison.precision)
    return work, expected


def tail_work(
        comparison: Comparison, label: str, data: list[Tensor], device: torch.device) -> tuple[Work, Expected]:
    """Return the passes of a tail, and the output to be expected."""
    works = []
    for is_fused in (False, label.endswith('/fused')):
        torch.manual_seed(0)
        net = placed(TailModule(TAIL_CHANNELS, '/se/' in label, is_fused), comparison, device)
        works.append(tail_pass(net, data[0], data[1], data[2], comparison.precision))
    result = works[0]().detach()
    return works[1], Expected(result, TOLERANCE[comparison.precision], gradient_norm(works[0].net))


WORKS: dict[str, Callable[..., tuple[Work, Expected]]] = {'train': train_work, 'infer': infer_work, 'tail': tail_work}


def check(work: Work, result: Tensor, expected: Expected) -> None:
    """Raise `ArithmeticError` for a variant that computes something else: its time would mean nothing."""
    if not is_finite(work, result):
        raise ArithmeticError('its first step gave values or gradients that are not finite')
    distance = difference(result, expected.value)
    if not distance <= expected.tolerance:
        raise ArithmeticError(f'its first result is {distance:.2g} away from that of the modules, relatively')
    if expected.gradient is not None:
        distance = abs(gradient_norm(work.net) / expected.gradient - 1)
        if not distance <= 2 * expected.tolerance:
            raise ArithmeticError(f'the norm of its first gradients is {distance:.2g} away from that of the modules')


# Time to spend


class Budget:
    """How much time is left, and how long compiling takes.

    Args:
        limit: Seconds, or None for as long as it takes.
        cached: Whether what will be compiled is in torch's cache.
    """

    def __init__(self, limit: float | None, cached: bool = False) -> None:
        self.limit = limit
        self.cached = cached
        self.started = time.monotonic()
        self.rates: dict[tuple[str, str], float] = {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return math.inf if self.limit is None else self.limit - (time.monotonic() - self.started)

    def estimate(self, task: str, mode: str, net: nn.Module) -> float:
        """Return about how many seconds compiling a network will take."""
        first = COMPILING[task] if 'compiled' in mode else FUSING if mode == 'fused' else 0.
        if self.cached:
            first *= CACHED
        return self.rates.get((task, mode), first) * leaves(net)

    def learn(self, task: str, mode: str, net: nn.Module, seconds: float) -> None:
        """Take the seconds that compiling took into account."""
        self.rates[task, mode] = max(self.rates.get((task, mode), 0.), seconds / leaves(net))

    def rounds(self, wanted: int, seconds: float) -> int:
        """Return how many rounds of so many seconds fit, in half of what is left so that others have theirs."""
        if self.limit is None:
            return wanted
        return max(0, min(wanted, int(max(0.5 * self.left(), min(self.left(), LEAST_ROUNDS * seconds)) / seconds)))


def leaves(net: nn.Module) -> int:
    """Return the number of modules that hold no others."""
    return sum(not list(module.children()) for module in net.modules())


# One comparison


class Settings(NamedTuple):
    """How it is measured."""

    device: torch.device
    rounds: int
    warmup: int


def prepare(result: Result, data: list[Tensor], settings: Settings, budget: Budget) -> tuple[Work, float] | None:
    """Build, check and warm up a variant; return its step and about how long that takes, None for lack of time."""
    comparison, mode, device = result.comparison, result.label.rsplit('/')[-1], settings.device
    before = allocated(device)
    work, expected = WORKS[comparison.task](comparison, result.label, data, device)
    estimate = budget.estimate(comparison.task, mode, work.net)
    if estimate > budget.left():
        result.problem = (f'for lack of time: it would take about {estimate:.0f} s to compile, and '
                          f'{max(0, budget.left()):.0f} s of the budget are left')
        return None
    if 'compiled' in mode:
        work.net.compile()
    start = time.perf_counter()
    check(work, work(), expected)
    synchronise(device)
    first = time.perf_counter() - start
    warm = warm_up(work, settings.warmup)
    result.compiling = max(0., first - warm.step) + warm.compiling
    budget.learn(comparison.task, mode, work.net, result.compiling)
    result.parameters = sum(p.numel() for p in work.net.parameters())
    result.memory = memory(work, before, 'compiled' in mode)
    if comparison.task == 'tail':
        result.bytes_moved = TAIL_PASSES * data[0].nbytes if mode == 'fused' else None
        work = replayed(work)
        return work, seconds(work)
    return work, warm.step


def compare(comparison: Comparison, settings: Settings, budget: Budget) -> Results:
    """Measure the variants of a comparison in turns."""
    say(f'\n{comparison}')
    results = {label: Result(comparison, label) for label in comparison.labels}
    works, steps = {}, {}
    data = tensors(comparison, settings.device)
    for label, result in results.items():
        ready = attempt(result, data, settings, budget)
        if ready is not None:
            works[label], steps[label] = ready
            say(f'  {label}: ready, {result.compiling:.1f} s of compiling')
        else:
            say(f'  {label}: not measured, {result.problem}')
    if works:
        each = sum(max(seconds, SHORTEST) for seconds in steps.values())
        rounds = budget.rounds(settings.rounds, each)
        say(f'  {rounds} rounds of {each:.1f} s')
        for label, seconds in interleave(works, steps, rounds).items():
            results[label].seconds = seconds
            results[label].problem = '' if seconds else 'for lack of time: no round fits into the budget'
    works.clear()
    torch._dynamo.reset()  # else what was compiled is kept, and looked through at each call
    free_memory()
    return results


def free_memory() -> None:
    """Give the device back what no tensor holds."""
    gc.collect()
    torch.cuda.empty_cache()


def attempt(result: Result, data: list[Tensor], settings: Settings, budget: Budget) -> tuple[Work, float] | None:
    """As `prepare`; whatever goes wrong with a variant is noted, and the others are measured all the same."""
    result.problem = missing(result.comparison.model, result.label)
    if not result.problem and budget.left() <= 0:
        result.problem = 'for lack of time: the budget is used up'
    if result.problem:
        return None
    try:
        return prepare(result, data, settings, budget)
    except torch.OutOfMemoryError:
        result.problem = f'{OUT_OF_MEMORY}: take a smaller --batch-size'
    except Exception as error:  # compilers fail in any way
        lines = str(error).strip().splitlines() or ['']
        why = [line.strip() for line in lines if line.startswith('  why: ')]  # of a message of this package
        result.problem = ', '.join([f'{type(error).__name__}: {lines[0]}', *why])
    result.failed = True
    free_memory()
    return None


def ratio_of(result: Result, other: Result) -> Spread:
    """Return the time of a variant over that of another."""
    return ratios(result.seconds, other.seconds)


def tax(result: Result, twin: Result) -> Spread:
    """Return the time of a network with SE over that of its plain twin, minus one."""
    return Spread(*(ratio - 1 for ratio in ratio_of(result, twin)))


def say(text: str) -> None:
    """Tell how far it is; the results alone go to the standard output."""
    print(text, file=sys.stderr, flush=True)
