"""Where SE acts within a residual block: Fig. 5 and Tables 14 and 15 of the paper."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import message, unknown
from .residual_blocks import is_identity
from .squeeze_excite import SqueezeExcite

__all__ = ['PLACEMENTS', 'PlacedSE', 'check_each_stage', 'check_se_arguments', 'places']

PLACEMENTS = ('standard', 'pre', 'post', 'identity', '3x3')


class PlacedSE:
    """What the residual blocks share: an SE block `se` (or an identity), and the place at which it acts.

    `places` has the places at which it may act, with the channels there.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of the class, and does not know these
        se: nn.Module
        placement: str
        places: dict[str, int]

    made_of = 'basic blocks'  # as messages call them

    @torch.jit.unused
    def insert_se(self, make_se: partial[SqueezeExcite], placement: str) -> None:
        """Put an SE block, made by `make_se(channels)`, at `placement` (Fig. 5 and Table 15 of the paper).

        Raises:
            ValueError: For `'3x3'` where no block is a bottleneck.
        """
        if placement not in self.places:
            raise ValueError(message(
                f'placement: {placement!r}',
                f'it is a place inside a bottleneck (Table 15), and this network is made of {self.made_of}',
                f'take one of {", ".join(self.places)}, or a network of bottlenecks, such as se_resnet50'))
        self.se = make_se(self.places[placement])
        self.placement = placement

    def excite_at(self, place: str, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, gated if this block has its SE at `place`."""
        return self.se(x) if self.placement == place else x

    @torch.jit.unused
    def tail_se(self) -> tuple[nn.Module | None, str]:
        """Return the SE block at the end of the residual branch, or in words why the end is no `Tail`."""
        if is_identity(self.se) or self.se_of_body():
            return None, ''
        return self.se, '' if self.placement == 'standard' else f'its SE has the placement {self.placement!r}'

    @torch.jit.unused
    def se_of_body(self) -> str:
        """Return in words that the SE block acts before the last convolution, or an empty text."""
        before = self.placement in ('pre', '3x3') and not is_identity(self.se)
        return f'its SE has the placement {self.placement!r}' if before else ''


def places(in_channels: int, out_channels: int, width: int = 0) -> dict[str, int]:
    """Return the places at which SE may act in a residual block, with the channels there.

    Args:
        in_channels: Of the block's input.
        out_channels: Of its output, and of what is added to that.
        width: Of its 3x3 convolution, if the block is a bottleneck.
    """
    found = {'standard': out_channels, 'pre': in_channels, 'post': out_channels, 'identity': out_channels}
    return {**found, '3x3': width} if width else found


def check_se_arguments(se: bool, placement: str, stages: Sequence[int], valid_stages: tuple[int, ...]) -> list[int]:
    """Raise `ValueError` for network-level SE arguments that name nothing."""
    if not isinstance(se, bool):
        raise ValueError(message(f'se: {se!r}', 'it is a switch', 'say True for SE or False for the plain twin'))
    if placement not in PLACEMENTS:
        raise ValueError(unknown('placement', placement, PLACEMENTS))
    stages = [stages] if isinstance(stages, str) or not isinstance(stages, Iterable) else list(stages)
    wrong = [stage for stage in stages if isinstance(stage, bool) or stage not in valid_stages]
    if wrong or not stages:
        raise ValueError(message(
            f'stages: {stages!r}',
            f'{wrong or "an empty list"} is not among the stages that can carry SE',
            f'name some of {list(valid_stages)}, as in stages=({valid_stages[0]}, {valid_stages[1]}); '
            'for none at all say se=False',
        ))
    return sorted({int(stage) for stage in stages})


def check_each_stage(valid_stages: tuple[int, ...], **values: Sequence[int]) -> None:
    """Raise `ValueError` for an argument that has not one number for each stage."""
    for name, value in values.items():
        if len(value) != len(valid_stages):
            raise ValueError(message(
                f'{name}: {value!r}', f'the network has {len(valid_stages)} stages', 'give as many numbers'))
