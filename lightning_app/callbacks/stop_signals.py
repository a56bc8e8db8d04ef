"""Signals that ask a training to stop, agreed on by all its processes."""
from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..data.workers import STOP_SIGNALS

__all__ = ['EndAtOnce', 'StopSignals', 'Stopped']


class Stopped(SystemExit):
    """Ends a training that was asked to stop, with the status that shells give to the signal."""


class StopSignals:
    """Takes note of signals while a training runs, instead of letting them end it in the middle of a step."""

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def install(self) -> None:
        """Listen, in place of Lightning, whose handler takes part in a collective that only this process may be in."""
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            for name in STOP_SIGNALS:
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                    self._handlers[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back to who had them; what was received is heeded, or of no more consequence."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None if it was not set by Python
        self._handlers, self.received = {}, 0

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == number:
            raise KeyboardInterrupt  # he is in a hurry
        self.received = number
        with suppress(RuntimeError):  # where it comes while a line is written, which this one must not interrupt
            rank_zero_info(
                f'{signal.Signals(number).name}: the training ends after this step, with a checkpoint to go on from'
                + ('; once more to leave at once' if number == signal.SIGINT else ''))

    def agreed(self, trainer: Trainer) -> int:
        """Return the signal that any process has received, 0 if none. Collective."""
        if trainer.world_size == 1:
            return self.received
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op='max'))


class EndAtOnce(Callback):
    """Ends an evaluation that gets SIGTERM, with the status of that; Lightning's ends as if it were complete."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of Lightning."""
        def end(number: int, frame: Any) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # the other processes that it has started
            raise Stopped(128 + number)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)

    on_test_start = on_predict_start = on_validation_start
