"""The Squeeze-and-Excitation block of Hu et al., https://arxiv.org/abs/1709.01507, with the paper's variants."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import Any

import torch
from timm.layers import get_act_layer
from torch import nn

from .errors import check_switches, meant, message, nearest, unknown

__all__ = ['EXCITATIONS', 'IdentityGate', 'SqueezeExcite', 'activation_and_se', 'se_maker']

SQUEEZES = ('avg', 'max', 'none')
# timm's activations that are gates or were tried as one in the paper (Table 12). Others, such as 'gelu', are no gates:
# timm takes them too, and so does `excitation`, but they are not what an error message should propose.
EXCITATIONS = ('sigmoid', 'tanh', 'relu', 'hard_sigmoid')

# excitation -> what makes it one at zero: shift of its argument, factor and summand of its value
IDENTITY_GATES = {'sigmoid': (0., 2., 0.), 'tanh': (0., 1., 1.), 'relu': (1., 1., 0.)}


class IdentityGate(nn.Module):
    """A gate that is exactly one at zero: `2 sigmoid(t)`, `1 + tanh(t)` or `relu(1 + t)`.

    Shapes: any.

    Args:
        excitation: `'sigmoid'`, `'tanh'` or `'relu'`.
    """

    def __init__(self, excitation: str) -> None:
        super().__init__()
        self.excitation = excitation
        self.act = get_act_layer(excitation)()
        self.shift, self.scale, self.offset = IDENTITY_GATES[excitation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.act(x + self.shift) + self.offset


class SqueezeExcite(nn.Module):
    """Channel gates computed from the channels' means: `x * sigmoid(fc2(relu(fc1(mean_hw(x)))))`.

    Equations 2 to 4 of the paper: squeeze `z = mean_hw(u)`, excitation `s = sigmoid(W2 relu(W1 z))`, scale `s * u`. The
    two fully connected layers are 1x1 convolutions `fc1` and `fc2`, so that the keys are those of timm's `SEModule`.
    The hidden width is exactly `channels // reduction`, as in the paper (timm rounds it up to a multiple of 8).

    Shapes: input and output `(N, C, H, W)`, any floating dtype; the gate is `(N, C, 1, 1)`, or `(N, C, H, W)` with
    `squeeze='none'`.

    Args:
        channels: Number of input channels, C.
        reduction: Reduction ratio r of the hidden layer (Table 10).
        squeeze: `'avg'`; `'max'` (Table 11); `'none'`: no pooling, the 1x1 convolutions run on the full map (Table 16).
        excitation: Last non-linearity: `'sigmoid'`, `'tanh'`, `'relu'` (Table 12), or another of timm's activations.
        bias: Biases in both layers. The released networks have them, the paper's ablations do not (Sec. 6).
        identity_start: Begin with gates of exactly one, for networks that are trained already: fc2 starts at zero, and
            the gate is `2 sigmoid(t)`, `1 + tanh(t)` or `relu(1 + t)` (a sigmoid that saturates at one would have no
            gradient). Not of the paper. fc1 has a gradient from the second step on.

    Raises:
        ValueError: If `reduction` is not in 1..channels, `squeeze` or `excitation` is unknown, a switch is none, or
            `identity_start` is asked of another excitation than those three.
    """

    def __init__(
            self,
            channels: int,
            reduction: int = 16,
            squeeze: str = 'avg',
            excitation: str = 'sigmoid',
            bias: bool = True,
            identity_start: bool = False,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        check_arguments(channels, reduction, squeeze, excitation)
        check_switches(bias=bias, identity_start=identity_start)
        channels, reduction = int(channels), int(reduction)  # TorchScript knows no numbers of numpy
        if identity_start and excitation not in IDENTITY_GATES:
            raise ValueError(message(
                f'identity_start=True with excitation={excitation!r}', 'it has no form here that is one at zero',
                f'take one of {", ".join(IDENTITY_GATES)}'))
        dd = {'device': device, 'dtype': dtype}
        self.squeeze = squeeze
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1, bias=bias, **dd)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1, bias=bias, **dd)
        self.gate: nn.Module = get_act_layer(excitation)().to(**dd)  # some have a parameter
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
        if identity_start:
            self.gate = IdentityGate(excitation)
            for parameter in self.fc2.parameters():
                nn.init.zeros_(parameter)

    def excite(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gates of `x (N, C, H, W)`: `(N, C, 1, 1)`, or `(N, C, H, W)` without squeeze."""
        if self.squeeze == 'avg':
            x = x.mean((2, 3), keepdim=True)
        elif self.squeeze == 'max':
            x = x.amax((2, 3), keepdim=True)
        return self.gate(self.fc2(self.act(self.fc1(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.excite(x)

    def extra_repr(self) -> str:
        return f'squeeze={self.squeeze!r}'


def se_maker(
        reduction: int, squeeze: str, excitation: str, bias: bool, given: Mapping[str, Any],
) -> partial[SqueezeExcite]:
    """Return what makes an SE block of a number of channels; `given` may hold its device and dtype."""
    return partial(
        SqueezeExcite, reduction=reduction, squeeze=squeeze, excitation=excitation, bias=bias,
        device=given.get('device'), dtype=given.get('dtype'))


def activation_and_se(activation: nn.Module, se: SqueezeExcite) -> nn.Sequential:
    """Return `se` after `activation`, to stand where `activation` does: all other keys of the network stay."""
    return nn.Sequential(OrderedDict([('act', activation), ('se', se)]))


def check_arguments(channels: int, reduction: int, squeeze: str, excitation: str) -> None:
    """Raise `ValueError` for arguments that `SqueezeExcite` cannot honour."""
    if isinstance(channels, bool) or not isinstance(channels, Integral) or channels < 1:
        raise ValueError(message(
            f'channels: {channels!r}', 'it is no number of channels', 'take a whole number from 1'))
    if isinstance(reduction, bool) or not isinstance(reduction, Integral) or not 1 <= reduction <= channels:
        raise ValueError(message(
            f'reduction: {reduction!r}',
            f'a block of {channels} channels needs a number by which its width channels // reduction is 1 or more',
            f'take a whole number from 1 to {channels}; the paper uses 2, 4, 8, 16 and 32',
        ))
    if squeeze not in SQUEEZES:
        raise ValueError(unknown('squeeze', squeeze, SQUEEZES))
    if not is_activation(excitation):
        raise ValueError(message(
            f'excitation: {excitation!r}', 'timm has no such activation',
            f"{meant(nearest(str(excitation), EXCITATIONS))}gates are {', '.join(EXCITATIONS)}; "
            "timm's other activations are taken, too"))


def is_activation(name: object) -> bool:
    """Return whether timm knows an activation layer of this name."""
    if not isinstance(name, str) or not name:
        return False
    try:
        return get_act_layer(name) is not None
    except (KeyError, AssertionError):
        return False
