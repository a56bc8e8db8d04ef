"""The bare network out of a checkpoint: for timm, ONNX Runtime, or PyTorch without its code."""
from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor

from se_timm import fold as fold_network
from se_timm.errors import InputError, check_installed, message

from .checkpoints import load_checkpoint
from .data.base import evaluation_settings
from .network import architecture, arguments_of, check_has_settings, create_network, network_of

__all__ = ['export']

Format = Literal['safetensors', 'onnx', 'pt2']
Logits = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4  # of the largest logit, where another program computes them
SUFFIX: dict[str, str] = {'safetensors': '', 'onnx': '.onnx', 'pt2': '.pt2'}
CONFIGURATION = ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')  # arguments of which timm writes the result
FOLDER = {'config.json', 'model.safetensors'}  # what timm writes for the Hugging Face Hub
LOAD: dict[str, Callable[[Path], str]] = {
    'safetensors': lambda path: f"import se_timm, timm; timm.create_model({f'local-dir:{path}'!r}, pretrained=True)",
    'onnx': lambda path: f'onnxruntime.InferenceSession({str(path)!r})',
    'pt2': lambda path: f'torch.export.load({str(path)!r}).module()'}


def export(
        ckpt_path: str,
        output: str | None = None,
        format: Format | list[Format] = 'safetensors',
        weights: Literal['ema', 'raw'] | None = None,
        fold: bool = False,
        dynamic_batch: bool = True,
        image_size: int | None = None,
) -> list[Path]:
    """Write the network of a checkpoint, and check that what was written gives the same logits.

    Nothing takes its place before all that was asked for is written and checked; older exports stay until then.

    Args:
        ckpt_path: Checkpoint of a training.
        output: Folder (`safetensors`) or file to write, the suffix may be left out; beside the checkpoint where not
            given.
        format: `safetensors` with its configuration, for `timm.create_model('local-dir:FOLDER', pretrained=True)`;
            `onnx`; `pt2`, a program of `torch.export`; or several, as `[safetensors, onnx]`.
        weights: Of a training that averaged its weights, the average (`ema`) or the weights themselves (`raw`); the
            average where not given.
        fold: Fold batch norm into the convolutions, see `se_timm.fold` (`onnx`, `pt2`).
        dynamic_batch: Take any number of images; else exactly one (`onnx`, `pt2`).
        image_size: Side of the images in pixels; where not given, as in the training's evaluation.

    Returns:
        What was written, a path for each format.

    Raises:
        InputError: If that cannot be.
    """
    formats = list(dict.fromkeys([format] if isinstance(format, str) else format))
    check_options(formats, fold, dynamic_batch, image_size)
    checkpoint = load_checkpoint(ckpt_path)
    check_has_settings(ckpt_path, checkpoint)
    check_checkpoint(checkpoint, formats, weights)
    paths = places(ckpt_path, output, formats)
    exported = read(checkpoint, weights, dynamic_batch, image_size)
    expected = logits_of(ckpt_path, exported)
    if fold:
        exported = dataclasses.replace(exported, net=fold_network(exported.net))
    try:
        for kind, path in paths.items():
            compare(kind, write(kind, exported, path), expected)
        for path in paths.values():
            replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(message(
            f'output: {" ".join(map(str, paths.values()))}',
            f'it cannot be written ({str(error).rpartition("error: ")[2]})',
            'make room there, or name another place by output')) from error
    finally:
        for path in paths.values():
            remove(unfinished(path))
    tell(paths, exported)
    if (views := checkpoint.get('data', {}).get('init_args', {}).get('eval_views', 'center')) != 'center':
        print(f'data.eval_views was {views}: evaluations average over views of an image, and this is of one')
    return list(paths.values())


def tell(paths: dict[str, Path], exported: Exported) -> None:
    """Print what was written, and how it is loaded."""
    for kind, path in paths.items():
        agreement = 'the same' if kind == 'safetensors' else f'the same within {TOLERANCE:g} of the largest'
        print(f'{path}: {exported.name}, {exported.net.num_classes} classes, {exported.weights}, '
              f'{size(path) / 1e6:.1f} MB; its logits are {agreement}\n  load: {LOAD[kind](path)}')


# What is given


def check_options(formats: list[Format], fold: bool, dynamic_batch: bool, image_size: int | None) -> None:
    """Raise `InputError` for options that the formats cannot honour, or that need a package that is not there."""
    if not formats:
        raise InputError(message('format: []', 'nothing would be written', f'name one or more of {", ".join(SUFFIX)}'))
    if image_size is not None and image_size < 1:
        raise InputError(message(f'image_size: {image_size}', 'it must be at least 1', 'correct it, or leave it out'))
    if fold and 'safetensors' in formats:
        raise InputError(message(
            'fold: true with format: safetensors', 'timm builds the network with its batch norms',
            'take format: onnx or pt2, or fold after loading, by se_timm.fold'))
    if not dynamic_batch and formats == ['safetensors']:
        raise InputError(message(
            'dynamic_batch: false with format: safetensors', "timm's network takes any number of images",
            'leave it out, or take format: onnx or pt2'))
    if 'onnx' in formats:
        check_installed('format: onnx', 'onnx', 'onnx', 'onnxscript', 'onnxruntime')


