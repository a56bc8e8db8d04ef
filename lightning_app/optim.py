"""Optimiser and schedule by timm's factories, from settings that fit in YAML."""
from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.optim import SGD, Optimizer

from se_timm.errors import InputError, check_least, message, unknown

__all__ = [
    'Optim', 'Schedule', 'build_optimizer', 'build_schedule', 'check_optimizer', 'check_options',
    'check_schedule', 'clip_gradients', 'clips_what_is_scaled', 'scaled_lr', 'with_clipping', 'without_effect',
]

WITHOUT_END = ('step', 'multistep', 'constant')  # schedules that know no lowest learning rate
# settings of a schedule that some schedules use
USED_BY = {
    'decay_epochs': ('step', 'wsd', 'rsqrt'), 'decay_rate': ('step', 'multistep', 'poly'),
    'decay_milestones': ('multistep',)}


@dataclass(frozen=True)
class Optim:
    """The optimiser. The defaults are the paper's.

    Attributes:
        name: Any of timm's optimisers (`timm.optim.list_optimizers()`), with `lookahead_` before it for Lookahead.
            `momentum` is SGD with plain momentum, as in the paper; timm's `sgd` is Nesterov's.
        lr: Learning rate after warm-up, for the batch size of `lr_batch`.
        momentum: Momentum (SGD and RMSprop).
        weight_decay: Weight decay.
        decay_bias_and_norm: Decay biases and batch norm too, as the paper did; timm's practice is not to.
        lr_scaling: How lr grows with the batch of an optimiser step: `none`, `linear` (lr * batch / lr_batch) or
            `sqrt`.
        lr_batch: Batch size that `lr` is meant for, used by `lr_scaling`.
        layer_decay: Factor on lr from each layer to the one before it; none by default.
        clip_grad: Limit of the gradient, none by default: its norm, its values, or for `agc` its norm relative to the
            weights' in each unit of each layer but the classifier (0.01 is usual).
        clip_mode: What `clip_grad` limits: `norm`, `value` or `agc` (adaptive, https://arxiv.org/abs/2102.06171).
        fused: One kernel for all parameters, of torch's own optimisers; where not given, whenever there is one.
        options: Further arguments of the optimiser, such as `betas` or `eps`.
    """

    name: str = 'momentum'
    lr: float = 0.6
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_bias_and_norm: bool = False
    lr_scaling: Literal['none', 'linear', 'sqrt'] = 'none'
    lr_batch: int = 256
    layer_decay: float | None = None
    clip_grad: float | None = None
    clip_mode: Literal['norm', 'value', 'agc'] = 'norm'
    fused: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the epochs of `trainer.max_epochs`, applied at every step.

    Attributes:
        name: Any of timm's schedules: `cosine`, `step`, `multistep`, `poly`, `tanh`, `wsd`, `rsqrt`, `constant`.
        warmup_epochs: Epochs of linear warm-up, part of the schedule's length.
        warmup_lr: Learning rate at the start of warm-up.
        min_lr: Lowest learning rate, of those that decay to one (not `step`, `multistep`, `constant`).
        decay_epochs: Epochs between two drops (`step`, which needs it), or length of the decay (`wsd`, `rsqrt`).
        decay_milestones: Epochs of the drops (`multistep`).
        decay_rate: Factor of each drop (`step`, `multistep`), 0.1 by default; power of the polynomial (`poly`), 1 by
            default.
    """

    name: Literal['cosine', 'step', 'multistep', 'poly', 'tanh', 'wsd', 'rsqrt', 'constant'] = 'cosine'
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float | None = None
    decay_milestones: list[int] = field(default_factory=lambda: [30, 60, 90])
    decay_rate: float | None = None


def scaled_lr(optim: Optim, batch_size: int | None) -> float:
    """Return the learning rate for steps of `batch_size` images over all processes.

    Raises:
        InputError: If lr shall scale and the batch size is not known.
    """
    if optim.lr_scaling == 'none':
        return optim.lr
    if batch_size is None:
        raise InputError(message(
            f'model.optim.lr_scaling: {optim.lr_scaling}', 'the batch size of a step is not known to the model',
            'use a data module of lightning_app, or give the final lr and lr_scaling: none'))
    if optim.lr_batch < 1:
        raise InputError(message(
            f'model.optim.lr_batch: {optim.lr_batch}', 'it is the batch size that lr is meant for',
            'take a number from 1, such as 256'))
    ratio = batch_size / optim.lr_batch
    return optim.lr * (ratio if optim.lr_scaling == 'linear' else ratio ** 0.5)


def _base_name(optim: Optim) -> str:
    return optim.name.removeprefix('lookahead_')


def check_optimizer(optim: Optim) -> None:
    """Raise `InputError` for an optimiser that timm does not have, or that needs another training step."""
    usable = [name for name in list_optimizers() if not get_optimizer_info(name).second_order]
    if (name := _base_name(optim)) in usable:
        return
    if name in list_optimizers():
        raise InputError(message(
            f'model.optim.name: {optim.name}', 'it needs second derivatives, which this training does not compute',
            'take another optimiser, such as adamw'))
    raise InputError(unknown('model.optim.name', name, usable))


def check_numbers(optim: Optim) -> None:
    """Raise `InputError` for numbers with which nothing would train, or all would run away."""
    for name, fits, valid in (
            ('lr', 0 <= optim.lr < math.inf, 'from 0'),
            ('momentum', 0 <= optim.momentum < 1, 'from 0 and below 1, such as 0.9'),
            ('weight_decay', 0 <= optim.weight_decay < math.inf, 'from 0'),
            ('layer_decay', optim.layer_decay is None or 0 < optim.layer_decay <= 1, 'above 0 and up to 1')):
        if not fits:
            raise InputError(message(
                f'model.optim.{name}: {getattr(optim, name)}', 'the training would stand still, or run away',
                f'take a number {valid}'))


def check_options(optim: Optim) -> None:
    """Raise `InputError` for options that the optimiser does not take; timm passes over some of them in silence."""
    parameters = inspect.signature(get_optimizer_class(_base_name(optim), bind_defaults=False)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in optim.options:
        if name not in parameters:
            raise InputError(message(
                f'model.optim.options: {name}', f'the optimiser {optim.name} takes no {name}',
                f'valid for the optimiser {optim.name}: {", ".join([*parameters][1:])}'))


def can_fuse(optim: Optim) -> bool:
    """Return whether the optimiser is one of torch's that have a fused form, itself and not within Lookahead."""
    kind: Any = get_optimizer_class(_base_name(optim), bind_defaults=False)
    return (optim.name == _base_name(optim) and kind.__module__.startswith('torch.optim')
            and 'fused' in inspect.signature(kind).parameters)


