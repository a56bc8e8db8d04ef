"""Squeeze-and-Excitation networks for timm. Importing this package registers them.

    import timm, se_timm
    net = timm.create_model('se_resnext50_32x4d')
"""
from .se_cifar import *
from .se_cifar import SEResNetCifar
from .se_resnet import *
from .se_resnet import SEResNet
from .squeeze_excite import SqueezeExcite

__version__ = '0.1.0'
__all__ = ['SEResNet', 'SEResNetCifar', 'SqueezeExcite', '__version__']
