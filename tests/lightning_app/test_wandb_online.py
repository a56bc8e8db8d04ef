"""The real W&B client against a stand-in for its server: what arrives there, and what becomes of a training without."""
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import wandb

from lightning_app import logger as logger_module
from lightning_app.cli import main
from lightning_app.logger import WandbLogger, finish

WANDB = 'lightning_app.logger.WandbLogger'
FOLDER = Path('runs/test_resnet/version_0')
WRONG_KEY = 'local' + '1' * 35


@pytest.fixture
def loggers(write_yaml):
    """Return a function that writes a config with both loggers and `best.ckpt`; it returns the option for it."""
    def loggers(**arguments):
        best = {'monitor': 'val/top1', 'mode': 'max', 'filename': 'best', 'enable_version_counter': False}
        return '--config=' + write_yaml('loggers.yaml', {'trainer': {
            'logger': [{'class_path': WANDB, 'init_args': arguments},
                       {'class_path': 'lightning_app.logger.CsvLogger'}],
            'callbacks': [{'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint', 'init_args': best}]}})

    return loggers


@pytest.fixture
def online(monkeypatch, in_tmp_path, wandb_server):
    """Log in to the stand-in, in this process too."""
    for name, value in wandb_server.environment.items():
        monkeypatch.setenv(name, value)
    return wandb_server


def points(run, name):
    """Return a metric of a run as pairs (step, value)."""
    return [(row['trainer/global_step'], row[name]) for row in run.history if name in row]


def check_history(run, folder, read_csv):
    """The W&B run must hold the numbers of metrics.csv, at steps that never fall."""
    for name in ('train/loss', 'val/loss', 'val/top1', 'val/top5'):
        assert points(run, name) == read_csv(folder, name) != []
    steps = [row['trainer/global_step'] for row in run.history]
    assert steps == sorted(steps)
    assert [row['_step'] for row in run.history] == list(range(len(steps)))


# A server that works


@pytest.mark.slow
def test_training_arrives_with_its_numbers_and_its_configuration(
        program, on_photos, loggers, wandb_server, tmp_path, read_csv):
    program('fit', loggers(tags=['a'], group='study', name='first'), *on_photos, **wandb_server.environment)
    run, = wandb_server.runs
    assert (run.project, run.name, run.group, run.job_type, run.tags) == ('se-timm', 'first', 'study', 'train', ['a'])
    assert run.exit_code == 0
    assert run.config['model']['optim']['lr'] == 0.01
    assert run.config['data']['init_args']['batch_size'] == 8
    check_history(run, tmp_path / FOLDER, read_csv)
    assert run.events


def test_resumed_training_goes_on_in_its_run(on_photos, loggers, online, read_csv):
    args = ['fit', loggers(), *on_photos]
    for more in ([], ['--trainer.max_epochs=2', f'--ckpt_path={FOLDER}/checkpoints/best.ckpt']):
        main([*args, *more])
        wandb.finish()
    run, = online.runs
    assert (run.resumed, run.exit_code) == (1, 0)
    assert [step for step, _ in points(run, 'val/top1')] == [2, 5]
    check_history(run, FOLDER, read_csv)


@pytest.mark.slow
def test_two_processes_log_one_run(program, on_photos, loggers, wandb_server, tmp_path, read_csv):
    program('fit', loggers(), *on_photos, '--trainer.devices=2', '--trainer.strategy=ddp', '--data.batch_size=4',
            **wandb_server.environment)
    run, = wandb_server.runs
    assert run.exit_code == 0
    check_history(run, tmp_path / FOLDER, read_csv)


def test_offline_run_is_synced(on_photos, loggers, in_tmp_path, program, wandb_server, read_csv):
    main(['fit', loggers(), *on_photos])
    wandb.finish()
    wandb.teardown()  # the file is written whole then
    assert wandb_server.runs == []
    folder, = FOLDER.glob('wandb/offline-run-*')
    program('sync', folder, module='wandb', **wandb_server.environment)
    run, = wandb_server.runs
    assert run.exit_code == 0
    assert run.config['model']['optim']['lr'] == 0.01
    check_history(run, FOLDER, read_csv)