def fused_options(net: nn.Module, optim: Optim, scaled: bool) -> dict[str, Any]:
    """Return the arguments of the optimiser that make it fused, or not.

    Raises:
        InputError: If it shall be fused and has no such form, or would see gradients that a GradScaler has scaled.
    """
    clipped_after_scaling = scaled and optim.clip_grad is not None
    if optim.fused and not can_fuse(optim):
        raise InputError(message(
            f'model.optim.fused: true with the optimiser {optim.name}', 'it has no fused form',
            'leave model.optim.fused out, or take momentum, sgd, adam or adamw'))
    if can_fuse(optim) and optim.options.get('fused', optim.fused) and clipped_after_scaling:
        raise clips_what_is_scaled(f'model.optim.{"options." * ("fused" in optim.options)}fused: true')
    if optim.fused is None:
        on_device = all(parameter.device.type in ('cpu', 'cuda') for parameter in net.parameters())
        fused = can_fuse(optim) and on_device and not clipped_after_scaling and 'fused' not in optim.options
        return {'fused': True} if fused else {}
    return {'fused': optim.fused} if can_fuse(optim) else {}


def clips_what_is_scaled(given: str) -> InputError:
    """Return the error for a fused optimiser whose gradients would be clipped while a GradScaler has them scaled."""
    return InputError(message(
        f'{given} with clipped gradients and 16-mixed precision',
        'a fused optimiser takes the scale off the gradients itself, after they were clipped',
        'let it not be fused, or take trainer.precision: bf16-mixed'))


