"""What networks of our own share that have a stem and three stages: all of timm's contract."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from .classifier_network import ClassifierNetwork

__all__ = ['STAGES', 'StagedNetwork']

STAGES = (2, 3, 4)


class StagedNetwork(ClassifierNetwork):
    """A network of `stem`, stages `layer1` to `layer3`, `norm` and classifier.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`. A subclass makes its stem and gives `stem(x)`, adds its
    stages by `add_stage`, and calls `add_classifier` at the end.

    The arguments are those of `ClassifierNetwork`.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of the class, and does not know these
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        norm: nn.Module

    @torch.jit.ignore
    def add_stem(self, channels: int, module: str, reduction: int = 1) -> None:
        """Say how many channels the stem gives, which module gives them, and by how much the map is smaller there."""
        self.feature_info = [dict(num_chs=channels, reduction=reduction, module=module)]

    @torch.jit.ignore
    def add_stage(self, channels: int, blocks: list[nn.Module], stride: int) -> None:
        """Add the next stage, whose map is smaller by `stride` than the one before."""
        name = f'layer{len(self.feature_info)}'
        self.add_module(name, nn.Sequential(*blocks))
        reduction = self.feature_info[-1]['reduction'] * stride
        self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=name))

    @torch.jit.ignore
    def add_classifier(self, norm: nn.Module, global_pool: str, dd: dict[str, Any]) -> None:
        """Add what follows the stages; `norm` belongs to the last of them: its output is the last feature map."""
        self.norm = norm
        if not isinstance(norm, nn.Identity):
            self.feature_info[-1]['module'] = 'norm'
        self.add_head(self.feature_info[-1]['num_chs'], global_pool, dd)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stem's output."""
        raise NotImplementedError

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups: the stem, then stages (`coarse`) or blocks."""
        return dict(
            stem=r'^conv1|bn1', blocks=[(r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)', None),
                                          (r'^norm', (99999,))])

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features and the outputs of stem and stages that `indices` names, as timm's networks do.

        Args:
            x: Images, `(N, in_chans, H, W)`.
            indices: The last n if an int, all if None; 0 is the stem, 1 to 3 the stages.
            norm: Without effect: a final norm, where there is one, belongs to the last stage.
            stop_early: Stop at the last wanted output.
            output_fmt: Only `'NCHW'`.
            intermediates_only: Return the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        stages = [self.layer1, self.layer2, self.layer3]
        for index, stage in enumerate(stages[:max_index] if stop_early else stages, start=1):
            checkpointing = self.grad_checkpointing and not torch.jit.is_scripting()
            x = checkpoint_seq(stage, x) if checkpointing else stage(x)
            if index == len(stages):
                x = self.norm(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what comes after the last output that `indices` names, and return the absolute indices.

        A final norm, where there is one, belongs to the last stage and stays with it, whatever `prune_norm` says.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        for index in range(max_index, last):
            setattr(self, f'layer{index + 1}', nn.Sequential())
        if max_index < last:
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < last:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.norm(x)
