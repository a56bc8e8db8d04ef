"""The paper's tables and settings as data; tests, tables and documentation read them here.

Hu, Shen, Albanie, Sun, Wu: Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507. Its versions differ, and
each table says which one it is of: `'v4'` is the last one, of 2019, whose text is that of TPAMI; `'cvpr'` is of 2018;
`'release'` are the networks that the authors published, https://github.com/hujie-frank/SENet.

Errors are in per cent. Multiply-adds, which the paper calls FLOPs, are of convolutions and fully connected layers, for
one image. Parameters are millions, as printed. None stands for what is not printed.
"""
from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = [
    'ABLATIONS',
    'CIFAR10',
    'CIFAR100',
    'COCO',
    'COCO_CVPR',
    'EXCITATION',
    'FIXED_SCHEDULE',
    'IMAGENET',
    'LARGER_CROPS',
    'MOBILE',
    'MOBILE_CVPR',
    'NETWORKS',
    'NO_SQUEEZE',
    'PLACEMENT',
    'PLACES365',
    'REDUCTION',
    'REDUCTION_CVPR',
    'RELEASE',
    'SETTINGS',
    'SE_3X3',
    'SINGLE_CROP',
    'SQUEEZE',
    'STAGES',
    'TABLES',
    'Ablation',
    'Cost',
    'Crop',
    'Detection',
    'Errors',
    'Network',
    'Pair',
    'Setting',
    'Table',
    'extra_weights',
    'printed_parameters',
]

Row = TypeVar('Row')


@dataclass(frozen=True)
class Table(Generic[Row]):  # a generic named tuple needs Python 3.11
    """A table of the paper.

    Attributes:
        version: See the module.
        number: Its number there, or where else it stands.
        title: What it is about.
        rows: Its rows, in the paper's order.
    """

    version: str
    number: int | str
    title: str
    rows: tuple[Row, ...]


class Errors(NamedTuple):
    """Top-1 and top-5 error."""

    top1: float | None = None
    top5: float | None = None


class Cost(NamedTuple):
    """Billions of multiply-adds, and millions of parameters."""

    gflops: float | None = None
    parameters: float | None = None


class Pair(NamedTuple):
    """A network without and with SE.

    Attributes:
        network: As the paper calls it.
        name: The network of this package with SE; empty if it is not here.
        plain: Errors of the authors' training without SE.
        se: With SE.
        original: Without SE, as published by others.
        plain_cost: Without SE.
        se_cost: With SE.
    """

    network: str
    name: str
    plain: Errors
    se: Errors
    original: Errors = Errors()
    plain_cost: Cost = Cost()
    se_cost: Cost = Cost()


IMAGENET = Table('v4', 2, 'single-crop errors on the ImageNet validation set', (
    Pair('ResNet-50', 'se_resnet50', Errors(24.80, 7.48), Errors(23.29, 6.62), Errors(24.7, 7.8), Cost(3.86),
         Cost(3.87)),
    Pair('ResNet-101', 'se_resnet101', Errors(23.17, 6.52), Errors(22.38, 6.07), Errors(23.6, 7.1), Cost(7.58),
         Cost(7.60)),
    Pair('ResNet-152', 'se_resnet152', Errors(22.42, 6.34), Errors(21.57, 5.73), Errors(23.0, 6.7), Cost(11.30),
         Cost(11.32)),
    Pair('ResNeXt-50 (32x4d)', 'se_resnext50_32x4d', Errors(22.11, 5.90), Errors(21.10, 5.49), Errors(22.2),
         Cost(4.24), Cost(4.25)),
    Pair('ResNeXt-101 (32x4d)', 'se_resnext101_32x4d', Errors(21.18, 5.57), Errors(20.70, 5.01), Errors(21.2, 5.6),
         Cost(7.99), Cost(8.00)),
    Pair('VGG-16', 'se_vgg16_bn', Errors(27.02, 8.81), Errors(25.22, 7.70), Errors(), Cost(15.47), Cost(15.48)),
    Pair('BN-Inception', 'se_bn_inception', Errors(25.38, 7.89), Errors(24.23, 7.14), Errors(25.2, 7.82),
         Cost(2.03), Cost(2.04)),
    # the original's errors are on a subset of the validation set
    Pair('Inception-ResNet-v2', 'se_inception_resnet_v2', Errors(20.37, 5.21), Errors(19.80, 4.79), Errors(19.9, 4.9),
         Cost(11.75), Cost(11.76)),
))

