"""SE taken out of some blocks of a trained network, and what that saves."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cost import cost
from .errors import check_module, check_switches, message
from .fold import NORMS
from .gates import SEBlock, choose_blocks
from .insertion import holders, size_of
from .meta import copied, does_not_run
from .placement import PlacedSE
from .residual_blocks import block_of, is_hooked
from .residual_tail import is_plain

__all__ = ['ChannelScale', 'Pruned', 'prune_se']


class ChannelScale(nn.Module):
    """Multiplies each channel by a constant: what is left of an SE block whose gates do not depend on the image.

    Shapes: `(N, C, H, W)`.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer('scale', scale[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, scaled."""
        return x * self.scale.to(x.dtype)


class Pruned(NamedTuple):
    """What `prune_se` did.

    Attributes:
        net: The network without these SE blocks.
        blocks: What was taken out -> what stands in its place: `'nothing'`, `'folded'` (a constant for each channel,
            in the batch norm before it) or `'scale'` (a constant for each channel, a module).
        parameters: How many are saved.
        multiply_adds: How many are saved for one image.
    """

    net: nn.Module
    blocks: dict[str, str]
    parameters: int
    multiply_adds: int

    def __str__(self) -> str:
        return (f'{len(self.blocks)} SE blocks taken out ({", ".join(self.blocks)}): '
                f'{self.parameters:,} parameters and {self.multiply_adds / 1e6:.2f} M multiply-adds less')


def prune_se(
        net: nn.Module,
        blocks: str | Iterable[str],
        gates: Mapping[str, Tensor] | None = None,
        *,
        input_size: tuple[int, int, int] | None = None,
        inplace: bool = False,
) -> Pruned:
    """Take SE out of some blocks of a network, as Sec. 7.2 of the paper considers for the last stage.

    Args:
        net: A network of any kind that `find_se` knows.
        blocks: Which, see `choose_blocks`.
        gates: The mean gates `(C,)` of each block by its name in `find_se`, as `GateReader` has them, which go on
            scaling its channels as constants; in the batch norm before it where that can be, so that they cost nothing.
            Without, as if the gates were one: right for blocks whose gates are near one.
        input_size: Channels, height and width for the count of multiply-adds; by default the network's own.
        inplace: Change `net`, else a copy.

    Raises:
        ValueError: If the network has no SE, no block of such a name, or `gates` lacks one of them or is not finite.
    """
    check_module('prune_se', net)
    check_switches(inplace=inplace)
    chosen = choose_blocks(net, blocks)
    if not chosen:
        raise ValueError(message(f'blocks: {blocks!r}', 'nothing would be taken out', "name one, such as 'SE_5_*'"))
    if gates is not None and not isinstance(gates, Mapping):
        raise ValueError(message(
            f'gates: a {type(gates).__name__}', 'it does not say of which block each gate is',
            'give a dictionary from names of blocks to tensors'))
    if gates is not None and (missing := [block.name for block in chosen if block.name not in gates]):
        raise ValueError(message(
            f'gates: of {", ".join(gates) or "no block"}', f'those of {missing[0]} are missing',
            f'give the mean gates of each block that is taken out by its name, such as {missing[0]!r}, or none at all'))
    if twice := [block for block in chosen if len(holders(net, net.get_submodule(block.module))) > 1]:
        raise ValueError(message(
            f'block: {twice[0].module}', 'its SE stands in several places, and could not be taken out of one',
            'give each block a module of its own'))
    given = {block.name: None if gates is None else
             checked(gates[block.name], block.name, net.get_submodule(block.module)) for block in chosen}
    channels, height, width = size_of(net, input_size)
    size = channels, height, width
    pruned = copied('prune_se', net)  # where that fails, `net` is what it was
    try:
        before = cost(net, size)
    except Exception as error:  # of any network's own making
        raise does_not_run('prune_se', net, size, error) from error
    try:
        done = {block.name: take_out(pruned, block, given[block.name]) for block in chosen}
        after = cost(pruned, size)
    except RuntimeError as error:
        raise ValueError(message(
            f'gates: {", ".join(f"{len(gate)} of {name}" for name, gate in given.items() if gate is not None)}',
            f'a block has another number of channels ({error})', 'give the mean gates of this network')) from error
    if inplace:
        for block in chosen:
            take_out(net, block, given[block.name])
    return Pruned(net if inplace else pruned, done, before.parameters - after.parameters,
                  before.multiply_adds - after.multiply_adds)


def checked(gate: Any, name: str, module: nn.Module) -> Tensor:
    """Return the gate of a block if it is a number for each channel, else raise `ValueError`."""
    if isinstance(gate, Tensor) and gate.ndim == 1:
        # the last layer has a row for each, and none has more; ECA's has one for all
        channels = max((len(weight) for weight in module.parameters() if weight.ndim), default=1)
        if len(gate) == 1 < channels:  # torch would take it for that of all
            raise ValueError(message(
                f'gates[{name!r}]: a single number', f'the block has {channels} channels',
                'give the mean over the images for each, such as gates.mean(0)'))
        if not gate.is_meta and not gate.float().isfinite().all():
            raise ValueError(message(
                f'gates[{name!r}]: not finite', 'the channels would be infinite or NaN for every image',
                'see which images gave them; a network that has diverged has no mean gates'))
        return gate
    given = f'of shape {tuple(gate.shape)}' if isinstance(gate, Tensor) else f'of type {type(gate).__name__}'
    raise ValueError(message(
        f'gates[{name!r}]: {given}', 'it must be a tensor with a number for each channel',
        'give the mean over the images, such as gates.mean(0)'))


@torch.no_grad()
def take_out(net: nn.Module, block: SEBlock, gate: Tensor | None) -> str:
    """Put an identity, or a constant for each channel, in the place of an SE block; return which, see `Pruned`."""
    parent, _, child = block.module.rpartition('.')
    holder, kept = net.get_submodule(parent), 'nothing'
    replacement: nn.Module = nn.Identity()
    if gate is not None:
        norm = norm_before(holder, child)
        if norm is None or len(holders(net, norm)) > 1:
            weight = next(net.get_submodule(block.module).parameters())
            replacement, kept = ChannelScale(gate.to(weight.device, weight.dtype)), 'scale'
        else:
            norm.weight.mul_(gate.to(norm.weight))
            norm.bias.mul_(gate.to(norm.bias))
            kept = 'folded'
    setattr(holder, child, replacement.train(holder.training))
    if type(replacement) is nn.Identity and isinstance(holder, PlacedSE):
        holder.placement = 'standard'  # of a gate that add_se may put there again
    return kept


def norm_before(holder: nn.Module, child: str) -> Any:
    """Return the batch norm whose output the SE block of a residual block takes, None if there is none known."""
    kind = block_of(holder)
    tail = kind.tail(holder) if kind else ''
    if isinstance(tail, str) or tail.se is not getattr(holder, child):
        return None
    norm: Any = tail.norm
    foldable = type(norm) in NORMS and is_plain(norm) and not is_hooked(norm)  # a parametrised one is of another class
    return norm if foldable and getattr(norm, 'affine', False) else None  # frozen ones have buffers
