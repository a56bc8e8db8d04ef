"""Where a result comes from: versions, the state of the source, the machine, the data and their decoder."""
from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from se_timm.machine import device_name

from .data.base import data_of

__all__ = ['provenance']

PACKAGES = ('se-timm', 'timm', 'torch', 'torchvision', 'lightning', 'torchmetrics', 'wandb', 'numpy')


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Return what a run's configuration does not say, in plain types: `versions`, `git`, `machine`, `command`, `data`.

    `git` is the commit of the source of this package and whether files differ from it; None for an installed package.
    """
    return {
        'versions': {'python': platform.python_version(), **installed(), 'cuda': torch.version.cuda},
        'git': source(Path(__file__).parent),
        'machine': {'device': device_name(trainer.strategy.root_device), 'processes': trainer.world_size,
                    'nodes': trainer.num_nodes},
        'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'data': described(data_of(trainer))}


def installed() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name.replace('-', '_')] = version(name)
        except PackageNotFoundError:  # run from its source, without installation
            versions[name.replace('-', '_')] = None
    return versions


def source(folder: Path) -> dict[str, Any] | None:
    """Return commit and cleanness of the git checkout of `folder`, None if it is none."""
    try:
        _, commit, changes = (subprocess.run(
            ['git', '-C', str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (  # the first one fails for a package that is installed within another repository
                ('ls-files', '--error-unmatch', '__init__.py'), ('rev-parse', 'HEAD'),
                ('status', '--porcelain', '--untracked-files=no')))
    except (OSError, subprocess.SubprocessError):
        return None
    return {'commit': commit, 'dirty': bool(changes)}


def described(data: Any) -> dict[str, int | str]:
    """Return the numbers of images of the splits that are open, and of classes, and what decodes training images."""
    splits = {name: getattr(data, attribute, None) for name, attribute in (
        ('train_images', 'training'), ('val_images', 'validation'), ('test_images', 'testing'))}
    counts = {name: len(samples) for name, samples in splits.items() if samples is not None}
    others = {'classes': getattr(data, 'num_classes', None),
              'decoder': getattr(getattr(data, 'training', None), 'decoder', None)}
    return {**counts, **{name: value for name, value in others.items() if value is not None}}
