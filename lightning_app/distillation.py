"""Knowledge distillation: a trained network as the teacher of another."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor
from torch.nn import functional as F

from se_timm.errors import InputError, message

from .network import INITIAL_WEIGHTS, create_network, refused_images, refuses_size, trained_classes
from .resume import first_other_class

__all__ = ['Distill', 'Teacher', 'check_distill']

TEACHER = ('model.distill.teacher', 'model.distill.network')  # its name and arguments, as the user calls them


@dataclass(frozen=True)
class Distill:
    """A teacher whose predictions are learnt, beside the labels.

    Attributes:
        teacher: Any of timm's networks.
        network: Its arguments, with its weights: `pretrained: true`, or `checkpoint_path: FILE`, which may be a
            checkpoint of a training here.
        weight: Share of the teacher in the loss; the labels have the rest.
        temperature: Divides the logits of both (Hinton et al., https://arxiv.org/abs/1503.02531).
        hard: Learn the teacher's most probable class, as DeiT does, not its probabilities.
    """

    teacher: str
    network: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.5
    temperature: float = 1.0
    hard: bool = False


def check_distill(distill: Distill) -> None:
    """Raise `InputError` for a teacher without weights, or settings that mean nothing."""
    if not any(distill.network.get(name) for name in INITIAL_WEIGHTS):
        raise InputError(message(
            f'model.distill.teacher: {distill.teacher} without weights', 'it would teach random predictions',
            "say --model.distill.network '{pretrained: true}' or '{checkpoint_path: FILE}'"))
    if distill.hard and distill.temperature != Distill.temperature:
        raise InputError(message(
            f'model.distill.temperature: {distill.temperature} with hard', 'it does not change the most probable class',
            'leave one of them out'))
    if not 0 < distill.weight <= 1 or not distill.temperature > 0:
        raise InputError(message(
            f'model.distill: weight {distill.weight}, temperature {distill.temperature}',
            'the weight is a share of the loss, and logits are divided by the temperature',
            'take a weight above 0 and up to 1, and a temperature above 0'))


class Teacher:
    """The teacher on its device. No module: it is in no state dict, no optimiser and no average of the weights.

    Args:
        distill: The settings.
        num_classes: Classes of the student.
        normalisation: `mean` and `std` of the images of the student.
        device: Where it computes.
        memory_format: Of its weights and images.
        convert: Gives a module the dtype of the training's precision, as Lightning's precision plugins do.
        class_names: Of the student, if they are known.

    Raises:
        InputError: If it cannot be made, or has other classes.
    """

    def __init__(
            self, distill: Distill, num_classes: int, normalisation: dict[str, Any], device: torch.device,
            memory_format: torch.memory_format, convert: Callable[[Any], Any] = lambda net: net,
            class_names: list[str] | None = None) -> None:
        self.distill = distill
        net: Any
        net, trained = create_network(
            distill.teacher, TEACHER, **distill.network)
        classes = net.num_classes if trained is None else trained  # a classifier that begins anew teaches nothing
        if classes != num_classes or trained is not None:
            raise InputError(message(
                f'model.distill.teacher: {distill.teacher} with weights of {classes} classes',
                f'the network that it teaches has {num_classes}, and the teacher {net.num_classes}',
                'take a teacher that was trained on the same classes, by network.checkpoint_path and num_classes'))
        self.net = convert(net).to(device, memory_format=memory_format).eval().requires_grad_(False)
        self._check_classes(net, class_names)
        own = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
        self.same = all(tuple(normalisation[name]) == tuple(own[name]) for name in normalisation)
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (normalisation['mean'], normalisation['std'], own['mean'], own['std']))
        # (x * std + mean - own_mean) / own_std, nothing where both are equal
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def _check_classes(self, net: Any, class_names: list[str] | None) -> None:
        """Raise `InputError` if the teacher was trained on others."""
        path = self.distill.network.get('checkpoint_path')
        if other := first_other_class(trained_classes(net), class_names):
            key, value = ('network.checkpoint_path', path) if path else ('teacher', self.distill.teacher)
            raise InputError(message(
                f'model.distill.{key}: {value}',
                'class {} was {} when it was trained, and is {} here'.format(*other),
                'take a teacher that was trained on the same classes, by the same names'))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # a copy of the student, such as a weight average, needs no teacher of its own

    def loss(self, images: Tensor, logits: Tensor, task_loss: Tensor) -> Tensor:
        """Return the loss of logits `(N, C)` by labels and teacher.

        Args:
            images: What the student saw, `(N, 3, H, W)`.
            logits: What it made of them.
            task_loss: Its loss by labels.
        """
        with torch.no_grad():
            own_images = images if self.same else (images * self.scale + self.shift).to(images.dtype)
            try:
                theirs = self.net(own_images).float()
            except (AssertionError, RuntimeError) as error:
                if not refuses_size(error):
                    raise
                raise refused_images(self.distill.teacher, self.net, images.shape[-1], error, TEACHER) from error
        if self.distill.hard:
            own = F.cross_entropy(logits.float(), theirs.argmax(1))
        else:
            temperature = self.distill.temperature
            own = temperature ** 2 * F.kl_div(
                (logits.float() / temperature).log_softmax(1), (theirs / temperature).log_softmax(1),
                reduction='batchmean', log_target=True)
        return (1 - self.distill.weight) * task_loss + self.distill.weight * own
