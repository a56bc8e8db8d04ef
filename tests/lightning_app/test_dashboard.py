"""The workspace and the reports hold what they say, name only what runs log, and are read again by W&B's library."""
import fnmatch
import json
import sys
from pathlib import Path

import pytest
import wandb
from wandb_workspaces import expr
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from lightning_app.analysis.panels import SECTIONS
from lightning_app.analysis.report import build_report
from lightning_app.analysis.studies import STUDIES, markdown, settings
from lightning_app.cli import main
from lightning_app.dashboard import blocks_of, build_workspace, specification

KEY = 'local-' + '0' * 40  # what W&B takes for a key
SILENT = 'http://127.0.0.1:9'  # nothing listens at this port
SECTION_NAMES = [
    'Accuracy', 'Optimisation', 'Speed', 'SE gates by block', 'SE gates by class', 'Ablations', 'Run']


@pytest.fixture(scope='module')
def blocks():
    return blocks_of('se_resnet50')


@pytest.fixture
def spec(blocks):
    return specification(build_workspace('someone', 'se-timm', blocks))


def sections(spec):
    return spec['spec']['section']['panelBankConfig']['sections']


def panels(spec, name):
    return next(section['panels'] for section in sections(spec) if section['name'] == name)


def without_ids(value):
    if isinstance(value, dict):
        return {key: without_ids(each) for key, each in value.items() if key not in ('id', '__id__')}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def leaves(value):
    """Return all texts in a specification."""
    if isinstance(value, (dict, list)):
        return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in leaves(each)]
    return [value] if isinstance(value, str) else []


# The workspace


def test_every_section_is_there_and_full(spec):
    assert [section['name'] for section in sections(spec)] == SECTION_NAMES == list(SECTIONS)
    for section in sections(spec):
        assert len(section['panels']) >= len(SECTIONS[section['name']])


def test_library_reads_what_was_written(spec):
    read = Workspace._from_model(View.model_validate(json.loads(json.dumps(spec))))
    assert specification(read) == spec


def test_two_builds_are_equal_but_for_ids(spec, blocks):
    again = specification(build_workspace('someone', 'se-timm', blocks))
    assert without_ids(again) == without_ids(spec)


def test_curves_are_of_any_network(spec):
    patterns = [panel['config']['metricRegex'] for panel in panels(spec, 'SE gates by block')
                if panel['config'].get('useMetricRegex')]
    assert patterns == [
        f'^(gates/[^/]+/{number})$' for number in ('mean', 'std', 'near_zero', 'near_one', 'class_specific')]


def test_pictures_are_of_the_blocks_of_the_paper(spec):
    shown = ['layer1_2', 'layer2_3', 'layer3_5', 'layer4_0', 'layer4_1', 'layer4_2']
    *charts, pictures = panels(spec, 'SE gates by class')
    assert pictures['config']['mediaKeys'] == [f'gates_map/{block}' for block in shown]
    histograms = [panel['config']['metrics'] for panel in panels(spec, 'SE gates by block')
                  if panel['config'].get('metrics', [''])[:1] == [f'gates_histogram/{shown[0]}']]
    assert len(histograms) == 1
    assert [text for chart in charts for text in leaves(chart) if text.startswith('gates_by_class/')] == [
        f'gates_by_class/{block}_table' for block in shown]


def test_charts_have_the_fields_of_wandb(spec):
    chart = wandb.plot.line_series(xs=[0], ys=[[1]], keys=['all'], title='', xname='channel')
    chart.set_key('gates_by_class/layer1_2')
    theirs = chart.spec.config_value['panel_config']
    ours = panels(spec, 'SE gates by class')[0]['config']
    assert (ours['panelDefId'], ours['fieldSettings'], ours['stringSettings'].keys()) == (
        theirs['panelDefId'], theirs['fieldSettings'], theirs['stringSettings'].keys())
    assert 'gates_by_class/layer1_2_table' in leaves(theirs)
    assert 'gates_by_class/layer1_2_table' in leaves(ours)


def metric_names():
    """All that the workspace names, as in `Panel.names`."""
    every = [panel for group in SECTIONS.values() for panel in group]
    return sorted({name for panel in every for name in (*panel.names, panel.options.get('groupby'))} - {None})


