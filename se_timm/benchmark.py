"""`python -m se_timm.benchmark`: the SE tax, measured.

    python -m se_timm.benchmark --model se_resnet50 --mode train --batch-size 16 --img-size 128 --threads 1
    python -m se_timm.benchmark --preset gpu --output results

The SE tax is the time of a network with SE divided by that of its plain twin, minus one. Variants are timed in turns,
and each ratio is the median of the rounds' ratios, with its quartiles. A variant is `WHO/NET/MODE`:

| part | values |
|---|---|
| who | `ours`, `timm`: its network of the same topology, v1.5, for ImageNet (wider gates in SE-ResNet-18, -34) |
| net | `se`, `plain`: the plain twin |
| mode, in training | `eager`; `fused`: by `se_timm.fuse`; `fused+recomputed`; `compiled`; `fused+compiled` |
| mode, in inference | `eager`; `folded`: by `se_timm.fold`; `compiled`; `folded+compiled` |

`--mode tail` measures one residual tail alone, forward and backward. `--preset cpu` and `--preset gpu` measure what
this project has set itself as limits, and say for each whether it is met.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fnmatch
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

import se_timm

from . import measure
from .errors import (
    ArgumentParser,
    InputError,
    check_installed,
    check_writable,
    exit_status,
    message,
    unknown,
)
from .machine import device_name
from .measure import (
    MODES,
    PRECISIONS,
    Budget,
    Comparison,
    Result,
    Results,
    Settings,
    Spread,
    all_labels,
    compare,
    our_networks,
    ratio_of,
    say,
    tax,
    usual_labels,
)
from .tables import aligned

__all__ = ['PRESETS', 'Row', 'main']

GPU_JOBS = 8  # of sixteen cores: each has compile workers of its own
AHEAD = 0.4  # of the budget, at most, for compiling ahead
# bytes a second of the memory, by what the name of the device contains; the first that fits
PEAKS = {'H200': 4.8e12, 'H100 PCIe': 2.0e12, 'H100 NVL': 3.9e12, 'H100': 3.35e12}


# What is to be reached


class Row(NamedTuple):
    """A limit that this project has set itself.

    Attributes:
        what: In words.
        task: A key of `MODES`.
        quantity: `'time'` or `'memory'`, the ratio of `over` to `under`; `'tax'`, the ratio of the times minus one, for
            which the modes of both sides are those that both have; `'share'`, bytes moved by `over` a second, as a
            share of what the memory can do.
        over: Variants of which the best counts.
        under: The same, of the other side.
        limit: At most this, of a share at least.
        stretch: Better still.
        today: What timm 1.0.31 reaches.
        precision: For which it holds; empty for any.
    """

    what: str
    task: str
    quantity: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    limit: float
    stretch: float
    today: str = '-'
    precision: str = ''


RECOMPUTED = ('ours/se/fused+recomputed',)
EAGER, TIMM_COMPILED = ('timm/plain/eager',), ('timm/plain/compiled',)
OURS = ('ours/se/fused', 'ours/se/fused+compiled')
OURS_PLAIN = ('ours/plain/fused', 'ours/plain/fused+compiled')
FAST, FAST_PLAIN = (
    tuple(f'ours/{net}/{mode}' for mode in ('compiled', 'folded+compiled')) for net in ('se', 'plain'))
STEP = 'training step / timm eager plain'

CPU_ROWS = (
    Row(STEP, 'train', 'time', OURS, EAGER, 1.00, 0.90, '1.09-1.25 eager, 1.03 compiled', 'fp32'),
    Row(STEP, 'train', 'time', OURS, EAGER, 0.98, 0.85, '1.17-1.24 eager, 1.06 compiled', 'bf16'),
    Row('tail / eager batch norm + add + ReLU', 'tail', 'time', ('ours/se/fused',), EAGER, 0.85, 0.60,
        '2.54 eager, 1.68 compiled', 'fp32'),
)
GPU_ROWS = (
    Row('SE tax of training, equally fused', 'train', 'tax', OURS, OURS_PLAIN, 0.05, 0.01, '+25 %'),
    Row(f'{STEP}, rest eager', 'train', 'time', OURS[:1], EAGER, 0.97, 0.92, '1.25'),
    Row(f'{STEP}, compiled', 'train', 'time', OURS[1:], EAGER, 0.85, 0.70),
    Row('training step / timm compiled plain', 'train', 'time', OURS[1:], TIMM_COMPILED, 1.00, 0.90),
    Row('peak memory / timm eager plain', 'train', 'memory', OURS, EAGER, 1.02, 0.95, '1.26'),
    Row('the same, relu(bn) recomputed', 'train', 'memory', RECOMPUTED, EAGER, 0.88, 0.80),
    Row('tail: share of the bandwidth', 'tail', 'share', ('ours/se/fused',), ('ours/se/fused',), 0.60, 0.80),
    Row('SE tax of inference, compiled', 'infer', 'tax', FAST, FAST_PLAIN, 0.05, 0.00, '+19 to +28 %'),
)


class Plan(NamedTuple):
    """What a preset measures, what must come of it, and its options."""

    models: tuple[str, ...]
    comparisons: Callable[[Sequence[str]], list[Comparison]]
    rows: tuple[Row, ...]
    budget: float | None
    device: str | None
    jobs: int


def cpu_plan(models: Sequence[str]) -> list[Comparison]:
    """Return the comparisons of `--preset cpu`."""
    train = (*EAGER, 'timm/se/eager', 'timm/se/compiled', *OURS)
    tail = (*EAGER, 'timm/se/eager', 'timm/se/compiled', 'ours/se/fused')
    return [
        *(Comparison(model, 'train', 16, 128, precision, False, train)
          for model in models for precision in ('fp32', 'bf16')),
        Comparison('tail', 'tail', 16, 224, 'fp32', False, tail),
    ]


def gpu_plan(models: Sequence[str]) -> list[Comparison]:
    """Return the comparisons of `--preset gpu`; of all networks but the first at first what needs no compiling."""
    first, *others = models
    fused_only = (*EAGER, OURS[0], OURS_PLAIN[0], 'timm/se/eager')
    train = (*fused_only, *RECOMPUTED, OURS[1], OURS_PLAIN[1], *TIMM_COMPILED)
    infer = (FAST[1], FAST_PLAIN[1], FAST[0], FAST_PLAIN[0])
    tail = ('ours/se/fused', 'ours/plain/fused', *EAGER, 'timm/se/eager', 'timm/se/compiled')

    def comparison(model: str, task: str, labels: tuple[str, ...]) -> Comparison:
        # SENet-154 keeps three times as much for the backward pass
        batch = 128 if model == 'se_senet154' and task == 'train' else 256
        return Comparison(model, task, batch, 224, 'bf16', True, labels)

    return [
        comparison(first, 'train', train), comparison('tail', 'tail', tail), comparison(first, 'infer', infer),
        *(comparison(model, 'train', fused_only) for model in others),
        *(comparison(model, 'infer', infer) for model in others),
        *(comparison(model, 'train', train) for model in others),
    ]


PRESETS = {
    'cpu': Plan(('se_resnet50',), cpu_plan, CPU_ROWS, None, 'cpu', 0),
    'gpu': Plan(('se_resnet50', 'se_resnext50_32x4d', 'se_senet154'), gpu_plan, GPU_ROWS, 480., 'cuda', GPU_JOBS),
}


class Measured(NamedTuple):
    """The value of a row, with quartiles, and what it is of."""

    value: Spread
    by: str


def evaluate(row: Row, results: Results, bandwidth: float) -> Measured | None:
    """Return what a row asks for, each side by its best variant; None if there is not what it takes."""
    key = bytes_needed if row.quantity == 'memory' else median_time
    over, under = ([results[label] for label in labels if label in results and key(results[label]) < math.inf]
                   for labels in (row.over, row.under))
    if row.quantity == 'tax':  # one side must not be fused by a mode that was not measured of the other
        shared = {mode_of(result) for result in over} & {mode_of(result) for result in under}
        over, under = ([result for result in side if mode_of(result) in shared] for side in (over, under))
    if not over or not under:
        return None
    best, other = min(over, key=key), min(under, key=key)
    if row.quantity == 'share':
        assert best.bytes_moved is not None
        moved = best.bytes_moved
        return Measured(measure.spread([moved / seconds / bandwidth for seconds in best.seconds]), best.label)
    by = f'{best.label} over {other.label}'
    if row.quantity == 'memory':
        return Measured(Spread(*[key(best) / key(other)] * 3), by)
    return Measured((tax if row.quantity == 'tax' else ratio_of)(best, other), by)


def median_time(result: Result) -> float:
    """Return the seconds of a step, infinity if they were not measured."""
    return result.time.median if result.seconds else math.inf


def bytes_needed(result: Result) -> float:
    """Return the bytes of memory, infinity if they were not measured."""
    return result.memory if result.memory is not None else math.inf


def mode_of(result: Result) -> str:
    """Return the last part of a label."""
    return result.label.rpartition('/')[2]


# Report


VERSIONS = {'torch': torch.__version__, 'timm': timm.__version__, 'se_timm': se_timm.__version__}
# timm's names first
COLUMNS = (
    'model', *(f'{task}_{name}' for task in ('train', 'infer')
               for name in ('samples_per_sec', 'step_time', 'batch_size', 'img_size')),
    'param_count', 'variant', 'mode', 'precision', 'memory_format', 'step_time_low', 'step_time_high', 'rounds',
    'baseline', 'ratio', 'ratio_low', 'ratio_high', 'se_tax', 'se_tax_low', 'se_tax_high', 'peak_memory', 'memory_of',
    'memory_ratio', 'bytes_moved', 'bandwidth_share', 'compile_seconds', 'problem', 'device', 'threads', *VERSIONS)


class Machine(NamedTuple):
    """Where it was measured.

    Attributes:
        kind: `'cpu'` or `'cuda'`.
        device: Name of the device.
        copy: Bytes a second that a copy moves.
        peak: Bytes a second that the memory's maker states; 0 where unknown.
    """

    kind: str
    device: str
    copy: float
    peak: float

    @property
    def bandwidth(self) -> float:
        """What shares are of."""
        return self.peak or self.copy

    def __str__(self) -> str:
        stated = f'{self.peak / 1e12:.2f} TB/s stated' if self.peak else 'no peak known, shares are of the copy'
        return f'{self.device}: a copy moves {self.copy / 1e9:.0f} GB/s; {stated}'


def machine_of(device: torch.device) -> Machine:
    """Return what is known of a device, and measure a copy on it."""
    name = device_name(device)
    peak = next((peak for key, peak in PEAKS.items() if key in name), 0.)
    return Machine(device.type, name, measure.copy_bandwidth(device), peak)


def baseline_of(results: Results) -> Result | None:
    """Return the variant that ratios are of: timm's eager plain network, or the first that was measured."""
    measured = {label: result for label, result in results.items() if result.seconds}
    return next((measured[label] for label in (*EAGER, 'ours/plain/eager', *measured) if label in measured), None)


