"""W&B never stops a training and CSV never loses a line."""
import contextlib
import csv
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import wandb

from lightning_app import logger as logger_module
from lightning_app import provenance as provenance_module
from lightning_app.cli import main
from lightning_app.logger import CsvLogger, WandbLogger
from lightning_app.metrics import DATA_WAIT, SPEED
from lightning_app.provenance import source
from se_timm.cost import cost

# W&B's keys have forty characters; "local" tells that the server is one's own
FAKE_KEY = 'local-' + '0' * 40


@pytest.fixture
def closed_port():
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def offline_runs(folder):
    return list(Path(folder).glob('wandb/offline-run-*/run-*.wandb'))


# W&B without an account


def test_without_an_account_the_run_is_kept_offline_and_it_is_said_what_to_do(tmp_path, caplog, capfd, read_wandb):
    logger = WandbLogger(save_dir=str(tmp_path / 'run'), tags=['a', 'b'], group='study', notes='Why.', name='first')
    logger.log_metrics({'val/top1': 12.5}, step=3)
    records = read_wandb(tmp_path / 'run')
    folder = offline_runs(tmp_path / 'run')[0].parent
    assert f'wandb leet run {folder}' in caplog.text
    assert 'wandb login' in caplog.text
    assert f'wandb sync {folder}' in caplog.text
    said = ''.join(capfd.readouterr())
    assert 'anonymous' not in said
    assert 'WARNING' not in said

    run = next(record.run for record in records if record.WhichOneof('record_type') == 'run')
    assert (run.project, run.run_group, list(run.tags), run.notes, run.display_name, run.job_type) == (
        'se-timm', 'study', ['a', 'b'], 'Why.', 'first', 'train')
    history = [{item.key or item.nested_key[0]: item.value_json for item in record.history.item}
               for record in records if record.WhichOneof('record_type') == 'history']
    assert any(json.loads(row.get('val/top1', 'null')) == 12.5 and json.loads(row['trainer/global_step']) == 3
               for row in history)


def test_message_names_a_folder_that_wandb_reads(tmp_path, caplog, program):
    WandbLogger(save_dir=str(tmp_path / 'run')).log_metrics({'val/top1': 12.5}, step=3)
    wandb.finish()
    command = next(line for line in caplog.text.splitlines() if 'wandb leet run ' in line)
    folder = command.split('wandb leet run ')[1]
    done = program('leet', 'inspect', '--json', folder, module='wandb')
    assert 'val/top1' in done.stdout


