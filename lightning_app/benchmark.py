"""What the training program costs: the step of `fit`, part by part, beside a loop of bare PyTorch."""
from __future__ import annotations

import contextlib
import itertools
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from se_timm.errors import InputError, check_least, message
from se_timm.gates import find_se
from se_timm.machine import device_name
from se_timm.meta import meta_copy
from se_timm.tables import aligned

from .callbacks import Gates, LastCheckpoint, ProgressBar, Throughput, WeightEMA
from .checkpoints import CheckpointFiles
from .classifier import ImageClassifier
from .logger import CsvLogger
from .optim import Optim, build_optimizer

__all__ = ['benchmark']

CLASSES = 100
OPTIM = Optim('momentum', lr=0.01)
WARMUP = 3  # steps that are not counted

Batches = Callable[[], DataLoader[Any]]


class Pixels(Dataset[tuple[torch.Tensor, int]]):
    """Normalised images in memory: what loading them costs is another question."""

    def __init__(self, length: int, size: int) -> None:
        self.images = torch.randn(64, 3, size, size)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index % len(self.images)], index % CLASSES


def loader(steps: int, batch_size: int, size: int) -> DataLoader[Any]:
    """Return the batches of one epoch."""
    return DataLoader(Pixels(steps * batch_size, size), batch_size)


class Clock(Callback):
    """Takes the time at the start of each of so many steps; list it first."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.times = device, list[float]()
        self.counted = WARMUP, steps - 2  # from and to: before the last step there may be a checkpoint

    def tick(self, step: int) -> None:
        """Take the time; a GPU is waited for at the first and last step that counts alone."""
        if self.device.type == 'cuda' and step in self.counted:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the time."""
        self.tick(batch_idx)

    def on_validation_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take the time."""
        self.tick(batch_idx)

    def milliseconds(self) -> float:
        """Return the time of a step: the median on a CPU, which has fast and slow moments, the mean on a GPU."""
        first, last = self.counted
        times = self.times[first:last + 1]
        steps = [end - start for start, end in itertools.pairwise(times)]
        return 1000 * (statistics.mean if self.device.type == 'cuda' else statistics.median)(steps)


Rows = dict[str, Callable[[Clock], None]]


def bare_loop(model: ImageClassifier, batches: DataLoader[Any], precision: str, clock: Clock) -> None:
    """Train one epoch as one would write it without Lightning."""
    net, device = model.net.train().to(clock.device), clock.device
    optimizer = build_optimizer(net, OPTIM, OPTIM.lr)
    for step, (images, labels) in enumerate(batches):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        clock.tick(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16-mixed', cache_enabled=False):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parts(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what is switched on in each row: arguments of the model, and of the Trainer."""
    logging_parts = {
        'callbacks': [Throughput(), ProgressBar()], 'logger': CsvLogger(str(folder / 'logs')),
        'enable_progress_bar': True}
    checkpoints = {'callbacks': [LastCheckpoint()], 'enable_checkpointing': True, 'plugins': [CheckpointFiles()]}
    return {
        'Lightning and our module': ({}, {}),
        '+ logging, progress bar, throughput': ({}, logging_parts),
        '+ average of the weights': ({}, {'callbacks': [WeightEMA()]}),
        '+ steps that are not finite undone': ({'max_nonfinite_steps': 1}, {}),
        '+ signals and checkpoints': ({}, checkpoints),
        'all of it': ({'max_nonfinite_steps': 1}, {
            **logging_parts, **checkpoints,
            'callbacks': [WeightEMA(), Throughput(), ProgressBar(), LastCheckpoint()]}),
    }


