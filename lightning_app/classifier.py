"""The LightningModule: any timm network as an image classifier."""
from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import Optimizer

from se_timm.errors import InputError, check_least, message

from .checkpoints import best_of
from .data import ImageDataModule
from .data.base import data_of
from .data.samples import run_seed, set_seed
from .distillation import Distill, Teacher, check_distill
from .generators import GeneratorsRestored
from .loss import Loss, build_loss, check_loss
from .metrics import ClassificationMetrics, check_monitors
from .mix import Mix, build_mixup, check_mix
from .network import (
    architecture,
    build_network,
    describe_images,
    fuse_network,
    refused_images,
    refuses_size,
    renew_classifier,
    trained_classes,
)
from .nonfinite import NonfiniteSteps
from .optim import (
    Optim,
    Schedule,
    build_optimizer,
    build_schedule,
    check_optimizer,
    clip_gradients,
    clips_what_is_scaled,
    scaled_lr,
    with_clipping,
    without_effect,
)
from .processes import check_clock
from .resume import (
    OF_NETWORK,
    begin_epoch,
    check_classes,
    check_continues,
    check_fits,
    check_not_past,
    continue_in_epoch,
    drop_elapsed_time,
    first_other_class,
    position,
    reopen_epoch,
    take_weights_without_average,
)
from .settings import as_group, check_choices, plain_values
from .steps import batches_done, is_logging_step, logs_next_step, tell_of_last_step

__all__ = ['GROUPS', 'ImageClassifier']

TOP = 5
EPOCHS_OF_TRIAL = 10_000  # enough for any schedule
GROUPS: dict[str, Any] = {'optim': Optim, 'schedule': Schedule, 'loss': Loss, 'mix': Mix, 'distill': Distill}
COUNTERS = ('lookahead_step',)  # what optimisers count in their parameter groups, beside the settings

# callbacks of Lightning's, why they cannot do here what they are for, and what does
UNSUITED: dict[type, tuple[str, str]] = {
    LearningRateFinder: (
        'the schedule exists when it has found a learning rate',
        'find it before the training, in Python: Tuner(trainer).lr_find(model, datamodule=data)'),
    BatchSizeFinder: (
        'data.batch_size is that of a step, and the training is planned when it has found another',
        'find it before the training, in Python: Tuner(trainer).scale_batch_size(model, datamodule=data)'),
    BackboneFinetuning: (
        "it wants a module called backbone, which timm's networks do not have",
        'take lightning_app.callbacks.FreezeBackbone'),
    StochasticWeightAveraging: (
        'it puts a schedule of its own in place of model.schedule, and its average is never validated',
        'take lightning_app.callbacks.WeightEMA')}


