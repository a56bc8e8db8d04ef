"""A gate put before or after a module of a network that is there already, without changing the network's keys."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
from typing import Any

import torch
from torch import nn

__all__ = ['LAYOUTS', 'REPARAMETERISE', 'Gated', 'GatedCall']

# where the channels are -> what the dimensions are
LAYOUTS = ('NCHW', 'NHWC', 'NLC')
# methods by which timm's `reparameterize_model` makes one layer of several; in that a gate would be lost
REPARAMETERISE = ('fuse', 'reparameterize', 'switch_to_deploy')


class Gated(nn.Module):
    """A module and the gate `se` of its input or its output.

    It stands in the place of `inner`, and reads and writes state dicts under the keys that `inner` had there; only the
    gate's, `se.*`, are new. In `named_modules` and `named_parameters` both are what they are: `inner` and `se`. (A gate
    by a forward hook, or by a subclass of the module's class, would be lost without a word where the module is replaced
    by one of another class, as by `convert_sync_batchnorm`.) Other attributes are those of `inner`, and what is put on
    it, such as a parameter, goes there. So `torch.func.functional_call` takes the names of `named_parameters`, and not
    those of the state dict, and what looks into a module's own parameters, such as pruning and the weight norms of
    `torch.nn.utils`, is for `inner`.

    Shapes: those of `inner`, whose input or output is gated by `se`, which sees `(N, C, H, W)`.

    Args:
        inner: The module.
        se: The gate.
        before: Gate the input, else the output.
        layout: What is gated, one of `LAYOUTS`: maps with the channels first or last, or tokens.
    """

    def __init__(self, inner: nn.Module, se: nn.Module, before: bool = False, layout: str = 'NCHW') -> None:
        super().__init__()
        self.before = before
        self.layout = layout
        self.se = se
        self.inner = inner
        self.training = inner.training
        self.register_load_state_dict_post_hook(_tell_the_old_names)

    def excite(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, gated."""
        if self.layout == 'NHWC':
            return self.se(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.layout == 'NLC':
            return self.se(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
        return self.se(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the module, gated, or that of the gated input."""
        if self.before:
            return self.inner(self.excite(x))
        return self.excite(self.inner(x))

    @torch.jit.ignore
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of the module under its old keys, and that of the gate under `se.`."""
        options = {**dict(zip(('destination', 'prefix', 'keep_vars'), args, strict=False)), **kwargs}
        state = self.inner.state_dict(**options)
        return self.se.state_dict(**{**options, 'destination': state, 'prefix': f'{options.get("prefix", "")}se.'})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(f'{prefix}se.')]:
            state_dict[f'{prefix}inner.{key[len(prefix):]}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
        vars(self)['_loaded'] = prefix, args[-1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner: Any = super().__getattr__('inner')
            # TorchScript and copy ask for names of their own
            if (name.startswith('_') and not _has(inner, name)) or name in REPARAMETERISE:
                raise
            return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        modules = self.__dict__.get('_modules', {})
        # methods that are replaced, such as `forward`, and what `compile` makes are of this module
        own = name in modules or hasattr(type(self), name) or 'inner' not in modules
        if not own and not isinstance(value, (nn.Parameter, nn.Module)):
            own = name in self.__dict__ or (name.startswith('_') and not _has(modules['inner'], name))
        if own:
            super().__setattr__(name, value)
        else:
            self.__dict__.pop(name, None)
            setattr(modules['inner'], name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name in self._modules:
            super().__delattr__(name)
        else:
            delattr(self.inner, name)

    def register_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Add a parameter to `inner`."""
        self.inner.register_parameter(*args, **kwargs)

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Add a buffer to `inner`."""
        self.inner.register_buffer(*args, **kwargs)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module to `inner`, or replace the gate or `inner`."""
        if name in self._modules:
            super().add_module(name, module)
        else:
            self.inner.add_module(name, module)

    def extra_repr(self) -> str:
        """Return where the gate is."""
        return f'before={self.before}, layout={self.layout!r}'


def _has(module: nn.Module, name: str) -> bool:
    """Return whether a parameter, buffer or child of a module is called so; of a gated one, of what it stands for."""
    if isinstance(module, Gated):
        return _has(module.inner, name)
    return any(name in kind for kind in (module._parameters, module._buffers, module._modules))


def _tell_the_old_names(gated: nn.Module, incompatible: Any) -> None:
    """Let the messages of `load_state_dict` name the keys of the state dict."""
    prefix, errors = vars(gated).pop('_loaded')
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [key.replace(f'{prefix}inner.', prefix, 1) if key.startswith(prefix) else key for key in keys]
    errors[:] = [text.replace(f' {prefix}inner.', f' {prefix}', 1) for text in errors]


class GatedCall(Gated):
    """A module that is called with more than one tensor, and the gate of its output; TorchScript cannot read it."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the module, gated."""
        return self.excite(self.inner(*args, **kwargs))
