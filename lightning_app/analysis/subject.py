"""What is analysed: a network with trained weights, and labelled images as it sees them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import instantiate_class
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from se_timm.errors import InputError, message
from se_timm.gates import GateReader, SEBlock

from ..data import ImageDataModule, ImageNetDataModule
from ..data.augment import Normalisation, evaluation_transform
from ..data.base import evaluation_settings
from ..data.samples import IGNORE, EvaluationSamples
from ..metrics import ClassificationMetrics
from ..network import create_network, network_of, trained_classes
from .channels import short_titles, titles_of
from .gate_statistics import BlockGates, GateStatistics

__all__ = ['Subject', 'Survey', 'open_subject', 'survey']


@dataclass(frozen=True)
class Subject:
    """A network and images.

    Attributes:
        net: The network, in evaluation mode.
        title: Its name, for headings.
        names: Names of the classes of the images.
        titles: The same in words.
        short_titles: What figures call the classes.
        samples: The images that count: pairs of uint8 `(3, H, W)` and label of the images' classes.
        labels: Label of each sample.
        net_labels: The network's label of each of the images' classes; None if it was trained on others.
        normalise: From uint8 images to the network's input.
        size: Side of the images in pixels.
    """

    net: Any
    title: str
    names: list[str]
    titles: list[str]
    short_titles: list[str]
    samples: Subset[Any]
    labels: np.ndarray
    net_labels: list[int] | None
    normalise: Normalisation
    size: int


@dataclass(frozen=True)
class Survey:
    """What was found: the gates of each block, and the accuracy in percent where the network knows the classes."""

    results: list[BlockGates]
    metrics: dict[str, float] | None


def open_subject(
        checkpoint: dict[str, Any] | None, name: str | None, network: dict[str, Any], root: str | None,
        split: str, images_per_class: int, allow_unreadable: bool = False) -> Subject:
    """Return the network of a checkpoint, or timm's of that name with trained weights, and its images.

    Raises:
        InputError: If there is no network, no trained weights, or no images.
    """
    if checkpoint is not None:
        net, title = network_of(checkpoint), checkpoint['hyper_parameters']['name']
        trained_on = checkpoint.get('class_names')
    else:
        net, title = trained_network(name, network), str(name)
        trained_on = trained_classes(net)
    saved = checkpoint.get('data') if checkpoint is not None else None
    data = data_module(saved, root)
    if root is None and trained_on:
        data.use_classes(list(trained_on))
    settings, _ = evaluation_settings(vars(data), net.pretrained_cfg)
    normalisation = {each: settings[each] for each in ('mean', 'std', 'interpolation')}
    images = data.open(split)
    transform = evaluation_transform(
        settings['input_size'][-1], settings['crop_pct'], crop_mode=settings['crop_mode'], **normalisation)
    labels = np.asarray(images.labels, dtype=np.int64)
    chosen = first_of_each_class(labels, images_per_class)
    samples = EvaluationSamples(images, transform, allow_unreadable or data.allow_unreadable)
    names = list(images.classes)
    titles = titles_of(names, len(names))
    return Subject(
        net.eval(), title, names, titles, short_titles(names, titles),
        Subset(samples, chosen.tolist()), labels[chosen],
        labels_of(net.num_classes, trained_on, images.classes),
        Normalisation(settings['mean'], settings['std']), settings['input_size'][-1])


def trained_network(name: str | None, network: dict[str, Any]) -> Any:
    """Return timm's network with weights; with random ones its gates say nothing."""
    if name is None:
        raise InputError(message(
            'no network', 'there is nothing to analyse',
            'say --ckpt_path runs/.../best.ckpt, or --name se_resnet50 for pretrained weights'))
    arguments = {**({} if network.get('checkpoint_path') else {'pretrained': True}), **network}
    net, classes = create_network(name, ('name', 'network'), **arguments)
    if classes is not None:
        raise InputError(message(
            f'network: {name} with {net.num_classes} classes',
            f'its weights are of {classes} classes, and a classifier of others would be random',
            f'say num_classes: {classes} among its arguments'))
    return net


def data_module(saved: dict[str, Any] | None, root: str | None) -> ImageDataModule:
    """Return the data that the checkpoint was trained on, in `root` if given, else ImageNet's layout in `root`."""
    if saved is None and root is None:
        raise InputError(message(
            'root: none', 'there are no images', 'say --root DIR, with images in DIR/val/CLASS or DIR/val.tar'))
    if saved is None:
        return ImageNetDataModule(root=str(root))
    arguments = saved['init_args']
    if root is None or 'root' in arguments:
        given = {} if root is None else {'root': root}
        try:
            return instantiate_class((), {**saved, 'init_args': {**arguments, **given}})
        except (AttributeError, ImportError, TypeError) as error:
            raise InputError(message(
                f'data: {saved["class_path"]}, of the training', f'it cannot be made here ({error})',
                'let Python find its module as it was then (PYTHONPATH)')) from error
    return ImageNetDataModule(root=root, **{name: arguments[name] for name in (
        'eval_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std') if name in arguments})


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the first `count` images of each class, in order."""
    order = np.argsort(labels, kind='stable')
    starts = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(labels)) - starts < count])


def labels_of(num_classes: int, trained_on: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """Return the network's label of each class of the images, by name; None if it knows others."""
    known = list(trained_on) if trained_on else ImageNetInfo().label_names() if num_classes == 1000 else []
    if set(classes) <= set(known):
        return [known.index(name) for name in classes]
    return list(range(len(classes))) if not known and len(classes) == num_classes else None


@torch.no_grad()
def survey(
        subject: Subject, blocks: Sequence[SEBlock], net: Any = None, *, batch_size: int = 64,
        num_workers: int = 0) -> Survey:
    """Let the network, or `net` in its place, see all images, and return what its gates did and how right it was.

    Raises:
        InputError: If no image could be read, all of which were to be left out then, or gates are not finite.
    """
    net = subject.net if net is None else net
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    net.to(device)
    statistics = GateStatistics(blocks, len(subject.names), within=True)
    metrics = ClassificationMetrics(net.num_classes).to(device)
    of_net = torch.tensor(subject.net_labels or [IGNORE] * len(subject.names), device=device)
    with GateReader(net, blocks) as reader:
        for images, labels in DataLoader(subject.samples, batch_size=batch_size, num_workers=num_workers):
            labels = labels.to(device)
            logits: Tensor = net(subject.normalise(images.to(device)))
            if blocks:
                statistics.update(reader.gates, labels)
            metrics.update(logits, torch.where(labels == IGNORE, IGNORE, of_net[labels.clamp(min=0)]))
    results = statistics.results()
    if blocks and not results:
        raise InputError(message(
            f'allow_unreadable: true, {len(subject.labels)} images', 'none of them could be read',
            'see what the log says of each'))
    check_finite(results)
    found = {name: float(value) for name, value in metrics.compute().items()}
    return Survey(results, found if subject.net_labels else None)


def check_finite(results: Sequence[BlockGates]) -> None:
    """Raise `InputError` if the gates of a block are no numbers, of which nothing can be said."""
    if broken := [result.block.title for result in results if np.isnan(result.mean)]:
        raise InputError(message(
            f'gates of {broken[0]}' + (f' and {len(broken) - 1} more blocks' if len(broken) > 1 else ''),
            'some are not finite: the weights are of a training that has diverged, or they overflow',
            'take an earlier checkpoint'))
