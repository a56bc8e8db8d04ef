"""`python -m lightning_app.scaling`: what a training on 8 to 1,024 GPUs should take. Arithmetic, not measurement.

    python -m lightning_app.scaling --markdown docs/scaling.md

In each step the gradients, one float32 a parameter, are summed over all GPUs, in DistributedDataParallel's buckets: by
a ring within each machine and one between the machines. A ring of `n` sends `2 (n - 1) / n` times the bytes out of each
(Patarasuk and Yuan, 2009). What is assumed are the fields of `Assumptions`, each an option.
"""
from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser
import timm
from torch import nn

from se_timm.cost import cost
from se_timm.errors import ArgumentParser, InputError, exit_status, message
from se_timm.paper import SETTINGS
from se_timm.tables import markdown

from .files import writing

__all__ = ['Assumptions', 'Link', 'Network', 'all_reduce', 'main', 'networks', 'step_time', 'synchronised', 'tables']

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GIGABITS = (100, 200, 400)  # a second, of an interface between machines
IMAGES = 1_281_167  # ImageNet's training set
BUCKET = 25 * 2**20  # bytes, torch's default `bucket_cap_mb`
BACKWARD = 2 / 3  # of a step: a convolution has two gradients, each as dear as itself
TYPES = {'float32': 4, 'bfloat16': 2}  # bytes of a gradient on its way
# batches up to which the papers named lost no accuracy, and what they trained ResNet-50 with
SHOWN = {8192: 'SGD (Goyal et al.)', 32768: 'LARS (You et al.)'}
LARGEST = min(SHOWN)
SHARES = ('reached', 'hidden')  # of what is assumed


@dataclass(frozen=True)
class Assumptions:
    """What is assumed.

    Attributes:
        images_per_gpu: Images of a step on each GPU, where the batch grows with the GPUs.
        gpus_per_machine: GPUs of a machine.
        nvlink: Stated speed of a GPU's links within its machine, GB/s in one direction (NVLink 4 of an H200: 450).
        interfaces: Network interfaces of a machine, which its GPUs share.
        reached: Share of a stated speed that is reached.
        hidden: Share of the backward pass behind which sums can hide.
        inside_us: Latency of a step of a ring within a machine, microseconds (NCCL's model has 3.4 for NVLink).
        between_us: The same between machines (NCCL's model: 14).
        small_us: Time of a small message beside its latency, microseconds, for launching and waiting.
        host_us: Least time of the host for one batch norm and what is around it, forward, backward and in the
            optimiser, microseconds: 18 launches of 17 (docs/benchmarks.md has 15 to 20 for one).
        speed_50: Images/s of SE-ResNet-50 on a GPU (H200, `fused`, 256 images in 51.0 ms: docs/benchmarks.md).
        speed_x50: Images/s of SE-ResNeXt-50, not measured: as 814.7 to 971.8 of SE-ResNet-50 (timm, RTX 3090).
        speed_154: Images/s of SENet-154, not measured: as 174.8 to 971.8 of SE-ResNet-50 (timm, RTX 3090).
        epochs: Epochs of a training.
    """

    images_per_gpu: int = 128
    gpus_per_machine: int = 8
    nvlink: float = 450.
    interfaces: int = 1
    reached: float = 0.8
    hidden: float = 0.8
    inside_us: float = 3.4
    between_us: float = 14.
    small_us: float = 20.
    host_us: float = 300.
    speed_50: float = 5020.
    speed_x50: float = 4208.
    speed_154: float = 903.
    epochs: int = 100


@dataclass(frozen=True)
class Link:
    """What connects the members of a ring: bytes a second out of each, and seconds of latency."""

    speed: float
    latency: float

    def ring(self, size: float, members: int) -> float:
        """Return the seconds that the sum of `size` bytes takes among `members`."""
        return 2 * (members - 1) * (size / members / self.speed + self.latency)