def benchmark(
        name: str = 'se_resnet18', batch_size: int = 16, size: int = 112, steps: int = 20, rounds: int = 7,
        precision: Literal['32', 'bf16-mixed'] = '32',
        accelerator: Literal['auto', 'cpu', 'cuda', 'gpu', 'mps'] = 'auto', threads: int | None = None,
        stage: Literal['fit', 'validate'] = 'fit',
) -> dict[str, float]:
    """Time the training step of `fit` with its parts, beside a bare loop with the same network, data and optimiser.

    Or a validation batch, with and without the callback `Gates`. Rounds alternate between all rows; ratios are within a
    round, and their median is printed.

    Args:
        name: The network.
        batch_size: Images in a step.
        size: Their side in pixels.
        steps: Steps in a round of a row.
        rounds: How often all rows are run.
        precision: Of both, `32` or `bf16-mixed`.
        accelerator: Where they compute.
        threads: Of PyTorch on the CPU; its own choice where not given.
        stage: `fit` or `validate`.

    Raises:
        InputError: For numbers with which nothing can be measured, or a network of which not.

    Returns:
        For each row the time of its step relative to that of the first.
    """
    check_least(1, batch_size=batch_size, size=size, rounds=rounds, threads=threads)
    check_least(WARMUP + 3, steps=steps)
    check_network(name, (batch_size, 3, size, size), stage)
    if threads:
        torch.set_num_threads(threads)
    times: dict[str, list[float]] = {}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            'accelerator': accelerator, 'devices': 1, 'precision': precision, 'max_epochs': 1, 'logger': False,
            'enable_checkpointing': False, 'enable_model_summary': False, 'default_root_dir': folder,
            'enable_progress_bar': False}
        device = Trainer(accelerator=accelerator, devices=1, logger=False).strategy.root_device
        make = partial(ImageClassifier, name, CLASSES, optim=OPTIM)
        batches = partial(loader, steps, batch_size, size)
        for number in range(1, rounds + 1):
            print(f'round {number} of {rounds}', file=sys.stderr)
            rows = ROWS[stage](common, make, batches)
            for row, run in rows.items():
                clock = Clock(device, steps)
                run(clock)
                times.setdefault(row, []).append(clock.milliseconds())
    first = next(iter(times.values()))
    ratios = {row: statistics.median(own / other for own, other in zip(values, first, strict=True))
              for row, values in times.items()}
    table = aligned([[f'a step of {stage}', 'ms', 'relative'], *(
        [row, f'{statistics.median(times[row]):.1f}', f'{ratio:.3f}'] for row, ratio in ratios.items())])
    print(f'{name}, batches of {batch_size} images of {size} px, {precision}, {device_name(device)}, '
          f'{torch.get_num_threads()} threads; medians of {rounds} rounds of {steps} steps; torch {torch.__version__}, '
          f'lightning {lightning.__version__}, Python {platform.python_version()}\n\n{table}')
    return ratios


def check_network(name: str, shape: tuple[int, int, int, int], stage: str) -> None:
    """Raise `InputError` for a network that does not take such batches, or has no gates to be read."""
    net = ImageClassifier(name, CLASSES).net
    if stage == 'validate' and not find_se(net):
        raise InputError(message(
            f'name: {name} with stage: validate', 'it has no SE whose gates could be read',
            'take a network with SE, or stage: fit'))
    try:
        meta_copy(net).train(stage == 'fit')(torch.empty(shape, device='meta'))
    except (AssertionError, RuntimeError) as error:
        raise InputError(message(
            f'size: {shape[-1]}', f'{name} does not take such images ({error})', 'take the size it is made for',
        )) from error
    except ValueError as error:  # of batch norm, which sees one value a channel
        raise InputError(message(
            f'batch_size: {shape[0]} with size: {shape[-1]}', f'{name} does not train on such batches ({error})',
            'take more images, or larger ones')) from error


def training_rows(common: dict[str, Any], make: Callable[..., ImageClassifier], batches: Batches) -> Rows:
    """Return what trains in each row, each time in a folder of its own."""
    folder = common['default_root_dir']
    rows: Rows = {'bare PyTorch': lambda clock: bare_loop(make(), batches(), common['precision'], clock)}
    for row, (model, trainer) in parts(Path(folder)).items():
        rows[row] = lambda clock, model=model, trainer=trainer: Trainer(**{  # type: ignore[misc]
            **common, 'limit_val_batches': 0, **trainer, 'default_root_dir': tempfile.mkdtemp(dir=folder),
            'callbacks': [clock, *trainer.get('callbacks', [])]}).fit(make(**model), batches())
    return rows


def validation_rows(common: dict[str, Any], make: Callable[..., ImageClassifier], batches: Batches) -> Rows:
    """Return what validates in each row."""
    return {row: lambda clock, callbacks=callbacks: Trainer(  # type: ignore[misc]
        **common, callbacks=[clock, *callbacks]).validate(make(), batches(), verbose=False)
            for row, callbacks in {'without': [], 'with Gates': [Gates()]}.items()}


ROWS: dict[str, Callable[..., Rows]] = {'fit': training_rows, 'validate': validation_rows}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning say nothing of its many short trainings, but draw their progress bars on stderr."""
    logger = logging.getLogger('lightning.pytorch')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
