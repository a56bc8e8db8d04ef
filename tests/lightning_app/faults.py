"""Faults, tried on a training of two processes: what survives, and what is lost.

    python tests/lightning_app/faults.py --markdown docs/faults.md

Each function does one thing to a real training, and raises if what is promised does not hold; `test_faults.py` runs
them.
"""
import argparse
import contextlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
STEPS = 24  # of a training: two epochs of twelve
BOUND = 90  # seconds in which a training that has lost a process must end

CONFIG = {
    'model': {'name': 'test_resnet', 'optim': {'lr': 0.02}},
    'data': {'class_path': 'ImageNetDataModule', 'init_args': {
        'batch_size': 4, 'image_size': 32, 'num_workers': 1}},
    'trainer': {
        'accelerator': 'cpu', 'devices': 2, 'strategy': 'ddp', 'max_epochs': 2, 'log_every_n_steps': 1,
        'enable_progress_bar': False, 'default_root_dir': 'runs', 'num_sanity_val_steps': 0,
        'logger': [{'class_path': 'lightning_app.logger.CsvLogger'}],
        'callbacks': [
            {'class_path': 'lightning_app.callbacks.WeightEMA', 'init_args': {'decay': 0.9}},
            {'class_path': 'lightning_app.callbacks.BestCheckpoint'},
            {'class_path': 'lightning_app.callbacks.ResultLine'},
            {'class_path': 'lightning_app.callbacks.LastCheckpoint', 'init_args': {'every_n_steps': 1}}]}}

# A program that runs `lightning_app` with something done to it, by the name that it is given.
SABOTAGE = '''
import glob
import os
import sys

import torch

from lightning_app.callbacks import Throughput
from lightning_app.cli import main
from lightning_app.data.samples import SeededSampler


class NotFinite(Throughput):
    """Spoils an image of one process in a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.global_step == 5 and trainer.global_rank == 1:
            batch[0][0] = torch.nan


def another_order():
    if os.environ.get('LOCAL_RANK') == '1':
        order = SeededSampler.order
        SeededSampler.order = lambda self: order(self).flip(0)


if __name__ == '__main__':
    what = os.environ['SABOTAGE']
    if what == 'order':
        another_order()
    given = sys.argv[1:]
    if what == 'step' and os.environ.get('LOCAL_RANK') == '1':
        given[given.index('auto')] = sorted(glob.glob('runs/version_0/checkpoints/last-*'))[-2]
    main([*given, *(['--trainer.callbacks+=__main__.NotFinite'] if what == 'nan' else [])])
'''


class Training:
    """A small training in a folder of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        generator = np.random.default_rng(0)
        for split, count in (('train', 48), ('val', 7)):
            for index in range(count):
                path = self.folder / 'photos' / split / 'abc'[index % 3] / f'{index:02}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(60 * (index % 3) + generator.normal(60, 40, (36, 40, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
        (self.folder / 'config.yaml').write_text(yaml.safe_dump(CONFIG))
        (self.folder / 'sabotage.py').write_text(SABOTAGE)
        self.run_folder = self.folder / 'runs' / 'version_0'
        self.started = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.started:
            kill_all(process)

    def start(self, *options, sabotage=None, **variables):
        """Start the training, or go on with it."""
        program = ['sabotage.py'] if sabotage else ['-m', 'lightning_app']
        command = [sys.executable, *program, 'fit', '--config', 'config.yaml', '--data.root', 'photos',
                   '--ckpt_path', 'auto', *options]
        environment = {
            **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(REPOSITORY), 'HOME': str(self.folder),
            'NETRC': str(self.folder / 'netrc'), **({'SABOTAGE': sabotage} if sabotage else {}), **variables}
        self.started.append(subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT))
        return self.started[-1]

    def finish(self, *options, seconds=300, **variables):
        """Run the training to its end, and return what it printed."""
        process = self.start(*options, **variables)
        text = wait(process, seconds)
        assert process.returncode == 0, text
        return text

    def checkpoints(self):
        return sorted(self.run_folder.glob('checkpoints/last-step=*.ckpt'))

    def step(self):
        """Return the step of the newest checkpoint, 0 if there is none."""
        return int(self.checkpoints()[-1].stem[-8:]) if self.checkpoints() else 0

    def wait_for_step(self, step, process):
        until(lambda: self.step() >= step or process.poll() is not None, 240)
        assert process.poll() is None, process.stdout.read()

    def weights(self):
        """Return all tensors of the last checkpoint of a finished training."""
        assert self.step() == STEPS
        checkpoint = torch.load(self.checkpoints()[-1], weights_only=True)
        return [*checkpoint['state_dict'].values(), *checkpoint['current_model_state'].values()]


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.02)


def wait(process, seconds):
    """Return what a process that must end by itself printed."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        kill_all(process)