def test_all_names_of_the_table_are_in_the_workspace(spec):
    texts = leaves(spec)
    for name in metric_names():
        if name.startswith('config.'):
            group, _, key = name.removeprefix('config.').partition('.')
            assert any(text.removeprefix('config:') == f'{group}.value.{key}' for text in texts), name
        else:
            found = fnmatch.filter([text.removeprefix('summary:') for text in texts], name)
            pattern = f'^({name.replace("*", "[^/]+")})$'
            assert found or pattern in texts, name


@pytest.mark.slow
def test_every_name_is_logged_by_a_training(
        on_photos, write_yaml, in_tmp_path, read_wandb, read_history, monkeypatch):
    monkeypatch.setenv('WANDB_X_STATS_SAMPLING_INTERVAL', '0.1')  # a rate, such as that of the CPU, takes two samples
    callbacks = [{'class_path': f'lightning_app.callbacks.{name}'}
                 for name in ('NetworkSummary', 'Throughput', 'GradientNorm', 'Gates')]
    network = {'reduction': 4, 'squeeze': 'avg', 'excitation': 'sigmoid', 'placement': 'standard', 'stages': [2, 3]}
    config = write_yaml('run.yaml', {'model': {'network': network}, 'trainer': {
        'logger': {'class_path': 'lightning_app.logger.WandbLogger'}, 'callbacks': callbacks}})
    main(['fit', '--config', config, *on_photos, '--model.name=se_resnet20_cifar'])
    logged = {name for row in read_history('runs') for name in keys(row)}
    configured = {}
    for record in read_wandb('runs'):
        for item in record.config.update:
            if item.key:
                configured[item.key] = json.loads(item.value_json)
    given = {f'config.{name}' for name in keys(configured, '.')}
    system = {f'system/{item.key}' for record in read_wandb('runs') for item in record.stats.item}
    missing = [name for name in metric_names() if not fnmatch.filter(logged | given | system, name)]
    assert [name for name in missing if not name.startswith('system/gpu.')] == []  # there is no GPU here
    assert 'trainer/global_step' in logged


def keys(content, separator='/', prefix=''):
    """Return the names in nested values, those of groups too."""
    for key, value in content.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, separator, f'{prefix}{key}{separator}')


# The verb


@pytest.mark.parametrize(('options', 'path'), [([], 'workspace.json'), (['--spec', 'mine.json'], 'mine.json')])
def test_without_an_account_the_workspace_is_written(options, path, spec, in_tmp_path, capsys):
    main(['dashboard', '--entity', 'someone', '--project', 'se-timm', *options])
    said = capsys.readouterr().out
    assert 'not saved on the server (there is no account' in said
    assert f'written to {path}' in said
    assert without_ids(json.loads(Path(path).read_text())) == without_ids(spec)


def test_network_says_whose_blocks_have_pictures(in_tmp_path):
    main(['dashboard', '--entity=someone', '--network=se_resnet20_cifar'])
    texts = leaves(json.loads(Path('workspace.json').read_text()))
    assert 'gates_map/layer3_2' in texts
    assert 'gates_map/layer4_2' not in texts


def test_network_that_se_was_put_into(in_tmp_path):
    main(['dashboard', '--entity=someone', '--network=resnet18', '--add_se={identity_start: true}'])
    assert 'gates_map/layer4_1' in leaves(json.loads(Path('workspace.json').read_text()))


def test_entity_and_project_of_the_environment(in_tmp_path, monkeypatch, cli_error):
    assert cli_error(['dashboard'])[0] == 'no entity'
    monkeypatch.setenv('WANDB_ENTITY', 'someone')
    monkeypatch.setenv('WANDB_PROJECT', 'mine')
    main(['dashboard'])
    assert {'someone', 'mine'} <= set(leaves(json.loads(Path('workspace.json').read_text())))


@pytest.mark.slow
def test_module_is_the_same_command(program, tmp_path):
    done = program('--entity', 'someone', '--spec', 'there.json', module='lightning_app.dashboard')
    assert 'written to there.json' in done.stdout
    assert [section['name'] for section in sections(json.loads((tmp_path / 'there.json').read_text()))] == SECTION_NAMES
    done = program('--entity', 'someone', '--specs', 'there.json', module='lightning_app.dashboard', check=False)
    assert done.returncode == 2
    assert 'did you mean --spec' in done.stderr


