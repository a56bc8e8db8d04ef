"""The classifier with a plain Trainer: training, schedule, precision, metrics, checkpoints, any network of timm."""
import contextlib
import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_app import DigitsDataModule, ImageClassifier
from lightning_app.callbacks import (
    BestCheckpoint,
    FreezeBatchNorm,
    LastCheckpoint,
    ProgressBar,
    ResultLine,
    WeightEMA,
)
from lightning_app.callbacks.throughput import images_in
from lightning_app.classifier import GROUPS
from lightning_app.data import Augment, ImageNetDataModule
from lightning_app.distillation import Distill
from lightning_app.logger import CsvLogger
from lightning_app.loss import Loss
from lightning_app.metrics import sum_dtype
from lightning_app.network import create_network, trained_classes
from lightning_app.optim import Optim, Schedule
from lightning_app.steps import is_logging_step
from se_timm import explain
from se_timm.errors import InputError
from se_timm.fused import operators
from se_timm.insertion import added

VALIDATION = {'val/loss', 'val/top1', 'val/top5', 'val/top1_error', 'val/top5_error'}
METRICS = {'train/loss', 'lr', *VALIDATION, 'val/top1_best'}


def classifier(**arguments):
    return ImageClassifier(**{'name': 'test_resnet', 'num_classes': 3, 'optim': Optim(lr=0.01), **arguments})


