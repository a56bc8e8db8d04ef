"""The processes that load images: what starts them, and that signals to a whole job do not end them."""
import multiprocessing
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_app import ImageNetDataModule
from lightning_app.data import workers

DEFAULT = multiprocessing.get_context().get_start_method()
METHODS = sorted({'fork', 'forkserver'} & set(multiprocessing.get_all_start_methods()))


def loader(method):
    if method == 'forkserver':
        workers.start_server()
    return workers.Loader(TensorDataset(torch.arange(16)), num_workers=1, multiprocessing_context=method)


def started(method):
    """Return batches, of which one has come, and the process that loads them."""
    batches = iter(loader(method))
    assert next(batches)[0] == 0
    return batches, batches._workers[0]


def parent(process):
    return int(Path(f'/proc/{process}/stat').read_text().split()[3])


def from_elsewhere(process, name):
    """Send a signal from a process that is not the one that loads by the worker."""
    subprocess.run(['kill', '-s', name[3:], str(process)], check=True)


@pytest.mark.parametrize('name', workers.STOP_SIGNALS)
@pytest.mark.parametrize('method', METHODS)
def test_worker_goes_on_when_the_job_is_asked_to_stop(method, name):
    batches, worker = started(method)
    from_elsewhere(worker.pid, name)
    assert [int(number) for number, in batches] == list(range(1, 16))


@pytest.mark.parametrize('method', METHODS)
def test_training_can_end_its_workers(method):
    _batches, worker = started(method)
    worker.terminate()
    worker.join(4)  # shorter than the 5 s after which it would look by itself whether the training is still there
    assert worker.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_worker_ends_when_its_training_is_killed(method, tmp_path):
    script = tmp_path / 'training.py'
    script.write_text(f'''
import time
import torch
from torch.utils.data import TensorDataset
from lightning_app.data import workers

if __name__ == '__main__':
    if '{method}' == 'forkserver':
        workers.start_server()
    batches = iter(workers.Loader(TensorDataset(torch.arange(16)), num_workers=1, multiprocessing_context='{method}'))
    next(batches)
    print('loading', flush=True)
    time.sleep(60)
''')
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout.readline() == 'loading\n'
        training.kill()
        training.communicate(timeout=30)  # until nobody is left who could print


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_server_hears_no_signals():
    batches, worker = started('forkserver')
    server = parent(worker.pid)
    for name in workers.STOP_SIGNALS:
        from_elsewhere(server, name)
    assert len(list(batches)) == 15
    _batches, worker = started('forkserver')
    assert parent(worker.pid) == server


def test_starting_the_server_leaves_the_signals_of_this_process_as_they_were():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    workers.start_server()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(('processes', 'hangs', 'method'), [
    (1, True, DEFAULT), (2, True, 'forkserver' if DEFAULT == 'fork' else DEFAULT), (2, False, DEFAULT)])
def test_several_processes_do_not_fork_where_that_hangs(pets, monkeypatch, processes, hangs, method):
    monkeypatch.setattr(workers, 'FORK_MAY_HANG', hangs)
    monkeypatch.setattr(ImageNetDataModule, '_world_size', processes)
    data = ImageNetDataModule(root=str(pets), batch_size=4, num_workers=2, image_size=32)
    data.setup('fit')
    for made in (data.train_dataloader(), data.val_dataloader()):
        assert made.multiprocessing_context.get_start_method() == method
    assert len(list(data.train_dataloader())) == len(data.training) // 4


def test_no_workers_need_no_server(pets, monkeypatch):
    monkeypatch.setattr(ImageNetDataModule, '_world_size', 2)
    monkeypatch.setattr('lightning_app.data.base.start_server', pytest.fail)
    data = ImageNetDataModule(root=str(pets), batch_size=4, num_workers=0, image_size=32)
    data.setup('fit')
    assert data.train_dataloader().multiprocessing_context is None


def test_signals_are_handled_for_a_while():
    heard = []
    before = {name: signal.getsignal(getattr(signal, name)) for name in workers.STOP_SIGNALS}
    with workers.handled(lambda number, frame: heard.append(number), *workers.STOP_SIGNALS, 'SIGOFNOSYSTEM'):
        for name in workers.STOP_SIGNALS:
            signal.raise_signal(getattr(signal, name))
    assert heard == [getattr(signal, name) for name in workers.STOP_SIGNALS]
    assert {name: signal.getsignal(getattr(signal, name)) for name in workers.STOP_SIGNALS} == before


def test_another_thread_leaves_signals_as_they_are():
    def handle():
        with workers.handled(lambda number, frame: None, 'SIGTERM'):
            found.append(signal.getsignal(signal.SIGTERM))

    found, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=handle)
    thread.start()
    thread.join()
    assert found == [before]
