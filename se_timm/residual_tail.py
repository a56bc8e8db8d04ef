"""The end of a residual block, batch norm -> SE -> drop path -> (+ shortcut) -> (ReLU): fused, or by its modules."""
from typing import Any, NamedTuple, Optional, cast

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, DropPath, SEModule, get_act_layer
from timm.layers.norm_act import SyncBatchNormAct
from timm.models import senet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from .errors import check_module
from .fused import launch
from .fused.function import REFERENCE, Gate, Moments, Norm, Passes, fused_tail
from .fused.inductor import COMPILED, compiled
from .fused.operators import OPERATORS, TRITON, backend_passes
from .fused.recompute import Convolution, norm_relu_conv
from .fused.vector_kernels import VECTORS, track
from .fused.vectors import PLAIN, Vectors
from .residual_blocks import HOOKED, OwnBlock, Step, Tail, is_hooked, is_identity
from .squeeze_excite import EXCITATIONS, IdentityGate, SqueezeExcite

__all__ = [
    'BACKENDS', 'Choice', 'ResidualTail', 'choose', 'explain', 'is_plain', 'recompute_problem', 'residual_tail',
    'structure_problem', 'tail_of',
]

BACKENDS = ('auto', 'fused', 'reference')
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
# values of a block's input from which on `auto` fuses its tail on CUDA outside of torch.compile. Below, the host sets
# the pace, and for it the modules are quicker: SE-ResNet-50 at 224 px gains with 256 images and loses with 32 (H200)
LEAST_VALUES = 2**24
EXCITATION_OF: dict[type, str] = {
    nn.Sigmoid: 'sigmoid', nn.Tanh: 'tanh', nn.ReLU: 'relu', nn.Hardsigmoid: 'hard_sigmoid',
    **{get_act_layer(name): name for name in EXCITATIONS},
}


class Choice(NamedTuple):
    """Whether a tail is fused here and now, and why."""

    fused: bool
    reason: str