def twin_of(result: Result, results: Results) -> Result | None:
    """Return the plain twin in the same mode of a network with SE, if it was measured."""
    twin = results.get(result.label.replace('/se/', '/plain/'))
    return twin if '/se/' in result.label and twin is not None and twin.seconds else None


def record(result: Result, results: Results, machine: Machine) -> dict[str, object]:
    """Return a line of the CSV file; what was not measured is left out."""
    comparison, place = result.comparison, {'device': machine.device, 'threads': torch.get_num_threads(), **VERSIONS}
    line: dict[str, object] = {
        'model': comparison.model, 'variant': result.label, 'mode': comparison.task, 'precision': comparison.precision,
        'memory_format': 'channels_last' if comparison.channels_last else 'contiguous', **place}
    if not result.seconds:
        return {**line, 'problem': result.problem}
    task, times = 'infer' if comparison.task == 'infer' else 'train', result.time  # a tail has a backward pass
    line |= {
        f'{task}_samples_per_sec': round(comparison.batch / times.median, 2),
        f'{task}_step_time': round(1e3 * times.median, 3), f'{task}_batch_size': comparison.batch,
        f'{task}_img_size': comparison.pixels, 'param_count': round(result.parameters / 1e6, 2),
        'step_time_low': round(1e3 * times.low, 3), 'step_time_high': round(1e3 * times.high, 3),
        'rounds': len(result.seconds), 'compile_seconds': round(result.compiling, 1)}
    return line | relations(result, results) | memory_columns(result, results, machine)


