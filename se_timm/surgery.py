"""Changes to a network that is there already: the fused residual tail in any network of timm."""
from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn

from .errors import check_module, check_switches, message, unknown
from .fused_blocks import FUSED
from .gates import find_se
from .residual_blocks import BLOCKS
from .residual_tail import BACKENDS, ResidualTail, recompute_problem, structure_problem, tail_of

__all__ = ['Fusion', 'fuse']


class Fusion(NamedTuple):
    """What `fuse` did, by the names of the modules.

    Attributes:
        replaced: Residual blocks whose end can be fused, with the class they are of now.
        left: Residual blocks and SE modules that stay as they are, with the reason.
        kept: Replaced blocks for which recomputation was asked and cannot be had, with the reason.
    """

    replaced: dict[str, str]
    left: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f'fused: {len(self.replaced)} residual blocks']
        for what, reasons in (('left', self.left), ('not recomputed', self.kept)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                more = f' and {len(names) - 3} more' if len(names) > 3 else ''
                lines.append(f'{what}: {", ".join(names[:3])}{more}: {reason}')
        return '\n'.join(lines)


def fuse(net: nn.Module, backend: str = 'auto', recompute: bool = False) -> Fusion:
    """Give the residual blocks of `net`, ours or timm's, the fused tail, in place; parameters and keys stay.

    Args:
        net: A network with residual blocks: this package's, or timm's ResNets with SE or without (SE-ResNeXt,
            SENet-154, ResNet-RS), its legacy SE networks, its RegNets.
        backend: What computes the tails in training: `'auto'`, `'fused'` or `'reference'`, see
            `se_timm.residual_tail.choose`.
        recompute: Compute the outputs of the batch norms and ReLUs within the blocks again in the backward pass, in
            place of keeping them: about a seventh less memory, for one more pass over each. With `'fused'` only.

    Returns:
        What was replaced, and what was left and why. Whether a replaced block is fused also depends on device and mode:
        `se_timm.explain` tells.

    Raises:
        ValueError: If the backend is unknown, `recompute` asked of another than `'fused'`, or if `net` has no residual
            block that is known.
    """
    check_module('fuse', net)
    check_switches(recompute=recompute)
    if backend not in BACKENDS:
        raise ValueError(unknown('backend', backend, BACKENDS))
    if recompute and backend != 'fused':
        raise ValueError(message(
            f'recompute=True with the backend {backend!r}', 'only the fused tail comes with it',
            "say backend='fused' as well, or net.set_grad_checkpointing() of timm's networks"))
    blocks = {name: module for name, module in net.named_modules()
              if isinstance(module, ResidualTail) or type(module) in BLOCKS}
    if not blocks:
        raise ValueError(message(
            f'fuse({type(net).__name__})', 'it has no residual block of a kind that is known',
            "take an SE-ResNet or SE-ResNeXt, or a network of timm's families resnet, senet (legacy) or regnet"))
    replaced, left, kept = {}, {}, {}
    for name, block in blocks.items():
        if not isinstance(block, ResidualTail) and type(block) in FUSED:
            block.__class__ = FUSED[type(block)]
        if problem := set_backend(block, backend):
            left[name] = problem
        else:
            replaced[name] = type(block).__name__
            if problem := set_recompute(block, recompute):
                kept[name] = problem
    return Fusion(replaced, {**left, **loose_gates(net, list(replaced), list(left))}, kept)


def set_recompute(block: Any, recompute: bool) -> str:
    """Set whether a block computes its ReLUs again, and return in words what keeps it from that, or an empty text."""
    block.recompute = recompute
    return recompute_problem(block.steps(), block.tail().conv) if recompute else ''


def set_backend(block: nn.Module, backend: str) -> str:
    """Set what computes the tail of a block, and return in words what keeps it from being fused, or an empty text."""
    if not isinstance(block, ResidualTail):
        tail = BLOCKS[type(block)].tail(block)
        assert isinstance(tail, str)
        return tail
    block.backend = backend
    tail = tail_of(block)
    return tail if isinstance(tail, str) else structure_problem(tail)


def loose_gates(net: nn.Module, fused: list[str], left: list[str]) -> dict[str, str]:
    """Return the SE modules of `net` that belong to no fused tail and to no block that is left, with the reason."""
    tails = [cast(Any, net.get_submodule(name)).tail() for name in fused]
    told = {id(tail.se) for tail in tails}
    told |= {id(module) for name in left for module in net.get_submodule(name).modules()}
    loose = [block.module for block in find_se(net) if id(net.get_submodule(block.module)) not in told]
    return {name: 'this SE is not at the end of a residual branch, right after its batch norm' for name in loose}