class Record(Callback):
    """Keeps the logged metrics of each step as numbers."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()} | {
            'train/loss': float(outputs['loss'])})


def expected_validation(model, samples):
    """Return loss, top-1 and top-5 over `samples`, one image at a time in float64 sums."""
    losses, ranks = [], []
    for image, label in samples:
        logits = model.eval()(image[None])[0].detach().double()
        losses.append(float(-logits.log_softmax(0)[label]))
        ranks.append(int((logits > logits[label]).sum()))
    count = len(losses)
    top1, top5 = (100 * sum(rank < k for rank in ranks) / count for k in (1, 5))
    return {'val/loss': sum(losses) / count, 'val/top1': top1, 'val/top5': top5,
            'val/top1_error': 100 - top1, 'val/top5_error': 100 - top5}


def normalised(data):
    """Return the validation images as the network gets them, with their labels."""
    return [(data.normalisation(image), label) for image, label in data.validation]


# Training


def test_training_from_python_learns_the_photos(make_trainer, photo_data):
    record, model = Record(), classifier(optim=Optim(lr=0.05))
    make_trainer(max_epochs=8, callbacks=[record]).fit(model, photo_data())
    losses = [step['train/loss'] for step in record.steps]
    assert len(losses) == 24
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert model.class_names == ['ant', 'bee', 'cat']


def test_training_on_plain_loaders(make_trainer):
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 3
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    model, trainer = classifier(), make_trainer()
    trainer.fit(model, loader, loader)
    assert METRICS - {'lr'} <= trainer.callback_metrics.keys()
    expected = expected_validation(model, zip(images, labels, strict=True))
    assert float(trainer.callback_metrics['val/loss']) == pytest.approx(expected['val/loss'], rel=1e-6)


@pytest.mark.parametrize('name', [
    'convnext_atto', 'mobilenetv3_small_050', 'test_vit', 'se_resnet20_cifar', 'se_resnet18'])
def test_any_network_of_timm_trains(name, make_trainer, photo_data):
    network = {'img_size': 32} if name == 'test_vit' else None
    model = ImageClassifier(name, num_classes=3, network=network, optim=Optim(lr=0.001))
    before = {key: value.clone() for key, value in model.net.named_parameters()}
    make_trainer(limit_train_batches=2).fit(model, photo_data())
    changed = [key for key, value in model.net.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) > 0.9 * len(before)  # the gates and biases too, but for those that start without a gradient
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(('name', 'data', 'given', 'do'), [
    ('test_vit3', {}, 'model.name: test_vit3 with images of 32 px', 'model.network.img_size=32'),
    ('densenet121', {'image_size': 16}, 'model.name: densenet121 with images of 16 px', 'data.image_size=224'),
    ('inception_next_atto', {'image_size': 16}, 'with images of 16 px', 'data.image_size=224'),
    ('se_resnet18', {'batch_size': 1}, 'data.batch_size: 1 images of 32 px', 'larger data.batch_size')])
def test_images_that_the_network_does_not_take(name, data, given, do, make_trainer, photo_data, refused):
    with refused(given, '', do):
        make_trainer().fit(ImageClassifier(name, num_classes=3), photo_data(**data))


def test_loss_is_the_configured_one(make_trainer, photo_data):
    record, model = Record(), classifier(loss=Loss(smoothing=0.2), optim=Optim(lr=1e-30))
    trainer = make_trainer(limit_train_batches=1, callbacks=[record])
    torch.manual_seed(0)
    data = photo_data()
    trainer.fit(model, data)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    images, labels = data.on_after_batch_transfer(next(iter(loader)), 0)
    expected = F.cross_entropy(model.train()(images), labels, label_smoothing=0.2).detach()
    assert record.steps[0]['train/loss'] == pytest.approx(float(expected), rel=1e-5)


class Seven(torch.nn.Module):
    """A loss that none other is."""

    def forward(self, logits, labels):
        return logits.sum() * 0 + 7


def with_attribute(criterion, **settings):
    model = type('Own', (ImageClassifier,), {})('test_resnet', num_classes=3, **settings)
    model.criterion = criterion
    return model


def with_class_attribute(criterion, **settings):
    return type('Own', (ImageClassifier,), {'criterion': criterion})('test_resnet', num_classes=3, **settings)


@pytest.mark.parametrize(('kind', 'criterion'), [
    (with_attribute, Seven()), (with_attribute, Seven().forward),
    (with_class_attribute, Seven()), (with_class_attribute, property(lambda model: Seven())),
    (with_class_attribute, Seven.forward)], ids=['module', 'function', 'class', 'property', 'method'])
def test_loss_of_a_subclass_is_taken(kind, criterion, make_trainer, photo_data, caplog):
    model, record = kind(criterion), Record()
    for _ in range(2):
        make_trainer(limit_train_batches=1, callbacks=[record]).fit(model, photo_data())
    assert [step['train/loss'] for step in record.steps] == [7, 7]
    assert 'model.loss' not in caplog.text
    make_trainer(limit_train_batches=1).fit(kind(criterion, loss=Loss('bce')), photo_data())
    assert 'model.loss: the loss is the criterion of Own' in caplog.text


def test_subclass_without_a_loss_has_that_of_the_settings(make_trainer, photo_data):
    model = with_attribute(None)
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    assert isinstance(model.criterion, torch.nn.CrossEntropyLoss)


def test_subclass_may_change_the_loss_of_each_training(make_trainer, photo_data):
    calls = []

    class Own(ImageClassifier):
        def setup(self, stage):
            super().setup(stage)
            built = self.criterion

            def twice(logits, labels):
                calls.append(built)
                return 2 * built(logits, labels)

            self.criterion = twice

    model = Own('test_resnet', num_classes=3)
    for _ in range(2):
        make_trainer(limit_train_batches=1).fit(model, photo_data())
    assert [type(each) for each in calls] == [torch.nn.CrossEntropyLoss] * 2


def test_loss_is_built_again_for_other_data(make_trainer, photo_data):
    model = classifier(loss=Loss(class_weights='balanced'))
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    first = model.criterion
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    assert model.criterion is not first


def test_views_are_averaged_as_probabilities(make_trainer, photo_data):
    model, data = classifier(), photo_data(eval_views='ten')
    result, = make_trainer().validate(model, data, verbose=False)
    losses = []
    for views, label in data.validation:
        assert views.shape == (10, 3, 32, 32)
        probability = model.eval()(data.normalisation(views)).detach().double().softmax(1).mean(0)
        losses.append(-float(probability[label].log()))
    assert result['val/loss'] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert len(model.predict_step((data.normalisation(views)[None], torch.zeros(1)), 0)['label']) == 1


def test_versions_of_images_line_up(make_trainer, photo_data):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    data = photo_data(augment=Augment(auto_augment='augmix-m3-w3', splits=3), batch_size=4)
    make_trainer(limit_train_batches=1, callbacks=[Look()]).fit(classifier(loss=Loss('jsd')), data)
    images, labels = seen[0]
    assert images.shape == (12, 3, 32, 32)
    assert len(labels) == 4
    for row, key in enumerate(list(data.sampler)[:4]):
        assert torch.equal(images[row::4], data.normalisation(data.training[key][0]))


@pytest.mark.parametrize('backend', ['reference', 'fused'])
def test_rates_of_what_is_dropped_come_by_network(make_trainer, photo_data, monkeypatch, backend):
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)  # plain torch takes no time to compile
    rates = {'drop_rate': 0.1, 'drop_path_rate': 0.1, 'drop_block_rate': 0.1}
    model = classifier(name='se_resnet18', network=rates, fused=backend)
    kinds = {type(module).__name__ for module in model.net.modules()}
    assert {'DropPath', 'DropBlock2d'} <= kinds
    assert model.net.drop_rate == 0.1
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(model, photo_data(image_size=64))
    assert trainer.callback_metrics['train/loss'].isfinite()
    assert model.hparams.network == rates


@pytest.mark.parametrize('precision', ['bf16-mixed', 'bf16-true'])
@pytest.mark.parametrize('name', ['ce', 'bce'])
def test_weights_of_classes_have_the_precision_of_the_training(make_trainer, photo_data, name, precision):
    model, trainer = classifier(loss=Loss(name, class_weights='balanced')), make_trainer(
        precision=precision, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, photo_data())
    assert trainer.callback_metrics['train/loss'].isfinite()
    assert not any('criterion' in name for name in model.state_dict())


@pytest.mark.parametrize(('precision', 'dtype'), [
    ('16-true', torch.float16), ('bf16-true', torch.bfloat16), ('64-true', torch.float64)])
def test_results_are_counted_as_exactly_in_true_precisions(make_trainer, precision, dtype):
    """701 right of 800, in float16 one times 100 is infinite, in bfloat16 700; and so in trainings after that."""
    model, images = classifier().eval(), torch.randn(800, 3, 32, 32)
    trainer = make_trainer(precision=precision, limit_val_batches=1.0)
    with torch.no_grad():
        labels = torch.cat([model.to(dtype)(part).argmax(1) for part in images.to(dtype).split(100)])
    labels[:99] = (labels[:99] + 1) % 3
    loader = DataLoader(TensorDataset(images, labels), 100)
    for each in (trainer, make_trainer(precision='64-true', limit_val_batches=1.0)):
        each.validate(model, loader, verbose=False)
        found = {name: value.item() for name, value in each.callback_metrics.items()}
        assert found['val/top1'] + found['val/top1_error'] == pytest.approx(100, abs=1e-9)
        assert model.val_metrics.loss_sum.dtype == sum_dtype()
        assert found['val/top1'] == pytest.approx(87.625, abs=0 if each is trainer else 5)


# The schedule


def cosine(step, steps, epochs=3, lr=0.1, warmup_lr=0.01):
    """One epoch from `warmup_lr` to `lr` in a straight line, then half a cosine to 0."""
    epoch = step / steps
    if epoch < 1:
        return warmup_lr + (lr - warmup_lr) * epoch
    return lr * (1 + math.cos(math.pi * (epoch - 1) / (epochs - 1))) / 2


def staircase(step, steps):
    """0.1, divided by 10 after each epoch."""
    return 0.1 * 0.1 ** (step // steps)


def drops(step, steps):
    """0.1, divided by 10 at the start of the second epoch, and again of the third."""
    return [0.1, 0.01, 0.001][step // steps]


@pytest.mark.parametrize('schedule', [
    Schedule(warmup_epochs=5, warmup_lr=0.01), Schedule('step', decay_epochs=30), Schedule('multistep'),
    Schedule('rsqrt', 2, decay_epochs=5.5), Schedule('wsd', 2, decay_epochs=3), Schedule('wsd'), Schedule('poly', 2),
    Schedule('tanh', 2), Schedule('step', decay_epochs=math.inf)])
def test_trial_is_of_the_first_steps_of_any_schedule(schedule, make_trainer, photo_data, optimizer_steps):
    model = classifier(optim=Optim(lr=0.1), schedule=schedule)
    make_trainer(fast_dev_run=True).fit(model, photo_data())
    assert optimizer_steps[0][0]['lr'] == (schedule.warmup_lr if schedule.warmup_epochs else 0.1)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize(('schedule', 'expected'), [
    (Schedule(warmup_epochs=1, warmup_lr=0.01), cosine),
    (Schedule(name='step', decay_epochs=1), staircase),
    (Schedule(name='multistep', decay_milestones=[1, 2]), drops),
    (Schedule(name='constant'), lambda step, steps: 0.1),
], ids=['cosine', 'step', 'multistep', 'constant'])
def test_learning_rate_of_each_step(schedule, expected, accumulate, make_trainer, photo_data, optimizer_steps):
    model = classifier(optim=Optim(lr=0.1), schedule=schedule)
    make_trainer(max_epochs=3, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model, photo_data())
    rates = [groups[0]['lr'] for groups in optimizer_steps]
    assert rates == pytest.approx([expected(step, 3) for step in range(9)])


@pytest.mark.parametrize(('accumulate', 'every'), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_logged_learning_rate_is_that_of_the_step(
        accumulate, every, make_trainer, photo_data, optimizer_steps, tmp_path, read_csv):
    model = classifier(optim=Optim(lr=0.1), schedule=Schedule(warmup_epochs=1))
    make_trainer(max_epochs=3, accumulate_grad_batches=accumulate, log_every_n_steps=every, limit_val_batches=0,
                 logger=CsvLogger(str(tmp_path / 'run'))).fit(model, photo_data())
    used = [groups[0]['lr'] for groups in optimizer_steps]
    logged = read_csv(tmp_path / 'run', 'lr')
    assert [step for step, _ in logged] == list(range(every - 1, 9, every))
    assert [value for _, value in logged] == pytest.approx([used[step] for step, _ in logged])


def test_one_logging_step_in_each_interval_however_batches_are_accumulated(make_trainer, photo_data):
    class Count(Callback):
        found = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if is_logging_step(trainer, batch_idx):
                self.found.append((trainer.global_step, batch_idx))

    make_trainer(max_epochs=2, accumulate_grad_batches=4, log_every_n_steps=2, limit_val_batches=0,
                 callbacks=[count := Count()]).fit(classifier(), photo_data())
    assert count.found == [(2, 7), (4, 3), (6, 11)]


def test_without_logging_the_host_waits_no_more_often(make_trainer, photo_data, monkeypatch):
    waits = []
    monkeypatch.setattr(ImageClassifier, 'stop_if_nonfinite', lambda model: waits.append(model.global_step))
    make_trainer(log_every_n_steps=0, limit_val_batches=0).fit(classifier(), photo_data())
    assert waits == [3]  # at the end of the epoch


@pytest.mark.parametrize('accumulate', [1, 2])
def test_last_incomplete_batch_is_left_out_however_it_is_accumulated(
        accumulate, make_trainer, photo_data, optimizer_steps):
    # 24 images in steps of 16: one step, not a second one of half the size
    make_trainer(accumulate_grad_batches=accumulate, limit_val_batches=0).fit(classifier(), photo_data(batch_size=16))
    assert len(optimizer_steps) == 1


def test_accumulated_gradients_are_those_of_the_whole_batch(make_trainer, photo_data):
    states = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = classifier(name='test_convnext', optim=Optim(lr=0.1))  # no batch norm, whose statistics would differ
        make_trainer(accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model, photo_data())
        states.append(model.net.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_estimated_stepping_batches_is_never_read(make_trainer, photo_data, monkeypatch):
    # reading it makes the loader before a checkpoint is restored
    def read(self):
        pytest.fail('estimated_stepping_batches was read')

    monkeypatch.setattr(Trainer, 'estimated_stepping_batches', property(read))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(classifier(schedule=Schedule(warmup_epochs=1)), photo_data())
    assert trainer.global_step == 6


def test_learning_rate_scales_with_the_batch_of_a_step(make_trainer, photo_data, optimizer_steps):
    optim = Optim(lr=0.1, lr_scaling='linear', lr_batch=32)
    make_trainer(accumulate_grad_batches=2).fit(
        classifier(optim=optim, schedule=Schedule(name='constant')), photo_data())
    assert {group['lr'] for groups in optimizer_steps for group in groups} == {0.1 * 8 / 32}


# Precision


@pytest.mark.parametrize(('precision', 'supported', 'said'), [
    ('bf16-mixed', False, True), ('bf16-true', False, True), ('bf16-mixed', True, False), (32, False, False)])
def test_cpu_without_instructions_for_bf16_is_told(
        precision, supported, said, make_trainer, photo_data, caplog, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    make_trainer(precision=precision, limit_train_batches=1, limit_val_batches=0).fit(classifier(), photo_data())
    assert ('is many times slower with it than with --trainer.precision 32' in caplog.text) == said


# Metrics


def test_metric_names(make_trainer, photo_data):
    trainer, model, data = make_trainer(), classifier(), photo_data()
    trainer.fit(model, data)
    assert set(trainer.callback_metrics) == METRICS
    assert {name.replace('test/', 'val/') for name in trainer.test(model, data, verbose=False)[0]} == VALIDATION
    assert set(trainer.validate(model, data, verbose=False)[0]) == VALIDATION


def test_best_accuracy_is_kept_over_epochs_and_interruptions(make_trainer, photo_data, tmp_path):
    class Given(ImageClassifier):
        """Has the accuracies that are given."""

        accuracies = (10.0, 90.0, 50.0, 60.0)

        def on_validation_epoch_end(self):
            value = torch.tensor(self.accuracies[self.current_epoch], dtype=torch.float64)
            self.val_metrics.results = lambda stage: {'val/top1': value}
            super().on_validation_epoch_end()

    found = []

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                found.append(float(trainer.callback_metrics['val/top1_best']))

    def fit(epochs, ckpt_path=None):
        trainer = make_trainer(max_epochs=epochs, callbacks=[Keep()])
        model = Given('test_resnet', 3, optim=Optim(lr=0.01))
        trainer.fit(model, photo_data(), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / f'{epochs}.ckpt')

    fit(2)
    fit(4, tmp_path / '2.ckpt')  # no better than before
    assert found == [10, 90, 90, 90]


@pytest.mark.parametrize('arguments', [{}, {'eval_batch_size': 3}, {'eval_batch_size': 1}])
def test_validation_is_that_of_each_image_by_hand(arguments, make_trainer, photo_data):
    # seven images: the last batch is smaller, and must not weigh more
    model, data, trainer = classifier(), photo_data(**arguments), make_trainer()
    trainer.fit(model, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name in VALIDATION}
    assert found == pytest.approx(expected_validation(model, normalised(data)), rel=1e-6)
    assert found['val/top5'] == 100  # of three classes


def test_five_most_probable_of_more_classes_by_hand(make_trainer, photo_data):
    model = classifier(num_classes=9, network={'drop_rate': 0.0})
    data = photo_data()
    data.setup('validate')
    images = normalised(data)
    found = make_trainer().validate(model, DataLoader(images, batch_size=8), verbose=False)[0]
    assert found == pytest.approx(expected_validation(model, images), rel=1e-6)


def test_images_with_label_minus_one_do_not_count(make_trainer):
    images, labels = torch.randn(7, 3, 32, 32), torch.tensor([0, 1, 2, 0, -1, -1, -1])
    model = classifier()
    loaders = [DataLoader(TensorDataset(images[:count], labels[:count]), batch_size=3) for count in (4, 7)]
    found = [make_trainer().validate(model, loader, verbose=False)[0] for loader in loaders]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# Precision, memory format, compilation


@pytest.mark.parametrize('precision', ['bf16-mixed', pytest.param('16-mixed', marks=pytest.mark.filterwarnings(
    'ignore:You passed `Trainer.accelerator=.cpu., precision=.16-mixed:UserWarning'))])
@pytest.mark.parametrize('channels_last', [False, True])
def test_mixed_precision(precision, channels_last, make_trainer, photo_data):
    kinds = []
    model, data, trainer = classifier(channels_last=channels_last), photo_data(), make_trainer(precision=precision)
    model.net.conv1.register_forward_hook(lambda module, args, output: kinds.append(
        (output.dtype, args[0].is_contiguous(memory_format=torch.channels_last))))
    trainer.fit(model, data)
    assert kinds
    assert {kind for kind, _ in kinds} == {torch.bfloat16}  # on the CPU Lightning replaces float16
    assert {last for _, last in kinds} == {channels_last}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    single = expected_validation(model, normalised(data))
    assert float(trainer.callback_metrics['val/loss']) == pytest.approx(single['val/loss'], rel=0.05)


@pytest.mark.parametrize('clip', [{'optim': {'clip_grad': 0.1}}, {'trainer': {'gradient_clip_val': 0.1}}], ids=str)
def test_what_is_clipped_are_the_gradients_and_not_their_scale(clip, make_trainer, photo_data):
    moved = []
    for plugins in ([], [MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=2.0 ** 16))]):
        torch.manual_seed(0)
        model = classifier(optim=Optim(lr=0.1, momentum=0.0, weight_decay=0.0, **clip.get('optim', {})))
        before = [parameter.detach().clone() for parameter in model.net.parameters()]
        make_trainer(plugins=plugins, limit_train_batches=1, limit_val_batches=0, **clip.get('trainer', {})).fit(
            model, photo_data())
        pairs = zip(before, model.net.parameters(), strict=True)
        moved.append(float(sum((old - new.detach()).square().sum() for old, new in pairs).sqrt()))
    assert moved == pytest.approx([0.01, 0.01], rel=1e-3)  # lr times the limit


class Fused(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1, fused=True)


@pytest.mark.parametrize('model', [
    lambda: classifier(optim=Optim(fused=True)), lambda: classifier(optim=Optim(options={'fused': True})),
    lambda: Fused('test_resnet', num_classes=3)])
def test_gradients_that_a_fused_optimiser_has_to_scale_are_not_clipped(model, make_trainer, photo_data, refused):
    scaled = MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu'))
    trainer = make_trainer(plugins=[scaled], gradient_clip_val=0.1)
    with refused('with clipped gradients and 16-mixed precision', 'takes the scale off', 'not be fused'):
        trainer.fit(model(), photo_data())


def test_channels_last_changes_only_the_memory_format():
    images = torch.randn(2, 3, 32, 32)
    plain, last = classifier(), classifier(channels_last=True)
    last.load_state_dict(plain.state_dict())
    assert last.net.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


# The fused tail


@pytest.mark.parametrize(('name', 'blocks'), [('se_resnet20_cifar', 9), ('test_resnet', 4), ('test_vit', 0)])
def test_fused_is_auto_for_any_network(name, blocks):
    model = classifier(name=name)
    assert model.hparams['fused'] == 'auto'
    assert len(explain(model.net)) == blocks


@pytest.mark.parametrize(('fused', 'recompute'), [('fused', False), ('fused', True), ('auto', False)])
def test_fused_trains_as_the_modules(fused, recompute, make_trainer, photo_data, monkeypatch):
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)  # plain torch: nothing to compile
    losses = {}
    for backend in (fused, 'reference'):
        torch.manual_seed(0)
        model = classifier(name='se_resnet20_cifar', fused=backend, recompute=recompute and backend == 'fused')
        assert {choice.fused for choice in explain(model.net).values()} == {backend == 'fused'}
        trainer = make_trainer(limit_train_batches=2, num_sanity_val_steps=0)
        trainer.fit(model, photo_data())
        losses[backend] = float(trainer.callback_metrics['val/loss'])
    assert losses[fused] == pytest.approx(losses['reference'], rel=1e-4)


@pytest.mark.parametrize(('arguments', 'why'), [
    (dict(fused='fusd'), 'did you mean fused'), (dict(name='test_vit', fused='fused'), 'no residual block'),
    (dict(name='se_resnet20_cifar', network=dict(squeeze='max'), fused='fused'), 'its squeeze is not the average'),
    (dict(name='se_resnet20_cifar', recompute=True), 'only the fused tail')])
def test_fused_that_cannot_be_is_refused(arguments, why):
    with pytest.raises(InputError, match=why):
        classifier(**arguments)


# SE in other networks


def test_se_is_added_to_any_network():
    plain = classifier(name='test_convnext')
    model = classifier(name='test_convnext', add_se={'reduction': 4, 'identity_start': True})
    assert len(added(model.net)) == 9
    assert model.hparams['add_se'] == {'reduction': 4, 'identity_start': True}
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert all('.se.' in key for key in result.missing_keys)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_plain_twin_goes_without_added_se():
    assert added(classifier(add_se={}, plain=True).net) == {}
    assert len(added(classifier(add_se={}).net)) == 4


def test_se_on_a_copy_is_the_network_s_too():
    assert len(added(classifier(add_se={'inplace': False}).net)) == 4


def test_network_with_added_se_is_trained_saved_and_evaluated(make_trainer, photo_data, tmp_path):
    model = classifier(name='test_convnext', add_se={'reduction': 4, 'kind': 'se'})
    callback = ModelCheckpoint(dirpath=tmp_path, filename='best')
    trainer = make_trainer(enable_checkpointing=True, callbacks=[callback])
    trainer.fit(model, photo_data())
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / 'best.ckpt')
    assert len(added(loaded.net)) == 9
    given = make_trainer().validate(loaded, photo_data(), verbose=False)[0]
    assert given['val/loss'] == float(trainer.callback_metrics['val/loss'])


@pytest.mark.parametrize(('arguments', 'given', 'remedy'), [
    (dict(add_se={'reductoin': 4}), "model.add_se: argument of add_se: 'reductoin'", 'did you mean reduction'),
    (dict(add_se={'at': 'layr1'}), "model.add_se: at: 'layr1'", 'did you mean layer1'),
    (dict(add_se={}, name='vgg11'), r'model.add_se: add_se\(VGG\)', 'name the modules'),
    (dict(add_se={}, name='se_resnet20_cifar'), r'model.add_se: add_se\(SEResNetCifar\)', 'name the modules'),
    (dict(add_se={'at': 3}), 'model.add_se: at: 3', 'give names of modules'),
    (dict(add_se={1: 3}), "model.add_se: {1: 3}", 'give the arguments of se_timm.add_se'),
])
def test_se_that_cannot_be_added_is_said(arguments, given, remedy):
    with pytest.raises(InputError, match=f'{given}[^\n]*\n  why: .*\n  do:  .*{remedy}'):
        classifier(**arguments)


@pytest.mark.slow  # the compiler takes a minute or two
def test_compiled_network_keeps_its_keys_and_trains(make_trainer, photo_data, tmp_path):
    keys = list(classifier().state_dict())
    model = classifier(compile=True)
    callback = ModelCheckpoint(dirpath=tmp_path, filename='best')
    trainer = make_trainer(
        limit_train_batches=1, num_sanity_val_steps=0, enable_checkpointing=True, callbacks=[callback])
    trainer.fit(model, photo_data())
    assert model.net._compiled_call_impl is not None
    state = torch.load(tmp_path / 'best.ckpt', weights_only=True)['state_dict']
    assert list(state) == keys
    eager = classifier()
    eager.load_state_dict(state)
    expected = expected_validation(eager, normalised(trainer.datamodule))
    assert float(trainer.callback_metrics['val/loss']) == pytest.approx(expected['val/loss'], rel=1e-4)


# Checkpoints


@pytest.fixture
def checkpoint(make_trainer, photo_data, tmp_path):
    """A checkpoint written from Python, and its model."""
    model = classifier(schedule=Schedule(name='multistep', decay_milestones=[1]), network={'drop_rate': 0.1})
    callback = ModelCheckpoint(dirpath=tmp_path / 'kept', filename='best')
    make_trainer(enable_checkpointing=True, callbacks=[callback]).fit(model, photo_data())
    return tmp_path / 'kept' / 'best.ckpt', model


def test_checkpoint_from_python_loads_with_weights_only(checkpoint):
    path, model = checkpoint
    assert torch.load(path, weights_only=True)['class_names'] == ['ant', 'bee', 'cat']
    loaded = ImageClassifier.load_from_checkpoint(path)
    for attribute in ('name', 'optim', 'schedule', 'loss', 'mix', 'distill', 'class_names'):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_data_module_of_a_checkpoint_has_its_settings(checkpoint, photo_data):
    path, _ = checkpoint
    loaded, given = ImageNetDataModule.load_from_checkpoint(path, batch_size=4), photo_data()
    for attribute in ('root', 'augment', 'image_size', 'num_workers'):
        assert getattr(loaded, attribute) == getattr(given, attribute) != getattr(ImageNetDataModule('here'), attribute)
    assert loaded.batch_size == 4


def test_checkpoint_loads_into_the_bare_network(checkpoint):
    path, model = checkpoint
    state = torch.load(path, weights_only=True)['state_dict']
    bare = timm.create_model('test_resnet', num_classes=3)
    bare.load_state_dict({key.removeprefix('net.'): value for key, value in state.items()}, strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(bare.eval()(images), model.eval()(images))


def test_learning_rate_that_lightning_finds_is_that_of_the_next_training(
        make_trainer, photo_data, optimizer_steps, caplog):
    model, data = classifier(optim=Optim(lr=0.3, lr_scaling='linear'), schedule=Schedule('constant')), photo_data()
    trainer = make_trainer(max_epochs=20)
    found = Tuner(trainer).lr_find(model, datamodule=data, num_training=40).suggestion()
    assert found not in (None, 0.3)
    assert 'ends the training before' not in caplog.text  # the search takes its own number of steps
    assert model.lr == model.hparams.optim['lr'] == found
    del optimizer_steps[:]
    make_trainer(limit_train_batches=2).fit(model, data)
    assert [group['lr'] for groups in optimizer_steps for group in groups] == pytest.approx([found] * 4)


@pytest.mark.parametrize(('callback', 'why', 'do'), [
    (LearningRateFinder, 'the schedule exists', 'Tuner(trainer).lr_find'),
    (BatchSizeFinder, 'the training is planned', 'Tuner(trainer).scale_batch_size'),
    (BackboneFinetuning, 'called backbone', 'FreezeBackbone'),
    (partial(StochasticWeightAveraging, 0.1), 'in place of model.schedule', 'WeightEMA')])
def test_callbacks_that_cannot_do_what_they_are_for(callback, why, do, make_trainer, photo_data, refused):
    made = callback()
    with refused(f'trainer.callbacks: {type(made).__name__}', why, do):
        make_trainer(callbacks=[made]).fit(classifier(), photo_data())


@pytest.mark.parametrize('work', ['fit', 'validate', 'predict'])
def test_loaders_of_the_data_module_without_it(work, make_trainer, photo_data, refused):
    data = photo_data()
    data.prepare_data()
    data.setup('fit')
    loaders = (data.train_dataloader(), data.val_dataloader()) if work == 'fit' else (data.val_dataloader(),)
    with refused('images: torch.uint8', 'not normalised', 'datamodule=data, not its loaders'):
        getattr(make_trainer(), work)(classifier(), *loaders)


def test_network_that_normalises_by_itself(make_trainer, photo_data):
    data, model = photo_data(), classifier()
    model.net.register_forward_pre_hook(lambda module, args: (args[0].float() / 255,))
    data.setup('fit')
    make_trainer().fit(model, data.train_dataloader(), data.val_dataloader())


@pytest.mark.parametrize('work', ['fit', 'validate'])
def test_network_with_fewer_outputs_than_the_data_has_classes(work, make_trainer, photo_data, refused):
    with refused('num_classes: 2', 'the data has 3 classes', "('test_resnet', num_classes=3, ...)"):
        getattr(make_trainer(), work)(classifier(num_classes=2), photo_data())


@pytest.mark.parametrize('work', ['fit', 'validate'])
def test_more_outputs_than_classes_are_told(work, make_trainer, photo_data):
    model = classifier(num_classes=None)
    with pytest.warns(UserWarning, match='the network has 1000 outputs, and the data 3 classes'):
        getattr(make_trainer(limit_train_batches=1), work)(model, photo_data())


def test_class_names_of_other_modules_may_be_anything(make_trainer, photo_data):
    data = photo_data()
    data.setup('validate')

    class Other(LightningDataModule):
        def val_dataloader(self):
            return DataLoader(normalised(data), batch_size=8)

        def class_names(self):
            return 'a method'

    make_trainer().validate(classifier(), Other(), verbose=False)


@pytest.mark.parametrize(('callback', 'told'), [
    (EarlyStopping('val_loss'), 'EarlyStopping waits for val_loss.*did you mean val/loss'),
    (ModelCheckpoint(monitor='val/recall'), 'ModelCheckpoint waits for val/recall')])
def test_monitor_that_may_not_come_is_told_before_the_training(callback, told, make_trainer, photo_data):
    class Later(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                pl_module.log_dict({'val_loss': 1.0, 'val/recall': 2.0})

    with pytest.warns(UserWarning, match=told):
        make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[callback, Later()]).fit(
            classifier(), photo_data())


def test_backbone_of_a_subclass_is_unfrozen_by_lightning(make_trainer, photo_data):
    class Own(ImageClassifier):
        @property
        def backbone(self):
            return self.net.layer1

    model = Own('test_resnet', 3, optim=Optim(lr=0.01))
    with contextlib.suppress(AttributeError, KeyError, RuntimeError):  # what that callback makes of it is its own
        make_trainer(max_epochs=1, callbacks=[BackboneFinetuning(5)]).fit(model, photo_data())
    assert not model.net.layer1[0].conv1.weight.requires_grad


@pytest.mark.filterwarnings('ignore:The provided params to be frozen already exist:UserWarning')
def test_training_whose_backbone_lightning_has_unfrozen_cannot_go_on(make_trainer, photo_data, tmp_path, refused):
    class Own(ImageClassifier):
        @property
        def backbone(self):
            return torch.nn.ModuleList([self.net.layer1, self.net.layer2])

    def train(epochs, **arguments):
        make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[
            BackboneFinetuning(1, backbone_initial_lr=0.01),
            ModelCheckpoint(tmp_path, '{step}', save_top_k=-1, every_n_train_steps=1)]).fit(
                Own('test_resnet', 3, optim=Optim(lr=0.1)), photo_data(), **arguments)

    train(2)
    train(2, ckpt_path=tmp_path / 'step=3.ckpt', weights_only=True)
    with refused('trainer.callbacks: BackboneFinetuning', 'it leaves frozen what it had unfrozen', 'FreezeBackbone'):
        train(3, ckpt_path=tmp_path / 'step=6.ckpt', weights_only=True)
    first = make_trainer()
    first.fit(Own('test_resnet', 3), photo_data())
    first.save_checkpoint(tmp_path / 'without.ckpt', weights_only=False)
    with refused('model: ', 'state of an optimiser of', 'resume with the callbacks of the checkpoint'):
        train(3, ckpt_path=tmp_path / 'without.ckpt', weights_only=True)


@pytest.mark.parametrize(('name', 'given', 'told', 'remedy'), [
    ('optim', 'adamw', "model.optim: 'adamw'", 'give Optim(...) or a dict'), ('mix', 0.2, 'model.mix: 0.2', 'mixup'),
    ('schedule', ['cosine'], "model.schedule: ['cosine']", 'Schedule'),
    ('loss', {'smoothin': 0.1}, "setting of model.loss: 'smoothin'", 'did you mean smoothing?'),
    ('optim', Optim, 'model.optim: <class', 'give Optim(...)'),
    ('mix', np.float32(0.2), 'model.mix: ', 'give Mix(...)'),
    ('distill', {'weight': 0.5}, "model.distill: {'weight': 0.5}", 'give model.distill.teacher')])
def test_groups_of_settings_that_are_none(refused, name, given, told, remedy):
    with refused(told, '', remedy):
        classifier(**{name: given})
    with refused("data.augment: 'rand-m9'", 'a group of settings', 'auto_augment'):
        DigitsDataModule(augment='rand-m9')


def test_none_stands_for_the_defaults_of_a_group():
    model = ImageClassifier('test_resnet', 3, **dict.fromkeys(GROUPS))
    assert model.hparams == ImageClassifier('test_resnet', 3).hparams
    assert (model.optim, model.distill) == (Optim(), None)


def test_network_without_outputs(refused):
    with refused('num_classes: 0', 'no classifier', 'num_classes=10'):
        classifier(num_classes=0)


def test_checkpoint_of_a_training_gives_initial_weights(checkpoint, refused):
    path, model = checkpoint
    again = classifier(network={'checkpoint_path': str(path)}, add_se={'identity_start': True})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert again.hparams['network'] == {}
    with refused('model: test_convnext with ', 'Error(s) in loading state_dict', "{'drop_rate': 0.1}: say the same"):
        classifier(name='test_convnext', network={'checkpoint_path': str(path)})
    with refused('model.network.checkpoint_path: ', 'no such file', f'did you mean {path}?'):
        classifier(network={'checkpoint_path': str(path.with_name('other.ckpt'))})


def test_checkpoint_of_a_network_with_se_put_in_gives_initial_weights(make_trainer, photo_data, tmp_path, refused):
    path, se = tmp_path / 'se.ckpt', {'reduction': 4}
    model, trainer = classifier(add_se=se), make_trainer(limit_train_batches=1)
    trainer.fit(model, photo_data())
    trainer.save_checkpoint(path, weights_only=False)
    network = {'checkpoint_path': str(path)}
    images = torch.randn(2, 3, 32, 32)
    again = classifier(network=network, add_se=se)
    assert torch.equal(again.eval()(images), model.eval()(images))
    teacher, _ = create_network('test_resnet', num_classes=3, **network)
    assert torch.equal(teacher.eval()(images), model(images))
    for other in (None, {'reduction': 8}):
        with refused(f'model.add_se: {other}', "trained with {'reduction': 4}", 'say the same'):
            classifier(network=network, add_se=other)


@pytest.mark.parametrize('kind', ['checkpoint', 'weights'])
def test_network_of_other_classes_begins_with_the_weights_of_a_checkpoint(checkpoint, kind, tmp_path, caplog):
    path, model = checkpoint
    if kind == 'weights':
        path = tmp_path / 'weights.pth'
        torch.save(model.net.state_dict(), path)
    with caplog.at_level('INFO'):
        tuned = classifier(num_classes=5, network={'checkpoint_path': str(path)}).net.state_dict()
    assert 'of 3 classes; the classifier of 5 begins anew' in caplog.text
    for name, value in model.net.state_dict().items():
        if name.startswith('fc.'):
            assert tuned[name].shape[0] == 5
        else:
            assert torch.equal(tuned[name], value), name


def test_only_the_number_of_classes_may_be_another(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=5).state_dict(), path)
    with pytest.raises(InputError, match='size mismatch'):  # a classifier of twice the features
        classifier(network={'checkpoint_path': str(path), 'global_pool': 'catavgmax'})


def test_pretrained_weights_of_other_classes_are_told(tmp_path, caplog):
    path = tmp_path / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=5).state_dict(), path)
    with caplog.at_level('INFO'):
        model = classifier(network={
            'pretrained': True, 'pretrained_cfg_overlay': {'file': str(path), 'num_classes': 5}})
    assert 'of 5 classes; the classifier of 3 begins anew' in caplog.text
    assert model.classes_of_weights == 5


def test_validation_after_an_interrupted_one_counts_its_own_images(make_trainer, photo_data):
    class Fails(Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError('fails')

    model = classifier()
    with pytest.raises(RuntimeError, match='fails'):
        make_trainer(callbacks=[Fails()]).validate(model, photo_data(eval_batch_size=4), verbose=False)
    again = make_trainer().validate(model, photo_data(), verbose=False)
    assert again == make_trainer().validate(model, photo_data(), verbose=False)


def test_best_accuracy_is_that_of_each_training(make_trainer, photo_data):
    model = classifier()
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    model.best_top1 = 101.0
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(model, photo_data())
    assert model.best_top1 == trainer.callback_metrics['val/top1_best'] <= 100


def test_checkpoint_may_be_saved_at_any_time(make_trainer, photo_data, tmp_path):
    class Saves(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / 'start.ckpt', weights_only=False)

    data = photo_data()
    make_trainer(callbacks=[Saves()], limit_train_batches=1).fit(classifier(), data)
    trainer = make_trainer()
    trainer.validate(classifier(), photo_data(), verbose=False)
    trainer.save_checkpoint(tmp_path / 'evaluated.ckpt', weights_only=False)
    for name in ('start', 'evaluated'):
        ImageClassifier.load_from_checkpoint(tmp_path / f'{name}.ckpt')


def test_learning_rate_of_another_schedule_is_left_to_it(make_trainer, photo_data):
    class Own(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.lr_scheduler_configs[0].scheduler = torch.optim.lr_scheduler.ExponentialLR(
                trainer.optimizers[0], gamma=2.0)

    model = classifier()
    trainer = make_trainer(callbacks=[Own()], max_epochs=2)
    trainer.fit(model, photo_data())
    assert trainer.optimizers[0].param_groups[0]['lr'] == pytest.approx(0.01 * 2 ** trainer.global_step)


def test_batch_size_of_other_data_scales_nothing(make_trainer, refused):
    class Own(LightningDataModule):
        batch_size = 4

        def train_dataloader(self):
            return [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))]

    with refused('lr_scaling', 'not known to the model', 'a data module of lightning_app'):
        make_trainer().fit(classifier(optim=Optim(lr=0.1, lr_scaling='linear')), Own())


def test_accumulation_by_a_schedule_is_refused(make_trainer, photo_data, refused):
    with refused('trainer.callbacks: GradientAccumulationScheduler', 'data.batch_size', 'accumulate_grad_batches'):
        make_trainer(callbacks=[GradientAccumulationScheduler({0: 2})]).fit(classifier(), photo_data())


@pytest.mark.parametrize('content', [b'hello world', b'GIF89a', b'}u.', b''])
def test_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / 'weights.pth').write_bytes(content)
    with pytest.raises(InputError, match=r'model: test_resnet with .*\n  why: '):
        classifier(network={'checkpoint_path': str(tmp_path / 'weights.pth')})


@pytest.mark.filterwarnings('ignore:Be aware that when using `ckpt_path`:UserWarning')
def test_checkpoint_from_python_is_validated_from_python(checkpoint, make_trainer, photo_data):
    path, model = checkpoint
    data = photo_data()
    fresh = make_trainer().validate(classifier(network={'drop_rate': 0.1}), data, ckpt_path=path, verbose=False)[0]
    assert fresh == pytest.approx(expected_validation(model, normalised(data)), rel=1e-6)


def test_checkpoint_of_another_network_is_refused_from_python_too(checkpoint, make_trainer, photo_data):
    path, _ = checkpoint
    with pytest.raises(InputError, match='test_resnet') as caught:
        make_trainer().validate(classifier(name='test_efficientnet'), photo_data(), ckpt_path=path, verbose=False)
    assert len(str(caught.value).splitlines()) == 3


def test_checkpoint_is_refused_on_other_classes_of_the_same_number(checkpoint, make_trainer, photo_data, photos):
    path, model = checkpoint
    for split in ('train', 'val'):
        (photos / split / 'bee').rename(photos / split / 'bug')
    for run in ('validate', 'test', 'fit'):
        with pytest.raises(InputError, match='3 classes, of which number 1 is bug') as caught:
            getattr(make_trainer(), run)(model, datamodule=photo_data(), ckpt_path=path)
        assert 'it is bee' in str(caught.value)


def test_initial_weights_are_not_needed_again(make_trainer, photo_data, tmp_path, weights):
    file = weights().partition('=')[2]
    trainer = make_trainer()
    trainer.fit(classifier(network={'checkpoint_path': file, 'drop_rate': 0.1}), photo_data())
    trainer.save_checkpoint(tmp_path / 'own.ckpt')
    Path(file).unlink()
    model = ImageClassifier.load_from_checkpoint(tmp_path / 'own.ckpt', map_location='cpu')
    assert model.hparams['network'] == {'drop_rate': 0.1}
    for name, value in trainer.lightning_module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


# A loss that is not finite


def test_loss_that_is_not_finite_raises_with_what_to_do(make_trainer, photo_data):
    with pytest.raises(InputError, match='not finite') as caught:
        make_trainer(max_epochs=4).fit(classifier(optim=Optim(lr=1e30)), photo_data())
    assert len(str(caught.value).splitlines()) == 3


def test_loss_that_is_not_finite_is_found_at_the_end_of_a_training_shorter_than_a_logging_interval(
        make_trainer, photo_data):
    with pytest.raises(InputError, match='not finite'):
        make_trainer(max_epochs=2, log_every_n_steps=50).fit(classifier(optim=Optim(lr=1e30)), photo_data())


def test_allowed_number_of_steps_that_are_not_finite(make_trainer, photo_data):
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    images[8:16] = float('nan')  # one batch of three
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    with pytest.raises(InputError, match='not finite in 1 steps'):
        make_trainer(limit_val_batches=0).fit(classifier(), loader, loader)
    model = classifier(max_nonfinite_steps=1)
    make_trainer(limit_train_batches=2, limit_val_batches=0).fit(model, loader, loader)
    assert model.nonfinite.count == 1


@pytest.mark.parametrize(('monitor', 'told'), [
    ('val/top1', r'the best checkpoint is \S*\.ckpt, of val/top1 \d'), (None, r'the newest checkpoint is \S*\.ckpt$')])
def test_training_that_diverges_tells_its_best_checkpoint_and_score(make_trainer, monitor, told, tmp_path):
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    last = torch.tensor([1.0] * 16 + [math.nan] * 8)[:, None, None, None]
    train = DataLoader(TensorDataset(images * last, labels), 8)
    best = ModelCheckpoint(tmp_path, monitor=monitor, mode='max', every_n_train_steps=1 if monitor is None else None)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[best], val_check_interval=2, log_every_n_steps=3)
    with pytest.raises(InputError, match=told):
        trainer.fit(classifier(), train, DataLoader(TensorDataset(images, labels), 8))


# Prediction


@pytest.mark.parametrize(('num_classes', 'width'), [(2, 2), (3, 3), (9, 5)])
def test_prediction_is_the_sorted_softmax(num_classes, width):
    model = classifier(num_classes=num_classes).eval()
    images = torch.randn(4, 3, 32, 32)
    found = model.predict_step((images, torch.tensor([0, 1, 2, -1])), 0)
    expected, order = model(images).softmax(1).sort(descending=True)
    assert found['index'].tolist() == [0, 1, 2, -1]
    assert torch.equal(found['label'], order[:, :width])
    torch.testing.assert_close(found['probability'], expected[:, :width])
    assert found['probability'].dtype == torch.float32


@pytest.mark.parametrize('batch', [lambda images: images, lambda images: [images]], ids=['tensor', 'list'])
def test_prediction_of_images_without_labels(make_trainer, batch):
    model, images = classifier(num_classes=3).eval(), torch.randn(6, 3, 32, 32)
    loader = DataLoader(images, batch_size=4, collate_fn=lambda each: batch(torch.stack(each)))
    found = make_trainer().predict(model, loader)
    assert [set(each) for each in found] == [{'label', 'probability'}] * 2
    expected = model.predict_step((images, torch.arange(6)), 0)
    assert torch.equal(torch.cat([each['label'] for each in found]), expected['label'])


# From Python, one after the other


def test_training_leaves_no_trace_in_the_generators(make_trainer, photo_data):
    """Members of an ensemble would be copies of each other."""
    torch.manual_seed(1)
    members = []
    for _ in range(3):
        members.append(classifier())
        drawn = torch.random.get_rng_state()
        make_trainer(limit_train_batches=1).fit(members[-1], photo_data())
        assert torch.equal(torch.random.get_rng_state(), drawn)
    model = classifier(optim=Optim(lr=math.inf))  # also if it fails
    drawn = torch.random.get_rng_state()
    with pytest.raises(InputError):
        make_trainer().fit(model, photo_data())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    first, *others = (member.net.layer1[0].conv1.weight for member in members)
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(*others)


def test_data_of_an_earlier_call_are_not_those_of_this_one(make_trainer, photo_data, refused):
    """Lightning keeps `trainer.datamodule` where loaders are given next."""
    loader = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 2, (16,))), batch_size=4)
    trainer, model = make_trainer(), classifier(num_classes=3, optim=Optim(lr=0.01, lr_scaling='linear'))
    trainer.validate(model, photo_data(), verbose=False)
    with refused('model.optim.lr_scaling: linear', 'the batch size of a step is not known', ''):
        trainer.fit(classifier(optim=Optim(lr=0.01, lr_scaling='linear')), loader)
    other = classifier(num_classes=2)
    trainer.fit(other, loader, loader)
    assert other.class_names is None
    trainer.save_checkpoint(path := f'{trainer.default_root_dir}/a.ckpt', weights_only=False)
    assert 'data' not in torch.load(path, weights_only=True)
    assert len(trainer.predict(other, loader)) == 4


def test_step_of_a_subclass_that_counts_otherwise(make_trainer, photo_data):
    class Own(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            self.log('val/own', (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

        test_step = validation_step

    class Both(Own):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            ImageClassifier.validation_step(self, batch, batch_idx)

    for kind, names in ((Own, {'val/own'}), (Both, {'val/own', 'val/top1', 'val/top1_best'})):
        trainer = make_trainer(num_sanity_val_steps=1)
        trainer.fit(model := kind('test_resnet', num_classes=3), photo_data())
        found = {name for name in trainer.callback_metrics if name.startswith('val/')}
        assert names <= found
        assert (found == names) == (kind is Own)
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        images = DataLoader([(torch.zeros(3, 32, 32), 0)])
        assert trainer.test(model, images)[0].keys() == {'val/own'}


def test_schedule_of_a_subclass_without_settings(make_trainer, photo_data):
    class Own(ImageClassifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
            schedule = CosineLRScheduler(optimizer, t_initial=1)
            return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': schedule, 'interval': 'step'}}

    make_trainer(max_epochs=2, max_steps=4).fit(Own('test_resnet', num_classes=3, schedule=None), photo_data())


class WithHead(ImageClassifier):
    """A layer outside `net`."""

    def __init__(self):
        super().__init__('test_resnet', 3)
        self.head = torch.nn.Linear(3, 3)

    def forward(self, images):
        return self.head(super().forward(images))


class WithHeadTrained(WithHead):
    """And trained."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured['optimizer'].add_param_group({'params': self.head.parameters()})
        return configured


