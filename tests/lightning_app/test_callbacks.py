"""Weight averaging, throughput, the gradient's norm, the progress bar and the lines that a training prints."""
import contextlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_app import ImageClassifier
from lightning_app.callbacks import (
    BestCheckpoint,
    FreezeBackbone,
    FreezeBatchNorm,
    Gates,
    GradientNorm,
    LastCheckpoint,
    NetworkSummary,
    ProgressBar,
    ProgressiveSize,
    ResultLine,
    Throughput,
    WeightEMA,
    throughput,
)
from lightning_app.cli import main
from lightning_app.logger import CsvLogger
from lightning_app.optim import Optim, Schedule
from se_timm.errors import InputError


def classifier(**arguments):
    return ImageClassifier(**{'name': 'test_resnet', 'num_classes': 3, 'optim': Optim(lr=0.01), **arguments})


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items() if value.is_floating_point()}


def assert_same(first, second, **tolerance):
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=lambda text, name=name: f'{name}: {text}', **tolerance)


# Weight averaging


class Watch(Callback):
    """Keeps the weights after each step, those that are validated, and the average by hand."""

    def __init__(self, decay):
        self.decay = decay
        self.count = 0
        self.current = self.validated = self.average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.current = weights(pl_module.net)
        if self.count == 0:
            self.average = self.current
        else:
            keep = min(self.decay, (1 + self.count) / (10 + self.count))
            self.average = {
                name: keep * value + (1 - keep) * self.current[name] for name, value in self.average.items()}
        self.count += 1

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated = weights(pl_module.net)


@pytest.mark.parametrize('decay', [0.9998, 0.15])
def test_average_is_validated_saved_and_kept_at_the_end(decay, make_trainer, photo_data, tmp_path):
    torch.manual_seed(0)
    model, watch = classifier(optim=Optim(lr=0.1)), Watch(decay)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename='best')
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=True,
                           callbacks=[WeightEMA(decay), watch, checkpoint])
    trainer.fit(model, photo_data())
    assert watch.count == 6
    assert any(not torch.allclose(watch.average[name], watch.current[name], atol=1e-4) for name in watch.current)
    assert_same(watch.average, watch.validated, rtol=1e-4, atol=1e-6)
    assert_same(watch.average, weights(model.net), rtol=1e-4, atol=1e-6)
    saved = torch.load(tmp_path / 'best.ckpt', weights_only=True)
    for key, expected in (('state_dict', watch.average), ('current_model_state', watch.current)):
        assert_same(expected, {name.removeprefix('net.'): value for name, value in saved[key].items()},
                    rtol=1e-4, atol=1e-6)


def test_average_moves_from_the_first_step(make_trainer, photo_data):
    model, watch = classifier(optim=Optim(lr=0.1)), Watch(0.9998)
    before = weights(model.net)
    make_trainer(limit_train_batches=1, num_sanity_val_steps=0, callbacks=[WeightEMA(), watch]).fit(model, photo_data())
    assert any(not torch.equal(watch.validated[name], before[name]) for name in before)
    assert_same(watch.current, watch.validated)


def test_average_counts_optimiser_steps_not_batches(make_trainer, photo_data):
    callback = WeightEMA()
    make_trainer(accumulate_grad_batches=2, callbacks=[callback]).fit(classifier(), photo_data())
    assert callback._average_model.n_averaged == 3  # of six batches


def test_average_of_a_training_is_no_part_of_what_its_trainer_evaluates_later(make_trainer, photo_data, tmp_path):
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, num_sanity_val_steps=0, callbacks=[
        WeightEMA(0.5), ModelCheckpoint(dirpath=tmp_path, filename='best')])
    model, data = classifier(optim=Optim(lr=0.1)), photo_data()
    trainer.fit(model, data)
    for other, options in ((classifier(), {}), (model, {'ckpt_path': tmp_path / 'best.ckpt'})):
        expected, = make_trainer().validate(other, data, verbose=False, **options)
        for evaluate, stage in ((trainer.validate, 'val'), (trainer.test, 'test')):
            found, = evaluate(other, data, verbose=False, **options)
            assert {name.partition('/')[2]: value for name, value in found.items()} == {
                name.partition('/')[2]: value for name, value in expected.items()}, stage