def test_checkpoint_arrives_as_an_artifact(on_photos, loggers, online):
    main(['fit', loggers(log_model=True), *on_photos])
    wandb.finish()
    artifact, = [artifact for artifact in online.artifacts if artifact.type == 'model']
    assert artifact.committed
    assert artifact.run == online.runs[0].id
    assert artifact.aliases == ['best', 'latest']
    assert artifact.metadata['file'] == 'best.ckpt'
    assert [hashlib.sha256(data).hexdigest() for data in artifact.files.values()] == [
        hashlib.sha256((FOLDER / 'checkpoints/best.ckpt').read_bytes()).hexdigest()]
    assert artifact.files.keys() == artifact.manifest.keys()


@pytest.mark.slow
def test_sweep_trains_each_combination(program, on_photos, loggers, write_yaml, wandb_server):
    file = write_yaml('sweep.yaml', {
        'program': 'lightning_app', 'method': 'grid', 'project': 'swept',
        'parameters': {'model.optim.lr': {'values': [0.02, 0.03]}},
        'command': ['${env}', '${interpreter}', '-m', '${program}', 'fit', loggers(), *on_photos, '${args}']})
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])  # the agent calls `python`
    variables = {**wandb_server.environment, 'PATH': path}
    program('sweep', file, module='wandb', **variables)
    sweep, = wandb_server.sweeps
    program('agent', f'tester/swept/{sweep.id}', module='wandb', **variables)
    assert sweep.state == 'FINISHED'
    assert [(run.sweep, run.project, run.exit_code, run.config['model']['optim']['lr'])
            for run in wandb_server.runs] == [(sweep.id, 'swept', 0, 0.02), (sweep.id, 'swept', 0, 0.03)]
    assert all(points(run, 'val/top1') for run in wandb_server.runs)


def test_workspace_and_report_are_saved(online):
    ws = pytest.importorskip('wandb_workspaces.workspaces')
    wr = pytest.importorskip('wandb_workspaces.reports.v2')
    place = {'entity': 'tester', 'project': 'se-timm'}
    workspace = ws.Workspace(**place, name='Curves', sections=[
        ws.Section(name='Accuracy', panels=[wr.LinePlot(y=['val/top1'])])])
    workspace.save()
    workspace.name = 'Renamed'
    workspace.save()
    wr.Report(**place, title='Ablation', blocks=[wr.PanelGrid(runsets=[wr.Runset(**place)])]).save()
    assert [(view['type'], view['displayName']) for view in online.views] == [
        ('project-view', 'Renamed'), ('runs', 'Ablation')]
    assert 'val/top1' in json.dumps(online.views[0]['spec'])


def test_dashboard_and_report_are_saved_by_their_command(online, in_tmp_path, capsys):
    place = ['--entity=tester', '--project=se-timm']
    main(['dashboard', *place, '--network=se_resnet20_cifar'])
    main(['dashboard', *place, '--report=reduction'])
    said = capsys.readouterr().out
    assert [view['type'] for view in online.views] == ['project-view', 'runs']
    text = json.dumps(online.views[0]['spec'])
    assert 'val/top1_best' in text
    assert 'gates_by_class/layer3_2' in text
    assert '22.28' in json.dumps(online.views[1]['spec'])  # the paper's error with r = 16
    assert said.count(f'{online.url}/tester/se-timm') == 2
    assert not Path('workspace.json').exists()


@pytest.mark.slow
def test_stop_run_ends_the_training_with_a_checkpoint(
        program, on_photos, loggers, wandb_server, tmp_path, read_csv):
    def stop():
        wandb_server.stop_runs = True

    after_first_checkpoint(tmp_path, stop)
    done = program('fit', loggers(), *on_photos, '--trainer.max_epochs=100000', check=False, **wandb_server.environment)
    assert 'attempting graceful shutdown' in done.stderr
    run, = wandb_server.runs
    assert run.exit_code == done.returncode == 1
    check_history(run, tmp_path / FOLDER, read_csv)
    assert_checkpoint(tmp_path)