def test_parameters_that_would_not_train_are_refused(make_trainer, photo_data, refused):
    with refused('WithHead: head.weight', 'it would not train', 'override configure_optimizers'):
        make_trainer().fit(WithHead(), photo_data())
    model = WithHeadTrained()
    before = model.head.weight.clone()
    make_trainer().fit(model, photo_data())
    assert not torch.equal(model.head.weight, before)


def test_layers_of_a_subclass_may_be_left_out_of_a_checkpoint(checkpoint):
    path, model = checkpoint
    with pytest.raises(RuntimeError, match=r'Missing key.*head.weight'):
        WithHead.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match='Found keys that are in the model state dict'):
        loaded = WithHead.load_from_checkpoint(path, strict=False)
    assert torch.equal(loaded.net.fc.weight, model.net.fc.weight)


def test_step_of_a_subclass_that_diverges_ends_the_training(make_trainer, photo_data, refused):
    class Diverges(ImageClassifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) * math.nan

    with refused('train/loss: not finite in 1 steps', 'has diverged', 'lower model.optim.lr'):
        make_trainer().fit(Diverges('test_resnet', 3), photo_data())


def test_first_step_of_a_search_has_its_learning_rate(make_trainer, photo_data, optimizer_steps):
    model = classifier(optim=Optim(lr=0.6), schedule=Schedule('constant'))
    Tuner(make_trainer(max_epochs=20)).lr_find(model, datamodule=photo_data(), min_lr=1e-7, num_training=20)
    assert optimizer_steps[0][0]['lr'] == pytest.approx(1e-7)