class ResidualTail(OwnBlock):
    """A residual block whose end is fused where that can be done and pays; a mixin of block classes.

    A class has `body(x)`, everything before the last convolution; `tail()`, the rest (`residual_blocks.Tail`, or in
    words why it is none); and `reference(x)`, the whole block by its modules, which runs wherever the fused end does
    not.

    Attributes:
        backend: `'auto'`, `'fused'` or `'reference'`, see `choose`.
        recompute: Where the tail is fused, keep the outputs of the batch norms and ReLUs before it no longer than the
            forward pass, and compute them again in the backward pass: less memory for one more pass over each.
    """

    backend = 'auto'
    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output `(N, C', H', W')` for `x (N, C, H, W)`."""
        if not torch.jit.is_scripting():
            fused = self.fused(x)
            if fused is not None:
                return fused
        return self.reference(x)  # type: ignore[attr-defined]

    @torch.jit.unused
    def fused(self, x: Tensor) -> Optional[Tensor]:  # noqa: UP045  (TorchScript reads it)
        """Return the output by way of the fused tail, or None where the modules are to compute it."""
        block: Any = self
        tail: Any = tail_of(block)
        if not choose(tail, x, self.backend, block.training).fused:
            return None
        if self.recompute and not recompute_problem(steps := block.steps(), tail.conv):
            return residual_tail(tail, recomputed_body(steps, tail.conv, x), x)
        return residual_tail(tail, tail.conv(block.body(x)), x)


def tail_of(block: Any) -> Tail | str:
    """Return the tail of a block of this package, or in words why it has none."""
    return f'its class {type(block).__name__} has another {block.untold}' if block.untold else block.tail()


def choose(
        tail: Tail | str, x: Tensor, backend: str = 'auto', training: bool = True, compiled: bool | None = None,
) -> Choice:
    """Return whether `residual_tail` is to compute a tail, and the reason.

    Never in evaluation, whose numbers are those of the modules to the bit, and never where the fused function has no
    meaning: while a graph is recorded, under `torch.func`, with forward-mode derivatives. Otherwise `'fused'` means
    wherever the modules allow it, and `'auto'` where it was measured to pay: within `torch.compile`, and on CUDA for
    inputs of `LEAST_VALUES` or more. (On the CPU outside of `torch.compile` each pass is compiled by itself, about a
    minute for a large network; say `'fused'` for that.)

    Args:
        tail: The modules, or in words why there is no tail.
        x: Input of the block.
        backend: `'auto'`, `'fused'` or `'reference'`.
        training: Whether the block is in training mode.
        compiled: Whether this is within `torch.compile`; where not given, as it is now.
    """
    if backend == 'reference':
        return Choice(False, "the backend is 'reference'")
    if not training:
        return Choice(False, 'evaluation is computed by the modules')
    problem = tail if isinstance(tail, str) else is_recorded(x) or structure_problem(tail)
    if problem:
        return Choice(False, problem)
    if x.device.type not in ('cpu', 'cuda'):
        return Choice(False, f'there are no kernels for the device {x.device.type}')
    if backend == 'fused':
        return Choice(True, "the backend is 'fused'")
    if torch.compiler.is_compiling() if compiled is None else compiled:
        return Choice(True, f'within torch.compile on {x.device.type}')
    if x.device.type == 'cuda':
        return automatic_on_cuda(x)
    return Choice(False, "on the CPU outside of torch.compile; take the backend 'fused' for a long training")


def automatic_on_cuda(x: Tensor) -> Choice:
    """Return whether `'auto'` is to fuse a tail on CUDA."""
    if problem := launch.problem():
        return Choice(False, problem)
    if x.dtype == torch.float64:
        return Choice(False, 'the kernels for CUDA compute in float32, not in float64')
    if x.ndim == 4 and x.numel() < LEAST_VALUES:
        return Choice(False, f'its input has fewer than {LEAST_VALUES} values: the launches would cost more time')
    return Choice(True, 'by Triton on CUDA')


def is_recorded(x: Tensor) -> str:
    """Return in words what keeps an `autograd.Function` from having its meaning here, or an empty text."""
    # not `is_exporting()`: torch 2.11 compiles that to True within `torch.compile` too
    if torch.compiler._is_exporting_flag:
        return 'the network is being exported'
    if torch.compiler.is_compiling():
        return ''
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        return 'the network is being traced'
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'a transformation of torch.func is active'
    if torch._C._is_fwd_grad_enabled() and forward_ad._current_level >= 0:
        return 'forward-mode derivatives are being taken'
    return ''


def structure_problem(tail: Tail) -> str:
    """Return in words which module of `tail` the fused function cannot stand for, or an empty text."""
    if is_any_hooked(tail):
        return HOOKED
    if type(tail.norm) not in BATCH_NORMS or not is_plain(tail.norm):
        return f'its norm is a {type(tail.norm).__name__}'
    if tail.act is not None and type(tail.act) is not nn.ReLU:
        return f'its activation is {type(tail.act).__name__}'
    if tail.drop_path is not None and type(tail.drop_path) is not DropPath:
        return f'its drop path is {type(tail.drop_path).__name__}'
    if is_synchronised(tail.norm) and torch.compiler.is_compiling():
        return 'its batch norm is synchronised between processes within torch.compile'
    return gate_problem(tail.se)


def is_any_hooked(tail: Tail) -> bool:
    """Return whether something would be called with a module that the fused function stands for."""
    norm: Any = tail.norm
    gate = [] if tail.se is None else list(tail.se.modules())
    within = (getattr(norm, 'act', None), getattr(norm, 'drop', None))  # identities of timm's batch norms
    return torch_module._has_any_global_hook() or any(
        is_hooked(module) for module in (norm, *within, tail.act, tail.drop_path, *gate) if module is not None)


def is_plain(norm: nn.Module) -> bool:
    """Return whether a batch norm of timm has neither an activation nor a dropout of its own."""
    return is_identity(getattr(norm, 'act', None)) and is_identity(getattr(norm, 'drop', None))


def gate_problem(se: nn.Module | None) -> str:
    """Return in words why the gates of `se` cannot be computed from the moments, or an empty text."""
    if se is None:
        return ''
    if type(se) not in (SqueezeExcite, SEModule, senet.SEModule):
        return f'its attention is {type(se).__name__}'
    block: Any = se
    if getattr(block, 'squeeze', 'avg') != 'avg' or getattr(block, 'add_maxpool', False):
        return 'its squeeze is not the average'
    hidden = block.relu if type(se) is senet.SEModule else block.act
    if type(hidden) is not nn.ReLU or not is_identity(getattr(block, 'bn', None)):
        return 'its hidden layer is not a ReLU alone'
    if any(type(layer) is not nn.Conv2d or layer.kernel_size != (1, 1) or layer.groups != 1
           for layer in (block.fc1, block.fc2)):
        return 'its layers are not 1x1 convolutions'
    if not excitation_of(block):
        return f'its excitation is {type(last_of(block)).__name__}'
    return ''


def last_of(se: Any) -> nn.Module:
    """Return the last non-linearity of an SE block."""
    return se.sigmoid if type(se) is senet.SEModule else se.gate


def excitation_of(se: Any) -> str:
    """Return the last non-linearity of an SE block, a key of `fused.vectors.EXCITATIONS`; else an empty text."""
    gate = last_of(se)
    if isinstance(gate, IdentityGate):
        return f'identity_{gate.excitation}'
    return EXCITATION_OF.get(type(gate), '')


def is_synchronised(norm: nn.Module) -> bool:
    """Return whether `norm` takes its statistics over several processes."""
    return (isinstance(norm, nn.SyncBatchNorm) and norm.training
            and dist.is_available() and dist.is_initialized() and dist.get_world_size(norm.process_group) > 1)


def residual_tail(tail: Tail, x: Tensor, shortcut: Tensor) -> Tensor:
    """Return `act(drop_path(se(norm(x))) + downsample(shortcut))`, fused; running statistics are updated.

    Args:
        tail: The modules, for which `choose` says that it can be done.
        x: Output of the last convolution, `(N, C, H, W)`.
        shortcut: Input of the block.

    Raises:
        ValueError: For an empty batch, or a single value per channel.
    """
    shortcut_norm = None
    if tail.downsample is not None:
        shortcut, shortcut_norm = projected(tail.downsample, shortcut)
    norm: Any = tail.norm
    y, moments, shortcut_moments = fused_tail(
        x, shortcut, norm_of(norm), gate=gate_of(tail.se), keep=drawn(tail.drop_path, x),
        shortcut_norm=None if shortcut_norm is None else norm_of(shortcut_norm), relu=tail.act is not None,
        **computed_by(x, is_synchronised(norm) or (shortcut_norm is not None and is_synchronised(shortcut_norm))))
    update_statistics(norm, moments)
    if shortcut_norm is not None and shortcut_moments is not None:
        update_statistics(shortcut_norm, shortcut_moments)
    return y


def recompute_problem(steps: list[Step] | str, last: nn.Module) -> str:
    """Return in words why what lies between the convolutions of a block cannot be computed again, or an empty text.

    Args:
        steps: The body of the block, or in words why it does not consist of steps.
        last: The convolution after it.
    """
    if isinstance(steps, str):
        return steps
    for step, conv in zip(steps, [*(step.conv for step in steps[1:]), last], strict=True):
        norm, act = step.norm, step.act
        if type(norm) not in BATCH_NORMS or not is_plain(norm) or type(act) is not nn.ReLU:
            return f'it has a {type(norm).__name__} and a {type(act).__name__}'
        if type(conv) is not nn.Conv2d or conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
            return f'its {type(conv).__name__} is not a plain convolution'
        if any(is_hooked(module) for module in (norm, act, conv)):
            return 'one of its modules has hooks'
        if is_synchronised(norm) and torch.compiler.is_compiling():
            return 'its batch norm is synchronised between processes within torch.compile'
    return ''


def recomputed_body(steps: list[Step], last: nn.Module, x: Tensor) -> Tensor:
    """Return the output of the last convolution, keeping nothing between the convolutions for the backward pass."""
    x = steps[0].conv(x)
    for step, following in zip(steps, [*(step.conv for step in steps[1:]), last], strict=True):
        norm, conv = step.norm, cast(Any, following)
        convolution = Convolution(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        passes = passes_for(x)
        x, moments = norm_relu_conv(x, norm_of(norm), convolution, passes, vectors_for(passes))
        update_statistics(norm, moments)
    return x


def passes_for(x: Tensor) -> Passes:
    """Return what computes the passes here: within `torch.compile` what the compiler can see, if it compiles well."""
    if torch.compiler.is_compiling():
        return REFERENCE  # on CUDA too: what Triton computes as operators takes the host longer than the GPU
    # a fake tensor, another subclass, or a mode that is to see what is done, as of `make_fx`: operators are seen
    if type(x) not in (Tensor, nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return OPERATORS
    return backend_passes(x)


def computed_by(x: Tensor, synchronised: bool) -> dict[str, Any]:
    """Return what computes the passes, and runs the halves, as arguments of `fused_tail`.

    What Inductor compiles on the CPU are the halves as a whole, unless processes exchange moments within them.
    """
    passes = passes_for(x)
    if passes is COMPILED and not synchronised:
        return {'passes': REFERENCE, 'half': compiled}
    return {'passes': passes, 'vectors': vectors_for(passes)}


def vectors_for(passes: Passes) -> Vectors:
    """Return what computes the steps between the passes."""
    return VECTORS if passes is TRITON else PLAIN


def projected(downsample: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """Return the shortcut, and the batch norm that it is still to pass if there is one at its end."""
    if type(downsample) is nn.Sequential and len(downsample) and not is_hooked(downsample):
        last = downsample[-1]
        if type(last) in BATCH_NORMS and is_plain(last) and not is_hooked(last) and not (
                is_synchronised(last) and torch.compiler.is_compiling()):
            for module in list(downsample)[:-1]:
                x = module(x)
            return x, last
    return downsample(x), None


def norm_of(norm: Any) -> Norm:
    """Return what the fused function needs of a batch norm."""
    running = None
    if not norm.training and norm.running_mean is not None:
        running = norm.running_mean, norm.running_var
    group = (norm.process_group or dist.group.WORLD) if is_synchronised(norm) else None
    return Norm(norm.weight, norm.bias, running, norm.eps, group)


def gate_of(se: Any) -> Gate | None:
    """Return the weights of an SE block."""
    if se is None:
        return None
    return Gate(se.fc1.weight.flatten(1), se.fc1.bias, se.fc2.weight.flatten(1), se.fc2.bias,
                excitation_of(se))


def drawn(drop_path: Any, x: Tensor) -> Tensor | None:
    """Return the factor of each image's branch `(N,)`, drawn as timm's `DropPath` draws it."""
    if drop_path is None or drop_path.drop_prob == 0. or not drop_path.training:
        return None
    kept = 1 - drop_path.drop_prob
    keep = x.new_empty((len(x), 1, 1, 1)).bernoulli_(kept).flatten()
    return keep.div_(kept) if kept > 0 and drop_path.scale_by_keep else keep


@torch.no_grad()
def update_statistics(norm: Any, moments: Moments) -> None:
    """Update the running statistics of `norm` as `nn.BatchNorm2d` does, without asking the device for the count."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    running = norm.running_mean, norm.running_var
    if isinstance(moments.values, int) and tracked_by_triton(norm, moments.mean):
        track(*running, norm.num_batches_tracked, moments.mean, moments.variance, norm.momentum, moments.values)
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the average over all batches
            factor = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    if factor is None:  # an average over batches that nobody counts
        return
    unbiased = moments.variance * (moments.values / (moments.values - 1))
    for statistic, value in zip(running, (moments.mean, unbiased), strict=True):
        statistic.lerp_(value.to(statistic.dtype), factor)