MOBILE = Table('v4', 3, 'single-crop errors of mobile networks on the ImageNet validation set', (
    Pair('MobileNet', 'se_mobilenetv1_100', Errors(28.4, 9.4), Errors(25.3, 7.7), Errors(29.4),
         Cost(0.569, 4.2), Cost(0.572, 4.7)),
    Pair('ShuffleNet', 'se_shufflenetv1_g3', Errors(32.6, 12.5), Errors(31.0, 11.1), Errors(32.6),
         Cost(0.140, 1.8), Cost(0.142, 2.4)),
))
MOBILE_CVPR = Table('cvpr', 3, MOBILE.title, (
    Pair('MobileNet', 'se_mobilenetv1_100', Errors(29.1, 10.1), Errors(25.3, 7.9), Errors(29.4),
         Cost(0.569, 4.2), Cost(0.572, 4.7)),
    Pair('ShuffleNet', 'se_shufflenetv1_g3', Errors(33.9, 13.6), Errors(31.7, 11.7), Errors(34.1),
         Cost(0.140, 1.8), Cost(0.142, 2.4)),
))

CIFAR10 = Table('v4', 4, 'errors on CIFAR-10', (
    Pair('ResNet-110', 'se_preresnet110_cifar', Errors(6.37), Errors(5.21)),
    Pair('ResNet-164', 'se_preresnet164_cifar', Errors(5.46), Errors(4.39)),
    Pair('WRN-16-8', 'se_wrn16_8_cifar', Errors(4.27), Errors(3.88)),
    Pair('Shake-Shake 26 2x96d + Cutout', 'se_shakeshake26_2x96d_cifar', Errors(2.56), Errors(2.12)),
))
CIFAR100 = Table('v4', 5, 'errors on CIFAR-100', (
    Pair('ResNet-110', 'se_preresnet110_cifar', Errors(26.88), Errors(23.85)),
    Pair('ResNet-164', 'se_preresnet164_cifar', Errors(24.33), Errors(21.31)),
    Pair('WRN-16-8', 'se_wrn16_8_cifar', Errors(20.43), Errors(19.14)),
    Pair('Shake-Even 29 2x4x64d + Cutout', 'se_shakeeven29_2x4x64d_cifar', Errors(15.85), Errors(15.41)),
))

PLACES365 = Table('v4', 6, 'single-crop errors on the Places365 validation set', (
    Pair('ResNet-152', 'se_resnet152', Errors(41.15, 11.61), Errors(40.37, 11.01), Errors(41.07, 11.48)),
))


class Detection(NamedTuple):
    """Average precision of Faster R-CNN, at an overlap of 0.5 and over all: higher is better."""

    network: str
    plain_ap50: float
    plain_ap: float
    se_ap50: float
    se_ap: float


COCO = Table('v4', 7, 'Faster R-CNN on COCO, minival', (
    Detection('ResNet-50', 57.9, 38.0, 61.0, 40.4), Detection('ResNet-101', 60.1, 39.9, 62.7, 41.9),
))
COCO_CVPR = Table('cvpr', 6, 'Faster R-CNN on COCO, 40k validation images', (
    Detection('ResNet-50', 45.2, 25.1, 46.8, 26.4), Detection('ResNet-101', 48.4, 27.2, 49.2, 27.9),
))


class Crop(NamedTuple):
    """Errors of a network at crops of 224 pixels, and of `size` pixels; where that is None, 320 or 299.

    `name` is its name in the registry, if it is there.
    """

    network: str
    small: Errors = Errors()
    large: Errors = Errors()
    size: int | None = None
    extra_data: bool = False
    name: str = ''