def test_loaded_model_is_not_evaluated_on_other_classes(checkpoint, make_trainer, photo_data, photos, refused):
    path, _ = checkpoint
    for split in ('train', 'val'):
        (photos / split / 'bee').rename(photos / split / 'dog')  # then cat is the second
    with refused('data: 3 classes, of which number 1 is cat', 'it is bee', 'of the same names'):
        make_trainer().validate(ImageClassifier.load_from_checkpoint(path), photo_data(), verbose=False)
    untrained = classifier()
    make_trainer().validate(untrained, photo_data(), verbose=False)
    (photos / 'val' / 'dog').rename(photos / 'val' / 'bee')
    (photos / 'train' / 'dog').rename(photos / 'train' / 'bee')
    make_trainer().validate(untrained, photo_data(), verbose=False)  # nor trained on the first
    make_trainer().validate(untrained, photo_data(), ckpt_path=path, verbose=False)


class OwnSchedule(ImageClassifier):
    """With an optimiser and a schedule of torch's, half the rate every two steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return [optimizer], [{'scheduler': torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), 'interval': 'step'}]


class OwnScheduleAlone(ImageClassifier):
    """With the optimiser of the class."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()['optimizer']
        return [optimizer], [{'scheduler': torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), 'interval': 'step'}]


