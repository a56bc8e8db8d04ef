"""Numbers of the paper and of the authors' release as data; tests, tables and documentation read them here."""
from __future__ import annotations

from typing import NamedTuple

__all__ = ['NETWORKS', 'Network']


class Network(NamedTuple):
    """A network of this package and what is known of it.

    Attributes:
        parameters: Parameters with SE (r = 16, biases); those of the authors' prototxts where they released one.
        gflops: Multiply-adds / 1e9 with SE at 224 px, from Table 2 of the paper (arXiv v4), where it is there.
        plain_gflops: The same of the plain twin.
    """

    parameters: int
    gflops: float | None = None
    plain_gflops: float | None = None


NETWORKS: dict[str, Network] = {
    'se_resnet18': Network(11_778_592),
    'se_resnet34': Network(21_958_868),
    'se_resnet50': Network(28_088_024, 3.87, 3.86),
    'se_resnet101': Network(49_326_872, 7.60, 7.58),
    'se_resnet152': Network(66_821_848, 11.32, 11.30),
    'se_resnext50_32x4d': Network(27_559_896, 4.25, 4.24),
    'se_resnext101_32x4d': Network(48_955_416, 8.00, 7.99),
    'se_resnext101_64x4d': Network(88_232_984),
    'se_senet154': Network(115_088_984),
    'se_resnet20_cifar': Network(274_847),
    'se_resnet32_cifar': Network(470_861),
    'se_resnet56_cifar': Network(862_889),
    'se_resnet110_cifar': Network(1_744_952),
}