class Network(NamedTuple):
    """A network as communication sees it.

    Attributes:
        name: For `timm.create_model`.
        recipe: The paper's settings of its training.
        speed: Assumed images/s of a GPU.
        parameters: Their number.
        plain_parameters: Without SE.
        channels: Of each batch norm.
    """

    name: str
    recipe: Mapping[str, Any]
    speed: float
    parameters: int
    plain_parameters: int
    channels: tuple[int, ...]


@cache
def counted(name: str) -> tuple[int, int, tuple[int, ...]]:
    """Return the parameters with and without SE, and the channels of each batch norm."""
    net, plain = (timm.create_model(name, se=se, device='meta') for se in (True, False))
    channels = tuple(module.num_features for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    return cost(net).parameters, cost(plain).parameters, channels


def networks(assumed: Assumptions) -> list[Network]:
    """Return the networks of the tables."""
    return [Network(name, SETTINGS[setting].values, speed, *counted(name)) for name, setting, speed in (
        ('se_resnet50', 'imagenet', assumed.speed_50), ('se_resnext50_32x4d', 'imagenet', assumed.speed_x50),
        ('se_senet154', 'senet154', assumed.speed_154))]


def divided(gpus: int, assumed: Assumptions) -> tuple[int, int]:
    """Return the GPUs of a machine, and the machines."""
    inside = min(gpus, assumed.gpus_per_machine)
    return inside, math.ceil(gpus / inside)


def links(assumed: Assumptions, gigabits: float) -> tuple[Link, Link]:
    """Return what connects GPUs within a machine, and machines with `gigabits` a second at each interface."""
    return (Link(assumed.nvlink * 1e9 * assumed.reached, assumed.inside_us * 1e-6),
            Link(assumed.interfaces * gigabits / 8 * 1e9 * assumed.reached, assumed.between_us * 1e-6))


def all_reduce(size: float, gpus: int, gigabits: float, assumed: Assumptions) -> float:
    """Return the seconds that the sum of `size` bytes takes: bucket by bucket, within machines and between them."""
    inside, machines = divided(gpus, assumed)
    within, between = links(assumed, gigabits)
    buckets = math.ceil(size / BUCKET)
    return buckets * (within.ring(size / buckets, inside) + between.ring(size / buckets, machines))


def compute_time(net: Network, images: float, assumed: Assumptions) -> float:
    """Return the seconds of a step without communication: of the GPU or of the host, whichever takes longer."""
    return max(images / net.speed, len(net.channels) * assumed.host_us * 1e-6)


def step_time(
        net: Network, gpus: int, images: float, gigabits: float, assumed: Assumptions, kind: str = 'float32') -> float:
    """Return the seconds of a step with `images` on each GPU.

    Sums hide behind a share of the backward pass, but for that of the last bucket, after which nothing is left to do.
    """
    size = net.parameters * TYPES[kind]
    compute, sums = compute_time(net, images, assumed), all_reduce(size, gpus, gigabits, assumed)
    return compute + max(sums - assumed.hidden * BACKWARD * compute, sums / math.ceil(size / BUCKET))


def synchronised(net: Network, gpus: int, gigabits: float, assumed: Assumptions) -> float:
    """Return the seconds that batch norm over all GPUs adds to a step, of which nothing hides.

    Each layer gathers mean, variance and count forward, and sums two vectors backward; by trees, once up to gather, up
    and down to sum.
    """
    inside, machines = divided(gpus, assumed)
    within, between = links(assumed, gigabits)
    hops = math.log2(inside) * within.latency + math.log2(machines) * between.latency
    gathered = gpus * sum(4 * (2 * channels + 1) for channels in net.channels)  # comes to each machine once
    latency = len(net.channels) * (2 * assumed.small_us * 1e-6 + 3 * hops)
    return latency + gathered / (within if machines == 1 else between).speed


# The tables


def named(found: Sequence[Network]) -> list[str]:
    """Return the heads of a table with a column a network."""
    return ['GPUs', *(f'`{net.name}`' for net in found)]


def gradients(found: Sequence[Network], assumed: Assumptions) -> str:
    """Return what the networks send."""
    return markdown(
        ['network', 'parameters', 'gradients, MB', 'in bfloat16', 'plain twin', 'step without sums, ms', 'batch norms',
         'their messages, kB'],
        [[f'`{net.name}`', f'{net.parameters:,}', *(f'{net.parameters * size / 1e6:.1f}' for size in TYPES.values()),
          f'{net.plain_parameters * 4 / 1e6:.1f}', f'{1000 * compute_time(net, assumed.images_per_gpu, assumed):.1f}',
          str(len(net.channels)), f'{sum(4 * (4 * channels + 1) for channels in net.channels) / 1e3:.0f}']
         for net in found])


def recipe(found: Sequence[Network], assumed: Assumptions) -> str:
    """Return the batch that grows with the GPUs, and what follows from it."""
    rows = []
    for gpus in GPUS:
        batch = gpus * assumed.images_per_gpu
        rates = [f'{net.recipe["lr"] * batch / net.recipe["batch"]:.3g}' if batch <= LARGEST else '-' for net in found]
        shown = next((by for largest, by in SHOWN.items() if batch <= largest), '-')
        steps = f'{IMAGES // batch:,}' if batch <= IMAGES else '-'
        rows.append([f'{gpus:,}', str(divided(gpus, assumed)[1]), f'{batch:,}', rates[0], rates[-1],
                     '0' if batch <= found[0].recipe['batch'] else '5', steps, shown])
    return markdown(['GPUs', 'machines', 'batch', 'lr', 'lr, SENet-154', 'warm-up epochs', 'steps an epoch',
                     'shown for ResNet-50 with'], rows)


def hours(seconds: float, batch: int, assumed: Assumptions) -> str:
    """Return the hours of a training whose steps of `batch` images take `seconds`; a dash where an epoch has none."""
    return f'{assumed.epochs * (IMAGES // batch) * seconds / 3600:.2f}' if batch <= IMAGES else '-'


def growing(net: Network, assumed: Assumptions) -> str:
    """Return sums, efficiency and hours of `net` with a batch that grows with the GPUs."""
    rows, images = [], assumed.images_per_gpu
    for gpus in GPUS:
        sums = [f'{1000 * all_reduce(4 * net.parameters, gpus, speed, assumed):.1f}' for speed in GIGABITS]
        steps = [[step_time(net, gpus, images, speed, assumed, kind) for speed in GIGABITS] for kind in TYPES]
        shares = [' / '.join(f'{images / net.speed / step:.0%}' for step in each) for each in steps]
        rows.append([f'{gpus:,}', ' / '.join(sums), *shares, hours(steps[0][-1], gpus * images, assumed)])
    at = f'at {" / ".join(map(str, GIGABITS))} Gb/s'
    return markdown(['GPUs', f'sum, ms, {at}', 'efficiency', 'in bfloat16', f'hours, {GIGABITS[-1]} Gb/s'], rows)


def constant(found: Sequence[Network], assumed: Assumptions) -> str:
    """Return efficiency and hours with the largest batch shown for SGD."""
    rows = []
    for gpus in (gpus for gpus in GPUS if gpus * assumed.images_per_gpu >= LARGEST):
        images = LARGEST / gpus
        steps = [(net, step_time(net, gpus, images, GIGABITS[-1], assumed)) for net in found]
        rows.append([f'{gpus:,}, {images:g} images each', *(
            f'{images / net.speed / step:.0%}, {hours(step, LARGEST, assumed)} h' for net, step in steps)])
    return markdown(named(found), rows)


def batch_norm(found: Sequence[Network], assumed: Assumptions) -> str:
    """Return what batch norm over all GPUs adds to a step."""
    steps = [(net, compute_time(net, assumed.images_per_gpu, assumed)) for net in found]
    return markdown(named(found), [[f'{gpus:,}', *(
        f'{1000 * added:.1f} ms, {added / step:.0%}' for net, step in steps
        for added in [synchronised(net, gpus, GIGABITS[-1], assumed)])] for gpus in GPUS])


def option(name: str) -> str:
    """Return the option of an assumption."""
    return f'--{name.replace("_", "-")}'


def meanings() -> dict[str, str]:
    """Return what each assumption means."""
    return {entry.arg_name: ' '.join(str(entry.description).split())
            for entry in docstring_parser.parse(str(Assumptions.__doc__)).params}


def tables(assumed: Assumptions) -> dict[str, str]:
    """Return all tables in Markdown, by name."""
    found = networks(assumed)
    values = [[f'`{option(name)}`', f'{getattr(assumed, name):g}', text] for name, text in meanings().items()]
    return {
        'assumptions': markdown(['option', 'value', 'meaning'], values), 'gradients': gradients(found, assumed),
        'recipe': recipe(found, assumed), **{net.name: growing(net, assumed) for net in found},
        'constant batch': constant(found, assumed), 'batch norm': batch_norm(found, assumed)}


def replaced(text: str, found: Mapping[str, str]) -> str:
    """Return a page with its tables made anew, each of which stands between `<!-- NAME -->` and `<!-- end -->`."""
    for name, content in found.items():
        text = re.sub(rf'(<!-- {name} -->\n).*?(<!-- end -->)', rf'\1{content}\n\2', text, flags=re.DOTALL)
    return text


def read_page(path: Path, names: Iterable[str]) -> str:
    """Return a page with a place for one of the tables at least.

    Raises:
        InputError: If it cannot be read, or has none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(message(
            f'--markdown {path}', f'it cannot be read ({error})', 'say docs/scaling.md')) from error
    if not any(f'<!-- {name} -->' in text for name in names):
        raise InputError(message(
            f'--markdown {path}', 'it has no place for a table',
            'put lines <!-- NAME --> and <!-- end --> into it, as docs/scaling.md has them'))
    return text


def parse(arguments: Sequence[str]) -> Any:
    """Return the options.

    Raises:
        InputError: For whatever cannot be used.
    """
    parser = ArgumentParser('python -m lightning_app.scaling', 'What a training on many GPUs should take.')
    for name, text in meanings().items():
        default = getattr(Assumptions(), name)
        parser.add_argument(
            option(name), type=type(default), default=default, help=f'{text.removesuffix(".")} (default: {default:g})')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='a page whose tables are made anew')
    options = parser.parse_args(arguments)
    for name in meanings():
        if not (value := getattr(options, name)) > 0:
            raise InputError(message(f'{option(name)} {value:g}', 'it must be above 0', 'correct it, or leave it out'))
    inside = options.gpus_per_machine
    if any(count % inside for count in GPUS if count > inside):
        raise InputError(message(
            f'--gpus-per-machine {inside}', f'the tables are of {GPUS[0]}, {GPUS[1]} and more GPUs, in whole machines',
            'take a power of two'))
    for name in SHARES:
        if (value := getattr(options, name)) > 1:
            raise InputError(message(f'{option(name)} {value:g}', 'it is a share', 'take a number up to 1'))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 for options that cannot be used."""
    return exit_status(lambda: run(parse(sys.argv[1:] if arguments is None else list(arguments))))


def run(options: Any) -> int:
    """Print the tables, or put them into a page; return 0."""
    found = tables(Assumptions(**{name: getattr(options, name) for name in meanings()}))
    if options.markdown is None:
        print('\n\n'.join(f'{name}\n\n{content}' for name, content in found.items()))
    else:
        page = replaced(read_page(options.markdown, found), found)
        with writing(f'--markdown {options.markdown}', 'name another page'):
            options.markdown.write_text(page)
    return 0


if __name__ == '__main__':
    sys.exit(main())
