"""W&B never stops a training and CSV never loses a line."""
import json
import socket
import time
from pathlib import Path

import pytest
import wandb

from lightning_app import logger as logger_module
from lightning_app.cli import main
from lightning_app.logger import CsvLogger, WandbLogger

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