def tracked_by_triton(norm: Any, mean: Tensor) -> bool:
    """Return whether one kernel can update the running statistics: each of the operations of torch is a launch."""
    if norm.momentum is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    counter = norm.num_batches_tracked
    return (type(mean) is Tensor and mean.is_cuda and not launch.problem()
            and (counter is None or counter.device == mean.device)
            and all(value.device == mean.device and value.dtype == torch.float32 and value.is_contiguous()
                    for value in (norm.running_mean, norm.running_var, mean)))


class Choices(dict[str, Choice]):
    """The choices for the blocks of a network, by their names; as text, a line for each reason."""

    def __str__(self) -> str:
        lines = []
        for choice in dict.fromkeys(self.values()):
            names = [name for name, other in self.items() if other == choice]
            lines.append(f'{"fused" if choice.fused else "by the modules"}, {choice.reason}: {", ".join(names)}')
        return '\n'.join(lines) or 'it has no block of this package, and none that fuse was called for'


def explain(net: nn.Module, compiled: bool = False) -> Choices:
    """Return for each residual block of `net` whether its tail is fused in training, and why.

    What depends on the input is left out: on CUDA, `'auto'` asks for `LEAST_VALUES` in all images together.

    Args:
        net: A network of this package, or one of timm's after `fuse`.
        compiled: Ask for a training within `torch.compile`.

    Raises:
        ValueError: If `net` is no network.
    """
    check_module('explain', net)
    choices = Choices()
    for name, block in net.named_modules():
        if isinstance(block, ResidualTail):
            tail = tail_of(block)
            x = next(block.parameters()).new_empty(0)  # type: ignore[attr-defined]
            choices[name] = choose(tail, x, block.backend, compiled=compiled)
    return choices