def build_optimizer(net: nn.Module, optim: Optim, lr: float, scaled: bool = False) -> Optimizer:
    """Return timm's optimiser for the parameters of `net`.

    Args:
        net: The network, on its device.
        optim: The settings.
        lr: Learning rate, see `scaled_lr`.
        scaled: A GradScaler scales the gradients.

    Raises:
        InputError: For an optimiser timm does not have, or options or numbers it does not take.
    """
    check_optimizer(optim)
    check_numbers(optim)
    try:
        check_options(optim)
        optimizer = create_optimizer_v2(
            net, opt=optim.name, lr=lr, momentum=optim.momentum, weight_decay=optim.weight_decay,
            filter_bias_and_bn=not optim.decay_bias_and_norm, layer_decay=optim.layer_decay,
            **{**fused_options(net, optim, scaled), **optim.options})
        begin_momentum(optimizer)
        return optimizer
    except InputError:
        raise
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(message(
            f'model.optim: {optim}', str(error), f'correct model.optim for the optimiser {optim.name}')) from error


def begin_momentum(optimizer: Optimizer) -> None:
    """Give torch's fused SGD a momentum of zeros; its own is not initialised if the first step is left out."""
    if isinstance(optimizer, SGD) and optimizer.defaults['fused'] and not optimizer.defaults['dampening']:
        for group in optimizer.param_groups:
            for parameter in group['params'] if group['momentum'] else []:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)


def with_clipping(optim: Optim, limit: float | None = None, algorithm: Any = None) -> Optim:
    """Return the settings with the Trainer's `gradient_clip_val` and `gradient_clip_algorithm`, where it has some.

    Raises:
        InputError: If gradients shall be clipped to nothing, twice, or in some way without a limit.
    """
    ours = optim.clip_grad is not None or optim.clip_mode != Optim.clip_mode
    if ours and limit:
        raise InputError(message(
            f'model.optim.clip_grad: {optim.clip_grad} with trainer.gradient_clip_val', 'both clip the gradient',
            'leave one of them out'))
    names = (('model.optim.clip_grad', 'model.optim.clip_mode') if ours else
             ('trainer.gradient_clip_val', 'trainer.gradient_clip_algorithm'))
    if not ours:  # 0 is none to Lightning
        optim = dataclasses.replace(optim, clip_grad=limit or None, clip_mode=algorithm or Optim.clip_mode)
    if optim.clip_grad is not None and not optim.clip_grad > 0:
        raise InputError(message(
            f'{names[0]}: {optim.clip_grad}', 'gradients would be clipped to nothing',
            'take a number above 0, or leave it out'))
    if optim.clip_grad is None and (algorithm or ours):
        raise InputError(message(
            f'{names[1]}: {optim.clip_mode}', 'nothing is clipped without a limit', f'give {names[0]}, too'))
    return optim


def clip_gradients(net: nn.Module, value: float, mode: str) -> None:
    """Clip the gradients of `net` in place; `agc` leaves the classifier out, as its authors and timm do."""
    dispatch_clip_grad(model_parameters(net, exclude_head=mode == 'agc'), value=value, mode=mode)


def check_schedule(schedule: Schedule, epochs: int) -> None:
    """Raise `InputError` if the schedule is none over `epochs`."""
    if epochs < 1:
        raise InputError(message(
            'trainer.max_epochs: none, or below 1', f'the schedule {schedule.name} is one of epochs',
            'say --trainer.max_epochs, beside trainer.max_steps if that shall end the training'))
    check_least(0, **{
        f'model.schedule.{name}': getattr(schedule, name) for name in ('warmup_epochs', 'warmup_lr', 'min_lr')})
    if schedule.min_lr and schedule.name in WITHOUT_END:
        raise InputError(message(
            f'model.schedule.min_lr: {schedule.min_lr}', f'the schedule {schedule.name} does not decay to one',
            'leave it out, or take another schedule, such as cosine'))
    milestones = sorted({epoch for epoch in schedule.decay_milestones if epoch >= 0})
    if schedule.name == 'multistep' and milestones != list(schedule.decay_milestones):
        raise InputError(message(
            f'model.schedule.decay_milestones: {schedule.decay_milestones}', 'each must be later than the one before',
            f'say {milestones}'))
    if schedule.warmup_epochs >= epochs:
        raise InputError(message(
            f'model.schedule.warmup_epochs: {schedule.warmup_epochs}', f'trainer.max_epochs is {epochs}',
            f'take fewer than {epochs}, or a larger trainer.max_epochs'))
    if schedule.name == 'step' and not schedule.decay_epochs:
        raise InputError(message(
            f'model.schedule.decay_epochs: {schedule.decay_epochs}', 'the schedule step drops every so many epochs',
            'say after how many, such as --model.schedule.decay_epochs 30'))
    for name, least in (('decay_epochs', 'above 0'), ('decay_rate', 'from 0')):
        value = getattr(schedule, name) if schedule.name in USED_BY[name] else None
        if value is not None and not (value > 0 if name == 'decay_epochs' else value >= 0):
            raise InputError(message(
                f'model.schedule.{name}: {value}', 'the learning rate would not fall',
                f'take a number {least}'))