def check_checkpoint(checkpoint: dict[str, Any], formats: list[Format], weights: str | None) -> None:
    """Raise `InputError` for what the checkpoint does not hold, or timm cannot build."""
    hparams = checkpoint['hyper_parameters']
    if weights == 'ema' and 'current_model_state' not in checkpoint:
        raise InputError(message(
            'weights: ema', 'the training averaged no weights', 'leave weights out, or train with callbacks.WeightEMA'))
    if 'safetensors' in formats and hparams.get('add_se') is not None and not hparams.get('plain'):
        raise InputError(message(
            'format: safetensors of a network with model.add_se', 'timm builds the network without it',
            'take format: onnx or pt2, or in Python lightning_app.ImageClassifier.load_from_checkpoint(FILE).net'))


def places(ckpt_path: str, output: str | None, formats: list[Format]) -> dict[str, Path]:
    """Return where each format goes.

    Raises:
        InputError: If something else lies there, or `output` has the suffix of another format.
    """
    base = str(Path(output or ckpt_path.removesuffix('.ckpt')))
    suffixes = [SUFFIX[kind] for kind in formats]
    suffix = Path(base).suffix
    if output and suffix in ('.onnx', '.pt2', '.safetensors') and suffixes != [suffix]:
        raise InputError(message(
            f'output: {output} with format: {", ".join(formats)}', f'the suffix {suffix} is not that of each format',
            f'leave the suffix out: {base.removesuffix(suffix)}'))
    if output and '' not in suffixes and os.path.isdir(base):
        raise InputError(message(
            f'output: {output}', 'it is a folder', f'name another file, such as {Path(base, "net" + suffixes[0])}'))
    paths: dict[str, Path] = {kind: Path(base.removesuffix(SUFFIX[kind]) + SUFFIX[kind]) for kind in formats}
    for kind, path in paths.items():
        check_place(kind, path, Path(ckpt_path))
    return paths


def check_place(kind: str, path: Path, ckpt_path: Path) -> None:
    """Raise `InputError` if something else than an older export lies where this one would go."""
    reason, real = None, path.resolve()
    if real == ckpt_path.resolve():
        reason = 'it is the checkpoint'
    elif kind != 'safetensors':
        reason = 'it is a folder' if real.is_dir() else None
    elif real.is_file():
        reason = 'it is a file, and the export a folder'
    elif real.is_dir():
        others = sorted({file.name for file in real.iterdir()} - FOLDER)
        if others or Path.cwd().is_relative_to(real):
            reason = f'other files lie there, which would be lost ({", ".join(others[:3])})' if others else (
                'it is the working directory')
    if reason:
        raise InputError(message(
            f'output: {path}', reason, f'name another {"folder" if kind == "safetensors" else "file"}'))