def test_average_of_a_second_training_begins_with_its_first_step(make_trainer, photo_data):
    average = WeightEMA()
    make_trainer(max_epochs=2, callbacks=[average]).fit(classifier(), photo_data())
    make_trainer(callbacks=[average]).fit(classifier(), photo_data())
    assert average._average_model.n_averaged == 3


# Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to, in place of the one that Throughput reads."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, 'time', SimpleNamespace(
        perf_counter=lambda: clock.now, monotonic=lambda: clock.now, time=lambda: clock.now))
    return clock


class Pass(Callback):
    """Lets time pass: a second a training batch, a hundred for each validation batch and between epochs."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_epoch_start(self, trainer, pl_module):
        self.clock.now += 100

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.clock.now += 50 if batch_idx == 0 else 1  # the first waits for the workers

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.clock.now += 100


@pytest.mark.parametrize('options', [
    {}, {'log_every_n_steps': 2}, {'log_every_n_steps': 3}, {'val_check_interval': 2}, {'max_epochs': 3},
    {'accumulate_grad_batches': 2}, {'accumulate_grad_batches': 2, 'log_every_n_steps': 2}], ids=str)
def test_throughput_is_images_by_seconds_of_training(options, clock, make_trainer, photo_data, tmp_path, read_csv):
    logger = CsvLogger(str(tmp_path / 'run'))
    batch = 4 // options.get('accumulate_grad_batches', 1)  # one a second
    make_trainer(**{'max_epochs': 2, 'logger': logger, 'callbacks': [Pass(clock), Throughput()], **options}).fit(
        classifier(), photo_data(batch_size=4))
    values = [value for _, value in read_csv(tmp_path / 'run', 'train/images_per_second')]
    assert len(values) >= 2
    assert values == pytest.approx([batch] * len(values))


class Work(Callback):
    """Lets three seconds pass in a step, beside the one that `Pass` lets pass before it."""

    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, *_):
        self.clock.now += 3


@pytest.mark.parametrize('options', [{}, {'log_every_n_steps': 2}, {'val_check_interval': 2}], ids=str)
def test_share_of_time_that_goes_by_until_the_data_are_there(
        options, clock, make_trainer, photo_data, tmp_path, read_csv):
    make_trainer(max_epochs=2, logger=CsvLogger(str(tmp_path / 'run')), **options, callbacks=[
        Pass(clock), Throughput(), Work(clock)]).fit(classifier(), photo_data(batch_size=4))
    values = [value for _, value in read_csv(tmp_path / 'run', 'train/data_wait')]
    assert len(values) >= 2
    assert values == pytest.approx([25] * len(values))


@pytest.mark.parametrize('order', [1, -1])
def test_throughput_leaves_out_checkpoints_within_an_epoch(
        order, clock, make_trainer, photo_data, tmp_path, read_csv):
    class SlowDisk(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            clock.now += 100
            super().save_checkpoint(*args, **kwargs)

    make_trainer(
        logger=CsvLogger(str(tmp_path / 'run')), enable_checkpointing=True, plugins=[SlowDisk()], callbacks=[
            Pass(clock), *[Throughput(), LastCheckpoint(every_n_steps=2)][::order]],
    ).fit(classifier(), photo_data(batch_size=4))
    values = dict(read_csv(tmp_path / 'run', 'train/images_per_second'))
    assert values == pytest.approx({1: 4, 3: 4})


def test_speed_is_of_the_images_of_all_processes(clock, make_trainer, tmp_path, read_csv, monkeypatch):
    images = DataLoader(TensorDataset(torch.zeros(24, 3, 32, 32), torch.zeros(24, dtype=torch.long)), batch_size=4)
    trainer = make_trainer(limit_val_batches=0, logger=CsvLogger(str(tmp_path / 'run')), callbacks=[
        Pass(clock), Throughput()])
    monkeypatch.setattr(trainer.strategy, 'world_size', 4, raising=False)  # as if there were three more
    trainer.fit(classifier(), images)
    values = [value for _, value in read_csv(tmp_path / 'run', 'train/images_per_second')]
    assert len(values) >= 2
    assert values == pytest.approx([16] * len(values))


class Hurry(Callback):
    """Lets each step take less time than the one before it."""

    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, trainer, *_):
        self.clock.now += 1 / (1 + trainer.global_step)


@pytest.mark.parametrize(('options', 'saved', 'counted'), [
    ({}, None, {1: [1], 2: [2], 3: [3], 4: [4], 5: []}),  # a checkpoint lies before the step before a validation
    ({'log_every_n_steps': 2}, None, {1: [1], 3: [2, 3], 5: [4]}),
    ({'log_every_n_steps': 2}, 1, {1: [], 3: [], 5: []}),
    ({'log_every_n_steps': 3}, 2, {2: [1], 5: [3]}),
    ({'log_every_n_steps': 2, 'val_check_interval': 2}, None, {1: [], 3: [2], 5: [4]})])
def test_each_speed_is_that_of_its_own_steps(
        options, saved, counted, clock, make_trainer, photo_data, tmp_path, read_csv):
    """None is one that was logged before, where a checkpoint or a validation lies between."""
    make_trainer(
        logger=CsvLogger(str(tmp_path)), default_root_dir=tmp_path, enable_checkpointing=True, **options,
        callbacks=[Hurry(clock), Throughput(), LastCheckpoint(every_n_steps=saved)],
    ).fit(classifier(), photo_data(batch_size=4))
    expected = {step: 4 * len(steps) / sum(1 / (1 + each) for each in steps)
                for step, steps in counted.items() if steps}
    assert dict(read_csv(tmp_path, 'train/images_per_second')) == pytest.approx(expected)


# Progressive sizes


def test_crops_grow_over_the_epochs(make_trainer, photo_data, caplog):
    sizes = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(batch[0].shape[-1])

    with caplog.at_level('INFO'):
        make_trainer(max_epochs=6, callbacks=[Look(), ProgressiveSize(16, 1, 5, multiple=8)]).fit(
            classifier(), photo_data(image_size=44, eval_size=32, num_workers=1))
    assert sizes[::3] == [16, 16, 24, 32, 40, 44]
    assert '16 px from epoch 0, 24 px from epoch 2, 32 px from epoch 3, 40 px from epoch 4, 44 px from epoch 5' in (
        caplog.text)
    assert 'not reached' not in caplog.text


def test_sizes_stay_between_the_first_and_the_last():
    """Which need not be multiples, as those between the two are."""
    sizes = ProgressiveSize(100, 0, 10, multiple=32)
    sizes.end_size = 190
    assert [sizes.size(epoch) for epoch in range(11)] == [100, 100, 128, 128, 128, 160, 160, 160, 160, 190, 190]


def test_a_size_that_is_never_reached_is_said(make_trainer, photo_data, caplog):
    with caplog.at_level('INFO'):
        make_trainer(max_epochs=4, limit_train_batches=0, limit_val_batches=0, callbacks=[
            ProgressiveSize(16, 1, 5, multiple=8)]).fit(classifier(), photo_data(image_size=44, eval_size=32))
    assert 'from epoch 3; 44 px are not reached, as max_epochs is 4' in caplog.text


def test_a_resumed_training_goes_on_with_the_size_of_its_epoch(make_trainer, photo_data, tmp_path):
    sizes, models = {}, {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.setdefault(name, []).append((trainer.current_epoch, batch[0].shape[-1]))

    for name, start in (('whole', None), ('resumed', tmp_path / 'epoch=1.ckpt')):
        torch.manual_seed(0)
        models[name] = classifier()
        kept = ModelCheckpoint(dirpath=tmp_path, filename='{epoch}', save_top_k=-1, enable_version_counter=False)
        trainer = make_trainer(
            max_epochs=4, enable_checkpointing=True, callbacks=[Look(), ProgressiveSize(16, 0, 3, multiple=8), kept])
        trainer.fit(models[name], photo_data(image_size=40, num_workers=2), ckpt_path=start, weights_only=True)
    assert [size for _, size in sizes['whole'][::3]] == [16, 24, 32, 40]
    assert sizes['resumed'] == sizes['whole'][6:]
    assert_same(weights(models['resumed']), weights(models['whole']), rtol=0, atol=0)


def test_sizes_end_with_their_training(make_trainer, photo_data):
    sizes, data = [], photo_data()

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(batch[0].shape[-1])

    for callbacks in ([ProgressiveSize(16)], []):
        make_trainer(limit_train_batches=1, limit_val_batches=0, callbacks=[Look(), *callbacks]).fit(classifier(), data)
    assert sizes == [16, 32]


@pytest.mark.parametrize('compiled', [False, True])
def test_second_compilation_is_announced(compiled, make_trainer, photo_data, caplog):
    with caplog.at_level('INFO'):  # nothing is compiled before the first batch
        make_trainer(limit_train_batches=0, limit_val_batches=0, callbacks=[ProgressiveSize(16, 0, 2, multiple=8)]).fit(
            classifier(compile=compiled), photo_data())
    assert '16 px from epoch 0' in caplog.text
    assert ('compiled again at the first change' in caplog.text) == compiled


@pytest.mark.slow  # traced twice
@pytest.mark.parametrize('fused', ['reference', pytest.param('auto', marks=pytest.mark.xfail(
    torch.__version__.startswith('2.11.'), reason='torch 2.11 cannot trace the fused tail with a variable size',
    raises=torch._dynamo.exc.InternalTorchDynamoError, strict=True))])
def test_network_is_compiled_twice_for_any_number_of_sizes(fused):
    torch._dynamo.reset()
    graphs = []
    net = classifier(fused=fused).net.train()
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    counts = []
    for size in (32, 32, 64, 96, 128, 160, 32):
        net(torch.rand(2, 3, size, size)).sum().backward()
        counts.append(len(graphs))
    assert counts == [1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(('settings', 'given'), [
    ({'start_size': 0}, 'start_size 0'), ({'start_epoch': 3, 'end_epoch': 3}, 'end_epoch 3'),
    ({'multiple': -8}, 'multiple -8')])
def test_sizes_that_cannot_grow(refused, settings, given):
    with refused(f'ProgressiveSize: {given}', 'to a later end_epoch', 'end_epoch after start_epoch'):
        ProgressiveSize(**settings)


def test_sizes_of_images_that_lightning_orders(make_trainer, photo_data, refused):
    with refused('ProgressiveSize with trainer.overfit_batches: 1', 'all of one size', 'one of the two'):
        make_trainer(callbacks=[ProgressiveSize(16)], overfit_batches=1).fit(classifier(), photo_data())


def test_images_that_are_no_larger_than_the_start(make_trainer, photo_data, refused):
    with refused('start_size 32', 'images is 32', 'larger data.image_size'):
        make_trainer(callbacks=[ProgressiveSize(32)]).fit(classifier(), photo_data())


# Gradient norm


def test_gradient_norm_is_not_scaled(make_trainer, photo_data, tmp_path, read_csv):
    plain, scaled = [], [MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=4.0))]
    off = [MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', enabled=False))]
    for name, plugins in (('plain', plain), ('scaled', scaled), ('off', off)):
        torch.manual_seed(0)
        model = ImageClassifier('test_resnet', 3, optim=Optim('momentum', lr=0.01))
        make_trainer(callbacks=[GradientNorm()], logger=CsvLogger(str(tmp_path / name)), plugins=plugins,
                     max_epochs=1).fit(model, photo_data())
    found = [read_csv(tmp_path / name, 'train/grad_norm')[0][1] for name in ('plain', 'scaled', 'off')]
    assert found == pytest.approx(found[:1] * 3, rel=0.05)  # in half precision on the CPU


@pytest.mark.parametrize('first', [True, False])
def test_gradient_norm_is_without_what_a_callback_drops(first, make_trainer, photo_data, tmp_path, read_csv):
    heads = []

    class Keep(ImageClassifier):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            every = [p.grad for p in self.net.get_classifier().parameters()]
            heads.append(float(torch.cat([grad.flatten().double() for grad in every]).norm()))

    callbacks = [GradientNorm(), FreezeBackbone(1)]
    make_trainer(callbacks=callbacks if first else callbacks[::-1], logger=CsvLogger(str(tmp_path / 'run')),
                 max_epochs=1).fit(Keep('test_resnet', 3, optim=Optim(lr=0.01)), photo_data())
    assert [value for _, value in read_csv(tmp_path / 'run', 'train/grad_norm')] == pytest.approx(heads, rel=1e-5)


def test_gradient_norm_is_of_all_once_nothing_is_dropped_any_more(make_trainer, photo_data, tmp_path, read_csv):
    norms = []

    class Keep(ImageClassifier):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            every = [p.grad.flatten().double() for p in self.net.parameters() if p.grad is not None]
            norms.append(float(torch.cat(every).norm()))

    make_trainer(callbacks=[GradientNorm(), FreezeBackbone(1)], logger=CsvLogger(str(tmp_path / 'run')),
                 max_epochs=2).fit(Keep('test_resnet', 3, optim=Optim(lr=0.01)), photo_data())
    found = [value for _, value in read_csv(tmp_path / 'run', 'train/grad_norm')]
    assert len(found) == 6
    assert found[3:] == pytest.approx(norms[3:], rel=1e-5)


@pytest.mark.parametrize('options', [{}, {'log_every_n_steps': 2}, {'accumulate_grad_batches': 2}], ids=str)
def test_gradient_norm_is_that_of_the_step_before_clipping(options, make_trainer, photo_data, tmp_path, read_csv):
    norms = []

    class Keep(ImageClassifier):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            norms.append(float(torch.cat([p.grad.flatten().double() for p in self.net.parameters()]).norm()))

    make_trainer(callbacks=[GradientNorm()], gradient_clip_val=1e-3, logger=CsvLogger(str(tmp_path / 'run')),
                 max_epochs=2, **options).fit(Keep('test_resnet', 3, optim=Optim(lr=0.01)), photo_data())
    every = options.get('log_every_n_steps', 1)
    found = read_csv(tmp_path / 'run', 'train/grad_norm')
    assert [step for step, _ in found] == [step for step in range(len(norms)) if (step + 1) % every == 0]
    assert [value for _, value in found] == pytest.approx(norms[every - 1::every], rel=1e-5)
    assert min(norms) > 1e-3


# The progress bar


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors while a training step is under way: on a GPU each waits for it."""

    def __init__(self):
        super().__init__()
        self.step = None
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_cpu = func is torch.ops.aten._to_copy.default and (kwargs or {}).get('device') == torch.device('cpu')
        if self.step is not None and (func is torch.ops.aten._local_scalar_dense.default or to_cpu):
            self.found.append(self.step)
        return func(*args, **(kwargs or {}))