def relations(result: Result, results: Results) -> dict[str, object]:
    """Return the columns that relate the time of a variant to those of others."""
    columns: dict[str, object] = {}
    if (baseline := baseline_of(results)) is not None:
        ratio = ratio_of(result, baseline)
        columns |= dict(zip(('baseline', 'ratio', 'ratio_low', 'ratio_high'),
                            (baseline.label, *(round(value, 4) for value in ratio)), strict=True))
    if (twin := twin_of(result, results)) is not None:
        columns |= dict(zip(('se_tax', 'se_tax_low', 'se_tax_high'),
                            (round(value, 4) for value in tax(result, twin)), strict=True))
    return columns


def memory_columns(result: Result, results: Results, machine: Machine) -> dict[str, object]:
    """Return the columns of memory and of bytes moved."""
    columns: dict[str, object] = {}
    if result.memory is not None:
        kind = 'allocated' if machine.kind == 'cuda' else 'saved for backward'
        columns |= {'peak_memory': round(result.memory / 2**20, 1), 'memory_of': kind}
        baseline = baseline_of(results)
        if baseline is not None and baseline.memory is not None:
            columns['memory_ratio'] = round(result.memory / baseline.memory, 4)
    if result.bytes_moved is not None:
        columns |= {'bytes_moved': result.bytes_moved,
                    'bandwidth_share': round(result.bytes_moved / result.time.median / machine.bandwidth, 4)}
    return columns


