"""Squeeze-and-Excitation networks for timm. Importing this package registers them.

    import timm, se_timm
    net = timm.create_model('se_resnext50_32x4d')
"""
from .fold import fold
from .gates import GateReader, find_se
from .insertion import add_se, remove_se
from .pruning import prune_se
from .residual_tail import explain
from .se_bn_inception import *
from .se_bn_inception import SEBNInception
from .se_cifar import *
from .se_cifar import SEResNetCifar
from .se_inception import *
from .se_inception import SEInceptionResnetV2, SEInceptionV3
from .se_mobilenet import *
from .se_mobilenet import SEMobileNetV1
from .se_preresnet import *
from .se_preresnet import SEPreResNetCifar
from .se_resnet import *
from .se_resnet import SEResNet
from .se_shakeshake import *
from .se_shakeshake import SEShakeShakeCifar
from .se_shufflenet import *
from .se_shufflenet import SEShuffleNetV1
from .se_vgg import *
from .se_vgg import SEVGG
from .squeeze_excite import SqueezeExcite
from .surgery import fuse

__version__ = '0.1.0'
__all__ = [
    'SEVGG', 'GateReader', 'SEBNInception', 'SEInceptionResnetV2', 'SEInceptionV3', 'SEMobileNetV1',
    'SEPreResNetCifar', 'SEResNet', 'SEResNetCifar', 'SEShakeShakeCifar', 'SEShuffleNetV1', 'SqueezeExcite',
    '__version__', 'add_se', 'explain', 'find_se', 'fold', 'fuse', 'prune_se', 'remove_se',
]