class Span(Callback):
    """Marks the training step, from its batch on the device to the logger; the loader's work is not in it."""

    def __init__(self, reads):
        self.reads = reads

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reads.step = batch_idx + 1


@pytest.fixture
def reads(monkeypatch):
    reads = Reads()
    # tolist and numpy read a tensor without an operator
    for name in ('tolist', 'numpy', 'cpu'):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, **kwargs):
            if reads.step is not None:
                reads.found.append(reads.step)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return reads


@pytest.mark.parametrize('callbacks', [
    [], [Throughput], [ProgressBar], [Throughput, ProgressBar], [GradientNorm], [ResultLine, ModelCheckpoint]],
    ids=lambda callbacks: '+'.join(callback.__name__ for callback in callbacks) or 'none')
def test_no_tensor_is_read_between_two_logging_steps(callbacks, reads, make_trainer, tmp_path):
    images, labels = torch.randn(96, 3, 32, 32), torch.arange(96) % 3
    model, made = classifier(), [callback() for callback in callbacks]

    def end(trainer=None):
        reads.step = None

    trainer = make_trainer(
        log_every_n_steps=4, num_sanity_val_steps=0, logger=CsvLogger(str(tmp_path / 'run')),
        callbacks=[Span(reads), *made],
        enable_progress_bar=ProgressBar in callbacks, enable_checkpointing=ModelCheckpoint in callbacks)
    # the step ends when the loop asks for the next batch
    trainer.fit_loop.epoch_loop.on_advance_end = _before(trainer.fit_loop.epoch_loop.on_advance_end, end)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    with reads:
        trainer.fit(model, loader, loader)
    assert trainer.global_step == 12
    assert set(reads.found) <= {4, 8, 12}, f'steps in which a tensor was read: {reads.found}'
    assert reads.found  # at the logging steps