SINGLE_CROP = Table('v4', 8, 'single-crop errors of large networks on the ImageNet validation set', (
    Crop('ResNet-152', Errors(23.0, 6.7), Errors(21.3, 5.5)),
    Crop('ResNet-200', Errors(21.7, 5.8), Errors(20.1, 4.8)),
    Crop('Inception-v3', Errors(), Errors(21.2, 5.6)),
    Crop('Inception-v4', Errors(), Errors(20.0, 5.0)),
    Crop('Inception-ResNet-v2', Errors(), Errors(19.9, 4.9)),
    Crop('ResNeXt-101 (64x4d)', Errors(20.4, 5.3), Errors(19.1, 4.4)),
    Crop('DenseNet-264', Errors(22.15, 6.12)),
    Crop('Attention-92', Errors(), Errors(19.5, 4.8)),
    Crop('PyramidNet-200', Errors(20.1, 5.4), Errors(19.2, 4.7)),
    Crop('DPN-131', Errors(19.93, 5.12), Errors(18.55, 4.16)),
    Crop('SENet-154', Errors(18.68, 4.47), Errors(17.28, 3.79), name='se_senet154'),
))
LARGER_CROPS = Table('v4', 9, 'errors with larger crops or more data on the ImageNet validation set', (
    Crop('Very Deep PolyNet', large=Errors(18.71, 4.25), size=331),
    Crop('NASNet-A (6 @ 4032)', large=Errors(17.3, 3.8), size=331),
    Crop('PNASNet-5 (N=4, F=216)', large=Errors(17.1, 3.8), size=331),
    Crop('SENet-154', large=Errors(16.88, 3.58), size=320),
    Crop('AmoebaNet-C', large=Errors(16.5, 3.5), size=331),
    Crop('ResNeXt-101 32x48d', small=Errors(14.6, 2.4), extra_data=True),
))


class Ablation(NamedTuple):
    """A variant of SE-ResNet-50.

    Attributes:
        variant: As the paper calls it.
        arguments: Of `create_model('se_resnet50', ...)`.
        errors: On the ImageNet validation set.
        cost: As printed, see `printed_parameters`.
    """

    variant: str
    arguments: dict[str, Any]
    errors: Errors
    cost: Cost = Cost()


_PLAIN: dict[str, Any] = {'se': False}
_PLAIN_ERRORS, _SE_ERRORS = Errors(23.30, 6.55), Errors(22.28, 6.03)

# The ablations have no biases in the gate; but the parameters printed for r from 4 on are with them.
REDUCTION = Table('v4', 10, 'reduction ratio', (
    Ablation('2', {'reduction': 2, 'bias': False}, Errors(22.29, 6.00), Cost(parameters=45.7)),
    Ablation('4', {'reduction': 4}, Errors(22.25, 6.09), Cost(parameters=35.7)),
    Ablation('8', {'reduction': 8}, Errors(22.26, 5.99), Cost(parameters=30.7)),
    Ablation('16', {'reduction': 16}, _SE_ERRORS, Cost(parameters=28.1)),
    Ablation('32', {'reduction': 32}, Errors(22.72, 6.20), Cost(parameters=26.9)),
    Ablation('original', _PLAIN, _PLAIN_ERRORS, Cost(parameters=25.6)),
))
REDUCTION_CVPR = Table('cvpr', 7, 'reduction ratio, schedule of the main runs', (
    Ablation('4', {'reduction': 4}, Errors(23.21, 6.63), Cost(parameters=35.7)),
    Ablation('8', {'reduction': 8}, Errors(23.19, 6.64), Cost(parameters=30.7)),
    Ablation('16', {'reduction': 16}, Errors(23.29, 6.62), Cost(parameters=28.1)),
    Ablation('32', {'reduction': 32}, Errors(23.40, 6.77), Cost(parameters=26.9)),
    Ablation('original', _PLAIN, Errors(24.80, 7.48), Cost(parameters=25.6)),
))
SQUEEZE = Table('v4', 11, 'squeeze', (
    Ablation('Max', {'squeeze': 'max', 'bias': False}, Errors(22.57, 6.09)),
    Ablation('Avg', {'squeeze': 'avg', 'bias': False}, _SE_ERRORS),
))
EXCITATION = Table('v4', 12, 'last non-linearity of the excitation', (
    Ablation('ReLU', {'excitation': 'relu', 'bias': False}, Errors(23.47, 6.98)),
    Ablation('Tanh', {'excitation': 'tanh', 'bias': False}, Errors(23.00, 6.38)),
    Ablation('Sigmoid', {'excitation': 'sigmoid', 'bias': False}, _SE_ERRORS),
))
STAGES = Table('v4', 13, 'stages that carry SE', (
    Ablation('ResNet-50', _PLAIN, _PLAIN_ERRORS, Cost(3.86, 25.6)),
    Ablation('SE_Stage_2', {'stages': (2,), 'bias': False}, Errors(23.03, 6.48), Cost(3.86, 25.6)),
    Ablation('SE_Stage_3', {'stages': (3,), 'bias': False}, Errors(23.04, 6.32), Cost(3.86, 25.7)),
    Ablation('SE_Stage_4', {'stages': (4,), 'bias': False}, Errors(22.68, 6.22), Cost(3.86, 26.4)),
    Ablation('SE_All', {'bias': False}, _SE_ERRORS, Cost(3.87, 28.1)),
))
PLACEMENT = Table('v4', 14, 'where SE stands in the residual unit', (
    Ablation('SE', {'placement': 'standard', 'bias': False}, _SE_ERRORS, Cost(3.87, 28.1)),
    Ablation('SE-PRE', {'placement': 'pre', 'bias': False}, Errors(22.23, 6.00)),
    Ablation('SE-POST', {'placement': 'post', 'bias': False}, Errors(22.78, 6.35)),
    Ablation('SE-Identity', {'placement': 'identity', 'bias': False}, Errors(22.20, 6.15)),
))
SE_3X3 = Table('v4', 15, 'SE after the 3x3 convolution of the residual unit', (
    Ablation('SE', {'placement': 'standard', 'bias': False}, _SE_ERRORS, Cost(3.87, 28.1)),
    Ablation('SE_3x3', {'placement': '3x3', 'bias': False}, Errors(22.48, 6.02), Cost(3.86, 25.8)),
))
NO_SQUEEZE = Table('v4', 16, 'excitation without squeeze', (
    Ablation('ResNet-50', _PLAIN, _PLAIN_ERRORS, Cost(3.86, 25.6)),
    Ablation('NoSqueeze', {'squeeze': 'none', 'bias': False}, Errors(22.93, 6.39), Cost(4.27, 28.1)),
    Ablation('SE', {'bias': False}, _SE_ERRORS, Cost(3.87, 28.1)),
))
FIXED_SCHEDULE = Table('v4', 'footnote 2', 'schedule of 270 epochs, fixed', (
    Ablation('ResNet-50', _PLAIN, Errors(23.21, 6.53)), Ablation('SE', {'bias': False}, Errors(22.20, 6.00)),
))
ABLATIONS = (
    REDUCTION, REDUCTION_CVPR, SQUEEZE, EXCITATION, STAGES, PLACEMENT, SE_3X3, NO_SQUEEZE, FIXED_SCHEDULE)

