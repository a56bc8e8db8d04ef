"""Between two logging steps the host asks the device for nothing: it would wait for all that it has queued there."""
import contextlib
import warnings

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_app import ImageClassifier
from lightning_app.callbacks import BestCheckpoint, FreezeBackbone, LastCheckpoint, ProgressBar, Throughput, WeightEMA
from lightning_app.distillation import Distill
from lightning_app.loss import Loss
from lightning_app.mix import Mix
from lightning_app.optim import Optim

# operations whose result the host has to know, to go on or to allocate
ASKED = ('_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', '_unique2', 'unique_consecutive')
EVERY = 5  # steps from one logging step to the next


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for an accelerator, on the CPU too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix('aten::')
        if name in ASKED:
            raise Waited(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(patch):
    """Let every way by which Python asks a device for values, or waits for it, fail."""
    def refuse(name):
        def refused(*args, **kwargs):
            raise Waited(name)
        return refused

    def numpy(tensor, whole=torch.Tensor.numpy):
        if tensor.is_shared():  # with the workers: the host's memory
            return whole(tensor)
        raise Waited('Tensor.numpy')

    with patch.context() as inner, NoWaiting():
        inner.setattr(torch.Tensor, 'numpy', numpy)
        for name in ('cpu', 'tolist', 'item', '__bool__', '__float__', '__int__', '__index__'):
            inner.setattr(torch.Tensor, name, refuse(f'Tensor.{name}'))
        for name in ('tensor', 'as_tensor'):  # copied from the host's memory, for which it waits
            inner.setattr(torch, name, refuse(f'torch.{name}'))
        inner.setattr(torch.cuda, 'synchronize', refuse('synchronize'))
        yield


@contextlib.contextmanager
def no_waiting_for_cuda(patch):
    """Let torch raise an error where the host would wait for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Synchronization debug mode')  # torch calls it a prototype
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


class Window(Callback):
    """Enters a context in the first step after a logging step, and leaves it when the next one begins."""

    def __init__(self, context):
        self.context, self.entered, self.steps = context, None, 0

    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_step + 1) % EVERY == 0:
            self.leave()
        elif trainer.global_step and self.entered is None:
            self.entered = self.context()
            self.entered.__enter__()
        self.steps += self.entered is not None

    def leave(self):
        if self.entered is not None:
            self.entered.__exit__(None, None, None)
            self.entered = None

    def on_validation_start(self, *_):
        self.leave()

    def on_exception(self, *_):
        self.leave()


class Asks(Callback):
    """What must not be: `self.log(..., prog_bar=True)` and the like ask at every step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        if trainer.global_step == 7:
            float(outputs['loss'])


def run(photo_data, make_trainer, context, *callbacks, optim, accelerator='cpu', distill=None, **trainer):
    window = Window(context)
    model = ImageClassifier(
        'se_resnet20_cifar', num_classes=3, optim=optim, max_nonfinite_steps=1, mix=Mix(mixup=0.2, cutmix=1.0),
        loss=Loss(smoothing=0.1), distill=distill)
    make_trainer(
        accelerator=accelerator, log_every_n_steps=EVERY, enable_progress_bar=True, enable_checkpointing=True,
        limit_train_batches=2 * EVERY + 1,  # a checkpoint, for which it waits, is written before the last step
        # the window begins before the others and ends after them
        callbacks=[window, WeightEMA(), Throughput(), ProgressBar(), BestCheckpoint(), LastCheckpoint(), *callbacks],
        **trainer).fit(model, photo_data(batch_size=2, num_workers=1))
    assert window.steps == 3 + 4 + 1


OPTIMS = [Optim('momentum', lr=0.01), Optim('adamw', lr=0.001, clip_grad=1.0), Optim('sgd', lr=0.01, clip_grad=0.01,
                                                                                    clip_mode='agc')]


def scaled(accelerator):
    return {'plugins': [MixedPrecision('16-mixed', accelerator, torch.amp.GradScaler(accelerator))]}


PRECISIONS = {'fp32': lambda _: {}, 'bf16-mixed': lambda _: {'precision': 'bf16-mixed'}, '16-mixed': scaled}


def allowed(optim, precision):
    return optim.clip_grad is None or precision != '16-mixed'  # for which no optimiser is fused


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('optim', OPTIMS, ids=lambda optim: optim.name)
def test_host_asks_for_nothing(photo_data, make_trainer, monkeypatch, optim, precision):
    if not allowed(optim, precision):
        pytest.skip('gradients are clipped after a GradScaler has asked for them')
    run(photo_data, make_trainer, lambda: no_waiting(monkeypatch), optim=optim, **PRECISIONS[precision]('cpu'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('optim', OPTIMS, ids=lambda optim: optim.name)
def test_host_does_not_wait_for_the_gpu(photo_data, make_trainer, monkeypatch, optim, precision):
    if not allowed(optim, precision):
        pytest.skip('gradients are clipped after a GradScaler has asked for them')
    run(photo_data, make_trainer, lambda: no_waiting_for_cuda(monkeypatch), optim=optim, accelerator='gpu',
        **PRECISIONS[precision]('cuda'))


def test_teacher_and_frozen_parts_ask_for_nothing(photo_data, make_trainer, monkeypatch, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'teacher.pth')
    run(photo_data, make_trainer, lambda: no_waiting(monkeypatch), FreezeBackbone(1), optim=OPTIMS[0], distill=Distill(
        'test_resnet', {'checkpoint_path': str(tmp_path / 'teacher.pth'), 'num_classes': 3}))


def test_question_would_be_found(photo_data, make_trainer, monkeypatch):
    with pytest.raises(Waited):
        run(photo_data, make_trainer, lambda: no_waiting(monkeypatch), Asks(), optim=OPTIMS[0])