@pytest.mark.slow
def test_server_that_does_not_answer(in_tmp_path, monkeypatch, capfd, cli_error):
    monkeypatch.setenv('WANDB_BASE_URL', SILENT)
    monkeypatch.setenv('WANDB_API_KEY', KEY)
    main(['dashboard', '--entity=someone'])
    assert f'not saved on the server (Failed to verify credentials with {SILENT}' in capfd.readouterr().out
    assert Path('workspace.json').is_file()
    given, why, do = cli_error(['dashboard', '--entity=someone', '--report=squeeze'])
    assert given == 'report: squeeze'
    assert 'made on the server, which did not take it' in why
    assert 'someone/se-timm' in do


@pytest.mark.parametrize(('options', 'given', 'why', 'do'), [
    (['--report=reductions'], "report: 'reductions'", 'no such report', 'did you mean reduction'),
    (['--report=3x3'], 'report: 3x3', 'there is no account', 'wandb login'),
    (['--report=3x3', '--spec=a.json'], 'spec: a.json with report: 3x3', 'no form without the server', 'leave one'),
    (['--network=resnet18'], 'network: resnet18', 'no SE block', 'se_resnet50'),
    (['--network=se_resnet51'], "network: 'se_resnet51'", 'no such network', 'se_resnet50'),
    (['--spec=nowhere/a.json'], 'spec: nowhere/a.json', 'cannot be written', 'a folder that is there'),
    (['--panels=5'], '--panels=5', 'no such option', '--help'),
])
def test_what_cannot_be_is_said_in_three_lines(options, given, why, do, cli_error, in_tmp_path):
    lines = cli_error(['dashboard', '--entity=someone', *options])
    assert given in lines[0]
    assert why in lines[1]
    assert do in lines[2]
    assert not list(in_tmp_path.iterdir())


def test_package_that_is_missing_is_named(cli_error, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb_workspaces', None)  # as Python marks what cannot be imported
    given, why, do = cli_error(['dashboard', '--entity=someone'])
    assert given == 'dashboard'
    assert 'wandb_workspaces' in why
    assert "pip install 'se-timm[dashboard]'" in do


# Reports


@pytest.mark.parametrize('study', STUDIES)
def test_report_holds_the_paper_s_table_and_the_runs_of_the_study(study):
    report = build_report(study, 'someone', 'se-timm')
    text = '\n'.join(block.text for block in report.blocks if hasattr(block, 'text') and isinstance(block.text, str))
    assert markdown(STUDIES[study]) in text
    grids = [block for block in report.blocks if hasattr(block, 'runsets')]
    assert [[type(panel).__name__ for panel in grid.panels] for grid in grids] == [
        ['BarPlot', 'BarPlot'], ['ParallelCoordinatesPlot', 'ScatterPlot', 'ScatterPlot', 'RunComparer']]
    for grid in grids:
        runs, = grid.runsets
        assert (runs.entity, runs.project) == ('someone', 'se-timm')
        filters = expr.filters_tree_to_v2(expr.expr_to_filters(runs.filters))['filters']
        assert [(each['key'], each['op'], each['value']) for each in filters] == [
            ({'section': 'run', 'name': 'group'}, '=', study)]
    assert [expr.groupby_str_to_key(key).name for key in grids[0].runsets[0].groupby] == [
        f'model.value.network.{name}' for name in settings(STUDIES[study])]


@pytest.mark.parametrize('study', STUDIES)
def test_bars_keep_the_rows_of_a_table_apart(study):
    rows = STUDIES[study].rows
    assert len({tuple(row.arguments.get(name) for name in settings(STUDIES[study])) for row in rows}) == len(rows)


def test_table_is_printed_as_in_the_paper():
    lines = markdown(STUDIES['no_squeeze']).splitlines()
    assert lines[0] == '| variant | arguments | top-1 error | top-5 error | GFLOPs | parameters (millions) |'
    assert lines[3] == "| NoSqueeze | `{'squeeze': 'none', 'bias': False}` | 22.93 | 6.39 | 4.27 | 28.1 |"
    assert markdown(STUDIES['squeeze']).splitlines()[2].endswith('| 22.57 | 6.09 |  |  |')
