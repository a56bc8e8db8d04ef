"""What the entry points of the networks share: keywords and weights are checked, then timm builds."""
from __future__ import annotations

import inspect
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from .errors import message, unknown

__all__ = ['check_keywords', 'check_weights_exist', 'create', 'imagenet_cfg']

_BUILDER_ARGUMENTS = {
    *inspect.signature(build_model_with_cfg).parameters, 'features_only', 'out_indices', 'feature_cls', 'pruned',
}


def check_keywords(variant: str, given: dict[str, Any], *classes: type, fixed: tuple[str, ...] = ()) -> None:
    """Raise `TypeError` for keywords that neither timm's builder nor the constructors of `classes` take.

    `fixed` are those of the constructors that the builder gives.
    """
    parameters = [each for cls in classes for each in inspect.signature(cls).parameters.values()]
    valid = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}.difference(fixed)
    for name in given:
        if name not in valid | _BUILDER_ARGUMENTS:
            raise TypeError(unknown(f'argument of {variant}', name, valid - {'block', 'layers'}))


def check_weights_exist(variant: str, cfg: Any) -> None:
    """Raise `ValueError` if `cfg` names no weights, with the tags that do."""
    if cfg.state_dict or cfg.file or cfg.url or cfg.hf_hub_id:
        return
    tags = timm.list_pretrained(f'{variant}.*')
    raise ValueError(message(
        f'pretrained=True for {variant}.{cfg.tag}' if cfg.tag else f'pretrained=True for {variant}',
        'there are no weights for this network',
        f'take {" or ".join(tags)}' if tags else 'train it, or pass checkpoint_path=... with weights of your own',
    ))


def create(
        cls: type, variant: str, pretrained: bool, given: dict[str, Any], defaults: dict[str, Any] | None = None,
        bases: tuple[type, ...] = (), **builder: Any,
) -> nn.Module:
    """Return the network `variant` by `timm.models.build_model_with_cfg`.

    Args:
        cls: Its class.
        variant: Its name.
        pretrained: Load weights.
        given: The user's keywords.
        defaults: Arguments of `cls` that make the variant; what the user gives wins.
        bases: Classes that take the keywords which `cls` hands on.
        **builder: Arguments of timm's builder.

    Raises:
        TypeError: For a keyword that nothing takes.
        ValueError: If there are no weights.
    """
    check_keywords(variant, given, cls, *bases, fixed=('cfg',) if 'model_cfg' in builder else ())
    if pretrained:
        check_weights_exist(variant, resolve_pretrained_cfg(
            variant, given.get('pretrained_cfg'), given.get('pretrained_cfg_overlay')))
    return build_model_with_cfg(cls, variant, pretrained, **builder, **{**(defaults or {}), **given})


def imagenet_cfg(**overrides: Any) -> dict[str, Any]:
    """Return the configuration of a network for ImageNet at 224 pixels, as in the paper."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:1709.01507',
        **overrides,
    }