@pytest.mark.parametrize('mode', ['offline', 'disabled'])
def test_mode_of_the_environment_is_respected(mode, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', mode)
    logger = WandbLogger(save_dir=str(tmp_path / 'run'))
    logger.log_metrics({'val/top1': 12.5}, step=3)
    wandb.finish()
    assert len(offline_runs(tmp_path / 'run')) == (mode == 'offline')
    assert logger._wandb_init['mode'] is None  # wandb itself reads the variable


def test_mode_given_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    WandbLogger(save_dir=str(tmp_path / 'run'), mode='offline').log_metrics({'val/top1': 12.5})
    wandb.finish()
    assert len(offline_runs(tmp_path / 'run')) == 1


def test_environment_is_left_alone(tmp_path):
    # Lightning's `offline: true` sets WANDB_MODE for the whole process; the guard of every test would fail this one
    WandbLogger(save_dir=str(tmp_path / 'run'), mode='offline').log_metrics({'val/top1': 12.5})


def test_resume_is_allowed(tmp_path):
    # LightningCLI would fill in None, with which a run that is continued starts anew
    logger = WandbLogger(save_dir=str(tmp_path / 'run'), id='abc12345', mode='offline')
    assert logger.experiment.settings.resume == 'allow'
    assert logger.experiment.id == 'abc12345'


def test_resumed_training_goes_on_with_its_run(on_photos, in_tmp_path, recwarn):
    args = ['fit', *on_photos, '--trainer.logger=lightning_app.logger.WandbLogger']
    first = main(args).trainer.logger.experiment.id
    wandb.finish()
    path = str(next(Path('runs').rglob('*.ckpt')))
    resumed = main([*args, '--trainer.max_epochs=2', f'--ckpt_path={path}']).trainer.logger
    assert resumed.version == resumed.experiment.id == first
    wandb.finish()
    assert main(args).trainer.logger.experiment.id != first


def test_trainings_with_one_folder_for_logs_are_runs_of_their_own(on_photos, in_tmp_path):
    args = ['fit', *on_photos, '--trainer.logger=lightning_app.logger.WandbLogger', '--trainer.logger.save_dir=logs']
    first = main(args).trainer.logger.experiment.id
    wandb.finish()
    second = main(args).trainer.logger.experiment.id
    wandb.finish()
    assert second != first
    path = str(next(Path('runs').rglob('version_0/checkpoints/*.ckpt')))
    resumed = main([*args, '--trainer.max_epochs=2', f'--ckpt_path={path}']).trainer.logger
    assert resumed.experiment.id == first


def test_metrics_of_another_run_are_set_aside(on_photos, in_tmp_path, read_csv, caplog):
    def losses(file):
        Path(file).parent.joinpath('only').mkdir(exist_ok=True)
        shutil.copy(file, 'logs/only/metrics.csv')
        return read_csv('logs/only', 'val/loss')

    args = [*on_photos, '--trainer.logger=lightning_app.logger.CsvLogger', '--trainer.logger.save_dir=logs']
    main(['fit', *args, '--trainer.max_epochs=2'])
    first = losses('logs/metrics.csv')
    main(['fit', *args])
    assert losses('logs/metrics-1.csv') == first
    assert len(first) == 2
    assert 'logs/metrics.csv has rows of another run' in caplog.text
    path = str(next(Path('runs').rglob('version_1/checkpoints/*.ckpt')))
    main(['validate', *args, f'--ckpt_path={path}'])
    assert len(losses('logs/metrics-2.csv')) == len(losses('logs/metrics.csv')) == 1
    main(['fit', *args, '--trainer.max_epochs=2', f'--ckpt_path={path}'])  # one that goes on goes on in the file
    files = ['metrics-1.csv', 'metrics-2.csv', 'metrics.csv']
    assert sorted(file.name for file in Path('logs').glob('metrics*')) == files
    with pytest.raises(SystemExit):
        main(['fit', *args, '--data.batch_size=1000'])  # one that is refused leaves all as it is
    assert sorted(file.name for file in Path('logs').glob('metrics*')) == files


def test_rows_of_another_run_stay_where_they_cannot_be_copied(tmp_path, read_csv, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    for goes_on in (True, False):
        logger = CsvLogger(str(tmp_path))
        logger.goes_on = goes_on
        with contextlib.nullcontext() if goes_on else pytest.warns(UserWarning, match='stay in it'):
            logger.log_metrics({'train/loss': 1.0}, step=3 - goes_on)
        logger.save()
        monkeypatch.setattr(logger_module.shutil, 'copy', full)
    assert read_csv(tmp_path, 'train/loss') == [(2, 1.0), (3, 1.0)]
    assert [file.name for file in tmp_path.glob('*.csv')] == ['metrics.csv']


def test_project_and_kind_of_the_environment_are_respected(monkeypatch, tmp_path):
    monkeypatch.setenv('WANDB_PROJECT', 'mine')
    monkeypatch.setenv('WANDB_JOB_TYPE', 'trial')
    for given, expected in (({}, ('mine', 'trial')), ({'project': 'a', 'job_type': 'b'}, ('a', 'b'))):
        logger = WandbLogger(save_dir=str(tmp_path), **given)
        logger.be('validate')
        assert (logger._wandb_init['project'], logger._wandb_init['job_type']) == expected


def test_two_runs_of_wandb_are_refused(on_photos, in_tmp_path, write_yaml, cli_error):
    both = [{'class_path': 'lightning_app.logger.WandbLogger', 'init_args': {'project': name}} for name in 'ab']
    given, why, _ = cli_error(['fit', *on_photos, '--config', write_yaml('both.yaml', {'trainer': {'logger': both}})])
    assert (given, why) == ('trainer.logger: WandbLogger, 2 times', 'W&B has one run at a time in a process')


def test_prediction_is_no_run(on_photos, photos, in_tmp_path):
    main(['fit', *on_photos])
    path = str(next(Path('runs').rglob('*.ckpt')))
    before = sorted(Path('runs').rglob('*'))
    cli = main(['predict', '--ckpt_path', path, f'--data.images={photos}/val', '--trainer.accelerator=cpu',
                '--trainer.logger=lightning_app.logger.CsvLogger'])
    assert cli.trainer.loggers == []
    assert sorted(Path('runs').rglob('*')) == before


@pytest.mark.parametrize('known', ['127.0.0.1:8080', '127.0.0.1', 'api.wandb.ai'])
def test_login_at_a_server_of_ones_own(known, own_home, monkeypatch):
    """As `wandb login --host` writes it down."""
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    (own_home / 'netrc').write_text(f'machine {known}\n  login user\n  password {FAKE_KEY}\n')
    settings = own_home / 'config_dir' / 'settings'
    settings.parent.mkdir()
    assert logger_module.logged_in() == (known == 'api.wandb.ai')
    settings.write_text('[default]\nbase_url = http://127.0.0.1:8080\n')
    assert logger_module.logged_in() == (known != 'api.wandb.ai')


def test_login_in_the_file_that_wandb_reads(own_home, monkeypatch):
    """It takes one that others may read, too, and none that is no text."""
    for name in ('WANDB_API_KEY', 'NETRC'):
        monkeypatch.delenv(name, raising=False)
    login = f'machine api.wandb.ai\n  login user\n  password {FAKE_KEY}\n'
    file = own_home / '.netrc'
    for encoding, mode in itertools.product(('ascii', 'utf-16'), (0o600, 0o644)):
        file.write_text(login, encoding)
        file.chmod(mode)
        assert logger_module.logged_in() == (encoding == 'ascii')
    file.rename(own_home / '_netrc').write_text(login)
    assert logger_module.logged_in()


def test_second_process_starts_no_run(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, 'rank', 1)
    logger = WandbLogger(save_dir=str(tmp_path / 'run'))
    logger.log_metrics({'val/top1': 12.5})
    logger.experiment.log({'val/top1': 12.5})
    assert wandb.run is None
    assert not (tmp_path / 'run').exists()


def test_folder_is_the_runs_also_after_the_working_directory_has_changed(tmp_path, monkeypatch):
    # W&B's service keeps the working directory in which it was started
    for name in ('first', 'second'):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        WandbLogger(save_dir='run', mode='offline').log_metrics({'val/top1': 12.5})
        wandb.finish()
    assert [len(offline_runs(tmp_path / name / 'run')) for name in ('first', 'second')] == [1, 1]
    monkeypatch.undo()


# A server that cannot be reached


def test_unreachable_server_does_not_stop_the_run(tmp_path, monkeypatch, closed_port, caplog):
    monkeypatch.setenv('WANDB_BASE_URL', f'http://127.0.0.1:{closed_port}')
    monkeypatch.setenv('WANDB_API_KEY', FAKE_KEY)
    monkeypatch.setattr(logger_module, 'CONNECT_SECONDS', 1)
    logger = WandbLogger(save_dir=str(tmp_path / 'run'), mode='online')
    start = time.monotonic()
    with pytest.warns(UserWarning, match='cannot be reached, the run is kept offline'):
        logger.log_metrics({'val/top1': 12.5}, step=3)
    assert time.monotonic() - start < 20
    wandb.finish()
    assert len(offline_runs(tmp_path / 'run')) == 1
    assert 'wandb sync' in caplog.text


@pytest.mark.slow
def test_training_with_an_unreachable_server_goes_on_offline(program, on_photos, tmp_path, closed_port):
    start = time.monotonic()
    done = program(
        'fit', *on_photos, '--trainer.logger=lightning_app.logger.WandbLogger', '--trainer.logger.mode=online',
        WANDB_BASE_URL=f'http://127.0.0.1:{closed_port}', WANDB_API_KEY=FAKE_KEY)
    assert time.monotonic() - start < 120
    assert 'W&B cannot be reached, the run is kept offline' in done.stderr
    folder = tmp_path / 'runs/test_resnet/version_0'
    assert len(offline_runs(folder)) == 1
    assert (folder / 'config.yaml').is_file()


def test_account_without_a_key_that_works_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', 'too-short')
    with pytest.warns(UserWarning, match='the run is kept offline'):
        WandbLogger(save_dir=str(tmp_path / 'run'), mode='online').log_metrics({'val/top1': 12.5})
    wandb.finish()
    assert len(offline_runs(tmp_path / 'run')) == 1


# CSV


def test_csv_holds_every_step_in_the_folder_that_is_given(tmp_path, read_csv):
    logger = CsvLogger(str(tmp_path / 'run'), flush_logs_every_n_steps=2)
    for step in range(5):
        logger.log_metrics({'train/loss': step / 2}, step=step)
    logger.log_metrics({'val/top1': 50.0}, step=4)  # a new column
    logger.finalize('success')
    assert read_csv(tmp_path / 'run', 'train/loss') == [(step, step / 2) for step in range(5)]
    assert read_csv(tmp_path / 'run', 'val/top1') == [(4, 50.0)]


def test_csv_goes_on_where_a_run_is_continued(tmp_path, read_csv):
    for steps in (range(3), range(3, 6), range(6, 9)):
        logger = CsvLogger(str(tmp_path / 'run'))
        for step in steps:
            logger.log_metrics({'train/loss': step / 2}, step=step)
        logger.log_metrics({f'part{steps[0]}': 1.0}, step=steps[-1])  # a new column in each part
        logger.finalize('success')
    assert read_csv(tmp_path / 'run', 'train/loss') == [(step, step / 2) for step in range(9)]
    assert [read_csv(tmp_path / 'run', f'part{step}') for step in (0, 3, 6)] == [[(2, 1.0)], [(5, 1.0)], [(8, 1.0)]]


def test_csv_has_steps_that_are_done_again_once(tmp_path, read_csv):
    for part, steps in enumerate((range(6), range(3, 8))):  # the first was killed after its last checkpoint
        logger = CsvLogger()
        logger.place(tmp_path / 'run')
        for step in steps:
            logger.log_metrics({'train/loss': part + step / 10}, step=step)
        logger.finalize('success')
    expected = [(step, step / 10 + (step >= 3)) for step in range(8)]
    assert read_csv(tmp_path / 'run', 'train/loss') == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [file.name for file in (tmp_path / 'run').glob('*.csv')] == ['metrics.csv']


@pytest.mark.usefixtures('in_tmp_path')
def test_folder_given_in_the_config_is_kept(on_photos, write_yaml):
    config = write_yaml('loggers.yaml', {'trainer': {'logger': [
        {'class_path': 'lightning_app.logger.CsvLogger', 'init_args': {'save_dir': 'mine'}}]}})
    main(['fit', '--config', config, *on_photos])
    assert Path('mine/metrics.csv').is_file()
    assert not Path('runs/test_resnet/version_0/metrics.csv').exists()


@pytest.mark.usefixtures('in_tmp_path')
def test_training_with_both_loggers_warns_of_nothing_of_ours(on_photos, write_yaml, recwarn):
    config = write_yaml('loggers.yaml', {'trainer': {'logger': [
        {'class_path': 'lightning_app.logger.WandbLogger'}, {'class_path': 'lightning_app.logger.CsvLogger'}]}})
    main(['fit', '--config', config, *on_photos])
    said = [str(warning.message) for warning in recwarn]
    assert not [text for text in said if 'will be deleted' in text]


# What a run holds

WANDB = '--trainer.logger=lightning_app.logger.WandbLogger'


def of_kind(records, kind):
    return [getattr(record, kind) for record in records if record.WhichOneof('record_type') == kind]


def artifacts(records):
    """Return the artifacts that a run has logged, by type."""
    found = {}
    for artifact in of_kind(records, 'artifact'):
        found.setdefault(artifact.type, []).append(artifact)
    return found


def test_run_holds_the_nested_configuration_and_where_it_comes_from(on_photos, in_tmp_path, read_wandb, config_of):
    callbacks = '--trainer.callbacks=lightning_app.callbacks.NetworkSummary'
    main(['fit', *on_photos, WANDB, callbacks, '--model.optim.lr=0.02', '--data.decoder=pillow'])
    records = read_wandb('runs')
    config = config_of(records)
    assert config['model']['optim']['lr'] == 0.02
    assert config['data']['init_args']['batch_size'] == 8
    assert config['trainer']['log_every_n_steps'] == 1
    assert config['network'] == cost(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))._asdict()
    come = config['provenance']
    assert come['data'] == {'train_images': 24, 'val_images': 7, 'classes': 3, 'decoder': 'pillow'}
    assert come['versions']['torch'] == importlib.metadata.version('torch')
    assert come['versions']['wandb'] == wandb.__version__
    assert come['machine']['processes'] == 1
    assert come['machine']['device'] not in ('', 'cpu')
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert come['git'] is None or come['git']['commit'] == commit.stdout.strip()
    assert 'num_classes' not in config  # nothing of it flat beside the nested
    assert of_kind(records, 'exit')[0].exit_code == 0


def test_package_that_is_installed_within_another_repository_has_no_commit(tmp_path):
    package = tmp_path / 'site-packages' / 'package'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text('')
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
    subprocess.run([*git, 'init', '--quiet'], check=True)
    subprocess.run([*git, 'commit', '--quiet', '--allow-empty', '-m', 'of something else'], check=True)
    assert source(package) is None
    subprocess.run([*git, 'add', '.'], check=True)
    subprocess.run([*git, 'commit', '--quiet', '-m', 'of the package'], check=True)
    assert source(package)['dirty'] is False


def test_metrics_have_names_that_wandb_can_sort_by_and_equal_those_of_csv(
        on_photos, in_tmp_path, read_history, write_yaml):
    callbacks = [{'class_path': f'lightning_app.callbacks.{name}'} for name in ('Throughput', 'GradientNorm', 'Gates')]
    loggers = [{'class_path': f'lightning_app.logger.{name}'} for name in ('WandbLogger', 'CsvLogger')]
    config = write_yaml('all.yaml', {'trainer': {'callbacks': callbacks, 'logger': loggers}})
    main(['fit', *on_photos, '--config', config, '--model.name=se_resnet20_cifar', '--trainer.max_epochs=2'])
    rows = read_history('runs')
    assert all(re.fullmatch('[A-Za-z0-9_/]+', name) for row in rows for name in row)
    found = {(row['trainer/global_step'], name): value for row in rows for name, value in row.items()
             if isinstance(value, (int, float)) and not name.startswith(('_', 'trainer/'))}
    with open('runs/se_resnet20_cifar/version_0/metrics.csv', newline='') as file:
        csv_rows = list(csv.DictReader(file))
    expected = {(int(row['step']), name): float(value) for row in csv_rows for name, value in row.items()
                if value and name != 'step'}
    assert found == expected
    assert {name for _, name in found} >= {
        'train/loss', 'train/grad_norm', 'train/images_per_second', 'train/data_wait', 'lr', 'val/loss', 'val/top1',
        'val/top5', 'val/top1_error', 'val/top5_error', 'val/top1_best', 'gates/layer1_0/mean'}
    steps = [row['trainer/global_step'] for row in rows if 'val/loss' in row or 'train/loss' in row]
    assert steps == sorted(steps)


@pytest.mark.parametrize('log_model', ['true', 'all'])
def test_best_checkpoint_is_kept_as_an_artifact(log_model, on_photos, in_tmp_path, read_wandb, write_yaml):
    config = write_yaml('best.yaml', {'trainer': {'callbacks': [
        {'class_path': 'lightning_app.callbacks.NetworkSummary'},
        {'class_path': 'lightning_app.callbacks.BestCheckpoint'}]}})
    cli = main(['fit', *on_photos, '--config', config, WANDB, f'--trainer.logger.log_model={log_model}'])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    kept, = artifacts(read_wandb('runs'))['model']
    assert kept.name == f'test_resnet-{cli.trainer.logger.version}'
    assert set(kept.aliases) == {'latest', 'best'}
    described = json.loads(kept.metadata)
    assert described.items() >= {
        'network': 'test_resnet', 'epoch': 0, 'global_step': 3, 'file': 'best.ckpt',
        'val/top1': metrics['val/top1'], 'val/top5': metrics['val/top5'],
        **cost(timm.create_model('test_resnet', num_classes=3), (3, 32, 32))._asdict()}.items()
    file, = kept.manifest.contents
    assert (file.path, file.size) == ('best.ckpt', Path(cli.trainer.checkpoint_callback.best_model_path).stat().st_size)


def test_checkpoint_that_cannot_be_kept_does_not_stop_the_training(on_photos, in_tmp_path, write_yaml, monkeypatch):
    config = write_yaml('best.yaml', {'trainer': {'callbacks': [
        {'class_path': 'lightning_app.callbacks.BestCheckpoint'}]}})
    monkeypatch.setattr(wandb.Artifact, 'add_file', lambda *args, **options: 1 / 0)
    with pytest.warns(UserWarning, match='division by zero'):
        cli = main(['fit', *on_photos, '--config', config, WANDB, '--trainer.logger.log_model=all',
                    '--trainer.logger.save_code=false'])
    assert cli.trainer.global_step == 3


def test_source_that_cannot_be_kept_does_not_stop_the_run(tmp_path, monkeypatch, read_history):
    monkeypatch.setattr(wandb.Artifact, 'add_file', lambda *args, **options: 1 / 0)
    with pytest.warns(UserWarning, match='the source is not kept .division by zero'):
        WandbLogger(save_dir=str(tmp_path / 'run'), mode='offline').log_metrics({'val/top1': 12.5})
    assert read_history(tmp_path / 'run')[-1]['val/top1'] == 12.5


@pytest.mark.parametrize('save_code', [True, False])
def test_source_is_kept(save_code, tmp_path, read_wandb):
    WandbLogger(save_dir=str(tmp_path / 'run'), mode='offline', save_code=save_code).log_metrics({'val/top1': 12.5})
    kept = artifacts(read_wandb(tmp_path / 'run')).get('code', [])
    assert [each.name for each in kept] == (['lightning_app-source', 'se_timm-source'] if save_code else [])
    paths = {file.path for each in kept for file in each.manifest.contents}
    assert paths >= ({'classifier.py', 'data/base.py', 'squeeze_excite.py', 'fused/kernels.py'} if save_code else set())
    assert all(path.endswith('.py') for path in paths)


# Resumed trainings and evaluations


@pytest.mark.filterwarnings('ignore:The dirpath has changed:UserWarning')  # Lightning's, of ModelCheckpoint
def test_run_goes_on_from_a_checkpoint_that_lies_elsewhere(on_photos, in_tmp_path):
    first = main(['fit', *on_photos, WANDB]).trainer
    identity = torch.load(first.checkpoint_callback.best_model_path, weights_only=True)['wandb']
    assert identity == [{'id': first.logger.version, 'project': 'se-timm', 'entity': None}]
    wandb.finish()
    shutil.copy(first.checkpoint_callback.best_model_path, 'copied.ckpt')
    shutil.rmtree('runs')
    resumed = main(['fit', *on_photos, WANDB, '--trainer.max_epochs=2', '--ckpt_path=copied.ckpt']).trainer.logger
    assert resumed.experiment.id == identity[0]['id']
    wandb.finish()
    given = main(['fit', *on_photos, WANDB, '--trainer.logger.id=mine', '--trainer.max_epochs=3',
                  '--ckpt_path=copied.ckpt']).trainer.logger
    assert given.experiment.id == 'mine'


@pytest.mark.filterwarnings('ignore:The dirpath has changed:UserWarning')  # Lightning's, of ModelCheckpoint
def test_checkpoint_of_another_project_begins_a_run_and_says_so(on_photos, in_tmp_path, caplog):
    first = main(['fit', *on_photos, WANDB, '--trainer.logger.project=theirs']).trainer
    wandb.finish()
    shutil.copy(first.checkpoint_callback.best_model_path, 'copied.ckpt')
    resumed = main(['fit', *on_photos, WANDB, '--trainer.max_epochs=2', '--ckpt_path=copied.ckpt']).trainer
    assert resumed.logger.experiment.id != first.logger.version
    assert resumed.global_step == 6
    assert (f'the checkpoint is of run {first.logger.version} of project theirs; this training is a new run of project '
            'se-timm') in caplog.text


@pytest.mark.parametrize('stage', ['validate', 'test'])
def test_evaluation_is_a_run_of_its_own(stage, on_photos, in_tmp_path, read_wandb, config_of):
    fitted = main(['fit', *on_photos, WANDB]).trainer
    wandb.finish()
    path = Path(fitted.checkpoint_callback.best_model_path)
    before = sorted(Path('runs').rglob('*.wandb')), path.stat().st_mtime_ns
    evaluated = main([stage, '--ckpt_path', str(path), WANDB]).trainer
    assert evaluated.logger.version != fitted.logger.version
    folder = Path(f'runs/test_resnet/version_0/{stage}_0')
    records = read_wandb(folder)
    assert of_kind(records, 'run')[0].job_type == stage
    config = config_of(records)
    assert config['checkpoint'] == {'epoch': 0, 'global_step': 3}
    assert config['ckpt_path'] == str(path)
    main([stage, '--ckpt_path', str(path), '--trainer.logger=lightning_app.logger.CsvLogger'])
    assert Path(f'runs/test_resnet/version_0/{stage}_1/metrics.csv').is_file()
    assert sorted(set(Path('runs').rglob('*.wandb')) - {next(folder.rglob('run-*.wandb'))}) == before[0]
    # the training goes on with its own run
    resumed = main(['fit', *on_photos, WANDB, '--trainer.max_epochs=2', f'--ckpt_path={path}']).trainer.logger
    assert resumed.version == fitted.logger.version


def test_kind_of_the_run_can_be_given(on_photos, in_tmp_path, read_wandb):
    main(['fit', *on_photos, WANDB, '--trainer.logger.job_type=trial'])
    assert of_kind(read_wandb('runs'), 'run')[0].job_type == 'trial'


def test_changes_of_the_source_are_told(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith('GIT_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', os.devnull)
    (tmp_path / '__init__.py').write_text('')
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
    for words in (['init', '--quiet'], ['add', '.'], ['commit', '--quiet', '-m', 'of the package']):
        subprocess.run([*git, *words], check=True)
    (tmp_path / 'notes.txt').write_text('of no commit')
    assert source(tmp_path)['dirty'] is False
    (tmp_path / '__init__.py').write_text('changed = True')
    assert source(tmp_path)['dirty'] is True


def test_where_a_result_of_several_machines_comes_from(monkeypatch):
    monkeypatch.setattr('sys.argv', ['/somewhere/program', 'fit', '--data.root=my pets'])
    monkeypatch.setattr(provenance_module, 'PACKAGES', ('no-such-package',))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device('cpu')), world_size=8, num_nodes=2,
                              datamodule=SimpleNamespace(testing=[1, 2, 3], num_classes=5))
    come = provenance_module.provenance(trainer)
    assert come['versions']['no_such_package'] is None
    assert (come['machine']['processes'], come['machine']['nodes']) == (8, 2)
    assert come['command'] == "program fit '--data.root=my pets'"
    assert come['data'] == {'test_images': 3, 'classes': 5}


def test_speeds_of_which_none_counts_are_left_out_and_a_divergence_is_not(tmp_path):
    logger = CsvLogger(str(tmp_path))
    logger.log_metrics({SPEED: float('nan'), DATA_WAIT: float('nan'), 'train/loss': float('nan')}, step=3)
    logger.save()
    with open(tmp_path / 'metrics.csv', newline='') as file:
        assert list(csv.DictReader(file)) == [{'step': '3', 'train/loss': 'nan'}]


def test_lines_without_a_step_are_left_out(tmp_path, read_csv):
    (tmp_path / 'metrics.csv').write_text('step,train/loss\n1,0.5,7\n,0.4\nx')
    logger = CsvLogger(str(tmp_path))
    logger.goes_on = True
    logger.log_metrics({'train/loss': 0.25}, step=2)
    logger.save()
    assert read_csv(tmp_path, 'train/loss') == [(1, 0.5), (2, 0.25)]
