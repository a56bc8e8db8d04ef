"""`python -m se_timm.zoo [PATTERN...]`: every network of this package beside the paper.

    python -m se_timm.zoo 'se_resnet*' --csv zoo.csv

Parameters and multiply-adds are counted on the meta device, at the size of the network's images. `paper` is what Table
2 or 3 prints, in billions of multiply-adds; where it prints nothing, the column is empty. Below the table stands why a
network is more than 1 % away from it, and where weights come from.
"""
from __future__ import annotations

import csv
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import nn

import se_timm

from .cost import cost
from .errors import ArgumentParser, InputError, check_file, exit_status, unknown
from .paper import NETWORKS
from .squeeze_excite import SqueezeExcite
from .tables import aligned

__all__ = ['Entry', 'entries', 'main']


class Entry(NamedTuple):
    """A network beside the paper.

    Attributes:
        name: For `timm.create_model`.
        parameters: With SE.
        se_parameters: Those of the SE blocks.
        image: Height and width.
        gflops: Billions of multiply-adds for one image, with SE.
        paper_gflops: As printed; None where nothing is.
        plain_gflops: Without SE.
        paper_plain_gflops: As printed.
        weights: Tags of weights, and where timm finds them.
        why: Why the multiply-adds are not the printed ones; empty if they are.
    """

    name: str
    parameters: int
    se_parameters: int
    image: int
    gflops: float
    paper_gflops: float | None
    plain_gflops: float
    paper_plain_gflops: float | None
    weights: dict[str, str]
    why: str

    @property
    def difference(self) -> float | None:
        """Return how far the multiply-adds with SE are from the printed ones, relatively."""
        return None if self.paper_gflops is None else self.gflops / self.paper_gflops - 1


def entry(name: str) -> Entry:
    """Count the network `name` and its plain twin."""
    net, plain = (timm.create_model(name, se=se, device='meta') for se in (True, False))
    size = net.default_cfg['input_size']
    counted, paper = cost(net, size), NETWORKS[name]
    return Entry(
        name, counted.parameters, se_parameters(net), size[-1], counted.multiply_adds / 1e9, paper.gflops,
        cost(plain, size).multiply_adds / 1e9, paper.plain_gflops, weights(name), paper.why)


def entries(wanted: Sequence[str] = ()) -> list[Entry]:
    """Return the networks whose names match one of the patterns, all if there are none."""
    return [entry(name) for name in NETWORKS
            if not wanted or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]


def se_parameters(net: nn.Module) -> int:
    """Return the number of parameters in SE blocks."""
    return sum(p.numel() for module in net.modules() if isinstance(module, SqueezeExcite) for p in module.parameters())


def weights(name: str) -> dict[str, str]:
    """Return the tags of pretrained weights, and where each comes from."""
    found = {}
    for tagged in timm.list_pretrained(f'{name}.*'):
        cfg = timm.models.get_pretrained_cfg(tagged)
        if cfg is not None:
            found[str(cfg.tag)] = f'huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else str(cfg.url or cfg.file or '')
    return found


COLUMNS = (
    'network', 'parameters', 'of SE', 'px', 'G multiply-adds', 'paper', 'difference', 'plain', 'paper', 'weights')


def cells(each: Entry) -> list[str]:
    """Return the line of a network."""
    def printed(value: float | None) -> str:
        return '' if value is None else f'{value:.{2 if value >= 1 else 3}f}'

    return [
        each.name, f'{each.parameters:,}', f'{each.se_parameters:,}', str(each.image), f'{each.gflops:.4f}',
        printed(each.paper_gflops), '' if each.difference is None else f'{100 * each.difference:+.2f} %',
        f'{each.plain_gflops:.4f}', printed(each.paper_plain_gflops), ' '.join(each.weights)]


def table(found: Sequence[Entry]) -> str:
    """Return the networks as text, why some differ from the paper, and where weights come from."""
    notes = {
        'differences:': [f'{each.name}: {each.why}' for each in found if each.why],
        'weights:': [f'{each.name}.{tag}: {source}' for each in found for tag, source in each.weights.items()],
    }
    below = [line for title, lines in notes.items() if lines for line in ('', title, *lines)]
    return '\n'.join([aligned([COLUMNS, *map(cells, found)], left=(0, len(COLUMNS) - 1)), *below])


def write_csv(path: Path, found: Sequence[Entry]) -> None:
    """Write the networks as CSV, with the tags of their weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, [*Entry._fields, 'difference'])
        writer.writeheader()
        for each in found:
            writer.writerow({**each._asdict(), 'difference': each.difference, 'weights': ' '.join(each.weights)})


def parse(arguments: Sequence[str]) -> Any:
    """Return the options.

    Raises:
        InputError: For whatever cannot be used.
    """
    parser = ArgumentParser('python -m se_timm.zoo', 'Every network of this package beside the paper.')
    parser.add_argument('patterns', nargs='*', metavar='PATTERN', help="which networks, such as 'se_resnet*'")
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table there too')
    options = parser.parse_args(arguments)
    for pattern in options.patterns:
        if not fnmatch.filter(NETWORKS, pattern):
            raise InputError(unknown('network', pattern, NETWORKS))
    check_file('--csv', options.csv, 'zoo.csv')
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 for options that cannot be used."""
    return exit_status(lambda: run(parse(sys.argv[1:] if arguments is None else list(arguments))))


def run(options: Any) -> int:
    """Print the networks, and write them; return 0."""
    found = entries(options.patterns)
    print(f'se_timm {se_timm.__version__}, timm {timm.__version__}\n\n{table(found)}')
    if options.csv is not None:
        write_csv(options.csv, found)
    return 0


if __name__ == '__main__':
    sys.exit(main())