# What is written


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network, and what goes with it.

    Attributes:
        net: The network, in eval mode, on the CPU, float32.
        name: Its name.
        arguments: What `timm.create_model` builds it with, beside the name.
        weights: Which weights it has, in words.
        settings: How images are made: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        classes: The names of the classes in label order, if they are known.
        images: Images to try it with `(N, 3, H, W)`.
        dynamic: Take any number of images.
    """

    net: Any
    name: str
    arguments: dict[str, Any]
    weights: str
    settings: dict[str, Any]
    classes: list[str] | None
    images: Tensor
    dynamic: bool

    def description(self) -> dict[str, Any]:
        """Return what must be known to use the network."""
        return {**self.settings, 'classes': self.classes, 'network': self.name}

    def example(self) -> tuple[tuple[Tensor], Any]:
        """Return the images to trace the network with, and which of their sizes are free."""
        free = {0: torch.export.Dim('batch', min=1)}
        return (self.images[:2],), (free,) if self.dynamic else None


def read(
        checkpoint: dict[str, Any], weights: str | None, dynamic_batch: bool, image_size: int | None) -> Exported:
    """Return what is to be written of a checkpoint, with its weights or their average.

    Raises:
        InputError: If they are not those of the network that its settings say.
    """
    hparams = checkpoint['hyper_parameters']
    net = network_of(checkpoint, raw=weights == 'raw')
    settings, _ = evaluation_settings(
        {**checkpoint.get('data', {}).get('init_args', {}), **({'eval_size': image_size} if image_size else {})},
        net.pretrained_cfg)
    images = torch.randn(3 if dynamic_batch else 1, *settings['input_size'],
                         generator=torch.Generator().manual_seed(0))
    words = 'the weights, not their average' if weights == 'raw' else 'the average of the weights'
    arguments = architecture(arguments_of(
        hparams.get('network'), hparams.get('plain', False), hparams.get('add_se'))) or {}
    arguments = {key: value for key, value in arguments.items() if key not in CONFIGURATION}
    return Exported(
        net, hparams['name'], arguments, words if 'current_model_state' in checkpoint else 'the weights', settings,
        checkpoint.get('class_names'), images, dynamic_batch)


def logits_of(ckpt_path: str, exported: Exported) -> Tensor:
    """Return the logits `(N, num_classes)` that every export must give.

    Raises:
        InputError: If the network does not take the images, or the logits are not finite.
    """
    try:
        with torch.no_grad():
            logits = exported.net(exported.images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(message(
            f'image_size: {exported.settings["input_size"][-1]}',
            f'{exported.name} does not take such images ({error})',
            'leave image_size out, or take the size of the training')) from error
    if not logits.isfinite().all():
        raise InputError(message(
            f'ckpt_path: {ckpt_path}', 'its network gives logits that are not finite: the training has diverged',
            'take an earlier checkpoint, or try weights: ema or raw'))
    return logits


def write(kind: str, exported: Exported, path: Path) -> Tensor:
    """Write the network beside its place; return the logits of what was written, read again."""
    place = unfinished(path)
    remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    again = WRITERS[kind](exported, place)
    with torch.no_grad():
        return again(exported.images)


# How each format is written; each returns a function from images to logits of what was written


def write_safetensors(exported: Exported, path: Path) -> Logits:
    """Write a folder in the layout of the Hugging Face Hub."""
    save_for_hf(
        exported.net, str(path), model_config={'label_names': exported.classes} if exported.classes else None,
        model_args=exported.arguments, safe_serialization=True, data_config=exported.settings)
    net: Any = create_network(f'local-dir:{path}', pretrained=True)[0]
    return net.eval()


def write_onnx(exported: Exported, path: Path) -> Logits:
    """Write an ONNX model of images `(N, 3, H, W)`, with how they are made in its metadata, as JSON."""
    import onnx
    import onnxruntime

    images, shapes = exported.example()
    program: Any = traced('onnx', exported.name, lambda: torch.onnx.export(
        exported.net, images, dynamo=True, input_names=['images'], output_names=['logits'], verbose=False,
        dynamic_shapes=shapes))
    model = program.model_proto
    for key, value in exported.description().items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=json.dumps(value)))
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])


def write_pt2(exported: Exported, path: Path) -> Logits:
    """Write a program of images `(N, 3, H, W)`, with how they are made in the extra file `config.json`."""
    images, shapes = exported.example()
    program = traced('pt2', exported.name, lambda: torch.export.export(exported.net, images, dynamic_shapes=shapes))
    buffer = io.BytesIO()  # torch's writer ends the process where the disk is full
    torch.export.save(program, buffer, extra_files={'config.json': json.dumps(exported.description())})
    path.write_bytes(buffer.getbuffer())
    with open(path, 'rb') as file:  # not by name, which would have to end in .pt2
        return torch.export.load(file).module()


WRITERS: dict[str, Callable[[Exported, Path], Logits]] = {
    'safetensors': write_safetensors, 'onnx': write_onnx, 'pt2': write_pt2}


def traced(kind: str, name: str, trace: Callable[[], Any]) -> Any:
    """Return what `trace` does; torch raises errors of many kinds for networks that it cannot trace."""
    try:
        return trace()
    except Exception as error:
        raise InputError(message(
            f'format: {kind} of {name}', f'torch cannot trace it ({str(error).partition(chr(10))[0]})',
            'take another format, or try dynamic_batch: false')) from error


def compare(kind: str, found: Tensor, expected: Tensor) -> None:
    """Raise `InputError` if the logits of what was written are others than the checkpoint's, or not finite."""
    distance = float((found - expected).abs().max()) if found.shape == expected.shape else float('inf')
    allowed = 0.0 if kind == 'safetensors' else TOLERANCE * float(expected.abs().max())
    if not distance <= allowed:  # NaN is no distance
        raise InputError(message(
            f'format: {kind}, logits that differ by {distance:.1e}, more than {allowed:.1e}',
            'what was written does not compute what the checkpoint does, and was removed',
            'try another format, or without fold; please report it with the name of the network'))


# Files and folders


def unfinished(path: Path) -> Path:
    """Return where an export is written before it takes its place; a link is followed, not replaced."""
    real = path.resolve()
    return real.with_name(f'.unfinished-{real.name}')


def replace(path: Path) -> None:
    """Put what was written in its place; an older export goes only then."""
    new, path = unfinished(path), path.resolve()
    old = path.with_name(f'.old-{path.name}')
    if not path.is_dir():
        os.replace(new, path)
    else:
        remove(old)
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()


def size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob('*') if path.is_dir() else [path]))