class ImageClassifier(LightningModule):
    """Trains and evaluates a timm network on batches of images `(N, 3, H, W)` and labels `(N,)`.

    Logs `train/loss`, `lr`, and `val/loss`, `val/top1`, `val/top5`, `val/top1_error`, `val/top5_error` (0 to 100;
    `test/...` in tests), and `val/top1_best`, the best accuracy of the training, also over interruptions. In
    evaluations labels of -1 do not count. Callbacks find the results of a validation in their `on_validation_end`:
    before, in `on_validation_epoch_end`, they are of the last. A `criterion` that a subclass has takes the place of
    `loss`. Works under LightningCLI and with a plain Trainer.

    Args:
        name: Any of timm's networks, with tag or without: `se_resnet50`, `se_resnext50_32x4d.racm_in1k`,
            `convnext_tiny`.
        num_classes: Number of classes; on the command line it comes from the data.
        network: Arguments of `timm.create_model`, such as `reduction: 8` or `pretrained: true`.
        plain: Build the plain twin, the same network without SE. An argument of its own, since a later config replaces
            the whole of `network`.
        add_se: Put SE into the network, after its initial weights are loaded, unless these have it: arguments of
            `se_timm.add_se`, such as `identity_start: true`, or `{}` for its defaults. The plain twin goes without.
        optim: The optimiser.
        schedule: The learning rate over the epochs.
        loss: The training loss.
        mix: Mixup and CutMix; off by default.
        distill: A teacher; none by default.
        fused: What computes the ends of residual blocks (batch norm, SE, add, ReLU) in training: `'fused'`, in four
            passes over memory; `'reference'`, the modules; `'auto'`, fused where that was measured to pay.
        recompute: Keep less for the backward pass and compute it again there, see `se_timm.fuse`; with `fused: fused`.
        compile: Compile the network with `torch.compile`, in place.
        channels_last: Memory format of the network and the images; faster with mixed precision on GPUs.
        max_nonfinite_steps: Training steps with an infinite or NaN loss or gradient that are left out; with one more
            the run stops with an error.

    Raises:
        InputError: For an unknown network or arguments that it does not take.
    """

    net: Any  # nn.Module with timm's attributes
    criterion: Any  # of a training
    seeds_steps = True  # each by where it is, see `on_train_batch_start`
    restores_generators = True  # after a training

    def __init__(
            self,
            name: str = 'se_resnet50',
            num_classes: int | None = None,
            network: dict[str, Any] | None = None,
            plain: bool = False,
            add_se: dict[str, Any] | None = None,
            optim: Optim = Optim(),  # noqa: B008  (frozen)
            schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
            loss: Loss = Loss(),  # noqa: B008  (frozen)
            mix: Mix = Mix(),  # noqa: B008  (frozen)
            distill: Distill | None = None,
            fused: str = 'auto',
            recompute: bool = False,
            compile: bool = False,
            channels_last: bool = False,
            max_nonfinite_steps: int = 0,
    ) -> None:
        super().__init__()
        self.optim = group('optim', optim)
        self.schedule = group('schedule', schedule)
        self.loss = group('loss', loss)
        self.mix = group('mix', mix)
        self.distill = group('distill', distill)
        check_least(0, **{'model.max_nonfinite_steps': max_nonfinite_steps})
        check_optimizer(self.optim)
        check_mix(self.mix)
        check_loss(self.loss, self.mix.on)
        if self.distill:
            check_distill(self.distill)
        self.net, self.classes_of_weights = build_network(name, num_classes, network, plain, add_se)
        self._check_number_of_outputs()
        fuse_network(self.net, fused, recompute)
        self.class_names: list[str] | None = None
        self.trained_class_names: list[str] | None = None  # those of the data at hand may be others
        self.resumed: dict[str, Any] = {}  # the checkpoint, until the training begins
        self.nonfinite: Any = None  # `NonfiniteSteps` in a training
        self.resumed_nonfinite_steps = 0
        self.best_top1 = 0.0
        self.latest: dict[str, float] = {}  # validation
        self.given_options: list[dict[str, Any]] = []  # of the optimiser, where a checkpoint may bring others
        self.name = name
        self.compile_network = compile
        self.channels_last = channels_last
        self.max_nonfinite_steps = max_nonfinite_steps
        self.save_hyperparameters(plain_values('model', {
            'name': name, 'num_classes': self.net.num_classes, 'network': architecture(network), 'plain': plain,
            'add_se': add_se, **self._groups(), 'fused': fused, 'recompute': recompute, 'compile': compile,
            'channels_last': channels_last, 'max_nonfinite_steps': max_nonfinite_steps,
        }), logger=False)
        self.net.to(memory_format=self.memory_format)
        self.has_own_criterion: bool | None = None  # that of a subclass, from the first training on
        self.mixup: Mixup | None = None
        self.teacher: Teacher | None = None
        self.val_metrics = ClassificationMetrics(self.net.num_classes)
        self.test_metrics = ClassificationMetrics(self.net.num_classes)

    def _groups(self) -> dict[str, Any]:
        """Return the groups of settings in plain types, without those that a subclass has replaced by its own."""
        found: dict[str, Any] = {name: getattr(self, name) for name in GROUPS}
        return {name: settings and dataclasses.asdict(settings) for name, settings in found.items()
                if settings is None or isinstance(settings, GROUPS[name])}

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the network and the images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data, and compile the network for a training."""
        names = self._classes_of_data()
        self.class_names = names or self.class_names
        if stage == 'fit':
            check_clock(self.trainer)
            self.trained_class_names = self.class_names
            self.resumed, self.given_options = {}, []
        tell_of_slow_precision(self.trainer)
        if stage == 'fit' and not self.trainer.global_step:  # nothing of a training before, unless this one goes on
            self.nonfinite, self.best_top1, self.latest, self.resumed_nonfinite_steps = None, 0.0, {}, 0
        if stage == 'fit' and first_other_class(trained_classes(self.net), names):
            rank_zero_info('initial weights: of classes with other names; the classifier begins anew')
            renew_classifier(self.net)
        self._check_number_of_classes(names)
        check_classes(trained_classes(self.net), names)
        if stage == 'fit':
            self._build_loss()
        if self.compile_network and stage == 'fit':
            self.net.compile()  # in place: the keys of the state dict stay those of the bare network

    def _check_number_of_outputs(self) -> None:
        if self.net.num_classes < 1:
            raise InputError(message(
                f'num_classes: {self.net.num_classes}', 'the network would have no classifier',
                'say how many classes there are, such as num_classes=10'))

    def _check_number_of_classes(self, names: list[str] | None) -> None:
        """Raise `InputError` if the network has fewer outputs than the data has classes, and say if it has more."""
        outputs = self.net.num_classes
        if names and len(names) > outputs:
            raise InputError(message(
                f'num_classes: {outputs}', f'the data has {len(names)} classes',
                f'build the network for them: ImageClassifier({self.name!r}, num_classes={len(names)}, ...); '
                'evaluate a trained one on data with its classes'))
        if names and len(names) < outputs:
            rank_zero_warn(f'num_classes: the network has {outputs} outputs, and the data {len(names)} classes')

    def configure_callbacks(self) -> list[Callback]:
        """Add what restores generators; raise `InputError` for one of Lightning's that cannot do what it is for.

        The command line, whose process ends with the training, has those alone that its configs name.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for kind, (why, do) in UNSUITED.items():
            if kind is BackboneFinetuning and hasattr(self, 'backbone'):
                continue  # of a subclass
            # with those of the tuner the training ends when they have found something
            if any(isinstance(each, kind) and not getattr(each, '_early_exit', False) for each in callbacks):
                raise InputError(message(f'trainer.callbacks: {kind.__name__}', why, do))
        averages = [type(each).__name__ for each in callbacks if isinstance(each, WeightAveraging)]
        if len(averages) > 1:
            raise InputError(message(
                f'trainer.callbacks: {" and ".join(averages)}', 'each puts its average in place of the weights: '
                'checkpoints would hold no weights to go on from', 'leave all but one of them out'))
        return [GeneratorsRestored()] if self.restores_generators else []

    def _build_loss(self) -> None:
        """Make what the loss consists of, some of which depends on the data."""
        data: Any = data_of(self.trainer)
        known = isinstance(data, ImageDataModule)
        convert = self.trainer.precision_plugin.convert_module  # Lightning converts submodules only
        if self.has_own_criterion is None:
            self.has_own_criterion = getattr(self, 'criterion', None) is not None
        if not self.has_own_criterion:
            criterion = build_loss(
                self.loss, self.net.num_classes, self.mix.on, data.augment.splits if known else 0,
                data.training.source.labels if known else None)
            criterion = convert(criterion).to(self.device)
            object.__setattr__(self, 'criterion', criterion)  # no submodule: its weights are not the network's
        elif self.loss != Loss():
            rank_zero_info(f'model.loss: the loss is the criterion of {type(self).__name__}; of these settings at most '
                           'the smoothing has an effect, in model.mix')
        self.mixup = build_mixup(
            self.mix, self.net.num_classes, self.loss.smoothing,
            data.images_per_batch // self.trainer.world_size if known else None)
        if self.distill:
            cfg = self.net.pretrained_cfg
            normalisation = {name: getattr(data, 'normalisation_settings', cfg)[name] for name in ('mean', 'std')}
            self.teacher = Teacher(
                self.distill, self.net.num_classes, normalisation, self.device, self.memory_format, convert,
                self._classes_of_data())

    def _classes_of_data(self) -> list[str] | None:
        """Return the names of the classes of the images at hand, if they have labels."""
        if self._trainer is None or self.trainer.state.fn == TrainerFn.PREDICTING:
            return None
        names: Any = getattr(data_of(self.trainer), 'class_names', None)
        names = names.tolist() if hasattr(names, 'tolist') else names  # of numpy, pandas, torch
        if isinstance(names, (str, bytes, Mapping)) or not (isinstance(names, Sized) and isinstance(names, Iterable)):
            return None  # those of others may be anything
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]

    @property
    def lr(self) -> float:
        """Learning rate, for `Tuner(trainer).lr_find` of Lightning, which sets it to that of a step, as it is."""
        return self.optim.lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optim = dataclasses.replace(self.optim, lr=float(rate), lr_scaling='none')
        self.hparams['optim'] = dataclasses.asdict(self.optim)
        rank_zero_info(f'lr: {rate:g} from now on, lr_scaling: none')

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of normalised images `(N, 3, H, W)`.

        Raises:
            InputError: For images of which the network takes none, or batch norm has no statistics.
        """
        try:
            return self.net(images.contiguous(memory_format=self.memory_format))
        except (AssertionError, RuntimeError) as error:
            if refuses_size(error):
                raise refused_images(self.name, self.net, images.shape[-1], error) from error
            if images.is_floating_point():
                raise
            raise InputError(message(
                f'images: {images.dtype}', 'they are not normalised, which the data module does that a Trainer has',
                'give fit, validate, test or predict the data module, datamodule=data, not its loaders')) from error
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise InputError(message(
                f'data.batch_size: {len(images)} images of {images.shape[-1]} px at once',
                'at the end of the network batch norm has one value of each channel, and no statistics',
                'take a larger data.batch_size or data.image_size, or fewer processes or accumulated batches'
            )) from error

    # Training

    def on_train_epoch_start(self) -> None:
        """See that all processes divide the same images."""
        if isinstance(data := data_of(self.trainer), ImageDataModule):
            data.check_order()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what the step draws, and when metrics are logged after it, log the learning rate that it uses."""
        # by where it is, not by what was drawn before: a resumed training draws the same, and no state need be saved
        set_seed(run_seed(), self.current_epoch, batch_idx, self.global_rank)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.nonfinite.begin()
        if logs_next_step(self.trainer):
            # with layer decay the groups differ; the largest is the schedule's
            self.log('lr', max(group['lr'] for group in self.trainer.optimizers[0].param_groups))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the training loss of one batch."""
        images, targets = batch
        if self.mixup:
            self.mixup.mixup_enabled = self.mix.off_epoch is None or self.current_epoch < self.mix.off_epoch
            images, targets = self.mixup(images, targets)
        logits = self(images)
        loss = self.criterion(logits, targets)
        if self.teacher:
            loss = self.teacher.loss(images, logits, loss)
        self.nonfinite.note(loss)
        self.log('train/loss', loss)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Look at the loss of a step of a subclass, too."""
        if type(self).training_step is not ImageClassifier.training_step and not self._scaled:
            self.nonfinite.note(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Count the step if it is not finite."""
        self.nonfinite.end(optimizer, scaled=self._scaled)

    def configure_gradient_clipping(
            self, optimizer: Optimizer, gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None) -> None:
        """Clip as `optim` or the Trainer says; Lightning's own way refuses fused optimisers."""
        optim = with_clipping(self.optim, gradient_clip_val, gradient_clip_algorithm)
        if optim.clip_grad:
            if self._scaled and getattr(optimizer, '_step_supports_amp_scaling', False):  # that of a subclass
                raise clips_what_is_scaled(type(optimizer).__name__)
            clip_gradients(self.net, optim.clip_grad, optim.clip_mode)

    @property
    def _scaled(self) -> bool:
        """Whether a GradScaler scales the gradients."""
        scaler = getattr(self.trainer.precision_plugin, 'scaler', None)
        return scaler is not None and scaler.is_enabled()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """When metrics are logged, look for losses that are not finite."""
        if is_logging_step(self.trainer, batch_idx):
            self.stop_if_nonfinite()

    def on_train_epoch_end(self) -> None:
        """Look for losses that are not finite since the last logging step."""
        self.stop_if_nonfinite()

    def _weights_are_finite(self) -> bool:
        finite = [tensor.isfinite().all() for tensor in self.net.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack(finite).all())  # one wait for the device, not one for each

    def stop_if_nonfinite(self, weights: bool = False) -> None:
        """Raise `InputError` if too many training steps had a loss that is not finite. Collective over processes.

        Args:
            weights: Look at the weights too; the last step may have destroyed them, which the next loss would show.
        """
        broken = weights and not self._weights_are_finite()  # batch norms' statistics may differ between processes
        found = torch.stack([self.nonfinite.count, torch.full_like(self.nonfinite.count, broken)])
        count, broken = self.trainer.strategy.reduce(found, reduce_op='max').tolist()
        self.nonfinite.count.fill_(count)  # each process saw its own losses
        if count > self.max_nonfinite_steps or broken:
            raise InputError(message(
                f'train/loss: not finite in {count} steps up to step {self.trainer.global_step}',
                f'model.max_nonfinite_steps is {self.max_nonfinite_steps}; the training has diverged, with '
                f'lr {self.optim.lr:g} and {self.trainer.precision} precision',
                'lower model.optim.lr, add model.schedule.warmup_epochs, or clip by model.optim.clip_grad; '
                + best_of(self.trainer.checkpoint_callback)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build timm's optimiser and schedule."""
        self._check_parameters()
        data = data_of(self.trainer)
        batch_size = data.batch_size if isinstance(data, ImageDataModule) else None  # of others it may mean anything
        optim = with_clipping(self.optim, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
        optimizer = build_optimizer(self.net, optim, scaled_lr(optim, batch_size), scaled=self._scaled)
        trial = getattr(self.trainer, 'fast_dev_run', False)  # of the first steps: in one epoch not every schedule fits
        epochs = EPOCHS_OF_TRIAL if trial else self.trainer.max_epochs or 0
        for setting in without_effect(optim, self.schedule, epochs, self.trainer.min_epochs or 0):
            rank_zero_info(setting)
        scheduler = build_schedule(optimizer, self.schedule, epochs)
        if self.resumed:
            if self._is_plain:
                check_continues(
                    optimizer, self.optim, self.resumed, self.trainer.callbacks)  # type: ignore[attr-defined]
            self.given_options = [
                {name: value for name, value in group.items() if name not in ('params', *COUNTERS)}
                for group in optimizer.param_groups]
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}

    @property
    def _is_plain(self) -> bool:
        """Whether the optimiser is this class's, not that of a subclass, which may have other parameters, too."""
        return type(self).configure_optimizers is ImageClassifier.configure_optimizers

    def _check_parameters(self) -> None:
        """Raise `InputError` for parameters of a subclass that the optimiser would leave out."""
        if not self._is_plain:
            return
        own = set(self.net.parameters())
        if other := [name for name, each in self.named_parameters() if each.requires_grad and each not in own]:
            raise InputError(message(
                f'{type(self).__name__}: {other[0]}', 'the optimiser is of the parameters of net alone, so that it '
                'would not train', 'let it be a part of self.net, or override configure_optimizers'))

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """Set the learning rate by the share of the epochs that is done.

        The number of batches is read here, when the loader exists: `trainer.estimated_stepping_batches` would create
        the loader before a checkpoint is restored, which silently breaks a resume within an epoch.
        """
        if not isinstance(scheduler, Scheduler):  # of one of Lightning's callbacks, such as the search for a lr
            super().lr_scheduler_step(scheduler, metric)
            return
        self._set_learning_rate(scheduler, self.trainer.fit_loop.batch_idx + 1)

    def _set_learning_rate(self, scheduler: Scheduler, batches: int) -> None:
        scheduler.step(self.trainer.current_epoch + batches / max(self.trainer.num_training_batches, 1))

    def on_train_start(self) -> None:
        """Let the given optimiser settings win over those that a checkpoint has brought back."""
        begin_epoch(self.trainer)
        self.nonfinite = NonfiniteSteps(self.net, self.max_nonfinite_steps, self.resumed_nonfinite_steps)
        self._restore_rates([config.scheduler for config in self.trainer.lr_scheduler_configs])
        if batches_done(self.trainer):  # Lightning leaves out the hook of an epoch that goes on
            self.on_train_epoch_start()

    def _restore_rates(self, schedulers: list[Any]) -> None:
        """Let torch's schedules, of a subclass, go on; those of timm and all other settings follow what is given."""
        restored: tuple[str, ...] = ()
        for scheduler, state in zip(schedulers, self.resumed.get('lr_schedulers', []), strict=False):
            if not isinstance(scheduler, Scheduler) and 'base_values' not in state:  # which is timm's
                scheduler.load_state_dict(state)
                restored = ('lr', 'initial_lr')
                if any(getattr(each, 'cycle_momentum', False)
                       for each in (scheduler, *getattr(scheduler, '_schedulers', ()))):  # of a sequence, for example
                    restored += ('momentum', 'betas')
        for group, given in zip(self.trainer.optimizers[0].param_groups, self.given_options, strict=False):
            kept = {name: group[name] for name in restored if name in group}
            if 'betas' in kept:
                kept['betas'] = (kept['betas'][0], *given['betas'][1:])  # the first is the momentum
            group.update(given | kept)
        self.given_options, self.resumed = [], {}
        if not schedulers or not isinstance(schedulers[0], Scheduler):
            return
        tell_of_last_step(self.trainer, not self._is_plain or self.schedule.name != 'constant')
        if self.trainer.global_step:
            self._set_learning_rate(schedulers[0], batches_done(self.trainer))
        if math.isinf(self.trainer.num_training_batches):
            rank_zero_warn('the loader has no length: the learning rate changes between epochs only, the warm-up too; '
                           'Trainer(limit_train_batches=N) gives an epoch one')

    # Evaluation

    def evaluate(self, images: Tensor) -> Tensor:
        """Return the logits of images `(N, 3, H, W)`, or of views `(N, V, 3, H, W)` the log of the mean probability.

        Krizhevsky et al. 2012 average the predictions of ten crops in the same way.
        """
        if images.dim() == 4:
            return self(images)
        logits = self(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])
        return logits.log_softmax(-1).logsumexp(1) - math.log(images.shape[1])

    def _check_evaluated(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            check_classes(self.trained_class_names, self._classes_of_data())

    def on_validation_epoch_start(self) -> None:
        """Count from the first image on, also after a validation that was interrupted."""
        self._check_evaluated()
        self.val_metrics.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of validation images."""
        self.val_metrics.update(self.evaluate(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the validation's loss, accuracies and errors, and in a training the best accuracy so far."""
        results = self._results('val', self.val_metrics, 'validation_step')
        self.log_dict(results)
        if results and self.trainer.state.fn == TrainerFn.FITTING:
            if not self.trainer.sanity_checking:
                self.latest = {name: float(value) for name, value in results.items()}
                self.best_top1 = max(self.best_top1, float(results['val/top1']))  # never NaN
            self.log('val/top1_best', results['val/top1'].new_tensor(self.best_top1))

    def on_validation_end(self) -> None:
        """In the short validation before a training, look for callbacks that wait for what none gives."""
        if self.trainer.sanity_checking:
            check_monitors(self.trainer.callbacks, self.trainer.callback_metrics)  # type: ignore[attr-defined]

    def on_test_epoch_start(self) -> None:
        """Count from the first image on."""
        self._check_evaluated()
        self.test_metrics.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of test images."""
        self.test_metrics.update(self.evaluate(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        """Log the test's loss and accuracies."""
        self.log_dict(self._results('test', self.test_metrics, 'test_step'))

    def _results(self, stage: str, metrics: ClassificationMetrics, step: str) -> dict[str, Tensor]:
        """Return what was counted, and begin anew; nothing if a subclass's own step has counted nothing."""
        own = getattr(type(self), step) is not getattr(ImageClassifier, step)
        with warnings.catch_warnings():
            if own:
                warnings.filterwarnings('ignore', 'The ``compute`` method')
            results = metrics.results(stage)
        metrics.reset()
        return {} if own and results[f'{stage}/top1'].isnan() else results

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return for each image its index, and the five most probable classes, best first.

        Keys: `index (N,)`, `label (N, 5)` int64, `probability (N, 5)` float32; fewer than 5 if there are fewer classes.
        The index is the batch's label, which for unreadable images is negative, see `PredictionSamples`; a batch of
        images alone has none.
        """
        images, *labels = [batch] if isinstance(batch, Tensor) else batch
        probability, label = self.evaluate(images).float().softmax(1).topk(min(TOP, self.net.num_classes))
        index = {'index': labels[0]} if labels else {}
        return {**index, 'label': label, 'probability': probability}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep class names, precision and the data's settings, so that a checkpoint can be evaluated on its own."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.nonfinite:  # never write a network that has diverged
            self.stop_if_nonfinite(weights=True)
            checkpoint['nonfinite_steps'] = int(self.nonfinite.count)
        checkpoint['best_top1'] = self.best_top1
        checkpoint['metrics'] = self.latest
        checkpoint['position'] = position(self.trainer)
        reopen_epoch(self.trainer, checkpoint)
        checkpoint['class_names'] = self.class_names
        checkpoint['precision'] = self.trainer.precision
        hparams = checkpoint.get('hyper_parameters', {})
        # as they are now: from Python they may have changed
        hparams.update({name: settings for name, settings in self._groups().items() if name in hparams})
        if isinstance(data := data_of(self.trainer), ImageDataModule):
            checkpoint['data'], checkpoint['data_left_out'] = data.settings(), data.left_out
            # where Lightning's `load_from_checkpoint` of a data module finds them
            checkpoint.setdefault(data.CHECKPOINT_HYPER_PARAMS_KEY, checkpoint['data']['init_args'])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network, and drop its schedule, which follows from the settings."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        own = self.hparams.keys() - inspect.signature(ImageClassifier).parameters.keys()  # of a subclass
        settings = {name: self.hparams.get(name) for name in (*OF_NETWORK, *sorted(own))}
        check_fits(self, settings, self.net.num_classes, checkpoint, goes_on=fitting)
        check_classes(checkpoint.get('class_names'), self._classes_of_data())
        self.class_names = self.trained_class_names = checkpoint.get('class_names')
        before = dict(checkpoint)
        checkpoint['lr_schedulers'] = []
        if self._trainer is None:
            describe_images(self.net, checkpoint)
            return
        if fitting:
            check_not_past(self.trainer, checkpoint)
            self.resumed = before
            self.resumed_nonfinite_steps = checkpoint.get('nonfinite_steps', 0)
            self.best_top1 = checkpoint.get('best_top1', 0.0)
            self.latest = checkpoint.get('metrics', {})
            take_weights_without_average(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
            drop_elapsed_time(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
            if isinstance(data := data_of(self.trainer), ImageDataModule):
                continue_in_epoch(self.trainer, data, checkpoint)
        else:
            # of the training's callbacks, those that are here; Lightning warns of each that it lacks, and its own
            # ModelCheckpoint of another folder
            present = {callback.state_key for callback in self.trainer.callbacks  # type: ignore[attr-defined]
                       if not isinstance(callback, Checkpoint)}
            checkpoint['callbacks'] = {
                key: state for key, state in checkpoint.get('callbacks', {}).items() if key in present}


def group(name: str, settings: Any) -> Any:
    """Return one of the groups of settings in plain values; a checkpoint gives it as a dict."""
    if settings is None and name == 'distill':
        return None
    settings = as_group(f'model.{name}', settings, GROUPS[name])
    if not isinstance(settings, GROUPS[name]):  # a subclass has its own
        return settings
    check_choices(f'model.{name}', settings, GROUPS[name])
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.init}
    return dataclasses.replace(settings, **plain_values(f'model.{name}', values))


def tell_of_slow_precision(trainer: Any) -> None:
    """Say so if the CPU has no instructions for bf16: convolutions are then computed without the library for them."""
    on_cpu = trainer.strategy.root_device.type == 'cpu'
    if on_cpu and 'bf16' in str(trainer.precision) and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rank_zero_info(f'trainer.precision {trainer.precision}: this CPU has no instructions for it, and is many times '
                       'slower with it than with --trainer.precision 32')
