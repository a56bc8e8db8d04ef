"""The SE blocks of any network: where they are, and what their gates are while it runs."""
from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import check_module, meant, message, nearest
from .insertion_points import path_of

__all__ = ['GateReader', 'SEBlock', 'choose_blocks', 'find_se']

# class of an SE block, by its path -> its child whose output is the gate
GATE_OF = {
    'se_timm.squeeze_excite.SqueezeExcite': 'gate',
    'timm.layers.squeeze_excite.SEModule': 'gate',
    'timm.layers.squeeze_excite.EffectiveSEModule': 'gate',
    'timm.layers.eca.EcaModule': 'gate',
    'timm.layers.eca.CecaModule': 'gate',
    'timm.models.senet.SEModule': 'sigmoid',
    'timm.models._efficientnet_blocks.SqueezeExcite': 'gate',
    'torchvision.ops.misc.SqueezeExcitation': 'scale_activation',
}
# class of a gate, its name in small letters -> between which values it lies, 2 standing for no upper bound
RANGES = {
    **dict.fromkeys(('sigmoid', 'hardsigmoid', 'hardsigmoidme'), (0., 1.)), 'tanh': (-1., 1.), 'relu': (0., 2.),
    'relu6': (0., 6.), 'identitygate': (0., 2.)}
# names that a block gives to its SE; the rest of the path names the block
CHILDREN = ('se', 'se_module', 'attn', 'attn_last')
STAGES = {'layer1': 2, 'layer2': 3, 'layer3': 4, 'layer4': 5}  # as the paper numbers those of ResNets for ImageNet


class SEBlock(NamedTuple):
    """An SE block of a network.

    Attributes:
        name: Of the residual block, or whatever module it belongs to, such as `layer1.0`.
        module: The path of the SE module itself, such as `layer1.0.se`.
        title: As the paper would call it, `SE_2_1`; the name where stages and blocks are not those of a ResNet.
        low: Least value of the gate; -2 where there is none, or it is not known.
        high: Largest value of the gate; 2 where there is none, or it is not known.
        parameters: Of the SE module.
    """

    name: str
    module: str
    title: str
    low: float
    high: float
    parameters: int


def find_se(net: nn.Module) -> list[SEBlock]:
    """Return the SE blocks of `net`, in its order: of this package, timm (legacy, effective SE, ECA) or torchvision.

    Raises:
        ValueError: If `net` is no network.
    """
    check_module('find_se', net)
    found = {name: module for name, module in net.named_modules() if path_of(type(module)) in GATE_OF}
    names = {name: name.rpartition('.')[0] if name.rpartition('.')[2] in CHILDREN else name for name in found}
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    blocks = []
    for path, module in found.items():
        name = path if names[path] in shared else names[path]
        blocks.append(SEBlock(name, path, title_of(net, name), *range_of(gate_of(module)),
                              sum(parameter.numel() for parameter in module.parameters())))
    return blocks


def gate_of(module: nn.Module) -> nn.Module:
    """Return the child of an SE block whose output is the gate."""
    return module.get_submodule(GATE_OF[path_of(type(module))])


def title_of(net: nn.Module, name: str) -> str:
    """Return what the paper calls a block: `SE_stage_block`, both counted as in Sec. 7.2."""
    stage, _, block = name.partition('.')
    if stage in STAGES and block.isdigit() and all(hasattr(net, each) for each in STAGES):
        return f'SE_{STAGES[stage]}_{int(block) + 1}'
    return name


def range_of(gate: nn.Module) -> tuple[float, float]:
    """Return between which values a gate lies, for the last non-linearity of an SE block."""
    return RANGES.get(type(gate).__name__.lower(), (-2., 2.))


class GateReader:
    """Reads the gates of a network's SE blocks while it runs: a context within which `gates` are those of the last run.

    Forward hooks take them; the network computes what it computes without. (Hooks keep a residual block from the fused
    tail in training: use this in evaluation.)

    Args:
        net: The network.
        blocks: Which of its SE blocks; all where not given.

    Raises:
        ValueError: If `blocks` has anything else.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[SEBlock] | None = None) -> None:
        self.net = net
        self.blocks = find_se(net) if blocks is None else list(blocks)
        if others := [each for each in self.blocks if not isinstance(each, SEBlock)]:
            raise ValueError(message(
                f'blocks: {others[0]!r}', 'it is no SEBlock', 'give some of se_timm.find_se(net)'))
        self._latest: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GateReader:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Begin to read."""
        self.detach()
        for block in self.blocks:
            gate = gate_of(self.net.get_submodule(block.module))
            self._handles.append(gate.register_forward_hook(self._hook(block.name)))

    def detach(self) -> None:
        """Read no more, and leave no trace in the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._latest = {}

    def _hook(self, name: str) -> Any:
        latest = self._latest

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            latest[name] = output.detach()

        return keep

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates of the last run by the names of the blocks: `(N, C)` each, as they were computed.

        Where there is a gate for each position (`squeeze='none'`), its mean over the positions.
        """
        return {block.name: per_channel(self._latest[block.name]) for block in self.blocks
                if block.name in self._latest}


def per_channel(gate: Tensor) -> Tensor:
    """Return a gate `(N, C, 1, 1)`, `(N, C, H, W)` or `(N, 1, C)` as `(N, C)`."""
    if gate.dim() == 4 and gate.shape[2] * gate.shape[3] > 1:
        return gate.mean((2, 3))
    return gate.flatten(1)


# Choosing


def choose_blocks(net: nn.Module, names: str | Iterable[str]) -> list[SEBlock]:
    """Return the SE blocks of `net` that are named.

    Args:
        net: The network.
        names: Names of blocks (`layer4.2`), of their SE modules (`layer4.2.se`) or as in the paper (`SE_5_3`), or
            patterns of those (`layer4.*`, `SE_5_*`).

    Raises:
        ValueError: If the network has no SE, or none of that name.
    """
    blocks = find_se(net)
    if not blocks:
        raise ValueError(message(
            f'{type(net).__name__}', 'it has no SE block of a kind that is known',
            "take a network with SE, such as 'se_resnet50', or put SE into it by se_timm.add_se"))
    chosen = []
    given = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in given:
        if not isinstance(name, str):
            raise ValueError(message(
                f'blocks: {name!r:.60}', f'it is a {type(name).__name__}', "give names of blocks, such as 'SE_5_*'"))
        matching = [block for block in blocks if any(
            fnmatch.fnmatchcase(each, name) for each in (block.name, block.module, block.title))]
        if not matching:
            valid = dict.fromkeys(each for block in blocks for each in (block.title, block.name))
            close = nearest(name, valid)
            raise ValueError(message(
                f'block: {name!r}', 'the network has no SE block of this name',
                meant(close) + f'they are {", ".join(block.title for block in blocks)}'))
        chosen += matching
    return [block for block in blocks if block in chosen]
