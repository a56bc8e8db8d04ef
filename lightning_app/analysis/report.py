"""Reports of W&B on the paper's studies: its table, and the runs of the same settings."""
from __future__ import annotations

from typing import Any

from .panels import COSTS, Blocks, Panel, draw
from .studies import find_study, markdown, settings

__all__ = ['build_report']

NONE = Blocks((), ())


def build_report(study: str, entity: str, project: str) -> Any:
    """Return the report of a study; the library asks W&B's server for the project when it is saved.

    Args:
        study: One of `studies.STUDIES`, also the group of its runs.
        entity: User or team.
        project: Project of the runs.

    Raises:
        InputError: If there is no such study.
    """
    import wandb_workspaces.reports.v2 as wr

    table = find_study(study)
    keys = [f'config.model.network.{name}' for name in settings(table)]
    runs = {'entity': entity, 'project': project, 'filters': f"Group = '{study}'"}
    bars = [Panel('bar', 'Top-1 error, in per cent', ('val/top1_error',)),
            Panel('bar', 'Top-5 error, in per cent', ('val/top5_error',))]
    single = [
        Panel('coordinates', 'Settings, cost and accuracy', (*keys, 'config.model.optim.lr', *COSTS, 'val/top1_best')),
        *(Panel('scatter', title, (cost, 'val/top1_error')) for title, cost in zip(
            ('Parameters and top-1 error', 'Multiply-adds and top-1 error'), COSTS, strict=True)),
        Panel('comparer', 'Configurations, side by side')]
    return wr.Report(
        entity=entity, project=project, title=f'SE-ResNet-50 on ImageNet: {table.title}',
        description=f'Runs of the group {study}, beside Table {table.number} of the paper',
        blocks=[
            wr.H2(f'Table {table.number} of the paper (arXiv:1709.01507{table.version})'),
            wr.MarkdownBlock(f'Errors on the ImageNet validation set, in per cent.\n\n{markdown(table)}'),
            wr.H2('Runs, those of the same setting together'),
            wr.PanelGrid(runsets=[wr.Runset(name=study, groupby=keys, **runs)], panels=draw(bars, NONE)),
            wr.H2('Runs one by one'),
            wr.PanelGrid(runsets=[wr.Runset(name=study, **runs)], panels=draw(single, NONE))])
