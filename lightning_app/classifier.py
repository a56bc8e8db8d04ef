"""The LightningModule: any timm network as an image classifier."""
from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import Optimizer

from se_timm.errors import InputError, message

from .loss import Loss, build_loss
from .metrics import ClassificationMetrics
from .network import architecture, create_network, fuse_network, with_se
from .optim import Optim, Schedule, build_optimizer, build_schedule, check_optimizer, scaled_lr

__all__ = ['ImageClassifier', 'is_logging_step']

TOP = 5
COUNTERS = ('lookahead_step',)  # what optimisers count in their parameter groups, beside the settings


class ImageClassifier(LightningModule):
    """Trains and evaluates a timm network on batches of images `(N, 3, H, W)` and labels `(N,)`.

    Logs `train/loss`, `lr`, and `val/loss`, `val/top1`, `val/top5` (0 to 100; `test/...` in tests). Labels of -1 do not
    count. Works under LightningCLI and with a plain Trainer.

    Args:
        name: Any of timm's networks, with tag or without: `se_resnet50`, `se_resnext50_32x4d.racm_in1k`,
            `convnext_tiny`.
        num_classes: Number of classes; on the command line it comes from the data.
        network: Arguments of `timm.create_model`, such as `reduction: 8` or `pretrained: true`.
        plain: Build the plain twin, the same network without SE. An argument of its own, since a later config replaces
            the whole of `network`.
        add_se: Put SE into the network, after its initial weights are loaded: arguments of `se_timm.add_se`, such as
            `identity_start: true`, or `{}` for its defaults. The plain twin goes without.
        optim: The optimiser.
        schedule: The learning rate over the epochs.
        loss: The training loss.
        fused: What computes the ends of residual blocks (batch norm, SE, add, ReLU) in training: `'fused'`, in four
            passes over memory; `'reference'`, the modules; `'auto'`, fused where that was measured to pay.
        recompute: Keep less for the backward pass and compute it again there, see `se_timm.fuse`; with `fused: fused`.
        compile: Compile the network with `torch.compile`, in place.
        channels_last: Memory format of the network and the images; faster with mixed precision on GPUs.
        max_nonfinite_steps: Training steps with an infinite or NaN loss after which the run stops with an error.

    Raises:
        InputError: For an unknown network or arguments that it does not take.
    """

    net: Any  # nn.Module with timm's attributes

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
            fused: str = 'auto',
            recompute: bool = False,
            compile: bool = False,
            channels_last: bool = False,
            max_nonfinite_steps: int = 0,
    ) -> None:
        super().__init__()
        # a checkpoint gives plain dicts
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim
        self.schedule = Schedule(**schedule) if isinstance(schedule, dict) else schedule
        self.loss = Loss(**loss) if isinstance(loss, dict) else loss
        check_optimizer(self.optim)
        twin = {'se': False} if plain and add_se is None else {}
        self.net = create_network(name, num_classes=num_classes, **{**(network or {}), **twin})
        if add_se is not None and not plain:
            self.net = with_se(self.net, add_se)
        fuse_network(self.net, fused, recompute)
        self.class_names: list[str] | None = None
        self.resumed: dict[str, Any] = {}  # the checkpoint, until the optimiser is built
        self.name = name
        self.compile_network = compile
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.max_nonfinite_steps = max_nonfinite_steps
        # plain types only: a checkpoint with other objects cannot be loaded with weights_only=True
        self.save_hyperparameters({
            'name': name, 'num_classes': self.net.num_classes, 'network': architecture(network), 'plain': plain,
            'add_se': add_se, 'optim': dataclasses.asdict(self.optim), 'schedule': dataclasses.asdict(self.schedule),
            'loss': dataclasses.asdict(self.loss), 'fused': fused, 'recompute': recompute,
            'compile': compile, 'channels_last': channels_last, 'max_nonfinite_steps': max_nonfinite_steps,
        }, logger=False)
        self.net.to(memory_format=self.memory_format)
        self.criterion = build_loss(self.loss)
        self.val_metrics = ClassificationMetrics(self.net.num_classes)
        self.test_metrics = ClassificationMetrics(self.net.num_classes)
        self.nonfinite_steps = torch.zeros((), dtype=torch.int64)  # no buffer: DDP copies rank 0's to all

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data, and compile the network for a training."""
        self.class_names = self._classes_of_data() or self.class_names
        if self.compile_network and stage == 'fit':
            self.net.compile()  # in place: the keys of the state dict stay those of the bare network

    def _classes_of_data(self) -> list[str] | None:
        """Return the names of the classes of the images at hand, if they have labels."""
        if self._trainer is None or self.trainer.state.fn == TrainerFn.PREDICTING:
            return None
        return getattr(getattr(self.trainer, 'datamodule', None), 'class_names', None)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of normalised images `(N, 3, H, W)`."""
        return self.net(images.contiguous(memory_format=self.memory_format))

    # Training

    def on_fit_start(self) -> None:
        """Count the losses that are not finite on the device."""
        self.nonfinite_steps = torch.zeros((), dtype=torch.int64, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """When metrics are logged after this step, log the learning rate that it uses."""
        if (self.trainer.global_step + 1) % log_interval(self.trainer) == 0:
            # with layer decay the groups differ; the largest is the schedule's
            self.log('lr', max(group['lr'] for group in self.trainer.optimizers[0].param_groups))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the training loss of one batch."""
        images, labels = batch
        loss = self.criterion(self(images), labels)
        self.nonfinite_steps += ~torch.isfinite(loss.detach())  # stays on the device; read when logging
        self.log('train/loss', loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """When metrics are logged, look for losses that are not finite."""
        if is_logging_step(self.trainer, batch_idx):
            self.stop_if_nonfinite()

    def on_train_epoch_end(self) -> None:
        """Look for losses that are not finite since the last logging step."""
        self.stop_if_nonfinite()

    def _weights_are_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.net.state_dict().values()
                   if tensor.is_floating_point())

    def stop_if_nonfinite(self, weights: bool = False) -> None:
        """Raise `InputError` if too many training steps had a loss that is not finite. Collective over processes.

        Args:
            weights: Look at the weights too; the last step may have destroyed them, which the next loss would show.
        """
        broken = weights and not self._weights_are_finite()  # batch norms' statistics may differ between processes
        found = torch.stack([self.nonfinite_steps, torch.full_like(self.nonfinite_steps, broken)])
        count, broken = self.trainer.strategy.reduce(found, reduce_op='sum').tolist()
        if count > self.max_nonfinite_steps or broken:
            best = getattr(self.trainer.checkpoint_callback, 'best_model_path', '')
            raise InputError(message(
                f'train/loss: not finite in {count} steps up to step {self.trainer.global_step}',
                f'model.max_nonfinite_steps is {self.max_nonfinite_steps}; the training has diverged, with '
                f'lr {self.optim.lr:g} and {self.trainer.precision} precision',
                'lower model.optim.lr, add model.schedule.warmup_epochs, or clip by trainer.gradient_clip_val; '
                + (f'the last good checkpoint is {best}' if best else 'no checkpoint had been written')))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build timm's optimiser and schedule."""
        batch_size = getattr(getattr(self.trainer, 'datamodule', None), 'batch_size', None)
        optimizer = build_optimizer(self.net, self.optim, scaled_lr(self.optim, batch_size))
        schedule = self.schedule
        if getattr(self.trainer, 'fast_dev_run', False):  # one epoch, in which no warm-up fits
            schedule = dataclasses.replace(schedule, warmup_epochs=0)
        scheduler = build_schedule(optimizer, schedule, self.trainer.max_epochs or 0)
        if self.resumed:
            self._check_continues(optimizer, self.resumed)
            self.resumed = {}
        self.given_options = [
            {name: value for name, value in group.items() if name not in ('params', *COUNTERS)}
            for group in optimizer.param_groups]
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """Set the learning rate by the share of the epochs that is done.

        The number of batches is read here, when the loader exists: `trainer.estimated_stepping_batches` would create
        the loader before a checkpoint is restored, which silently breaks a resume within an epoch.
        """
        batches = self.trainer.num_training_batches
        steps = max(-(-int(batches) // self.trainer.accumulate_grad_batches), 1)
        scheduler.step(self.trainer.global_step / steps)

    def on_train_start(self) -> None:
        """Let the given optimiser settings win over those that a checkpoint has brought back."""
        for group, given in zip(self.trainer.optimizers[0].param_groups, self.given_options, strict=True):
            group.update(given)
        if self.trainer.global_step:
            self.lr_scheduler_step(self.trainer.lr_scheduler_configs[0].scheduler, None)

    # Evaluation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of validation images."""
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the validation's loss and accuracies."""
        self.log_dict(self.val_metrics.results('val'))
        self.val_metrics.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of test images."""
        self.test_metrics.update(self(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        """Log the test's loss and accuracies."""
        self.log_dict(self.test_metrics.results('test'))
        self.test_metrics.reset()

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return for each image its index, and the five most probable classes, best first.

        Keys: `index (N,)`, `label (N, 5)` int64, `probability (N, 5)` float32; fewer than 5 if there are fewer classes.
        The index is the batch's label, which for unreadable images is negative, see `PredictionSamples`.
        """
        probability, label = self(batch[0]).float().softmax(1).topk(min(TOP, self.net.num_classes))
        return {'index': batch[1], 'label': label, 'probability': probability}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep class names, precision and the data's settings, so that a checkpoint can be evaluated on its own."""
        if self.trainer.training or self.trainer.validating:  # never write a network that has diverged
            self.stop_if_nonfinite(weights=self.max_nonfinite_steps == 0)
        checkpoint['class_names'] = self.class_names
        checkpoint['precision'] = self.trainer.precision
        if settings := getattr(getattr(self.trainer, 'datamodule', None), 'settings', None):
            checkpoint['data'] = settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network, and drop its schedule, which follows from the settings."""
        self._check_fits(checkpoint)
        self._check_classes(checkpoint)
        self.class_names = checkpoint.get('class_names')
        checkpoint['lr_schedulers'] = []
        if self._trainer is None:
            return
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.resumed = checkpoint
        else:
            # of the training's callbacks, those that are here; Lightning warns of each that it lacks, and its own
            # ModelCheckpoint of another folder
            present = {callback.state_key for callback in self.trainer.callbacks  # type: ignore[attr-defined]
                       if not isinstance(callback, Checkpoint)}
            checkpoint['callbacks'] = {
                key: state for key, state in checkpoint.get('callbacks', {}).items() if key in present}

    def _check_fits(self, checkpoint: dict[str, Any]) -> None:
        own, theirs = self.state_dict(), checkpoint['state_dict']
        hparams = checkpoint.get('hyper_parameters', {})
        name, num_classes = hparams.get('name', 'another network'), hparams.get('num_classes')
        if num_classes is not None and num_classes != self.net.num_classes:
            raise InputError(message(
                f'checkpoint: {name} with {num_classes} classes', f'this run has {self.net.num_classes} classes',
                'evaluate it on data with its classes, or train a network of your own'))
        wrong = [key for key in own.keys() | theirs.keys()
                 if key not in own or key not in theirs or own[key].shape != theirs[key].shape]
        if wrong:
            raise InputError(message(
                f'checkpoint: {name}', f'this run builds {self.name}, of which {len(wrong)} tensors differ, '
                f'for example {min(wrong)}', f'say --model.name {name} with the model.network it was trained with, or '
                'leave both out: the checkpoint knows them'))

    def _check_classes(self, checkpoint: dict[str, Any]) -> None:
        """Raise `InputError` if the data at hand has other classes than the checkpoint, or numbers them otherwise."""
        theirs, ours = checkpoint.get('class_names'), self._classes_of_data()
        if not ours or not theirs or list(theirs) == list(ours):
            return
        pairs = enumerate(zip_longest(theirs, ours, fillvalue='missing'))
        label, (trained, given) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise InputError(message(
            f'data: {len(ours)} classes, of which number {label} is {given}',
            f'in the data that the checkpoint was trained on, it is {trained}',
            'evaluate the checkpoint on data with its classes, of the same names'))

    def _check_continues(self, optimizer: Optimizer, checkpoint: dict[str, Any]) -> None:
        """Raise `InputError` if the checkpoint holds the state of another optimiser than `optimizer`."""
        if not checkpoint.get('optimizer_states'):
            raise InputError(message(
                'ckpt_path: a checkpoint of weights only', 'a training cannot go on without the state of its optimiser',
                'resume from a checkpoint that was written without save_weights_only'))
        given = checkpoint.get('hyper_parameters', {}).get('optim')
        trained = Optim(**given) if given else self.optim
        sizes = [len(group['params']) for group in checkpoint['optimizer_states'][0]['param_groups']]
        own = [len(group['params']) for group in optimizer.param_groups]
        if trained.name == self.optim.name and sizes == own:
            return
        changed = {field.name: getattr(trained, field.name) for field in dataclasses.fields(Optim)
                   if field.name in ('name', 'weight_decay', 'decay_bias_and_norm', 'layer_decay')
                   and getattr(trained, field.name) != getattr(self.optim, field.name)}
        raise InputError(message(
            'model.optim: ' + ', '.join(f'{name} {getattr(self.optim, name)}' for name in changed),
            'the checkpoint holds the state of an optimiser with '
            + ', '.join(f'{name} {value}' for name, value in changed.items()) + ', which this one cannot continue',
            'resume with the settings of the checkpoint, or leave out ckpt_path for a new training'))


def log_interval(trainer: Any) -> int:
    """Return the number of steps between two logging steps (Lightning sets the attribute, but does not declare it)."""
    return max(int(trainer.log_every_n_steps), 1)


def is_logging_step(trainer: Any, batch_idx: int) -> bool:
    """Return at the end of a training batch whether it ended an optimiser step after which metrics are logged."""
    last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    stepped = last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return stepped and trainer.global_step % log_interval(trainer) == 0
