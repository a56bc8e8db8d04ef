"""The network of a training: timm's by name, its initial weights, SE put into it, and its fused tails."""
from __future__ import annotations

import copy
import os
import pickle
import struct
import textwrap
from pathlib import Path
from typing import Any

import timm
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.models import load_state_dict
from torch import Tensor, nn

from se_timm import add_se as insert_se
from se_timm import fuse  # the import registers the SE networks
from se_timm.errors import InputError, message, unknown
from se_timm.residual_tail import BACKENDS

from .checkpoints import checkpoints_near, mapped
from .data.base import evaluation_settings

__all__ = [
    'INITIAL_WEIGHTS', 'architecture', 'arguments_of', 'build_network', 'check_has_network', 'check_has_settings',
    'check_name', 'create_network', 'describe_images', 'fuse_network', 'network_of', 'refused_images',
    'refuses_size', 'renew_classifier', 'trained_classes', 'with_se',
]

INITIAL_WEIGHTS = ('pretrained', 'checkpoint_path')  # arguments of `timm.create_model`
REFUSED = {  # others of them: why, and what to do instead
    'name': ('the network is that of model.name', 'say --model.name'),
    'num_classes': ('the images say how many classes there are', 'leave it out, or say --data.num_classes'),
    'features_only': ('features are no classes', 'leave it out'),
    'in_chans': ('images have three channels here', 'leave it out'),
    'aux_logits': ('no loss is taken of a second classifier', 'leave it out'),
}
DEFAULTS = {'features_only': False, 'in_chans': 3, 'aux_logits': False}  # of these: to give them is no error

TOO_SMALL = ('Output size is too small', "Kernel size can't be greater than actual input size")  # torch's errors


