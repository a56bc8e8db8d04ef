"""Training and evaluation of SE networks, and of any other timm network, with PyTorch Lightning."""
import se_timm  # noqa: F401  (registers the SE networks)

from .classifier import ImageClassifier
from .data import CIFAR10DataModule, CIFAR100DataModule, DigitsDataModule, ImageNetDataModule

__all__ = [
    'CIFAR10DataModule',
    'CIFAR100DataModule',
    'DigitsDataModule',
    'ImageClassifier',
    'ImageNetDataModule',
]