def test_schedule_of_a_subclass_goes_on(make_trainer, photo_data, optimizer_steps):
    make_trainer(max_epochs=4).fit(OwnSchedule('test_resnet', 3), photo_data())
    whole = [step[0]['lr'] for step in optimizer_steps]
    assert len(set(whole)) == 6
    del optimizer_steps[:]
    first = make_trainer(max_epochs=2)
    first.fit(OwnSchedule('test_resnet', 3), photo_data())
    first.save_checkpoint(path := f'{first.default_root_dir}/own.ckpt', weights_only=False)
    make_trainer(max_epochs=4).fit(OwnSchedule('test_resnet', 3), photo_data(), ckpt_path=path)
    assert [step[0]['lr'] for step in optimizer_steps] == whole
    plain = make_trainer(max_epochs=2)  # whose checkpoint has the schedule of another kind
    plain.fit(classifier(), photo_data())
    plain.save_checkpoint(path, weights_only=False)
    del optimizer_steps[:]
    make_trainer(max_epochs=3).fit(
        OwnScheduleAlone('test_resnet', 3, optim=Optim(lr=0.01)), photo_data(), ckpt_path=path)
    assert optimizer_steps[0][0]['lr'] == 0.01


@pytest.mark.parametrize('chained', [False, True])
@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_momentum_of_a_schedule_of_a_subclass_goes_on(name, chained, make_trainer, photo_data, optimizer_steps):
    class OneCycle(ImageClassifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()['optimizer']
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
            if chained:
                schedule = torch.optim.lr_scheduler.ChainedScheduler([schedule])
            return [optimizer], [{'scheduler': schedule, 'interval': 'step'}]

    def momenta():
        return [step[0]['momentum'] if name == 'sgd' else step[0]['betas'][0] for step in optimizer_steps]

    def model(**options):
        return OneCycle('test_resnet', 3, optim=Optim(name, options=options))

    make_trainer(max_epochs=2).fit(model(), photo_data())
    whole = momenta()
    assert len(set(whole)) == 5
    first = make_trainer(max_epochs=1)
    first.fit(model(), photo_data())
    first.save_checkpoint(path := f'{first.default_root_dir}/cycle.ckpt', weights_only=False)
    del optimizer_steps[:]
    make_trainer(max_epochs=2).fit(model(), photo_data(), ckpt_path=path)
    assert momenta() == whole[3:]
    if name == 'adamw':
        del optimizer_steps[:]
        make_trainer(max_epochs=2).fit(model(betas=(0.9, 0.95)), photo_data(), ckpt_path=path)
        assert [step[0]['betas'] for step in optimizer_steps] == [(momentum, 0.95) for momentum in whole[3:]]


def test_training_without_a_limit_of_epochs_goes_on(make_trainer, photo_data):
    first = make_trainer(max_epochs=-1, max_steps=4)
    first.fit(OwnSchedule('test_resnet', 3), photo_data())
    first.save_checkpoint(path := f'{first.default_root_dir}/steps.ckpt', weights_only=False)
    again = make_trainer(max_epochs=-1, max_steps=8)
    again.fit(OwnSchedule('test_resnet', 3), photo_data(), ckpt_path=path)
    assert again.global_step == 8


def test_training_with_a_group_of_a_subclass_goes_on(make_trainer, photo_data):
    first = make_trainer(max_epochs=1)
    first.fit(WithHeadTrained(), photo_data())
    first.save_checkpoint(path := f'{first.default_root_dir}/head.ckpt', weights_only=False)
    again = make_trainer(max_epochs=2)
    again.fit(WithHeadTrained(), photo_data(), ckpt_path=path)
    assert again.global_step == 6


def test_hook_of_a_subclass_that_calls_no_other(make_trainer, photo_data):
    class Own(ImageClassifier):
        def on_fit_start(self):
            pass

    make_trainer(limit_train_batches=1).fit(Own('test_resnet', 3), photo_data())


def test_best_of_another_training_is_kept(make_trainer, photo_data):
    kept = []
    for _ in range(2):
        trainer = make_trainer(enable_checkpointing=True, callbacks=[BestCheckpoint()])
        trainer.fit(classifier(), photo_data())
        kept.append(Path(trainer.checkpoint_callback.best_model_path))
    assert [path.name for path in kept] == ['best.ckpt', 'best-v1.ckpt']
    trainer = make_trainer(enable_checkpointing=True, callbacks=[BestCheckpoint()], max_epochs=2)
    trainer.fit(classifier(), photo_data(), ckpt_path=kept[1])
    assert trainer.checkpoint_callback.best_model_path == str(kept[1])
    again = make_trainer(enable_checkpointing=True, callbacks=trainer.callbacks[-1:], default_root_dir='elsewhere')
    again.fit(classifier(), photo_data())
    assert again.checkpoint_callback.best_model_path not in map(str, kept)
    Path(again.checkpoint_callback.best_model_path).unlink()
    assert sorted(kept[0].parent.iterdir()) == sorted(kept)


def test_several_best_of_another_training_are_kept(make_trainer, photo_data):
    def fit(ckpt_path=None, epochs=2):
        best = BestCheckpoint(keep=2)
        make_trainer(enable_checkpointing=True, callbacks=[best], max_epochs=epochs).fit(
            classifier(), photo_data(), ckpt_path=ckpt_path)
        return {Path(path): Path(path).read_bytes() for path in best.best_k_models}

    first, second = fit(), fit()
    assert sorted(path.name for path in (*first, *second)) == [
        'best-epoch=0-step=3.ckpt', 'best-epoch=1-step=6.ckpt',
        'best-v1-epoch=0-step=3.ckpt', 'best-v1-epoch=1-step=6.ckpt']
    assert {path: path.read_bytes() for path in first} == first
    third = fit(max(second), 3)
    assert all(path.name.startswith('best-v1-epoch=') for path in third)
    assert {path: path.read_bytes() for path in first} == first


def test_best_that_is_used_in_several_trainings_is_saved_in_each(make_trainer, photo_data):
    best, kept = BestCheckpoint(), []
    for _ in range(3):
        make_trainer(enable_checkpointing=True, callbacks=[best]).fit(classifier(), photo_data())
        kept.append(Path(best.best_model_path))
    assert len(set(kept)) == 3
    assert all(path.is_file() for path in kept)


def test_best_that_is_new_in_a_training_that_goes_on_leaves_those_of_others(make_trainer, photo_data):
    best = BestCheckpoint()
    make_trainer(enable_checkpointing=True, callbacks=[best], max_epochs=1).fit(classifier(), photo_data())
    kept = best.best_model_path
    both = [BestCheckpoint('val/loss'), BestCheckpoint()]
    trainer = make_trainer(enable_checkpointing=True, callbacks=both, max_epochs=3)
    trainer.fit(classifier(), photo_data(), ckpt_path=kept)
    assert [Path(each.best_model_path).name for each in both] == ['best-val-loss.ckpt', 'best.ckpt']
    assert both[1].best_model_path == kept
    assert all(Path(each.best_model_path).is_file() for each in both)


def test_callbacks_that_are_used_again_begin_anew(make_trainer, photo_data, refused, capsys):
    callbacks = [ResultLine(), LastCheckpoint(handle_signals=False)]
    make_trainer(enable_checkpointing=True, callbacks=callbacks).fit(classifier(), photo_data())
    with refused('default_root_dir: ', 'of another training', 'give the Trainer another one'):
        make_trainer(enable_checkpointing=True, callbacks=callbacks).fit(classifier(), photo_data())
    capsys.readouterr()
    callbacks[0].best = {'top1': 101.0, 'top5': 101.0, 'epoch': 9}
    make_trainer(callbacks=callbacks[:1]).fit(classifier(), photo_data())
    assert 'epoch 0' in capsys.readouterr().out


def test_settings_from_python_are_plain_values_in_a_checkpoint(make_trainer, photo_data, tmp_path):
    trainer = make_trainer()
    trainer.fit(classifier(), photo_data())
    trainer.save_checkpoint(teacher := tmp_path / 'teacher.ckpt', weights_only=False)
    model = ImageClassifier(
        'test_resnet', np.int64(3), {'act_layer': 'silu', 'checkpoint_path': teacher}, optim=Optim(lr=np.float64(0.01)),
        distill=Distill('test_resnet', {'checkpoint_path': teacher}), max_nonfinite_steps=np.int64(2),
        channels_last=np.bool_(True))
    best = BestCheckpoint()
    trainer = make_trainer(callbacks=[best, ResultLine()], enable_checkpointing=True)
    data = photo_data(batch_size=np.int64(8), mean=np.array([0.5, 0.5, 0.5]))
    trainer.fit(model, data)
    assert (data.batch_size, data.mean) == (8, [0.5] * 3)
    loaded = ImageClassifier.load_from_checkpoint(best.best_model_path)
    assert loaded.optim == Optim(lr=0.01)
    assert loaded.distill.network == {'checkpoint_path': str(teacher)}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data, ckpt_path=best.best_model_path)
    assert trainer.global_step == 6