def _before(function, first):
    def both(*args, **kwargs):
        first()
        return function(*args, **kwargs)
    return both


def test_progress_bar_shows_loss_speed_and_accuracy(make_trainer, photo_data, capfd):
    make_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[Throughput(), ProgressBar()]).fit(
        classifier(), photo_data(batch_size=4))
    text = ''.join(capfd.readouterr())
    bar = [line for line in text.replace('\r', '\n').splitlines() if 'loss=' in line]
    assert any('images/s=' in line for line in bar)
    assert 'v_num' not in text
    lines = [line for line in text.replace('\r', '\n').splitlines() if 'top-1' in line]
    assert [line.split('epoch ')[1].split(':')[0] for line in lines] == ['0', '1']
    assert all('top-5 100.00 %' in line for line in lines)


def test_progress_bar_shows_where_a_training_goes_on(make_trainer, photo_data, tmp_path, capfd):
    """Within its epoch, and with the speed of its own steps."""
    stopped = make_trainer(max_epochs=2, max_steps=4)
    stopped.fit(classifier(), photo_data())
    stopped.save_checkpoint(tmp_path / 'within.ckpt', weights_only=False)
    bar = ProgressBar()
    capfd.readouterr()
    make_trainer(max_epochs=2, max_steps=5, enable_progress_bar=True, callbacks=[bar]).fit(
        classifier(), photo_data(), ckpt_path=tmp_path / 'within.ckpt', weights_only=True)
    shown = re.findall(r'(\w+ ?\d*): [^|]*\|[^|]*\| (\d/\d)', ''.join(capfd.readouterr()))
    assert shown[-1] == ('Epoch 1', '2/3')
    assert bar.train_progress_bar.format_dict['initial'] == 1