def ranged(value: Spread, form: Callable[[float], str]) -> str:
    """Return a median with its quartiles."""
    return f'{form(value.median)} [{form(value.low)}, {form(value.high)}]'


def number(value: float) -> str:
    """Return a ratio as text."""
    return f'{value:.3f}'


def percent(value: float) -> str:
    """Return a tax as text."""
    return f'{100 * value:+.1f} %'


def share(value: float) -> str:
    """Return a share as text."""
    return f'{100 * value:.0f} %'


FORMS: dict[str, Callable[[float], str]] = {'time': number, 'memory': number, 'tax': percent, 'share': share}


def table(results: Results, machine: Machine) -> str:
    """Return what was measured in one comparison, as text."""
    comparison = next(iter(results.values())).comparison
    measured = [result for result in results.values() if result.seconds]
    left = omissions(results)
    if not measured:
        return '\n'.join([f'{comparison}', *left])
    baseline = baseline_of(results)
    assert baseline is not None
    kind = 'peak' if machine.kind == 'cuda' else 'saved'
    lines = [['variant', 'ms', 'images/s', f'time / {baseline.label}', 'SE tax', f'{kind} MiB', 'compile s']]
    for result in measured:
        twin = twin_of(result, results)
        lines.append([
            result.label, ranged(result.time, lambda value: f'{1e3 * value:.2f}'),
            f'{comparison.batch / result.time.median:.1f}',
            ranged(ratio_of(result, baseline), number), ranged(tax(result, twin), percent) if twin else '',
            '' if result.memory is None else f'{result.memory / 2**20:.1f}', f'{result.compiling:.1f}'])
    return '\n'.join([f'{comparison}; {len(measured[0].seconds)} rounds, medians [quartiles]', aligned(lines), *left])


