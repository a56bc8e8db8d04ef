"""Two processes on the CPU: a training that is stopped and resumed, by as many processes or by another number."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_app.cli import main

pytestmark = [pytest.mark.usefixtures('in_tmp_path'), pytest.mark.slow]

TWO = ['--trainer.devices=2', '--trainer.strategy=ddp']
RUN = Path('runs/test_resnet/version_0')
CALLBACKS = {'trainer': {'logger': {'class_path': 'lightning_app.logger.CsvLogger'}, 'callbacks': [
    {'class_path': 'lightning_app.callbacks.WeightEMA', 'init_args': {'decay': 0.9}},
    {'class_path': 'lightning_app.callbacks.BestCheckpoint'},
    {'class_path': 'lightning_app.callbacks.ResultLine'},
    {'class_path': 'lightning_app.callbacks.LastCheckpoint', 'init_args': {'every_n_steps': 1, 'keep': 99}}]}}


@pytest.fixture
def arguments(on_photos, write_yaml):
    return ['fit', *on_photos, '--config', write_yaml('steps.yaml', CALLBACKS), '--trainer.max_epochs=2']


def at(step, folder=RUN):
    return folder / 'checkpoints' / f'last-step={step:08d}.ckpt'


def weights(step, folder=RUN):
    return torch.load(at(step, folder), weights_only=True)


def metrics(folder=RUN):
    with open(folder / 'metrics.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_two_processes_go_on_as_if_they_had_not_stopped(arguments, program):
    options = [
        *TWO, '--trainer.accumulate_grad_batches=2', '--data.num_workers=1', '--model.network.drop_path_rate=0.3']
    program(*arguments, *options)
    whole, lines = weights(6), metrics()
    for step in (5, 6):
        at(step).unlink()
    program(*arguments, *options, '--ckpt_path', at(4))
    resumed = weights(6)
    for part in ('state_dict', 'current_model_state'):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    states = [content['optimizer_states'][0]['state'] for content in (whole, resumed)]
    assert all(torch.equal(value['momentum_buffer'], states[1][key]['momentum_buffer'])
               for key, value in states[0].items())
    assert metrics() == lines


def test_one_process_goes_on_where_two_stopped_with_the_images_that_are_left(arguments, program, capfd):
    # without batch norm, whose statistics are those of each process's images
    options = ['--model.name=test_convnext', '--trainer.default_root_dir=runs/test_resnet', '--model.optim.lr=0.02']
    program(*arguments, *options, *TWO)
    (at(5)).unlink()
    (at(6)).unlink()
    main([*arguments, *options, '--ckpt_path', str(at(4))])
    assert 'each accumulates 2 batches of 4 images' in capfd.readouterr().err
    resumed = weights(6)
    main([*arguments, *options, '--trainer.default_root_dir=runs/one'])
    unbroken = weights(6, Path('runs/one/version_0'))
    for name, value in unbroken['current_model_state'].items():
        torch.testing.assert_close(resumed['current_model_state'][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_go_on_where_one_stopped(arguments, program):
    options = ['--model.name=test_convnext', '--trainer.default_root_dir=runs/test_resnet', '--model.optim.lr=0.02']
    main([*arguments, *options])
    unbroken = weights(6)
    for step in (5, 6):
        at(step).unlink()
    program(*arguments, *options, *TWO, '--ckpt_path', at(4))
    resumed = weights(6)
    for name, value in unbroken['current_model_state'].items():
        torch.testing.assert_close(resumed['current_model_state'][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize('whom', ['first', 'second'])
def test_signal_to_one_process_ends_both_after_the_same_step(arguments, tmp_path, whom):
    command = [sys.executable, '-m', 'lightning_app', *arguments, *TWO, '--trainer.max_epochs=4000']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: at(4).exists(), 120)
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            second = next(int(child) for child in children
                          if 'lightning_app' in Path(f'/proc/{child}/cmdline').read_text())
            os.kill(process.pid if whom == 'first' else second, signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    step = weights(int(sorted(RUN.glob('checkpoints/last*'))[-1].stem[-8:]))['global_step']
    assert step >= 4
    assert f'the checkpoint is of step {step}' in errors
    wait_for(lambda: not Path(f'/proc/{second}').exists(), 30)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