# A server that does not


def after_first_checkpoint(folder, action):
    """Call `action` as soon as a training in `folder` has written a checkpoint."""
    def wait():
        while not list(Path(folder, FOLDER).glob('checkpoints/*.ckpt')):
            time.sleep(0.05)
        action()

    threading.Thread(target=wait, daemon=True).start()


def assert_checkpoint(folder='.'):
    path, = Path(folder, FOLDER).glob('checkpoints/*.ckpt')
    assert torch.load(path, weights_only=True)['state_dict']


def wrong_key(server, monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', WRONG_KEY)
    return {}


def broken(server, monkeypatch):
    server.broken = True
    return {}


def silent(server, monkeypatch):
    server.delay = 3600
    return {}


def unknown_team(server, monkeypatch):
    return {'entity': 'nobody'}


FAULTS = {wrong_key: 'user is not logged in', broken: 'HTTP 500', silent: 'deadline exceeded',
          unknown_team: 'nobody not found'}


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_training_that_the_server_does_not_take_is_kept_offline(
        fault, on_photos, loggers, online, monkeypatch, read_csv, read_history):
    monkeypatch.setattr(logger_module, 'CONNECT_SECONDS', 2)
    arguments = fault(online, monkeypatch)
    with pytest.warns(UserWarning, match=f'the run is kept offline(.|\\n)*{FAULTS[fault]}'):
        main(['fit', loggers(**arguments), *on_photos])
    assert_checkpoint()
    offline, = FOLDER.glob('wandb/offline-run-*')
    rows = read_history(offline)
    assert [(row['trainer/global_step'], row['val/top1']) for row in rows if 'val/top1' in row] == read_csv(
        FOLDER, 'val/top1') != []
    assert online.runs == []


def test_slow_server_gets_all(on_photos, loggers, online, read_csv):
    online.delay = 0.5
    main(['fit', loggers(), *on_photos])
    wandb.finish()
    run, = online.runs
    assert run.exit_code == 0
    check_history(run, FOLDER, read_csv)


def test_dead_server_is_not_waited_for_at_the_end(online, tmp_path, monkeypatch):
    monkeypatch.setattr(logger_module, 'FINISH_SECONDS', 1)
    logger = WandbLogger(save_dir=str(tmp_path / 'run'))
    logger.log_metrics({'val/top1': 12.5}, step=3)
    online.close()
    folder, = tmp_path.glob('run/wandb/run-*')
    with pytest.warns(UserWarning, match=f'did not arrive whole(.|\\n)*wandb sync --include-online {folder}'):
        finish(logger.experiment)


@pytest.mark.slow
def test_server_that_dies_in_the_middle_of_a_training_loses_nothing(
        program, on_photos, loggers, wandb_server, tmp_path, read_csv):
    after_first_checkpoint(tmp_path, wandb_server.close)
    done = program('fit', loggers(), *on_photos, '--trainer.max_epochs=20', **wandb_server.environment)
    assert wandb_server.runs[0].exit_code is None
    assert_checkpoint(tmp_path)
    folder, = (tmp_path / FOLDER).glob('wandb/run-*')
    assert f'wandb sync --include-online {folder}' in done.stderr
    with type(wandb_server)() as another:
        program('sync', '--include-online', folder, module='wandb', **another.environment)
    run, = another.runs
    assert run.exit_code == 0
    check_history(run, tmp_path / FOLDER, read_csv)
    assert another.unknown == []


@pytest.mark.parametrize(('option', 'named', 'why'), [
    ('project=a/b', 'a/b', 'Invalid project name'), ('id=a/b', 'a/b', 'Run ID cannot'),
    (f'tags=[good,{"a" * 65}]', f'tags: {"a" * 65}', '1 to 64 characters')])
def test_name_that_wandb_refuses_is_refused_before_the_training(option, named, why, on_photos, in_tmp_path, cli_error):
    given, reason, _ = cli_error(['fit', *on_photos, f'--trainer.logger={WANDB}', f'--trainer.logger.{option}'])
    assert named in given
    assert why in reason
    assert not Path('runs').exists()