def test_progress_bar_shows_the_values_that_were_logged(make_trainer, photo_data, tmp_path, read_csv):
    shown = []

    class Bar(ProgressBar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    make_trainer(logger=CsvLogger(str(tmp_path)), enable_progress_bar=True, callbacks=[Throughput(), Bar()],
                 log_every_n_steps=2).fit(classifier(), photo_data(batch_size=4))
    logged = {format(value, '.3f') for _, value in read_csv(tmp_path, 'train/loss')}
    assert {metrics['loss'] for metrics in shown if 'loss' in metrics} <= logged
    assert shown[-1].keys() == {'loss', 'images/s'}


# Summary and result


def test_summary_counts_parameters_and_multiply_adds(make_trainer, photo_data, caplog):
    model = ImageClassifier('se_resnet18', num_classes=3)
    data = photo_data(image_size=224, eval_size=224)
    make_trainer(limit_train_batches=0, callbacks=[NetworkSummary()]).fit(model, data)
    # 11,778,592 parameters with 1000 classes, of which the classifier has 513 each
    parameters = (11_778_592 - 997 * 513) / 1e6
    line = next(message for message in caplog.messages if message.startswith('se_resnet18'))
    assert line == f'se_resnet18: {parameters:.2f} M parameters, 1.81 G multiply-adds at 224x224 px, 3 classes'


def test_summary_on_plain_loaders(make_trainer, caplog):
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3), batch_size=8)
    make_trainer(callbacks=[NetworkSummary()]).fit(classifier(), loader, loader)
    assert 'test_resnet: ' in caplog.text


