"""What lets a training go on from a checkpoint as if it had never stopped, and what is refused because it cannot."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Timer, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from se_timm.errors import InputError, message

from .data import ImageDataModule
from .data.base import data_of
from .data.samples import run_seed
from .optim import Optim
from .settings import as_group
from .steps import batches_done, epochs_done, validates

__all__ = [
    'OF_NETWORK', 'begin_epoch', 'begins_anew', 'check_classes', 'check_continues', 'check_fits', 'check_not_past',
    'continue_in_epoch', 'drop_elapsed_time', 'first_other_class', 'position', 'reopen_epoch',
    'take_weights_without_average',
]

ADD_STATE = ('amsgrad', 'centered')  # options with which an optimiser remembers more
OF_NETWORK = ('name', 'network', 'plain', 'add_se')  # by which settings it is built
NEW_TRAINING = 'or leave out ckpt_path for a new training'


def check_fits(
        model: nn.Module, settings: Mapping[str, Any], num_classes: int, checkpoint: dict[str, Any], goes_on: bool,
) -> None:
    """Raise `InputError` if the checkpoint is of another network than `model`.

    Args:
        model: With the network that was built.
        settings: By which it was built, some of `OF_NETWORK` and those of a subclass.
        num_classes: Of the network.
        checkpoint: Of a training.
        goes_on: Whether a training goes on from there, for which nothing is taken from what the checkpoint says.
    """
    own, theirs = model.state_dict(), checkpoint['state_dict']
    hparams = checkpoint.get('hyper_parameters', {})
    trained, classes = hparams.get('name', 'another network'), hparams.get('num_classes')
    if classes is not None and classes != num_classes:
        raise InputError(message(
            f'checkpoint: {trained} with {classes} classes', f'this run has {num_classes} classes',
            'to train on from its weights, say --model.network.checkpoint_path in place of --ckpt_path' if goes_on else
            'evaluate it on data with its classes, or train a network of your own'))
    wrong = [key for key in own.keys() | theirs.keys() if key.startswith('net.')  # others of a subclass torch refuses
             and (key not in own or key not in theirs or own[key].shape != theirs[key].shape)]
    if wrong:
        others = [name for name in settings if settings[name] != hparams.get(name)]
        was = ''.join(f'; model.{name} was {hparams.get(name)}, and is {settings[name]}' for name in others)
        which = ', '.join(f'--model.name {trained}' if name == 'name' else f'model.{name} as in its training'
                          for name in others or settings)
        raise InputError(message(
            f'checkpoint: {trained}', f'this run builds {settings["name"]}, of which {len(wrong)} tensors differ, '
            f'for example {min(wrong)}{was}', f'say {which}, or ' + (
                'take the config.yaml of its run, which has that' if goes_on else
                'leave that out: the checkpoint knows it')))


def first_other_class(theirs: list[str] | None, ours: list[str] | None) -> tuple[int, str, str] | None:
    """Return the first class that has another name, with both names; None if all are equal, or some are not known."""
    pairs = enumerate(zip_longest(theirs, ours, fillvalue='missing') if theirs and ours else ())
    # as text: those of others may have been numbers
    return next(((label, *pair) for label, pair in pairs if str(pair[0]) != str(pair[1])), None)


def check_classes(theirs: list[str] | None, ours: list[str] | None) -> None:
    """Raise `InputError` if the data at hand has other classes than the checkpoint, or numbers them otherwise."""
    if (other := first_other_class(theirs, ours)) is None:
        return
    label, trained, given = other
    raise InputError(message(
        f'data: {len(ours or ())} classes, of which number {label} is {given}',
        f'in the data that the checkpoint was trained on, it is {trained}',
        'evaluate the checkpoint on data with its classes, of the same names'))


def check_not_past(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise `InputError` if the checkpoint has more behind it than the training shall have; say if as much."""
    limits = {'epochs': (trainer.max_epochs, (checkpoint.get('position') or {}).get('epoch', 0)),
              'steps': (trainer.max_steps, checkpoint.get('global_step', 0))}
    for unit, (limit, done) in limits.items():
        if limit is None or not 0 <= limit < done:
            continue
        if getattr(trainer, 'fast_dev_run', False):
            raise InputError(message(
                'trainer.fast_dev_run with a checkpoint', f'a trial is of {limit} {unit}, and it has {done} behind it',
                'leave out ckpt_path'))
        raise InputError(message(
            f'trainer.max_{unit}: {limit}', f'the checkpoint has {done} behind it',
            f'take a larger number, {NEW_TRAINING}'))
    if reached := [unit for unit, (limit, done) in limits.items() if limit == done]:
        ends = ' and '.join(f'{limits[unit][1]} {unit}' for unit in reached)
        larger = ' and '.join(f'trainer.max_{unit}' for unit in reached)
        rank_zero_info(f'the checkpoint is of the end of {ends}: a larger {larger} goes on from there')