@pytest.mark.parametrize('layer', [torch.nn.SiLU, partial(torch.nn.ReLU, inplace=True)], ids=['class', 'partial'])
def test_settings_that_no_checkpoint_could_hold_are_refused(layer, refused):
    with refused('model.network.act_layer: ', 'no checkpoint with it could be loaded', 'by its name'):
        ImageClassifier('test_resnet', 3, {'act_layer': layer})


@pytest.mark.parametrize(('settings', 'given', 'why'), [
    ({'loss': Loss(name='binary')}, "model.loss.name: 'binary'", 'no such'),
    ({'optim': Optim(clip_mode='norms')}, "model.optim.clip_mode: 'norms'", 'no such'),
    ({'schedule': {'name': 'plateau'}}, "model.schedule.name: 'plateau'", 'no such')])
def test_unknown_word_in_settings_from_python(settings, given, why, refused):
    with refused(given, why, ''):
        ImageClassifier('test_resnet', 3, **settings)


def test_settings_of_a_subclass(refused):
    @dataclasses.dataclass(frozen=True)
    class Own(Loss):
        where: 'Nowhere' = None  # noqa: F821  (imported for types alone)
        cached: int = dataclasses.field(default=0, init=False)

    assert ImageClassifier('test_resnet', 3, loss=Own(smoothing=0.1)).loss == Own(smoothing=0.1)
    with refused("model.loss.name: 'binary'", 'no such', ''):
        ImageClassifier('test_resnet', 3, loss=Own(name='binary'))