@pytest.mark.parametrize(('name', 'size', 'do'), [
    ('levit_128s', 64, 'data.image_size=224 (data.eval_size in evaluations), for which the network is made, or an '
     'argument of the network, such as model.network.img_size=64'),
    ('densenet121', 16, 'data.image_size=224 (data.eval_size in evaluations), for which the network is made')])
def test_summary_says_what_size_the_network_is_made_for(name, size, do, make_trainer, photo_data):
    model = ImageClassifier(name, num_classes=3)
    with pytest.raises(InputError) as caught:
        make_trainer(callbacks=[NetworkSummary()]).fit(model, photo_data(image_size=size))
    assert str(caught.value).endswith(f'  do:  say {do}')


def test_summary_leaves_the_network_as_it_is(make_trainer, photo_data):
    torch.manual_seed(0)
    first = classifier()
    make_trainer(callbacks=[NetworkSummary()]).fit(first, photo_data())
    torch.manual_seed(0)
    second = classifier()
    make_trainer().fit(second, photo_data())
    assert_same(weights(first), weights(second), rtol=0, atol=0)


@pytest.mark.usefixtures('in_tmp_path')
def test_command_of_the_result_line_gives_the_result(on_photos, capsys):
    main(['fit', *on_photos, '--trainer.max_epochs=3', '--model.optim.lr=0.05', '--trainer.default_root_dir=my runs',
          '--trainer.callbacks=lightning_app.callbacks.ResultLine', '--trainer.callbacks+=ModelCheckpoint',
          '--trainer.callbacks.filename=best', '--trainer.callbacks.monitor=val/top1', '--trainer.callbacks.mode=max'])
    lines = capsys.readouterr().out.splitlines()
    best = next(line for line in lines if line.startswith('best: '))
    command = shlex.split(next(line for line in lines if line.startswith('evaluate: ')).removeprefix('evaluate: '))
    assert command[:3] == ['python', '-m', 'lightning_app']
    metrics = main(command[3:]).trainer.callback_metrics
    assert best.startswith(f'best: top-1 {metrics["val/top1"]:.2f} %, top-5 {metrics["val/top5"]:.2f} %, epoch ')