def architecture(network: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the arguments that build a network again whose weights a checkpoint holds: without initial weights."""
    return network and {name: value for name, value in network.items() if name not in INITIAL_WEIGHTS}


def check_name(name: str, key: str = 'model.name') -> None:
    """Raise `InputError` for a network that timm does not have."""
    base = name.split('.', 1)[0]
    if ':' not in name and not timm.is_model(base):
        raise InputError(unknown(key, base, timm.list_models()))


def arguments_of(
        network: dict[str, Any] | None, plain: bool, add_se: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `timm.create_model`: `network`, and for the plain twin of a network with SE no SE."""
    return {**(network or {}), **({'se': False} if plain and add_se is None else {})}


def check_arguments(network: dict[str, Any]) -> None:
    """Raise `InputError` for an argument of `timm.create_model` that a classifier of images in colour cannot have."""
    for name, value in network.items():
        if name in REFUSED and not (name in DEFAULTS and value == DEFAULTS[name]):
            raise InputError(message(f'model.network.{name}: {value}', *REFUSED[name]))


def check_rates(arguments: dict[str, Any], key: str) -> None:
    """Raise `InputError` for a share of what is dropped that is none."""
    for name, value in arguments.items():
        if 'drop' in name and name.endswith('_rate') and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise InputError(message(
                f'{key}.{name}: {value}', 'it is the share of what is dropped', 'take a number from 0 and below 1'))


def check_has_plain_twin(name: str) -> None:
    """Raise `InputError` for a network that is built with or without SE by no argument of its own."""
    check_name(name)
    if ':' in name or not timm.model_entrypoint(name.split('.', 1)[0]).__module__.startswith('se_timm.'):
        raise InputError(message(
            f'model.plain: true with model.name: {name}', 'it is none of the SE networks of se_timm, which have a '
            'plain twin, nor is SE put into it', 'leave model.plain out, or say what is left out, by model.add_se'))


def build_network(
        name: str, num_classes: int | None, network: dict[str, Any] | None, plain: bool,
        add_se: dict[str, Any] | None) -> tuple[Any, int | None]:
    """Return the network that `ImageClassifier` trains with these arguments, and the number of `create_network`.

    Raises:
        InputError: If it cannot be made.
    """
    check_arguments(network or {})
    if plain and add_se is None:
        check_has_plain_twin(name)
    wanted = None if plain else add_se
    path = (network or {}).get('checkpoint_path')
    there = inserted_in(own_checkpoint(path)) if path else None
    if there is not None and there != wanted:
        raise InputError(message(
            f'model.add_se: {wanted}', f'the network in {path} was trained with {there}',
            'say the same, or take weights of a network without it'))
    net, classes = create_network(name, num_classes=num_classes, **arguments_of(network, plain, add_se))
    return net if wanted is None or there is not None else with_se(net, wanted), classes


def fuse_network(net: nn.Module, backend: str, recompute: bool = False) -> None:
    """Set what computes the ends of the residual blocks of `net`; `'auto'` takes any network.

    Raises:
        InputError: For an unknown backend, `'fused'` where not one block can be, or `recompute` without `'fused'`.
    """
    if backend not in BACKENDS:
        raise InputError(unknown('model.fused', backend, BACKENDS))
    if recompute and backend != 'fused':
        raise InputError(message(
            f'model.recompute: true with model.fused: {backend}', 'only the fused tail comes with it',
            'say model.fused: fused as well, or leave model.recompute out'))
    try:
        report = fuse(net, backend, recompute)
        reasons = dict.fromkeys(report.left.values()) if not report.replaced else {}
    except ValueError:
        reasons = {'it has no residual block of a kind that is known': None}
    if reasons and backend == 'fused':
        raise InputError(message(
            'model.fused: fused', f'nothing of this network can be fused: {"; ".join(reasons)}',
            'leave model.fused out, or take a network of se_timm or of timm\'s family resnet'))


def with_se(net: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Return `net` with SE.

    Raises:
        InputError: If that cannot be, with the message of `se_timm.add_se`.
    """
    try:
        report = insert_se(net, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f'model.add_se: {error}' if '\n  why: ' in str(error) else message(
            f'model.add_se: {arguments}', str(error), 'give the arguments of se_timm.add_se')) from error
    rank_zero_info(str(report).splitlines()[0])
    return report.net


def own_checkpoint(path: str) -> dict[str, Any] | None:
    """Return a checkpoint of this program; None for any other file, which timm reads."""
    try:
        # mapped, not read: what is not ours timm reads in its turn
        checkpoint = mapped(path)
    except Exception:  # whatever such a file makes the unpickler do
        return None
    return checkpoint if isinstance(checkpoint, dict) and 'pytorch-lightning_version' in checkpoint else None


def inserted_in(checkpoint: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return `model.add_se` of the network in a checkpoint of this program, None where it has no such SE."""
    hparams = (checkpoint or {}).get('hyper_parameters', {})
    return None if hparams.get('plain') else hparams.get('add_se')


def weights_of(checkpoint: dict[str, Any], kept: str = 'state_dict') -> dict[str, Tensor]:
    """Return the network's weights of a checkpoint of this program, which lie in it under the key `kept`."""
    return {key.removeprefix('net.'): value for key, value in checkpoint[kept].items() if key.startswith('net.')}


def check_has_settings(ckpt_path: str, checkpoint: dict[str, Any]) -> None:
    """Raise `InputError` for a checkpoint without the settings of its network, which `network_of` builds it by."""
    if 'name' not in checkpoint.get('hyper_parameters', {}):
        raise InputError(message(
            f'ckpt_path: {ckpt_path}', 'it holds no settings of a network: this program has not written it',
            'name a checkpoint of python -m lightning_app fit'))


def network_of(checkpoint: dict[str, Any], raw: bool = False) -> Any:
    """Return the network of a checkpoint, in eval mode, with the average of its weights if there is one; not if `raw`.

    Raises:
        InputError: If they are not the weights of the network that its settings say.
    """
    hparams = checkpoint['hyper_parameters']
    net, _ = build_network(
        hparams['name'], hparams['num_classes'], hparams.get('network'), hparams.get('plain', False),
        hparams.get('add_se'))
    averaged = 'current_model_state' in checkpoint
    try:
        net.load_state_dict(weights_of(checkpoint, 'current_model_state' if averaged and raw else 'state_dict'))
    except RuntimeError as error:
        raise InputError(message(
            f'ckpt_path: weights of {hparams["name"]}', 'they are not those of the network that timm builds now '
            f'({error})', 'use the versions of timm and se_timm that it was trained with')) from error
    return net.eval()


def load_weights(net: Any, weights: dict[str, Tensor]) -> int | None:
    """Load `weights` into `net`, but for a classifier of another number of classes, which is returned."""
    heads = net.pretrained_cfg.get('classifier') or ()
    heads = (heads,) if isinstance(heads, str) else heads
    own = net.state_dict()
    other = [key for key, value in own.items() if key.rpartition('.')[0] in heads and key in weights
             and weights[key].shape[1:] == value.shape[1:] and len(weights[key]) != len(value)]
    net.load_state_dict({**weights, **{key: own[key] for key in other}})
    return max((len(weights[key]) for key in other), default=None)


def describe_weights(
        net: Any, checkpoint: dict[str, Any] | None, arguments: dict[str, Any], other: int | None) -> None:
    """Keep in timm's `pretrained_cfg` how images were made in the evaluations of initial weights, and their classes.

    Args:
        net: The network.
        checkpoint: Of this program, if the weights are of one.
        arguments: By which timm has built it.
        other: Number of classes that the classifier is not of.
    """
    names = net.pretrained_cfg.get('label_names') if arguments.get('pretrained') else None
    if checkpoint is not None:
        names = checkpoint.get('class_names')
        describe_images(net, checkpoint)
    net.pretrained_cfg = {**net.pretrained_cfg, 'label_names': names if other is None else None}


def describe_images(net: Any, checkpoint: dict[str, Any]) -> None:
    """Keep in timm's `pretrained_cfg` how images were made in the evaluations of a training of this program."""
    if data := checkpoint.get('data'):
        images, _ = evaluation_settings(data['init_args'], net.pretrained_cfg)
        net.pretrained_cfg = {**net.pretrained_cfg, **images}


def trained_classes(net: Any) -> list[str] | None:
    """Return the names of the classes that the initial weights of `net` are of, None where they are not known.

    Not those of Hugging Face's hub, which may call the same classes otherwise than their folders are called.
    """
    return None if net.pretrained_cfg.get('source') == 'hf-hub' else net.pretrained_cfg.get('label_names')


def renew_classifier(net: Any) -> None:
    """Let the classifier begin anew, its parameters being the same objects."""
    fresh = copy.deepcopy(net)
    fresh.reset_classifier(net.num_classes)
    net.load_state_dict(fresh.state_dict())
    net.pretrained_cfg = {**net.pretrained_cfg, 'label_names': None}


def other_classes(net: Any, arguments: dict[str, Any]) -> int | None:
    """Return the number of classes of timm's pretrained weights if it is another: the classifier got none of them."""
    classes = net.pretrained_cfg.get('num_classes')
    return classes if arguments.get('pretrained') and classes not in (None, net.num_classes) else None


def check_has_network(module: Any, callback: Any, *needs: str) -> None:
    """Raise `InputError` for a LightningModule without the network, `net`, or what else a callback reads of it."""
    if missing := [name for name in ('net', *needs) if not hasattr(module, name)]:
        raise InputError(message(
            f'{type(callback).__name__} with {type(module).__name__}',
            f'it reads `{missing[0]}` of an ImageClassifier, which this has not',
            'make your own a subclass of lightning_app.classifier.ImageClassifier, or leave the callback out'))


def refuses_size(error: Exception) -> bool:
    """Return whether a network's error is taken to be of the size of its images: another than its own, or too small."""
    return isinstance(error, AssertionError) or too_small(error)


def too_small(error: Exception) -> bool:
    """Return whether a network's error is of images that are too small for it, whatever its arguments."""
    return any(text in str(error) for text in TOO_SMALL)


def refused_images(
        name: str, net: Any, size: int, error: Exception, keys: tuple[str, str] = ('model.name', 'model.network'),
) -> InputError:
    """Return the error for images of a side, in pixels, that a network which is made for another does not take.

    Args:
        name: Of the network.
        net: The network.
        size: The side.
        error: What it said.
        keys: What the user calls the name and the arguments.
    """
    own = net.pretrained_cfg['input_size'][-1]
    argument = f', or an argument of the network, such as {keys[1]}.img_size={size}'
    return InputError(message(
        f'{keys[0]}: {name} with images of {size} px', f'it cannot take them ({error})',
        f'say data.image_size={own} (data.eval_size in evaluations), for which the network is made'
        + argument * (not too_small(error))))


def create_network(
        name: str, keys: tuple[str, str] = ('model.name', 'model.network'), /, **arguments: Any,
) -> tuple[nn.Module, int | None]:
    """Return `timm.create_model(name, **arguments)`, with messages for users.

    Initial weights of another number of classes are taken but for the classifier; that number is returned too, else
    None. The network of a checkpoint of this program has the SE of its `model.add_se`, and its number of classes where
    none is given.

    Args:
        name: Of the network.
        keys: What the user calls the name and the arguments.
        **arguments: For timm.

    Raises:
        InputError: For an unknown network, or arguments that it does not take.
    """
    check_name(name, keys[0])
    if (path := arguments.get('checkpoint_path')) and not os.path.isfile(path):
        raise InputError(message(
            f'{keys[1]}.checkpoint_path: {path}', 'it is a folder' if os.path.isdir(path) else 'there is no such file',
            checkpoints_near(Path(path)) or 'name a file with weights of the network, or leave it out'))
    check_rates(arguments, keys[1])
    checkpoint = own_checkpoint(path) if path else None
    weights = None if checkpoint is None else weights_of(checkpoint)
    classes_there = (checkpoint or {}).get('hyper_parameters', {}).get('num_classes')
    arguments = {**({} if classes_there is None else {'num_classes': classes_there}), **arguments}
    try:
        if weights is None and (not path or path.lower().endswith(('.npz', '.npy'))):
            net = timm.create_model(name, **arguments)
            classes = other_classes(net, arguments)
        else:
            net = timm.create_model(name, **{**arguments, 'checkpoint_path': ''})
            if (inserted := inserted_in(checkpoint)) is not None:
                net = with_se(net, inserted)
            classes = load_weights(net, load_state_dict(path) if weights is None else weights)
        if classes is not None:
            rank_zero_info(f'initial weights: of {classes} classes; the classifier of {net.num_classes} begins anew')
        describe_weights(net, checkpoint, arguments, classes)
        return net, classes
    except (AssertionError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError,
            struct.error) as error:
        if '\n  why: ' in str(error):  # one of our own networks: the message is complete
            raise InputError(str(error)) from error
        why = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=' ...')  # some name every tensor
        raise InputError(message(
            f'{keys[0].rpartition(".")[0] or keys[0]}: {name} with {arguments}', why,
            remedy_of(error, name, keys, checkpoint))) from error


def remedy_of(error: Exception, name: str, keys: tuple[str, str], checkpoint: dict[str, Any] | None) -> str:
    """Return what to do where timm cannot build a network, or load its weights."""
    trained = (checkpoint or {}).get('hyper_parameters', {})
    if 'name' in trained and isinstance(error, RuntimeError):
        arguments = arguments_of(trained.get('network'), trained.get('plain', False), trained.get('add_se'))
        return f'the checkpoint is of {trained["name"]} with {arguments}: say the same by {keys[0]} and {keys[1]}'
    if isinstance(error, OSError) and name.startswith('local-dir:'):
        return 'put the folder there, as python -m lightning_app export has written it'
    if isinstance(error, OSError):
        return f'give the weights as a file by {keys[1]}.checkpoint_path, or try again with a network connection'
    return f"correct {keys[0]} or {keys[1]}; the arguments are those of the network's class in timm"
