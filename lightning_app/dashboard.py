"""The W&B workspace of a project, and reports on the paper's studies, as code.

    python -m lightning_app.dashboard --entity E --project P
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from se_timm.errors import InputError, check_installed, message
from se_timm.gates import find_se

from .analysis.channels import default_blocks
from .analysis.gate_statistics import key_of
from .analysis.panels import SECTIONS, Blocks, draw
from .analysis.report import build_report
from .analysis.studies import find_study
from .files import writing
from .logger import logged_in, own_project
from .network import create_network, with_se

__all__ = ['build_workspace', 'dashboard', 'specification']

NAME = 'Squeeze-and-Excitation'
SPEC = 'workspace.json'


def dashboard(
        entity: str | None = None,
        project: str | None = None,
        network: str = 'se_resnet50',
        add_se: dict[str, Any] | None = None,
        spec: str | None = None,
        report: str | None = None,
) -> None:
    """Make the W&B workspace of a project: accuracy, speed, SE gates and ablations, run beside run.

    Without an account, or if the server does not answer, it is written as JSON instead.

    Args:
        entity: User or team on the server; `$WANDB_ENTITY` where not given.
        project: Project of the runs; `$WANDB_PROJECT`, or `se-timm`, where not given.
        network: Name of the network whose SE blocks have pictures; curves show the blocks of any.
        add_se: As `model.add_se`, of runs that have put SE into it.
        spec: JSON file to write; where it is not given, `workspace.json`, and only if the workspace cannot be saved.
        report: Make a report instead, on a study of the paper: `reduction`, `squeeze`, `excitation`, `stages`,
            `placement`, `3x3` or `no_squeeze`. It holds the paper's table and the runs of the group of that name.

    Raises:
        InputError: If that cannot be.
    """
    check_options(spec, report)
    project = project or own_project()
    if not (entity := entity or os.environ.get('WANDB_ENTITY')):
        raise InputError(message('no entity', 'a project is one of a user or team', 'say --entity NAME'))
    if report is not None:
        make_report(report, entity, project)
        return
    workspace = build_workspace(entity, project, blocks_of(network, add_se))
    problem = saved(workspace.save) if logged_in() else 'there is no account: wandb login'
    if problem is None:
        print(f'workspace: {workspace.url}')
    else:
        print(f'workspace: not saved on the server ({problem})')
    if spec is not None or problem is not None:
        write(spec or SPEC, specification(workspace))


def check_options(spec: str | None, report: str | None) -> None:
    """Raise `InputError` for options that cannot be honoured, or if the library is not there."""
    if report is not None:
        find_study(report)
        if spec is not None:
            raise InputError(message(
                f'spec: {spec} with report: {report}', 'a report has no form without the server, which it names',
                'leave one of them out'))
    check_installed('dashboard', 'dashboard', 'wandb_workspaces')


def blocks_of(network: str, add_se: dict[str, Any] | None = None) -> Blocks:
    """Return the SE blocks of a network under the names by which they are logged.

    Raises:
        InputError: If there is no such network, or no SE in it.
    """
    net, _ = create_network(network, ('network', 'network'), device='meta')
    blocks = find_se(net if add_se is None else with_se(net, add_se))
    if not blocks:
        raise InputError(message(
            f'network: {network}', 'it has no SE block of a kind that is known',
            'name the network with SE that the runs are of, such as se_resnet50, or give the add_se that put it in'))
    names, shown = ([key_of(block) for block in each] for each in (blocks, default_blocks(blocks)))
    return Blocks(names, shown)


def build_workspace(entity: str, project: str, blocks: Blocks) -> Any:
    """Return the workspace, a `wandb_workspaces.workspaces.Workspace`."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(name=NAME, entity=entity, project=project, sections=[
        ws.Section(name=name, panels=draw(panels, blocks), is_open=True) for name, panels in SECTIONS.items()])


def specification(workspace: Any) -> dict[str, Any]:
    """Return a workspace as plain types, in the form in which W&B keeps it."""
    model = workspace._to_model()  # private: the library itself writes no files
    return model.model_dump(by_alias=True, exclude_none=True, mode='json')


def saved(save: Callable[[], Any]) -> str | None:
    """Return why something could not be saved on W&B's server, None if it was."""
    try:
        save()
    except Exception as error:  # of many kinds, by what is wrong between here and the server
        return ' '.join(str(error).split()) or type(error).__name__
    return None


def write(path: str, spec: dict[str, Any]) -> None:
    """Write the JSON file.

    Raises:
        InputError: If that is not possible.
    """
    with writing(f'spec: {path}', 'name a file in a folder that is there'):
        Path(path).write_text(json.dumps(spec, indent=1) + '\n')
    print(f'workspace: written to {path}')


def make_report(study: str, entity: str, project: str) -> None:
    """Save the report of a study.

    Raises:
        InputError: Without an account, or if the server does not answer: there is no report without it.
    """
    given = f'report: {study}'
    if not logged_in():
        raise InputError(message(
            given, 'it is made on the server, and there is no account', 'say wandb login, then the same again'))
    report = build_report(study, entity, project)
    if problem := saved(report.save):
        raise InputError(message(
            given, f'it is made on the server, which did not take it ({problem})',
            f'see that the project {entity}/{project} is there, then say the same again'))
    print(f'report: {report.url}')


if __name__ == '__main__':
    from .cli import run_verb

    run_verb('dashboard', sys.argv[1:])