# networks that the authors trained longer and published; their errors are not the paper's
RELEASE = Table('release', 'README', 'single-crop errors on the ImageNet validation set', (
    Pair('SE-BN-Inception', 'se_bn_inception', Errors(), Errors(23.62, 7.04)),
    Pair('SE-ResNet-50', 'se_resnet50', Errors(), Errors(22.37, 6.36)),
    Pair('SE-ResNet-101', 'se_resnet101', Errors(), Errors(21.75, 5.72)),
    Pair('SE-ResNet-152', 'se_resnet152', Errors(), Errors(21.34, 5.54)),
    Pair('SE-ResNeXt-50 (32x4d)', 'se_resnext50_32x4d', Errors(), Errors(20.97, 5.54)),
    Pair('SE-ResNeXt-101 (32x4d)', 'se_resnext101_32x4d', Errors(), Errors(19.81, 4.96)),
    Pair('SENet-154', 'se_senet154', Errors(), Errors(18.68, 4.47)),
))

TABLES: tuple[Table[Any], ...] = (
    IMAGENET, MOBILE, MOBILE_CVPR, CIFAR10, CIFAR100, PLACES365, COCO, COCO_CVPR, SINGLE_CROP, LARGER_CROPS,
    *ABLATIONS, RELEASE)


class Setting(NamedTuple):
    """How the paper trained.

    Attributes:
        version: See the module; `'author'` for what an author said later.
        values: Names and values, in the paper's words or numbers.
        not_given: What one would need besides.
    """

    version: str
    values: MappingProxyType[str, Any]
    not_given: tuple[str, ...] = ()


def _setting(version: str, *not_given: str, **values: Any) -> Setting:
    return Setting(version, MappingProxyType(values), not_given)


