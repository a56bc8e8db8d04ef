"""What all networks of our own share: pooling, classifier and initialisation, by timm's contract."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
import math
from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from torch import nn
from torch.nn import functional as F

__all__ = ['ClassifierNetwork']


class ClassifierNetwork(nn.Module):
    """A network that ends in pooling, dropout and a linear layer `fc`.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`. A subclass gives `forward_features(x)`, fills `feature_info`
    and calls `add_head` and `init_weights` at the end.

    Args:
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

    @torch.jit.ignore
    def add_head(self, channels: int, global_pool: str, dd: dict[str, Any]) -> None:
        """Add pooling and classifier for feature maps of so many channels."""
        self.num_features = channels
        self.global_pool, self.fc = create_classifier(channels, self.num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = channels * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions as He et al. do (https://arxiv.org/abs/1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # torch's `kaiming_normal_` does not count in groups
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits of a feature map, or with `pre_logits` what the classifier sees."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images."""
        return self.forward_head(self.forward_features(x))
