"""Where in an image the network sees a class: Grad-CAM (Selvaraju et al. 2017), by captum."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from se_timm.errors import InputError, message

from ..data.samples import IGNORE
from .drawing import literal
from .subject import Subject

__all__ = ['check_known', 'draw_grad_cam']


def check_known(subject: Subject) -> None:
    """Raise `InputError` if the network does not know the classes of the images."""
    if subject.net_labels is None:
        raise InputError(message(
            'grad_cam: true', 'the network was trained on other classes than those of the images',
            'leave it out, or give images of its classes by root'))


def draw_grad_cam(subject: Subject, layer: str, classes: Sequence[int]) -> Any:
    """Return a figure: the first image of each class, and over it what speaks for the class at the module `layer`.

    The classes must have images that can be read, and the network must know them, see `check_known`.
    """
    from captum.attr import LayerAttribution, LayerGradCam
    from matplotlib.figure import Figure

    assert subject.net_labels is not None
    device = next(subject.net.parameters()).device
    explain = LayerGradCam(subject.net, subject.net.get_submodule(layer))
    figure = Figure(figsize=(2.4 * len(classes), 5.2), layout='constrained')
    panels = figure.subplots(2, len(classes), squeeze=False)
    for column, label in enumerate(classes):
        samples = (subject.samples[int(index)] for index in np.flatnonzero(subject.labels == label))
        pixels = next(image for image, seen in samples if seen != IGNORE)
        image = subject.normalise(pixels[None].to(device))
        heat = explain.attribute(image, target=subject.net_labels[label], relu_attributions=True)
        heat = LayerAttribution.interpolate(heat, pixels.shape[1:], interpolate_mode='bilinear')[0, 0]
        for axes in panels[:, column]:
            axes.imshow(pixels.permute(1, 2, 0).cpu().numpy())
            axes.axis('off')
        panels[0, column].set_title(literal(subject.short_titles[label]), fontsize=10)
        panels[1, column].imshow(torch.as_tensor(heat).detach().cpu().numpy(), cmap='inferno', alpha=0.55)
    figure.suptitle(f'{subject.title}: Grad-CAM at {layer}')
    return figure