def check_continues(optimizer: Optimizer, optim: Optim, checkpoint: dict[str, Any], callbacks: list[Callback]) -> None:
    """Raise `InputError` if the checkpoint holds the state of another optimiser than `optimizer`."""
    if not checkpoint.get('optimizer_states'):
        raise InputError(message(
            'ckpt_path: a checkpoint of weights only', 'a training cannot go on without the state of its optimiser',
            'resume from a checkpoint that was written without save_weights_only'))
    given = checkpoint.get('hyper_parameters', {}).get('optim')
    trained = as_group('model.optim of the checkpoint', given, Optim) if given else optim
    sizes = [len(group['params']) for group in checkpoint['optimizer_states'][0]['param_groups']]
    own = [len(group['params']) for group in optimizer.param_groups]
    # a momentum of RMSprop, unlike SGD's, cannot begin later
    group, saved = optimizer.param_groups[0], checkpoint['optimizer_states'][0]['param_groups'][0]
    added = {name: saved.get(name) for name in (*ADD_STATE, *(['momentum'] if 'centered' in group else []))
             if group.get(name) and not saved.get(name)}
    if trained.name == optim.name and sizes == own and not added:
        return
    changed = added | {field.name: getattr(trained, field.name) for field in dataclasses.fields(Optim)
               if field.name in ('name', 'weight_decay', 'decay_bias_and_norm', 'layer_decay')
               and getattr(trained, field.name) != getattr(optim, field.name)}
    unfreezing = [type(callback).__name__ for callback in callbacks
                  if isinstance(callback, BaseFinetuning) and callback.state_key in checkpoint.get('callbacks', {})]
    if not changed and unfreezing and sum(sizes) > sum(own):
        raise InputError(message(
            f'trainer.callbacks: {unfreezing[0]}', 'where a training goes on, it leaves frozen what it had unfrozen',
            f'take lightning_app.callbacks.FreezeBackbone, {NEW_TRAINING}'))
    if not changed:
        raise InputError(message(
            f'model: {sum(own)} tensors that train', f'the checkpoint holds the state of an optimiser of {sum(sizes)}',
            f'resume with the callbacks of the checkpoint, such as FreezeBackbone, {NEW_TRAINING}'))
    raise InputError(message(
        'model.optim: ' + ', '.join(f'{name} {getattr(optim, name, group.get(name))}' for name in changed),
        'the checkpoint holds the state of an optimiser with '
        + ', '.join(f'{name} {value}' for name, value in changed.items()) + ', which this one cannot continue',
        f'resume with the settings of the checkpoint, {NEW_TRAINING}'))


def take_weights_without_average(checkpoint: dict[str, Any], callbacks: list[Any]) -> None:
    """Let a training that averages no weights any more go on from the weights, not from their average."""
    if 'current_model_state' in checkpoint and not any(isinstance(each, WeightAveraging) for each in callbacks):
        rank_zero_info('the checkpoint holds an average of the weights, which this training goes on without')
        checkpoint['state_dict'] = checkpoint['current_model_state']
        checkpoint['callbacks'] = {key: value for key, value in checkpoint['callbacks'].items()
                                   if 'latest_update_step' not in value}  # that of the callback