def test_result_of_a_module_whose_checkpoints_hold_its_own_objects(make_trainer, capsys):
    class Own(BoringModel):
        def __init__(self, where):
            super().__init__()
            self.save_hyperparameters()

        def validation_step(self, batch, batch_idx):
            self.log('val/top1', 50.0)

    make_trainer(callbacks=[BestCheckpoint(), ResultLine()], enable_checkpointing=True).fit(Own(Path('here')))
    assert 'best: top-1 50.00 %, epoch 0' in capsys.readouterr().out


def test_result_line_without_a_checkpoint_and_without_validation(make_trainer, photo_data, capsys):
    make_trainer(callbacks=[ResultLine()]).fit(classifier(), photo_data())
    out = capsys.readouterr().out
    assert 'best: top-1' in out
    assert 'checkpoint' not in out
    make_trainer(callbacks=[ResultLine()], limit_val_batches=0).fit(classifier(), photo_data())
    assert capsys.readouterr().out == ''


def test_result_line_names_unreadable_training_images(make_trainer, photo_data, photos, capsys):
    (photos / 'train' / 'ant' / 'train_00.png').write_bytes(b'no image')
    make_trainer(callbacks=[ResultLine()], max_epochs=2).fit(classifier(), photo_data())
    assert 'unreadable training images replaced, in all epochs: 2' in capsys.readouterr().out