SETTINGS: dict[str, Setting] = {
    'imagenet': _setting(
        'v4', 'weight decay', optimiser='SGD', momentum=0.9, batch=1024, lr=0.6, drop_every=30, drop_by=10, epochs=100,
        reduction=16, crop=224, resize=256, crop_inception_resnet_v2=299, resize_inception_resnet_v2=352,
        augmentation='random crop with scale and aspect ratio, horizontal flip', normalisation='mean of each channel',
        initialisation='He et al., 2015'),
    # https://github.com/hujie-frank/SENet/issues/37 and the README
    'imagenet, by the authors': _setting(
        'author', weight_decay=1e-4, weight_decay_bn_inception=2e-4, area=(0.08, 1.), aspect=(3 / 4, 4 / 3),
        rotation=10, pixel_jitter=20),
    'mobile': _setting(
        'v4', 'weight decay', optimiser='SGD', momentum=0.9, batch=256, lr=0.1, drop='where the loss of the validation '
        'set no longer falls', drop_by=10, epochs=400),
    'ablations': _setting(
        'v4', 'batch', 'weight decay', 'value of the label smoothing', lr=0.1, drop_by=10, drops=3, epochs=300,
        bias=False, label_smoothing=True, drop='where the loss of the validation set no longer falls'),
    'cifar': _setting(
        'v4', 'reduction', 'runs', 'batch, learning rate and weight decay: those of the original papers', padding=4,
        crop=32, flip=True, normalisation='mean and deviation of each channel'),
    'senet154': _setting(
        'v4', 'epochs', 'weight decay', 'value of the label smoothing', batch=2048, lr=1.0, dropout=0.2,
        label_smoothing=True, frozen_batch_norm='in the last epochs'),
}


class Network(NamedTuple):
    """A network of this package and what is known of it.

    Attributes:
        parameters: Parameters with SE (r = 16, biases); those of the authors' prototxts where they released one.
        gflops: Multiply-adds / 1e9 with SE at 224 px (Inception-ResNet-v2: 299), from Tables 2 and 3 of the paper
            (arXiv v4), where it is there.
        plain_gflops: The same of the plain twin.
        why: Why our count is more than 1 % away from `gflops`; empty if it is not.
    """

    parameters: int
    gflops: float | None = None
    plain_gflops: float | None = None
    why: str = ''


_PARAMETERS = {
    'se_resnet18': 11_778_592,
    'se_resnet34': 21_958_868,
    'se_resnet50': 28_088_024,
    'se_resnet101': 49_326_872,
    'se_resnet152': 66_821_848,
    'se_resnext50_32x4d': 27_559_896,
    'se_resnext101_32x4d': 48_955_416,
    'se_resnext101_64x4d': 88_232_984,
    'se_senet154': 115_088_984,
    'se_vgg16_bn': 138_596_784,
    'se_bn_inception': 11_931_622,
    'se_inception_v3': 25_496_188,
    'se_inception_resnet_v2': 64_387_444,
    'se_mobilenetv1_100': 4_718_044,
    'se_shufflenetv1_g3': 2_484_533,
    'se_resnet20_cifar': 274_847,
    'se_resnet32_cifar': 470_861,
    'se_resnet56_cifar': 862_889,
    'se_resnet110_cifar': 1_744_952,
    'se_preresnet110_cifar': 1_744_760,
    'se_preresnet164_cifar': 1_905_362,
    'se_wrn16_8_cifar': 11_049_290,
    'se_shakeshake26_2x96d_cifar': 26_292_546,
    'se_shakeeven29_2x4x64d_cifar': 34_921_002,
}
_WHY = {
    'se_shufflenetv1_g3': 'the printed numbers seem to be of ShuffleNet 1x in general, with other numbers of groups',
    'se_inception_resnet_v2': "the network is timm's port of Google's; the paper's, another one, is not published",
}
_PRINTED = {pair.name: (pair.se_cost.gflops, pair.plain_cost.gflops)
            for table in (IMAGENET, MOBILE) for pair in table.rows if pair.name}
NETWORKS: dict[str, Network] = {
    name: Network(parameters, *_PRINTED.get(name, (None, None)), _WHY.get(name, ''))
    for name, parameters in _PARAMETERS.items()}


def extra_weights(stages: list[tuple[int, int]], reduction: int) -> int:
    """Return the weights that SE adds, `2 / r sum_s N_s C_s^2` (Equation 5); biases are not counted.

    Args:
        stages: Blocks N_s and their output channels C_s, of each stage.
        reduction: r.
    """
    return sum(2 * blocks * channels * (channels // reduction) for blocks, channels in stages)


def printed_parameters(parameters: int, running_statistics: int) -> float:
    """Return the parameters of a network as the paper's tables print them, in millions.

    Those of the ablations count the running means and variances of the batch norms too. With this, and with the biases
    of the gate where `Ablation.arguments` do not leave them out, all that they print is found again; without, ResNet-50
    has 25.6 and SE-ResNet-50 with r = 4, 8 and 32 has 35.6, 30.6 and 26.8. Table 3, of mobile networks, counts the
    parameters alone, and cuts them off.
    """
    return round((parameters + running_statistics) / 1e6, 1)
