"""The bare network out of a checkpoint: for timm, ONNX Runtime, or PyTorch without its code."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from se_timm import fold as fold_network
from se_timm.errors import InputError, message

from .checkpoints import load_checkpoint
from .data.base import evaluation_settings
from .network import architecture, build_network

__all__ = ['export']

TOLERANCE = 1e-4  # of the largest logit, where another program computes them
SUFFIX = {'safetensors': '', 'onnx': '.onnx', 'pt2': '.pt2'}


def export(
        ckpt_path: str,
        output: str | None = None,
        format: Literal['safetensors', 'onnx', 'pt2'] = 'safetensors',
        weights: Literal['ema', 'raw'] | None = None,
        fold: bool = False,
) -> Path:
    """Write the network of a checkpoint, and check that what was written gives the same logits.

    Args:
        ckpt_path: Checkpoint of a training.
        output: Folder (`safetensors`) or file to write; beside the checkpoint where not given.
        format: `safetensors` with its configuration, for `timm.create_model('local-dir:FOLDER', pretrained=True)`;
            `onnx`; or `pt2`, a program of `torch.export`.
        weights: Their average (`ema`), or the weights themselves (`raw`), of a training that averaged them; the
            average where not given.
        fold: Fold batch norm into the convolutions, see `se_timm.fold` (`onnx`, `pt2`).

    Returns:
        What was written.

    Raises:
        InputError: If that cannot be.
    """
    checkpoint = load_checkpoint(ckpt_path)
    hparams = checkpoint.get('hyper_parameters', {})
    check_export(checkpoint, hparams, format, weights, fold)
    net = network_of(checkpoint, hparams, weights)
    settings = evaluation_settings(checkpoint.get('data', {}).get('init_args', {}), net.pretrained_cfg)
    path = Path(output or Path(ckpt_path).with_suffix(SUFFIX[format]))
    check_output(path, format)
    images = torch.randn(3, *settings['input_size'], generator=torch.Generator().manual_seed(0))
    unfinished = path.with_name(f'.unfinished-{path.name}')
    remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        again = WRITERS[format](fold_network(net) if fold else net, images[:2], settings, checkpoint, unfinished)
        with torch.no_grad():
            compare(again(images), net(images), exact=format == 'safetensors')
        replace(unfinished, path)
    finally:
        remove(unfinished)
    kind = 'the average of the weights' if 'current_model_state' in checkpoint and weights != 'raw' else 'the weights'
    print(f'{path}: {hparams["name"]}, {net.num_classes} classes, {kind}, {size(path) / 1e6:.1f} MB\n'
          f'use: {USE[format].format(path)}')
    return path


def check_export(
        checkpoint: dict[str, Any], hparams: dict[str, Any], format: str, weights: str | None, fold: bool) -> None:
    """Raise `InputError` for what the checkpoint does not hold, or the format cannot."""
    if 'name' not in hparams:
        raise InputError(message(
            'ckpt_path: a checkpoint without the settings of its network', 'it was not written by this program',
            'name a checkpoint of python -m lightning_app fit'))
    if weights == 'ema' and 'current_model_state' not in checkpoint:
        raise InputError(message(
            'weights: ema', 'the training averaged no weights', 'leave weights out, or train with callbacks.WeightEMA'))
    if fold and format == 'safetensors':
        raise InputError(message(
            'fold: true with format: safetensors', 'timm builds the network with its batch norms',
            'take format: onnx or pt2, or fold after loading, by se_timm.fold'))
    if hparams.get('add_se') is not None and not hparams.get('plain') and format == 'safetensors':
        raise InputError(message(
            'format: safetensors of a network with model.add_se', 'timm builds the network without it',
            'take format: onnx or pt2, or in Python lightning_app.ImageClassifier.load_from_checkpoint(FILE).net'))


def network_of(checkpoint: dict[str, Any], hparams: dict[str, Any], weights: str | None) -> Any:
    """Return the network for evaluation."""
    net, _ = build_network(
        hparams['name'], hparams['num_classes'], hparams.get('network'), hparams.get('plain', False),
        hparams.get('add_se'))
    raw = weights == 'raw' and 'current_model_state' in checkpoint
    state = checkpoint['current_model_state' if raw else 'state_dict']
    net.load_state_dict({key.removeprefix('net.'): value for key, value in state.items() if key.startswith('net.')})
    return net.eval()


# How each format is written; each returns a function from images to logits of what was written


def write_safetensors(
        net: Any, images: Tensor, settings: dict[str, Any], checkpoint: dict[str, Any], path: Path,
) -> Callable[[Tensor], Tensor]:
    """Write a folder in the layout of the Hugging Face Hub."""
    hparams, names = checkpoint['hyper_parameters'], checkpoint.get('class_names')
    twin = {'se': False} if hparams.get('plain') and hparams.get('add_se') is None else {}
    save_for_hf(net, str(path), model_config={'label_names': names} if names else None,
                model_args={**(architecture(hparams['network']) or {}), **twin}, safe_serialization=True,
                data_config=settings)
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


def write_onnx(
        net: nn.Module, images: Tensor, settings: dict[str, Any], checkpoint: dict[str, Any], path: Path,
) -> Callable[[Tensor], Tensor]:
    """Write an ONNX model of images `(N, 3, H, W)` for any N, with how they are made in its metadata."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(message(
            'format: onnx', f'it needs a package that is not there ({error.name})',
            "say pip install 'se-timm[onnx]'")) from error
    program = torch.onnx.export(
        net, (images,), dynamo=True, input_names=['images'], output_names=['logits'], verbose=False,
        dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    assert program is not None
    model = program.model_proto
    for key, value in description(settings, checkpoint).items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=json.dumps(value)))
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])