def omissions(results: Results) -> list[str]:
    """Return a line for each reason why variants were not measured."""
    reasons: dict[str, list[str]] = {}
    for result in results.values():
        if not result.seconds:
            reasons.setdefault(result.problem, []).append(result.label)
    return [f'not measured: {", ".join(labels)}: {reason}' for reason, labels in reasons.items()]


def verdicts(rows: Sequence[Row], models: Sequence[str], all_results: Sequence[Results], machine: Machine) -> str:
    """Return, row by row, what was measured, the limit, and whether it is met, as text."""
    lines = [['limit', 'network', 'measured [quartiles]', 'today', 'limit', 'stretch', '', 'of']]
    for row in rows:
        for model in ('tail',) if row.task == 'tail' else models:
            today = row.today if model in ('tail', 'se_resnet50') else '-'  # of others nobody has published it
            lines.append(verdict(row._replace(today=today), model, all_results, machine))
    return aligned(lines, left=(0, 1, 6, 7))


def verdict(row: Row, model: str, all_results: Sequence[Results], machine: Machine) -> list[str]:
    """Return the line of one row for one network."""
    form, sign = FORMS[row.quantity], '>=' if row.quantity == 'share' else '<='
    what = f'{row.what}, {row.precision}' if row.precision else row.what
    limits = [row.today, f'{sign} {form(row.limit)}', form(row.stretch)]
    fitting = [results for results in all_results if fits(row, model, results)]
    for results in reversed(fitting):  # a later one has more variants
        found = evaluate(row, results, machine.bandwidth)
        if found is not None:
            return [what, model, ranged(found.value, form), *limits, met(row, found.value.median), found.by]
    reason = 'its variants are not measured, see above' if fitting else 'it was not asked for'
    return [what, model, 'not measured', *limits, '-', reason]


def fits(row: Row, model: str, results: Results) -> bool:
    """Return whether a comparison is what a row speaks of."""
    comparison = next(iter(results.values())).comparison
    return (comparison.model, comparison.task) == (model, row.task) and row.precision in ('', comparison.precision)


def met(row: Row, value: float) -> str:
    """Return whether a limit is met."""
    sign = -1 if row.quantity == 'share' else 1
    if sign * value <= sign * row.stretch:
        return 'stretch met'
    return 'met' if sign * value <= sign * row.limit else 'MISSED'


def write_csv(path: Path, all_results: Sequence[Results], machine: Machine) -> None:
    """Write all that was measured, and what was not with the reason."""
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(record(result, results, machine) for results in all_results for result in results.values())


def write_environment(
        path: Path, command: Sequence[str], all_results: Sequence[Results], machine: Machine, warning: str) -> None:
    """Write where and how it was measured, and the seconds of each round."""
    content = {
        'command': ['python', '-m', 'se_timm.benchmark', *command], 'versions': {**VERSIONS, **other_versions()},
        'machine': machine._asdict(), 'platform': platform.platform(), 'threads': torch.get_num_threads(),
        'warning': warning, 'rounds': [
            {'comparison': str(next(iter(results.values())).comparison),
             'seconds': {label: result.seconds for label, result in results.items()}} for results in all_results]}
    path.write_text(json.dumps(content, indent=1) + '\n')


