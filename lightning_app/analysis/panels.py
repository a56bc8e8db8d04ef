"""The panels of the W&B workspace: a table of what they show, and how each kind is made."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..metrics import DATA_WAIT, SPEED

__all__ = ['COSTS', 'SECTIONS', 'Blocks', 'Panel', 'draw']

STEP, TIME = 'trainer/global_step', 'RelativeTime(Process)'
GPUS = [str(number) for number in range(8)]  # of one machine, the first, which is the one that W&B watches


class Panel(NamedTuple):
    """A panel, or one for each SE block.

    Attributes:
        kind: One of `KINDS`.
        title: Above it.
        names: What it shows: metrics as they are logged, keys of the configuration after `config.`. A `*` stands for
            any SE block, or after `system/` for any GPU.
        options: Arguments of the library's panel.
    """

    kind: str
    title: str
    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})


class Blocks(NamedTuple):
    """SE blocks by the names under which they are logged: all of a network, and those of which there are pictures."""

    all: Sequence[str]
    shown: Sequence[str]


def _of_error(group: str) -> Panel:
    return Panel('bar', f'Top-1 error by {group}', ('val/top1_error',), {'groupby': f'config.model.network.{group}'})


COSTS = ('config.network.parameters', 'config.network.multiply_adds')
SHARE = {'range_y': (0.0, 1.0)}
SECTIONS: dict[str, tuple[Panel, ...]] = {
    'Accuracy': (
        Panel('line', 'Training loss', ('train/loss',), {'smoothing_type': 'exponentialTimeWeighted',
                                                         'smoothing_factor': 0.9, 'smoothing_show_original': True}),
        Panel('line', 'Validation loss', ('val/loss',)),
        Panel('line', 'Top-1 accuracy', ('val/top1',)),
        Panel('line', 'Top-5 accuracy', ('val/top5',)),
        Panel('line', 'Top-1 and top-5 error', ('val/top1_error', 'val/top5_error')),
        Panel('scalar', 'Best top-1 accuracy', ('val/top1_best',)),
    ),
    'Optimisation': (
        Panel('line', 'Learning rate', ('lr',)),
        Panel('line', 'Norm of the gradient', ('train/grad_norm',), {'log_y': True}),
        Panel('line', 'Epoch', ('epoch',)),
    ),
    'Speed': (
        Panel('line', 'Images per second', (SPEED,)),
        Panel('line', 'Time spent waiting for data, in per cent', (DATA_WAIT,), {'range_y': (0.0, 100.0)}),
        Panel('line', 'GPU utilisation, in per cent', ('system/gpu.*.gpu',), {'x': TIME, 'range_y': (0.0, 100.0)}),
        Panel('line', 'GPU memory, in per cent', ('system/gpu.*.memoryAllocated',),
              {'x': TIME, 'range_y': (0.0, 100.0)}),
        Panel('line', 'GPU power, in watts', ('system/gpu.*.powerWatts',), {'x': TIME}),
        Panel('line', 'CPU utilisation, in per cent', ('system/cpu',), {'x': TIME}),
    ),
    'SE gates by block': (
        Panel('line', 'Mean gate', ('gates/*/mean',)),
        Panel('line', 'Deviation of the gates over images', ('gates/*/std',)),
        Panel('line', 'Share of gates near zero', ('gates/*/near_zero',), SHARE),
        Panel('line', 'Share of gates near one', ('gates/*/near_one',), SHARE),
        Panel('line', 'Share of the variance between classes', ('gates/*/class_specific',)),
        Panel('bar', 'Share of the variance between classes, from the first block to the last',
              ('gates/*/class_specific',)),
        Panel('histogram', 'Gates of {block}', ('gates_histogram/*',)),
        Panel('table', 'Blocks', ('gates/table',)),
    ),
    'SE gates by class': (
        Panel('curves', 'Mean gate by class, {block}', ('gates_by_class/*',)),
        Panel('media', 'Mean gate, class x channel', ('gates_map/*',)),
    ),
    'Ablations': (
        *(_of_error(group) for group in ('reduction', 'squeeze', 'excitation', 'placement', 'stages')),
        Panel('coordinates', 'Settings, cost and accuracy', (
            'config.model.network.reduction', 'config.model.optim.lr', *COSTS, 'val/top1_best')),
        Panel('scatter', 'Parameters and error', (COSTS[0], 'val/top1_error')),
        Panel('scatter', 'Multiply-adds and error', (COSTS[1], 'val/top1_error')),
        Panel('importance', 'What the accuracy depends on', ('val/top1_best',)),
    ),
    'Run': (
        Panel('comparer', 'Configurations, side by side'),
        Panel('code', 'Source, side by side'),
    ),
}


def draw(panels: Sequence[Panel], blocks: Blocks) -> list[Any]:
    """Return the panels as the library's objects.

    Args:
        panels: What to draw.
        blocks: The SE blocks, for panels that the library cannot make for any.
    """
    import wandb_workspaces.reports.v2 as wr

    return [drawn for panel in panels for drawn in KINDS[panel.kind](wr, panel, blocks)]


def filled(names: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """Return the names without `*`."""
    return [name.replace('*', each) for name in names
            for each in ([''] if '*' not in name else GPUS if name.startswith('system/') else blocks)]


def reference(wr: Any, name: str) -> Any:
    """Return a key of the configuration, or the last value of a metric, as panels of many runs take them."""
    return wr.Config(name.removeprefix('config.')) if name.startswith('config.') else wr.SummaryMetric(name)


# How each kind is made, by the library `wr`


def line(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One plot: of any SE block by a regular expression, which the library takes in line plots alone."""
    options = {'title': panel.title, 'x': STEP, **panel.options}
    if any('*' in name and not name.startswith('system/') for name in panel.names):
        patterns = [re.escape(name).replace(r'\*', '[^/]+') for name in panel.names]
        return [wr.LinePlot(metric_regex=f'^({"|".join(patterns)})$', **options)]
    return [wr.LinePlot(y=filled(panel.names, ()), **options)]