def write_pt2(
        net: nn.Module, images: Tensor, settings: dict[str, Any], checkpoint: dict[str, Any], path: Path,
) -> Callable[[Tensor], Tensor]:
    """Write a program of images `(N, 3, H, W)` for any N, with how they are made in the extra file `config.json`."""
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    config = json.dumps(description(settings, checkpoint))
    with open(path, 'wb') as file:  # not by name: it must end in .pt2
        torch.export.save(program, file, extra_files={'config.json': config})
    with open(path, 'rb') as file:
        return torch.export.load(file).module()


def description(settings: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what must be known to use the network."""
    return {**settings, 'classes': checkpoint.get('class_names'), 'network': checkpoint['hyper_parameters']['name']}


WRITERS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    'safetensors': write_safetensors, 'onnx': write_onnx, 'pt2': write_pt2}
USE = {
    'safetensors': "import se_timm, timm; timm.create_model('local-dir:{}', pretrained=True)",
    'onnx': "onnxruntime.InferenceSession('{}')", 'pt2': "torch.export.load('{}').module()"}


def compare(found: Tensor, expected: Tensor, exact: bool) -> None:
    """Raise `InputError` if the logits of what was written are others than the checkpoint's."""
    distance = float((found - expected).abs().max() / expected.abs().max())
    if distance > (0 if exact else TOLERANCE):
        raise InputError(message(
            f'export: logits that differ by {distance:.1e} of the largest',
            'what was written does not compute what the checkpoint does, and was removed',
            'try another format, or without fold; please report it with the name of the network'))


def check_output(path: Path, format: str) -> None:
    """Raise `InputError` if something else lies where the export would go."""
    other = path.is_dir() if format != 'safetensors' else path.is_file() or (
        path.is_dir() and any(path.iterdir()) and not (path / 'model.safetensors').is_file())
    if other:
        raise InputError(message(
            f'output: {path}', 'something else lies there, which would be lost',
            f'name another {"folder" if format == "safetensors" else "file"}'))


def replace(unfinished: Path, path: Path) -> None:
    """Put what was written in its place; an older export goes only then."""
    if path.is_dir():
        old = path.with_name(f'.old-{path.name}')
        remove(old)
        path.rename(old)
        unfinished.rename(path)
        remove(old)
    else:
        os.replace(unfinished, path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob('*') if path.is_dir() else [path]))
