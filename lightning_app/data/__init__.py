"""The LightningDataModules."""
from .augment import Augment
from .base import ImageDataModule
from .cifar import CIFAR10DataModule, CIFAR100DataModule
from .digits import DigitsDataModule
from .imagenet import ImageNetDataModule

__all__ = [
    'Augment',
    'CIFAR10DataModule',
    'CIFAR100DataModule',
    'DigitsDataModule',
    'ImageDataModule',
    'ImageNetDataModule',
]