def without_effect(optim: Optim, schedule: Schedule, epochs: int, least: int = 0) -> list[str]:
    """Return the settings that do nothing, each with the reason; a recipe that is changed may have some.

    Args:
        optim: The optimiser.
        schedule: The learning rate over the epochs.
        epochs: After which a training ends.
        least: Before which none ends, `trainer.min_epochs`.
    """
    why = {f'model.schedule.{name}': f'the schedule is {schedule.name}'
           for name, users in USED_BY.items() if schedule.name not in users and differs(schedule, name)}
    if not schedule.warmup_epochs and differs(schedule, 'warmup_lr'):
        why['model.schedule.warmup_lr'] = 'there is no warm-up'
    if schedule.name == 'multistep' and min(schedule.decay_milestones, default=epochs) >= epochs:
        why['model.schedule.decay_milestones'] = f'trainer.max_epochs is {epochs}'
    if schedule.name == 'step' and (schedule.decay_epochs or 0) >= epochs:
        why['model.schedule.decay_epochs'] = f'trainer.max_epochs is {epochs}'
    if optim.lr_scaling == 'none' and differs(optim, 'lr_batch'):
        why['model.optim.lr_batch'] = 'lr_scaling is none'
    if least > epochs > 0:
        why['trainer.min_epochs'] = f'trainer.max_epochs is {epochs}'
    at_rest = ['model.optim.lr is 0: nothing trains'] * (optim.lr == 0)
    return [*at_rest, *(f'{name} has no effect: {reason}' for name, reason in why.items())]


def differs(settings: Any, name: str) -> bool:
    """Return whether a setting is another than by default."""
    return bool(getattr(settings, name) != getattr(type(settings)(), name))


def build_schedule(optimizer: Optimizer, schedule: Schedule, epochs: int) -> Scheduler:
    """Return timm's schedule over `epochs`; its `step` takes epochs, also fractions of them."""
    check_schedule(schedule, epochs)
    lr = max(group['lr'] for group in optimizer.param_groups)
    if schedule.min_lr > lr:
        raise InputError(message(
            f'model.schedule.min_lr: {schedule.min_lr}', f'the learning rate is {lr:g}, and would rise',
            'take a smaller one'))
    rate = (1.0 if schedule.name == 'poly' else 0.1) if schedule.decay_rate is None else schedule.decay_rate
    # These decay over a length: it begins after the warm-up, so that lr is reached. The others count epochs from 0.
    after_warmup = schedule.name in ('cosine', 'tanh', 'poly')
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=schedule.name, num_epochs=epochs - schedule.warmup_epochs * after_warmup,
            warmup_prefix=after_warmup, warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr, min_lr=schedule.min_lr, decay_epochs=schedule.decay_epochs,
            # timm drops at the end of the epoch before a milestone; here the milestone's epoch is the first lower one
            decay_milestones=[epoch + 1 for epoch in schedule.decay_milestones], decay_rate=rate)
    except ValueError as error:
        raise InputError(message(
            f'model.schedule: {schedule}', str(error),
            'correct model.schedule.decay_epochs or warmup_epochs')) from error
    return scheduler