@pytest.mark.parametrize('last', [False, True])  # with a checkpoint of the last epoch, whatever it gives
def test_result_line_keeps_the_best_of_the_epochs(last, make_trainer, photo_data, capsys, tmp_path):
    # the schedule destroys the network after the first epoch
    schedule = Schedule(name='multistep', decay_milestones=[1], decay_rate=1e4)
    kept = [ModelCheckpoint(tmp_path / 'kept')] if last else []
    result, trainer = ResultLine(), make_trainer(max_epochs=2, enable_checkpointing=last, callbacks=kept)
    trainer.callbacks.append(result)
    trainer.fit(classifier(schedule=schedule, max_nonfinite_steps=100), photo_data())
    restored = ResultLine()
    restored.load_state_dict(result.state_dict())
    assert restored.best == result.best
    assert set(result.best) == {'top1', 'top5', 'epoch'}
    assert f'top-1 {result.best["top1"]:.2f} %' in (said := capsys.readouterr().out)
    assert f'epoch {result.best["epoch"]}\n' in said


@pytest.mark.parametrize(('callback', 'reads'), [
    (Gates(), 'net'), (GradientNorm(), 'net'), (NetworkSummary(), 'net'), (FreezeBatchNorm(1), 'net'),
    (FreezeBackbone(), 'net'), (LastCheckpoint(), None), (ProgressBar(), None), (ResultLine(), None),
    (Throughput(), None), (WeightEMA(), None)], ids=lambda each: type(each).__name__)
def test_modules_of_others(callback, reads, make_trainer, refused):
    trainer = make_trainer(
        callbacks=[callback], max_steps=2, enable_progress_bar=isinstance(callback, ProgressBar),
        enable_checkpointing=isinstance(callback, LastCheckpoint))
    given = f'{type(callback).__name__} with BoringModel'
    with refused(given, f'reads `{reads}`', 'a subclass of') if reads else contextlib.nullcontext():
        trainer.fit(BoringModel())


def test_module_of_others_that_has_a_network(make_trainer, refused):
    class Own(BoringModel):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.BatchNorm1d(32), self.layer)
            torch.nn.init.ones_(self.net[0].running_mean)

        def forward(self, x):
            return self.net(x)

    trainer = make_trainer(max_steps=2, callbacks=[FreezeBatchNorm(1), GradientNorm()])
    trainer.fit(model := Own())
    assert (model.net[0].running_mean == 1).all()
    assert trainer.callback_metrics['train/grad_norm'] > 0
    with refused('Gates with Own', 'reads `name`', 'a subclass of'):
        make_trainer(callbacks=[Gates()]).fit(Own())


def test_module_of_others_that_makes_its_network_late(make_trainer):
    class Own(BoringModel):
        def configure_model(self):
            self.net = self.layer

    make_trainer(max_steps=2, max_epochs=2, callbacks=[FreezeBatchNorm(1), GradientNorm()]).fit(Own())
    make_trainer(callbacks=[NetworkSummary()]).validate(BoringModel(), verbose=False)


def test_best_of_another_training_is_kept_in_a_folder_of_any_name(make_trainer, photo_data, tmp_path):
    paths = []
    for _ in range(2):
        best = BestCheckpoint()
        make_trainer(default_root_dir=tmp_path / 'lr[0.1]', enable_checkpointing=True, callbacks=[best]).fit(
            classifier(), photo_data())
        paths.append(Path(best.best_model_path).name)
    assert paths == ['best.ckpt', 'best-v1.ckpt']


def test_integers_are_not_averaged_but_those_of_now(make_trainer, photo_data, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename='last')
    make_trainer(max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=True,
                 callbacks=[WeightEMA(), checkpoint]).fit(classifier(), photo_data())
    saved = torch.load(tmp_path / 'last.ckpt', weights_only=True)
    for key in ('state_dict', 'current_model_state'):
        counts = [int(value) for name, value in saved[key].items() if name.endswith('num_batches_tracked')]
        assert set(counts) == {6}, key