def kill_all(process):
    """Kill a training and all that it has started, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def children(pid, text, file='cmdline'):
    """Return the children of a process in whose command line, or environment, `text` stands."""
    found = []
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        with contextlib.suppress(OSError):
            if text in Path(f'/proc/{child}/{file}').read_text():
                found.append(int(child))
    return found


def second_rank(pid):
    """Return the second process of a training, which Lightning has started from the first."""
    return children(pid, 'LOCAL_RANK=1', 'environ')[0]


def loading(pid):
    """Return the processes that load images for a process: forks of a server or of itself, whose command they show."""
    servers = children(pid, 'multiprocessing.forkserver')
    return [worker for parent in servers or [pid] for worker in children(parent, 'lightning_app')]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def unbroken(folder):
    """Return the weights of a training to which nothing happens."""
    with Training(folder) as training:
        training.finish()
        return training.weights()


def check_end(training, expected):
    """Go on with a training to its end, which must be that of one to which nothing happened."""
    training.finish()
    assert same(training.weights(), expected)


# The faults


def job_killed(training, expected, times=20, seed=0):
    """SIGKILL of all processes at {times} random moments."""
    chance, lost, unfinished = random.Random(seed), [], 0
    for _ in range(times):
        process, before = training.start(), training.step()
        until(lambda before=before, process=process: process.poll() is not None or training.step() > before, 240)
        time.sleep(chance.uniform(0, 0.3))
        reached = training.step()
        kill_all(process)
        unfinished += (training.run_folder / 'checkpoints' / '.unfinished').exists()
        lost.append(reached - training.step())
        if training.step() >= STEPS - 1:
            check_end(training, expected)
            shutil.rmtree(training.folder / 'runs')
    check_end(training, expected)
    assert max(lost) <= 0
    return f'resumes bit-equal, also where a file was being written ({unfinished} times)', 'the running step'


def one_rank_killed(training, expected):
    """SIGKILL of the second of two processes."""
    process = training.start()
    training.wait_for_step(3, process)
    os.kill(second_rank(process.pid), signal.SIGKILL)
    start = time.monotonic()
    text = wait(process, BOUND)
    assert process.returncode != 0
    assert 'terminated with code' in text or re.search('Connection (closed|reset) by peer', text), text
    seconds = time.monotonic() - start
    check_end(training, expected)
    return f'ends within {BOUND} s (here {seconds:.0f}) and says why, resumes bit-equal', 'the running step'


def worker_killed(training, expected):
    """SIGKILL of a process that loads images."""
    process = training.start()
    training.wait_for_step(3, process)
    os.kill(loading(second_rank(process.pid))[0], signal.SIGKILL)
    text = wait(process, BOUND)
    assert process.returncode != 0
    # the latter where it was just handing over a batch
    assert re.search(r'(?s)DataLoader worker|rebuild_storage_fd.*(EOFError|Connection|FileNotFound)', text), text
    check_end(training, expected)
    return "ends with torch's error of a lost worker, resumes bit-equal", 'the running step'


def terminated_twice(training, expected):
    """SIGTERM to all processes, those that load images too, and again while it is heeded."""
    process = training.start()
    training.wait_for_step(3, process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    text = wait(process, BOUND)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert 'SIGTERM: stopped at step' in text
    check_end(training, expected)
    return ('finishes the step, writes a checkpoint, ends with status 143, resumes bit-equal',
            'nothing, or the last step of an epoch, whose validation is still due')


def disk_full(training, expected):
    """A disk that is full for a while (a tmpfs)."""
    disk = training.folder / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'tmpfs', str(disk)], check=True)
    try:
        (training.folder / 'runs').symlink_to(disk)
        process = training.start()
        training.wait_for_step(2, process)
        ballast = disk / 'ballast'
        with contextlib.suppress(OSError), open(ballast, 'wb') as file:
            while True:
                file.write(bytes(2 ** 16))
                file.flush()
        said = ''
        while 'not written' not in said and (line := process.stdout.readline()):
            said += line
        kept = training.step()
        ballast.unlink()
        said += wait(process, 300)
        assert process.returncode == 0, said
        assert 'not written' in said, said
        assert kept >= 2
        check_end(training, expected)  # if it was over before there was room again, it is resumed
    finally:
        subprocess.run(['umount', '-l', str(disk)], check=True)
    return 'goes on, keeps the last good file, ends bit-equal', 'nothing'


def checkpoint_damaged(training, expected, times=5, seed=0):
    """The newest checkpoint cut off at random bytes."""
    chance = random.Random(seed)
    process = training.start()
    training.wait_for_step(5, process)
    kill_all(process)
    whole = training.checkpoints()[-1].read_bytes()
    for _ in range(times):
        training.checkpoints()[-1].write_bytes(whole[:chance.randrange(len(whole))])
        (training.run_folder / 'checkpoints' / 'best.ckpt').unlink(missing_ok=True)
        process = training.start('--trainer.max_steps=1')  # it is over as soon as it has resumed
        text = wait(process, 240)
        assert 'passed over, as it is cut off' in text, text
    text = training.finish()
    assert 'passed over' in text
    assert same(training.weights(), expected)
    return f'names it and takes the one before, {times} times, ends bit-equal', 'one step'


def images_damaged(training, expected):
    """Training images cut off and deleted while it runs, and a validation image."""
    process = training.start()
    training.wait_for_step(2, process)
    for index, path in enumerate(sorted((training.folder / 'photos' / 'train').rglob('*.png'))[::8]):
        path.write_bytes(path.read_bytes()[:100]) if index % 2 else path.unlink()
    text = wait(process, 240)
    assert process.returncode == 0, text
    assert 'unreadable image 1, replaced in training by the next' in text
    assert 'unreadable training images replaced' in text
    next((training.folder / 'photos' / 'val').rglob('*.png')).write_bytes(b'')
    text = wait(training.start('--trainer.max_epochs=3'), 240)
    assert 'why: it cannot be read' in text, text
    return 'names and counts them, and takes the next; a validation image that cannot be read ends it', 'those images'


def wandb_lost(training, expected):
    """W&B that cannot be reached at the start, and whose service is killed in the middle."""
    logger = ['--trainer.logger+=lightning_app.logger.WandbLogger']
    text = training.finish(
        *logger, WANDB_BASE_URL='http://127.0.0.1:9', WANDB_API_KEY='0' * 40, WANDB_ERROR_REPORTING='false')
    assert 'the run is kept offline' in text, text
    assert same(training.weights(), expected)
    shutil.rmtree(training.folder / 'runs')
    process = training.start(*logger, WANDB_MODE='offline', WANDB_ERROR_REPORTING='false')
    training.wait_for_step(4, process)
    services = children(process.pid, 'wandb-core')
    assert services
    for service in services:
        os.kill(service, signal.SIGKILL)
    text = wait(process, 240)
    assert process.returncode == 0, text
    assert same(training.weights(), expected)
    return 'goes on offline, or without it, with the same result', "W&B's record from then on"


def not_finite(training, expected):
    """NaN in a step of one process: more than is allowed, and as many as are."""
    process = training.start(sabotage='nan')
    text = wait(process, 240)
    assert process.returncode != 0
    assert 'not finite in 1 steps' in text, text
    assert 'the best checkpoint is' in text or training.step() == 5
    assert training.step() == 5
    shutil.rmtree(training.folder / 'runs')
    text = wait(training.start('--model.max_nonfinite_steps=1', sabotage='nan'), 240)
    weights = training.weights()
    assert all(tensor.isfinite().all() for tensor in weights if tensor.is_floating_point())
    return 'ends, with the last checkpoint kept, or leaves the step out in both processes and goes on', 'that step'


def another_order(training, expected):
    """Another order of the images in one process."""
    process = training.start(sabotage='order')
    text = wait(process, BOUND)
    assert process.returncode != 0
    assert 'process 1 has another order of images than process 0' in text, text
    return 'is found at the start of the epoch', 'nothing'


def another_checkpoint(training, expected):
    """Processes that go on from checkpoints of two steps."""
    process = training.start()
    training.wait_for_step(4, process)
    kill_all(process)
    step = training.step()
    process = training.start(sabotage='step')
    text = wait(process, BOUND)
    assert process.returncode != 0
    assert f'process 1 stands at step {step - 1}, and process 0 at step {step}' in text, text
    check_end(training, expected)
    return 'is found before the first step, resumes bit-equal', 'nothing'


def started_twice(training, expected):
    """The same command while it runs already."""
    process = training.start()
    training.wait_for_step(2, process)
    process.send_signal(signal.SIGSTOP)  # until the other has looked
    again = training.start()
    text = wait(again, BOUND)
    process.send_signal(signal.SIGCONT)
    assert again.returncode == 2, text
    assert 'another training is writing to it' in text, text
    text = wait(process, 240)
    assert process.returncode == 0, text
    assert same(training.weights(), expected)
    return 'is refused, and the first ends bit-equal', 'nothing'


FAULTS = [job_killed, one_rank_killed, worker_killed, terminated_twice, disk_full, checkpoint_damaged, images_damaged,
          wandb_lost, not_finite, another_order, another_checkpoint, started_twice]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--markdown', help='file to write the table to')
    parser.add_argument('--only', help='name of one fault')
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        expected = unbroken(Path(folder) / 'unbroken')
        for fault in FAULTS:
            if arguments.only in (None, fault.__name__):
                start = time.monotonic()
                with Training(Path(folder) / fault.__name__) as training:
                    outcome, lost = fault(training, expected)
                tried = fault.__doc__.replace('{times}', '20').rstrip('.')
                rows.append(f'| {tried} | {outcome} | {lost} |')
                print(f'{rows[-1]}  ({time.monotonic() - start:.0f} s)', flush=True)
    if arguments.markdown:
        Path(arguments.markdown).write_text('\n'.join([
            '# Faults', '',
            'What a training of two processes on the CPU survives, by '
            f'`python tests/lightning_app/faults.py --markdown {arguments.markdown}`',
            f'(torch {torch.__version__}, Python {platform.python_version()}). Bit-equal: weights and their',
            'average are those of a training to which nothing happened. With a checkpoint at every step, as here, at',
            'most the running step is lost; in general the steps since the last checkpoint.', '',
            '| tried | survived | lost |', '|---|---|---|', *rows, '']))


if __name__ == '__main__':
    main()