def drop_elapsed_time(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Let `trainer.max_time` be of each start: jobs that go on would have the time of earlier ones behind them.

    A callback of the user's may be called as Lightning's is.
    """
    others = {callback.state_key for callback in callbacks if not isinstance(callback, Timer)}
    checkpoint['callbacks'] = {
        key: state for key, state in checkpoint.get('callbacks', {}).items()
        if key.partition('{')[0] != Timer.__qualname__ or key in others}


# The position in the data


def begins_anew(trainer: Trainer) -> bool:
    """Return at the start of a fit whether it is of another training than what callbacks remember."""
    return trainer.ckpt_path is None and not trainer.global_step


def position(trainer: Trainer) -> dict[str, int | None] | None:
    """Return where the training stands in its data, in images over all processes: batches depend on their number."""
    data = data_of(trainer)
    if not isinstance(data, ImageDataModule) or trainer.state.fn != TrainerFn.FITTING:
        return None
    return {
        'epoch': epochs_done(trainer), 'images': batches_done(trainer) * data.images_per_batch,
        'length': len(data.training), 'seed': run_seed(), 'batch_size': data.batch_size,
        'images_per_batch': data.images_per_batch, 'repeats': data.repeats, 'processes': trainer.world_size,
        'accumulated': data.given_accumulation or trainer.accumulate_grad_batches, **data.training.digests}


def reopen_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let an epoch that ended early, which Lightning takes for done, be one that goes on in a checkpoint."""
    done = epochs_done(trainer)
    loop = checkpoint.get('loops', {}).get('fit_loop')
    if not loop or loop['epoch_progress']['current']['processed'] == done:
        return
    for part in loop['epoch_progress'].values():
        part['processed'] -= 1
        part['completed'] = min(part['completed'], part['processed'])
    if validates(trainer, batches_done(trainer)):  # Lightning leaves out the validation, but counts the step once more
        count_step(loop, -1)


def continue_in_epoch(trainer: Trainer, data: ImageDataModule, checkpoint: dict[str, Any]) -> None:
    """Let the data go on where the checkpoint stopped, and count the batches of its epoch in those of this run.

    With another number of processes, batches are accumulated such that each process has as many images in a batch as
    before, where that is possible and nothing else was asked for.

    Raises:
        InputError: If the checkpoint stands within an epoch that this run cannot continue.
    """
    there = checkpoint.get('position')
    if not there:
        return
    loop = checkpoint['loops']['fit_loop']
    if ends_epoch(loop):
        there = {**there, 'epoch': there['epoch'] + 1, 'images': 0}
    complete_epoch(loop)
    batches = loop['epoch_loop.batch_progress']
    # the last step of an epoch may be of fewer images
    stepped = batches['is_last_batch'] and batches['current']['processed'] == batches['current']['ready']
    if there['images']:
        check_same_epoch(data, there)
        check_order(trainer)
        if not stepped:
            check_same_steps(data, there)
    keep_batches(trainer, data, there)
    images = there['images']
    if not stepped and images % data.batch_size:
        images -= images % data.batch_size
        tell_of_step_again(trainer, there['images'], images, data.batch_size)
        count_step(loop, -1)  # Lightning takes it for done
    data.start = (there['epoch'], images)
    if there['images']:
        count_batches(batches, images // data.images_per_batch, there['images_per_batch'] / data.images_per_batch)


def tell_of_step_again(trainer: Trainer, images: int, start: int, batch_size: int) -> None:
    """Say what is not as in an unbroken training where a step is done again that was left after `images`."""
    if any(isinstance(each, _BatchNorm) for each in trainer.lightning_module.modules()):
        rank_zero_warn(
            f'the checkpoint stands after {images} images of its epoch, within a step of {batch_size}, which is done '
            f'again: batch norms count {images - start} images twice. That is not so where trainer.val_check_interval '
            'is a multiple of trainer.accumulate_grad_batches')


def ends_epoch(loop: dict[str, Any]) -> bool:
    """Return whether a checkpoint was saved in the end of the last batch, before the validation, and close its epoch.

    Lightning goes on with the next epoch, but with the order of the images of the old one.
    """
    batches = loop['epoch_loop.batch_progress']
    last = batches['is_last_batch'] and batches['current']['completed'] < batches['current']['processed']
    epochs = loop['epoch_progress']
    if not last or epochs['current']['ready'] == epochs['current']['processed']:
        return False
    for part in (epochs['current'], epochs['total']):
        part['processed'] += 1
    for part in (batches['current'], batches['total']):
        part['completed'] = part['processed']
    count_step(loop, 1)
    return True


def count_step(loop: dict[str, Any], number: int) -> None:
    """Add to the steps that the loggers count, in a checkpoint."""
    loop['epoch_loop.state_dict']['_batches_that_stepped'] += number


def complete_epoch(loop: dict[str, Any]) -> None:
    """Let the epoch of a checkpoint be over, if it was saved in its end."""
    epochs = loop['epoch_progress']
    if epochs['current']['ready'] == epochs['current']['processed']:
        for part in (epochs['current'], epochs['total']):
            part['completed'] = part['processed']
        loop['epoch_loop.batch_progress']['current'] = dict.fromkeys(loop['epoch_loop.batch_progress']['current'], 0)


def begin_epoch(trainer: Trainer) -> None:
    """Have Lightning begin an epoch where the last one is over: with `trainer.max_steps` it would go on with that."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.processed:
        trainer.fit_loop.epoch_loop.restarting = False


def check_order(trainer: Trainer) -> None:
    """Raise `InputError` if this run loads its images in another order than that of the sampler, which can go on."""
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InputError(message(
            f'trainer.overfit_batches: {trainer.overfit_batches}',  # type: ignore[attr-defined]
            'the checkpoint stands within an epoch, and such epochs begin with the first image',
            f'resume from a checkpoint of the end of an epoch, {NEW_TRAINING}'))


def check_same_epoch(data: ImageDataModule, there: dict[str, int]) -> None:
    """Raise `InputError` if the epoch of the checkpoint is another in this run, in which images would repeat."""
    for key, now, then in (('seed_everything', run_seed(), there['seed']),
                           ('data.repeats', data.repeats, there['repeats']),
                           ('data: training images', len(data.training), there['length'])):
        if now != then:
            raise InputError(message(
                f'{key}: {now}', f'the checkpoint stands within an epoch that was begun with {then}, '
                'whose other images cannot be told any more',
                f'resume with {then}, from a checkpoint of the end of an epoch, {NEW_TRAINING}'))
    for what, number in data.training.digests.items():
        if None not in (number, other := there.get(what)) and number != other:
            raise InputError(message(
                f'data: training images with other {what}', 'the checkpoint stands within an epoch that was begun with '
                'others, and some images would be seen twice, and some never',
                f'resume with the same images, from a checkpoint of the end of an epoch, {NEW_TRAINING}'))


def check_same_steps(data: ImageDataModule, there: dict[str, int]) -> None:
    """Raise `InputError` if no step begins in this run where the one of the checkpoint began, or ended."""
    within = there['images'] % there['batch_size']
    if data.batch_size != there['batch_size'] and (within or there['images'] % data.batch_size):
        raise InputError(message(
            f'data.batch_size: {data.batch_size}',
            f'the checkpoint stands after {there["images"]} images of its epoch, '
            f'in the middle of a step of {there["batch_size"] if within else "this size"}',
            f'resume with data.batch_size {there["batch_size"]}, or from a checkpoint of the end of an epoch'))


def keep_batches(trainer: Trainer, data: ImageDataModule, there: dict[str, int]) -> None:
    """Accumulate as many batches in a step as give each process its former number of images in one, if that goes."""
    given = trainer.accumulate_grad_batches
    images = there['images_per_batch'] // there['processes'] * trainer.world_size
    as_given = there['batch_size'] == there['images_per_batch'] * there['accumulated']  # else kept before
    same = given != there['accumulated'] or (as_given and trainer.world_size == there['processes'])
    if same or images == data.images_per_batch or data.batch_size % images:
        return
    batches = data.batch_size // images
    counts = counts_of_batches(trainer, data.batches_of_epoch(trainer))
    if any(count * batches % given for count in counts.values()):
        return
    for name, count in counts.items():  # of batches, which are smaller now
        setattr(trainer, name, count * batches // given)
    data.given_accumulation, trainer.accumulate_grad_batches = given, batches
    rank_zero_info(
        f'{trainer.world_size} processes' + f' in place of {there["processes"]}' * (
            trainer.world_size != there['processes']) + f': each accumulates {batches} batches of '
        f'{images // trainer.world_size} images, so that a step has {data.batch_size}'
        + ' as before' * (data.batch_size == there['batch_size']))


def counts_of_batches(trainer: Any, batches: int) -> dict[str, int]:
    """Return how many batches an epoch has, and after how many a validation follows, where that is given."""
    limit, every = trainer.limit_train_batches, getattr(trainer, 'val_check_interval', None)  # which may be a time
    counts = {} if isinstance(limit, float) and limit == 1 else {'limit_train_batches': batches}
    if type(every) is int:
        counts['val_check_interval'] = every
    elif isinstance(every, float) and every < 1:
        counts['val_check_interval'] = max(int(every * batches), 1)
    return counts


def count_batches(progress: dict[str, Any], done: int, ratio: float) -> None:
    """Set Lightning's saved progress to `done` batches of this epoch; `ratio` new batches are an old one.

    Where in the end of a batch it was saved, Lightning tells by the differences, which stay.
    """
    for part, count in (('current', done), ('total', round(progress['total']['processed'] * ratio))):
        shift = count - progress[part]['processed']
        for name in progress[part]:
            progress[part][name] += shift