def other_versions() -> dict[str, str | None]:
    """Return the versions of what torch uses."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {'python': platform.python_version(), 'cuda': torch.version.cuda, 'cudnn': cudnn and str(cudnn)}


COLOURS = {'timm/plain': '#9aa5b1', 'timm/se': '#52606d', 'ours/plain': '#9ecae1', 'ours/se': '#2171b5'}


def draw(path: Path, all_results: Sequence[Results]) -> None:
    """Draw the ratios of each comparison as bars, with their quartiles."""
    from matplotlib.figure import Figure

    shown = [results for results in all_results if baseline_of(results) is not None]
    heights = [1.2 + 0.3 * sum(bool(result.seconds) for result in results.values()) for results in shown]
    figure = Figure(figsize=(9, sum(heights) or 1), layout='constrained')
    axes: Any = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0] if shown else []
    for axis, results in zip(axes, shown, strict=True):
        baseline = baseline_of(results)
        assert baseline is not None
        measured = [result for result in results.values() if result.seconds][::-1]  # the first on top
        spreads = [ratio_of(result, baseline) for result in measured]
        axis.barh(
            [f'{result.label}  {each.median:.3f}' for result, each in zip(measured, spreads, strict=True)],
            [each.median for each in spreads],
            xerr=[[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]],
            color=[COLOURS[result.label.rpartition('/')[0]] for result in measured], ecolor='black', capsize=2)
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_title(str(baseline.comparison), loc='left', fontsize='medium')
        axis.set_xlabel(f'time / {baseline.label}')
    figure.savefig(path, dpi=120)


# Command line


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], int | float]:
    """Return what reads a finite number from `least` up."""
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least - 1)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(
                f'{text!r} is no {"whole " if kind is int else ""}number from {least:g} up')
        return value

    return read


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser('python -m se_timm.benchmark', 'The SE tax, measured.')
    count, add = at_least(1), parser.add_argument
    add('--preset', metavar='NAME', help=f'what the limits of this project ask for: {", ".join(PRESETS)}; '
        'options below that are given take the place of its own')
    add('--model', nargs='+', metavar='NAME', help='networks of this package (default: se_resnet50)')
    add('--mode', nargs='+', metavar='MODE', help=f'{", ".join(MODES)} (default: train)')
    add('--precision', help=f'{", ".join(PRECISIONS)}, by autocast (default: fp32)')
    add('--channels-last', action=argparse.BooleanOptionalAction, help='memory format')
    add('--batch-size', type=count, help='images (default: 16 on the CPU, 256 on a GPU)')
    add('--img-size', type=count, help='height and width (default: 224); a tail has a quarter')
    add('--variants', nargs='+', metavar='PATTERN', help="which, such as 'ours/*' timm/plain/eager")
    add('--device', help='cpu or cuda (default: cuda where there is a GPU)')
    add('--threads', type=count, help="of the CPU (default: torch's)")
    add('--rounds', type=count, default=10, help='how often each variant is timed (default: %(default)s)')
    add('--warmup', type=count, default=3, help='steps before that, at least (default: %(default)s)')
    add('--budget', type=at_least(1, float), metavar='SECONDS', help='time for all; what does not fit is left out')
    add('--jobs', type=at_least(0), help='processes that compile ahead, several at a time; 0 for none, the default '
        f'but of the preset gpu with {GPU_JOBS}')
    add('--output', type=Path, metavar='DIR', help='writes results.csv, results.png and environment.json there')
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options.

    Raises:
        InputError: For whatever cannot be used.
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:
        known = [name for action in parser._actions for name in action.option_strings if name.startswith('--')]
        raise InputError(unknown('option', rest[0], known))
    if options.preset is not None:
        check_names('preset', [options.preset], PRESETS)
    check_names('mode', options.mode or [], MODES)
    check_names('precision', [options.precision] if options.precision else [], PRECISIONS)
    check_names('model', options.model or [], our_networks())
    preset = PRESETS.get(options.preset)
    options.device = usable_device(options.device or (preset.device if preset else None))
    options.budget = options.budget or (preset.budget if preset else None)
    if options.jobs is None:
        options.jobs = preset.jobs if preset else 0
    if options.output is not None:
        check_output(options.output)
    return options


def check_names(kind: str, names: Sequence[str], valid: Any) -> None:
    """Raise `InputError` for a name that is not valid."""
    for name in names:
        if name not in valid:
            raise InputError(unknown(kind, name, valid))


def usable_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best there is.

    Raises:
        InputError: If it does not exist.
    """
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ('cuda' if gpu else 'cpu'))
    except RuntimeError:
        raise InputError(unknown('device', name, ('cpu', 'cuda', 'cuda:1'))) from None
    if device.type not in ('cpu', 'cuda'):
        raise InputError(unknown('device', name, ('cpu', 'cuda', 'cuda:1')))
    if device.type == 'cuda' and (not gpu or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if gpu else 0
        raise InputError(message(f'device: {device}', f'PyTorch finds {count or "no"} GPU{"s" * (count > 1)} here',
                                 'say --device cpu, or run this on a machine with a GPU'))
    return torch.device('cuda', device.index or 0) if device.type == 'cuda' else device


def check_output(folder: Path) -> None:
    """Raise `InputError`, before anything is measured, if the results could not be written."""
    check_installed(f'output: {folder}', 'benchmark', 'matplotlib', otherwise='leave --output out')
    check_writable('output:', folder)
    folder.mkdir(parents=True, exist_ok=True)


def planned(options: argparse.Namespace) -> list[Comparison]:
    """Return the comparisons that the options ask for.

    Raises:
        InputError: If that is none.
    """
    preset = PRESETS.get(options.preset)
    if preset is not None:
        plan = preset.comparisons(options.model or preset.models)
        plan = [each for each in plan if each.task in (options.mode or MODES)]
    else:
        batch = 256 if options.device.type == 'cuda' else 16
        plan = [
            Comparison('tail' if task == 'tail' else model, task, batch, 224, 'fp32', False, tuple(usual_labels(task)))
            for task in options.mode or ['train'] for model in options.model or ['se_resnet50']]
    given = {'batch': options.batch_size, 'size': options.img_size, 'precision': options.precision,
             'channels_last': options.channels_last}
    given = {key: value for key, value in given.items() if value is not None}
    plan = [dataclasses.replace(each, **given, labels=chosen(each, options, bool(preset))) for each in plan]
    plan = list(dict.fromkeys(each for each in plan if each.labels))
    if not plan:
        named = [f'--{name} {" ".join(values)}' for name, values in (
            ('preset', [options.preset or '']), ('mode', options.mode or ()), ('variants', options.variants or ()))
            if any(values)]
        raise InputError(message(' '.join(named), 'together they name nothing to measure', 'leave one of them out'))
    return plan


def chosen(comparison: Comparison, options: argparse.Namespace, preset: bool) -> tuple[str, ...]:
    """Return the variants of a comparison that the patterns name; of a preset only such that it measures."""
    if not options.variants:
        return comparison.labels
    valid = comparison.labels if preset else tuple(all_labels(comparison.task))
    every = dict.fromkeys(label for task in MODES for label in all_labels(task))
    for pattern in options.variants:
        if not fnmatch.filter(every, pattern):
            raise InputError(unknown('variant', pattern, every))
    return tuple(label for label in valid if any(fnmatch.fnmatchcase(label, pattern) for pattern in options.variants))


def compile_ahead(plan: Sequence[Comparison], device: torch.device, jobs: int, seconds: float) -> None:
    """Compile the variants in processes of their own, several at a time, so that torch finds them in its cache.

    One process compiles one after the other, mostly on one core. Nothing is timed meanwhile. One for which the others
    leave no memory on the device comes again, alone. A process that fails costs nothing but time: its variant is
    compiled when it is measured.

    Args:
        plan: What will be measured.
        device: Where.
        jobs: Processes at a time.
        seconds: Those that still run then are ended.
    """
    deadline = time.monotonic() + seconds
    commands = dict.fromkeys(
        alone(each, label, device) for each in plan for label in each.labels if 'compiled' in label)

    def run(command: tuple[str, ...]) -> str:
        left = deadline - time.monotonic()
        if left <= 0:
            return 'for lack of time'
        try:
            done = subprocess.run(command, timeout=left, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return 'for lack of time'
        return ' '.join(line for line in done.stdout.splitlines() if 'not measured' in line) or (
            (done.stderr.splitlines() or [''])[-1] if done.returncode else '')

    say(f'compiling {len(commands)} variants, {jobs} at a time, at most {seconds:.0f} s')
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(commands, pool.map(run, commands), strict=True))
    problems = [run(command) if measure.OUT_OF_MEMORY in problem else problem for command, problem in found.items()]
    say(f'  {problems.count("")} are compiled, after {seconds - (deadline - time.monotonic()):.0f} s')
    for problem in dict.fromkeys(filter(None, problems)):
        say(f'  {problems.count(problem)} are not: {problem}')


def alone(comparison: Comparison, label: str, device: torch.device) -> tuple[str, ...]:
    """Return the command line that measures one variant, once."""
    model = () if comparison.task == 'tail' else ('--model', comparison.model)
    layout = '--channels-last' if comparison.channels_last else '--no-channels-last'
    return (sys.executable, '-m', 'se_timm.benchmark', *model, '--mode', comparison.task, '--precision',
            comparison.precision, layout, '--batch-size', str(comparison.batch), '--img-size', str(comparison.size),
            '--device', str(device), '--variants', label, '--rounds', '1', '--warmup', '1', '--jobs', '0')


@contextlib.contextmanager
def torch_settings(device: torch.device, threads: int | None) -> Iterator[None]:
    """Set torch's device and threads, and let cuDNN choose by measuring as timm's scripts do; restore what was set."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before[0])
    torch.backends.cudnn.benchmark = True
    on_gpu = [device] if device.type == 'cuda' else []
    try:
        with torch.random.fork_rng(on_gpu), torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            if on_gpu:  # cuBLAS keeps what it works in, which would count for the first variant
                torch.mm(torch.ones(8, 8, device=device), torch.ones(8, 8, device=device))
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def benchmark(options: argparse.Namespace, command: Sequence[str]) -> bool:
    """Measure, print and write; return whether every variant could be measured that there was time for."""
    plan, preset = planned(options), PRESETS.get(options.preset)
    budget, warning = Budget(options.budget, bool(options.jobs)), measure.busy()
    if warning:
        say(f'warning: {warning}')
    machine = machine_of(options.device)
    print(machine)
    if options.jobs:
        compile_ahead(plan, options.device, options.jobs, min(AHEAD * budget.left(), 3600))
    all_results: list[Results] = []
    for comparison in plan:
        results = compare(comparison, Settings(options.device, options.rounds, options.warmup), budget)
        all_results.append(results)
        print(f'\n{table(results, machine)}', flush=True)
        if options.output is not None:  # each time: what is measured is not to be lost with what comes next
            write_csv(options.output / 'results.csv', all_results, machine)
            write_environment(options.output / 'environment.json', command, all_results, machine, warning)
            draw(options.output / 'results.png', all_results)
    if preset is not None:
        print(f'\n{verdicts(preset.rows, options.model or preset.models, all_results, machine)}')
    if warning:
        print(f'\nwarning: {warning}')
    return not any(result.failed for results in all_results for result in results.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 if a variant failed, 2 for options that cannot be used."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    return exit_status(lambda: run(command))


def run(command: Sequence[str]) -> int:
    """Measure what the options ask for; return 0, or 1 if a variant failed."""
    options = parse(command)
    with torch_settings(options.device, options.threads):
        return 0 if benchmark(options, command) else 1


if __name__ == '__main__':
    sys.exit(main())