def histogram(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One plot for each block: that of a key with histograms shows them over the steps."""
    return [wr.LinePlot(title=panel.title.format(block=block), x=STEP, y=filled(panel.names, [block]))
            for block in blocks.shown]


def curves(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One chart for each block, of what `wandb.plot.line_series` logs: a table of that name and `_table`."""
    return [wr.CustomChart(
        query={'summaryTable': {'tableKey': f'{name}_table'}}, chart_name='wandb/lineseries/v0',
        chart_fields={'step': 'step', 'lineKey': 'lineKey', 'lineVal': 'lineVal'},
        chart_strings={'title': panel.title.format(block=block), 'xname': 'channel'})
        for block in blocks.shown for name in filled(panel.names, [block])]


def media(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One browser of pictures."""
    return [wr.MediaBrowser(title=panel.title, media_keys=filled(panel.names, blocks.shown))]


def bar(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One bar plot: of all blocks, or of runs, which `groupby` takes together by a key of the configuration."""
    options = dict(panel.options)
    if group := options.pop('groupby', None):
        options |= {'groupby': reference(wr, group), 'groupby_aggfunc': 'mean', 'groupby_rangefunc': 'stddev'}
    return [wr.BarPlot(title=panel.title, metrics=filled(panel.names, blocks.all), orientation='v', **options)]


def coordinates(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One plot of runs as lines, from setting to result."""
    columns = [wr.ParallelCoordinatesPlotColumn(metric=reference(wr, name)) for name in panel.names]
    return [wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)]


def scatter(wr: Any, panel: Panel, blocks: Blocks) -> list[Any]:
    """One plot of runs as points."""
    x, y = (reference(wr, name) for name in panel.names)
    return [wr.ScatterPlot(title=panel.title, x=x, y=y)]


KINDS: dict[str, Callable[[Any, Panel, Blocks], list[Any]]] = {
    'line': line, 'histogram': histogram, 'curves': curves, 'media': media, 'bar': bar, 'coordinates': coordinates,
    'scatter': scatter,
    'scalar': lambda wr, panel, blocks: [wr.ScalarChart(title=panel.title, metric=panel.names[0])],
    'table': lambda wr, panel, blocks: [wr.WeavePanelSummaryTable(table_name=panel.names[0])],
    'importance': lambda wr, panel, blocks: [wr.ParameterImportancePlot(with_respect_to=panel.names[0])],
    'comparer': lambda wr, panel, blocks: [wr.RunComparer(diff_only='split')],
    'code': lambda wr, panel, blocks: [wr.CodeComparer(diff='split')]}