def test_unknown_word_in_the_augmentation_from_python(photo_data, refused):
    with refused("data.augment.crop: 'rrx'", 'no such', 'rrc'):
        photo_data(augment=Augment(crop='rrx'))


def test_two_averages_of_the_weights_are_refused(make_trainer, photo_data, refused):
    trainer = make_trainer(callbacks=[EMAWeightAveraging(decay=0.5), WeightEMA(0.9)])
    with refused('trainer.callbacks: EMAWeightAveraging and WeightEMA', 'no weights to go on from', 'all but one'):
        trainer.fit(classifier(), photo_data())


@pytest.mark.parametrize(('names', 'known'), [
    (np.array(['a', 'b', 'c']), ['a', 'b', 'c']), (range(3), ['0', '1', '2']), ((7, 8, 9), ['7', '8', '9']),
    (np.array([b'a', b'b', b'c']), ['a', 'b', 'c']), (dict.fromkeys('abc').keys(), ['a', 'b', 'c']), ('abc', None),
    ({'a': 0, 'b': 1, 'c': 2}, None), (3, None)], ids=str)
def test_names_of_classes_of_other_data(names, known, make_trainer):
    class Own(LightningDataModule):
        class_names = names

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,))), batch_size=4)

    trainer, model = make_trainer(), classifier(num_classes=3)
    trainer.fit(model, Own())
    assert model.class_names == known
    trainer.save_checkpoint(path := f'{trainer.default_root_dir}/a.ckpt', weights_only=False)
    assert torch.load(path, weights_only=True)['class_names'] == known


def test_schedule_of_a_loader_without_a_length_is_told(make_trainer):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(3, 32, 32), 0)] * 8)

    with pytest.warns(UserWarning, match='the loader has no length: the learning rate changes between epochs only'):
        make_trainer().fit(classifier(), DataLoader(Endless(), batch_size=4))


def test_checkpoint_holds_the_settings_that_were_trained_with(make_trainer, photo_data):
    model, trainer = classifier(), make_trainer(limit_train_batches=1)
    model.optim, model.schedule = Optim(name='adamw', lr=0.002), Schedule('constant')
    trainer.fit(model, photo_data())
    trainer.save_checkpoint(path := f'{trainer.default_root_dir}/a.ckpt', weights_only=False)
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert (loaded.optim, loaded.schedule) == (model.optim, model.schedule)


def test_lightning_exports_after_a_training(make_trainer, photo_data, tmp_path):
    model = classifier()
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.to_torchscript(method='trace', example_inputs=images)(images), model.eval()(images))


def test_model_is_saved_as_a_whole(tmp_path):
    torch.save(model := classifier(channels_last=True), tmp_path / 'model.pt')
    loaded = torch.load(tmp_path / 'model.pt', weights_only=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_batch_norm_that_was_fixed_by_hand_stays_so(make_trainer, photo_data):
    model = classifier()
    model.net.bn1.eval()
    before = model.net.bn1.running_mean.clone()
    make_trainer(max_epochs=2, callbacks=[FreezeBatchNorm(last_epochs=1)]).fit(model, photo_data())
    assert torch.equal(model.net.bn1.running_mean, before)
    assert [module.training for module in (model.net.bn1, model.net.layer1[0].bn1)] == [False, True]


@pytest.mark.parametrize('batch', [{'images': torch.ones(5, 3)}, torch.ones(5, 3), [torch.ones(8, 3), torch.ones(5)]])
def test_images_of_any_batch_are_counted(batch):
    assert images_in(batch) == 5


def test_callbacks_print_the_accuracies_that_there_are(make_trainer, photo_data, capsys):
    class OneAccuracy(ImageClassifier):
        def on_validation_epoch_end(self):
            self.log('val/top1', 50.0)

    make_trainer(enable_progress_bar=True, callbacks=[ProgressBar(), ResultLine()]).fit(
        OneAccuracy('test_resnet', 3), photo_data())
    out = capsys.readouterr().out
    assert 'epoch 0: top-1 50.00 %\n' in out
    assert 'best: top-1 50.00 %, epoch 0' in out


class Draws(Callback):
    """Draws a number in each step."""

    def __init__(self):
        self.numbers = []

    def on_before_backward(self, *_):
        self.numbers.append(float(torch.rand(())))


def test_what_a_step_draws_follows_from_seed_epoch_batch_and_process(make_trainer, photo_data, monkeypatch):
    def drawn(seed=0, process=0):
        monkeypatch.setenv('PL_GLOBAL_SEED', str(seed))
        monkeypatch.setattr(ImageClassifier, 'global_rank', process)
        draws = Draws()
        make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[draws]).fit(classifier(), photo_data())
        return draws.numbers

    found = [*drawn(), *drawn(seed=1), *drawn(process=1)]
    assert len(set(found)) == 3 * 2 * 3
    assert drawn() == found[:6]


def test_module_of_the_user_draws_by_his_own_seed(make_trainer, photo_data):
    class Own(BoringModel):
        def training_step(self, batch, batch_idx):
            drawn.append(float(torch.rand(())))
            return self.layer(batch[0].flatten(1)[:, :32]).sum()

    found = []
    for seed in range(2):
        drawn = []
        torch.manual_seed(seed)
        make_trainer(limit_val_batches=0).fit(Own(), photo_data())
        found += [*drawn, float(torch.rand(()))]
    assert len(set(found)) == 2 * (3 + 1)


def test_setting_of_a_subclass_by_which_a_network_differs_is_named(make_trainer, photo_data, tmp_path, refused):
    class Wide(ImageClassifier):
        def __init__(self, *args, width=32, **kwargs):
            super().__init__(*args, **kwargs)
            self.save_hyperparameters('width', logger=False)
            self.net.extra = torch.nn.Linear(width, 2)

    trainer = make_trainer()
    trainer.fit(Wide('test_resnet', num_classes=3), photo_data())
    trainer.save_checkpoint(tmp_path / 'a.ckpt')
    with refused('test_resnet', 'model.width was 32, and is 64', 'model.width as in its training'):
        make_trainer(max_epochs=2).fit(Wide('test_resnet', num_classes=3, width=64), photo_data(),
                                       ckpt_path=tmp_path / 'a.ckpt', weights_only=True)


def test_checkpoint_of_a_plain_twin_gives_initial_weights(make_trainer, photo_data, tmp_path):
    path, twin = tmp_path / 'plain.ckpt', {'add_se': {'reduction': 4}, 'plain': True}
    model, trainer = classifier(**twin), make_trainer(limit_train_batches=1)
    trainer.fit(model, photo_data())
    trainer.save_checkpoint(path, weights_only=False)
    images = torch.randn(2, 3, 32, 32)
    for given in (twin, {}):
        again = classifier(network={'checkpoint_path': str(path)}, **given)
        assert torch.equal(again.eval()(images), model.eval()(images))


def test_both_classifiers_of_a_network_begin_anew(tmp_path):
    name, path = 'deit_tiny_distilled_patch16_224', tmp_path / 'weights.pth'
    torch.save(timm.create_model(name, num_classes=5).state_dict(), path)
    net, classes = create_network(name, num_classes=3, checkpoint_path=str(path))
    assert (classes, net.num_classes) == (5, 3)


def test_names_of_classes_are_those_of_the_weights(checkpoint):
    path, _ = checkpoint
    names = {classes: trained_classes(create_network(
        'test_resnet', num_classes=classes, checkpoint_path=str(path))[0]) for classes in (3, 5)}
    assert names == {3: ['ant', 'bee', 'cat'], 5: None}


def test_hub_may_call_classes_otherwise():
    net = timm.create_model('test_resnet', num_classes=3)
    net.pretrained_cfg = {**net.pretrained_cfg, 'label_names': ['a', 'b', 'c'], 'source': 'hf-hub'}
    assert trained_classes(net) is None
    net.pretrained_cfg['source'] = 'local-dir'
    assert trained_classes(net) == ['a', 'b', 'c']


@pytest.mark.parametrize(('content', 'why'), [
    (None, 'it is a folder'), (b'', 'EOFError'), (b'no weights', 'eights')])
def test_weights_in_what_is_no_file_of_them(tmp_path, content, why):
    path = tmp_path / 'weights.pth'
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=f'\n  why: .*{why}'):
        classifier(network={'checkpoint_path': str(path)})
