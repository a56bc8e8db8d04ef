"""Fast inference: batch norm folded into the convolutions, and SE at the price of one pass over memory."""
# no `from __future__ import annotations`: a graph traced by FX could not be scripted with them as strings
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import Conv2dSame, DropPath
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .errors import check_module, message
from .meta import copied
from .residual_blocks import Tail, block_of, is_hooked, is_identity

__all__ = ['NORMS', 'FoldedBlock', 'FoldedBottleneck', 'fold']

# by exact class: a subclass, such as a weight-standardised convolution, may do anything else with the same attributes
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (
    nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d)


class FoldedBlock(nn.Module):
    """A residual block with SE for inference: `act(shortcut + gate * out)`, `out = conv(body(x))`.

    The gate needs one read of `out`, scale and sum are one pass. The input is never modified.

    Shapes: `x (N, C_in, H, W)` to `(N, C, H', W')`.

    Args:
        body: Everything before the last convolution.
        conv: The last convolution, with its batch norm in it.
        gate: From the mean of `out`, `(N, C, 1, 1)`, to the gates of the same shape.
        downsample: The shortcut's projection, or None.
        act: The last activation, or None; it may work in place.
    """

    def __init__(
            self, body: nn.Sequential, conv: nn.Module, gate: nn.Module, downsample: nn.Module | None,
            act: nn.Module | None,
    ) -> None:
        super().__init__()
        self.body = body
        self.conv = conv
        self.gate = gate
        self.downsample = downsample or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.conv(self.body(x))
        gate = self.gate(out.mean((2, 3), keepdim=True))
        return self.act(self.scale_and_add(self.downsample(x), out, gate))

    def scale_and_add(self, shortcut: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        """Return `shortcut + gate * out` in one pass; `out` may be overwritten."""
        if torch.jit.is_scripting() or not self.is_free(shortcut, out, gate):
            return torch.addcmul(shortcut, out, gate)
        return torch.addcmul(shortcut, out, gate, out=out)  # fresh memory costs half as much again on the CPU

    @torch.jit.unused
    def is_free(self, shortcut: Tensor, out: Tensor, gate: Tensor) -> bool:
        """Return whether nothing but the sum needs `out`: no gradient, graph or hook, no other dtype by autocast."""
        return (not torch.is_grad_enabled() and type(out) is Tensor and shortcut.dtype == out.dtype == gate.dtype
                and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
                and torch._C._functorch.peek_interpreter_stack() is None
                and not is_hooked(self.conv) and not torch_module._has_any_global_hook())


class FoldedBottleneck(FoldedBlock):
    """A `FoldedBlock` whose gate reads `h = body(x)`, in a bottleneck a quarter of the size of `out = conv(h)`.

    The last convolution is 1x1, and the mean over the positions commutes with it: `mean(W h + b) = W mean(h) + b`. Its
    weights are in the first layer of `gate` already.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.body(x)
        gate = self.gate(h.mean((2, 3), keepdim=True))
        return self.act(self.scale_and_add(self.downsample(x), self.conv(h), gate))


FOLDED = (FoldedBlock, FoldedBottleneck)


@torch.no_grad()
def fold(net: nn.Module) -> nn.Module:
    """Return a copy of `net` for fast inference, in eval mode and without gradients of its parameters.

    Batch norm is folded into the convolution before it, wherever the forward method of a module, as `torch.fx` reads
    it, calls the one directly on the other. Residual blocks that end in batch norm -> SE -> sum -> activation, SE being
    the excitation of the channels' means, become a `FoldedBlock` or a `FoldedBottleneck`; others keep their modules.
    Folding is done in float64 and does not change dtype, device or memory format. The outputs are those of `net` in
    eval mode but for rounding. Gates that have become part of a folded block are none of `find_se`'s any more.

    What stays as it is: a batch norm without running statistics; a convolution whose output or weight is used elsewhere
    in the forward methods; convolutions and batch norms that are called twice, that stand in several places of the
    network, that have hooks or parametrizations, or a forward method of their own; what a forward method calls that
    `torch.fx` cannot read, for each argument that is given or left out, unless all callers leave it out. What other
    methods, or code outside of the network, do with the output of a convolution cannot be seen.

    Args:
        net: Any network, in any mode; it is not changed.

    Raises:
        ValueError: If there is nothing to fold.

    The arithmetic of batch norm is `torch.nn.utils.fusion`'s.
    """
    check_module('fold', net)
    folded = copied('fold', net).eval()
    places = Counter(id(module) for _, module in folded.named_modules(remove_duplicate=False))
    shared = {key for key, count in places.items() if count > 1}
    folded = exchange_blocks(folded, shared)
    fold_pairs(folded, shared)
    for module in folded.modules():
        if isinstance(module, FoldedBlock):  # its batch norms are identities now
            module.body = nn.Sequential(*(step for step in module.body if not is_identity(step)))
    if count(folded, *NORMS) == count(net, *NORMS) and count(folded, *FOLDED) == count(net, *FOLDED):
        raise ValueError(message(
            f'fold({type(net).__name__})',
            'it is folded already' if count(net, *FOLDED) else
            'it has no batch norm with running statistics that directly follows a convolution without hooks',
            'leave fold out, and use the network as it is',
        ))
    return folded.eval().requires_grad_(False)  # again: new modules are in training mode


def count(net: nn.Module, *classes: type) -> int:
    """Return how many modules in `net` are exactly of one of `classes`."""
    return sum(type(module) in classes for module in net.modules())


# What a forward method does


def is_whole(module: nn.Module) -> bool:
    """Return whether a call of `module` is one step of what calls it."""
    return type(module) is not nn.Sequential or is_hooked(module)


class Tracer(fx.Tracer):
    """Reads one forward method, and those of the `nn.Sequential` that it calls; all other modules are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` is called as a whole."""
        return is_whole(m)


def trace(module: nn.Module, defaults: bool = True) -> fx.Graph | None:
    """Return what `forward` of `module` does with the defaults of its arguments, or with all of them given.

    None if that cannot be read.
    """
    if 'forward' in vars(module):  # `torch.fx` would read that of the class
        return None
    try:
        return Tracer().trace(module, concrete_args=defaults_of(module) if defaults else None)
    except Exception:  # this runs code of others on stand-ins for tensors: it may fail in any way
        return None


def arguments_of(module: nn.Module) -> list[inspect.Parameter]:
    """Return the arguments of the forward method of a module, but for itself."""
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def defaults_of(module: nn.Module) -> dict[str, Any]:
    """Return the arguments of the forward method of a module that need not be given, with their defaults."""
    return {given.name: given.default for given in arguments_of(module) if given.default is not given.empty}


def is_call(node: fx.Node) -> bool:
    """Return whether `node` calls a module on one other node."""
    return (node.op == 'call_module' and not node.kwargs and len(node.args) == 1
            and isinstance(node.args[0], fx.Node))


def chain(module: nn.Module, nodes: Iterable[fx.Node], start: fx.Node) -> list[nn.Module] | None:
    """Return the modules that `nodes` call one after the other, beginning with the value of `start`, or None."""
    modules = []
    for node in nodes:
        if not is_call(node) or node.args[0] is not start:
            return None
        modules.append(module.get_submodule(str(node.target)))
        start = node
    return modules


# Batch norm


def fold_pairs(net: nn.Module, shared: set[int]) -> None:
    """Fold the batch norms that a forward method in `net` calls directly on the output of a convolution."""
    graphs = forward_methods(net)
    uses = Counter(id(used) for module, graph in graphs for used in used_modules(module, graph))
    varying = with_other_arguments(net, graphs)
    for module, graph in graphs:
        pairs = direct_calls(graph)
        if id(module) in varying:
            given = trace(module, defaults=False)
            pairs = [pair for pair in pairs if given is not None and pair in direct_calls(given)]
        for source, target in pairs:
            conv, norm = module.get_submodule(source), module.get_submodule(target)
            if uses[id(conv)] == uses[id(norm)] == 1 and can_fold(conv, norm, shared):
                fold_norm(conv, norm)
                module.set_submodule(target, what_remains(norm))


def with_other_arguments(net: nn.Module, graphs: list[tuple[nn.Module, fx.Graph]]) -> set[int]:
    """Return the modules, by their ids, that may be called with others than the defaults, as their graph is."""
    optional = {id(module): defaults_of(module) for module, _ in graphs}
    plain, others = {id(net)}, set()
    for module, graph in graphs:
        for node in graph.find_nodes(op='call_module'):
            callee = module.get_submodule(str(node.target))
            names = [given.name for given in arguments_of(callee)] if optional.get(id(callee)) else []
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            if all(given.get(name, default) is default for name, default in optional.get(id(callee), {}).items()):
                plain.add(id(callee))
            else:
                others.add(id(callee))
    return {id(module) for module, _ in graphs if optional[id(module)] and id(module) not in plain - others}


def forward_methods(net: nn.Module) -> list[tuple[nn.Module, fx.Graph]]:
    """Return the modules in `net` that have batch norms in them and can be read, with what they do.

    An `nn.Sequential` is read as part of what calls it only: it may be that its modules are called one by one.
    """
    candidates = [module for module in net.modules()
                  if (module is net or is_whole(module)) and type(module) not in NORMS and count(module, *NORMS)]
    return [(module, graph) for module in candidates if (graph := trace(module)) is not None]


def used_modules(module: nn.Module, graph: fx.Graph) -> list[nn.Module]:
    """Return the modules that `graph`, of `module`, calls, or takes a parameter of; as often as it does."""
    names = [str(node.target) if node.op == 'call_module' else str(node.target).rpartition('.')[0]
             for node in graph.nodes if node.op in ('call_module', 'get_attr')]
    return [module.get_submodule(name) for name in names]


def direct_calls(graph: fx.Graph) -> list[tuple[str, str]]:
    """Return the pairs of modules of which the second is called on the output of the first, which nothing else gets."""
    return [(str(source.target), str(node.target)) for node in graph.nodes
            if is_call(node) and (source := node.args[0]).op == 'call_module' and len(source.users) == 1]


def can_fold(conv: Any, norm: Any, shared: set[int]) -> bool:
    """Return whether `norm` can be folded into `conv`, if it is called directly on the output of that."""
    return (type(conv) in CONVOLUTIONS and type(norm) in NORMS
            and norm.running_mean is not None and norm.running_var is not None
            and not {id(conv), id(norm)} & shared and not is_hooked(conv) and not is_hooked(norm))


def fold_norm(conv: Any, norm: Any) -> None:
    """Multiply `norm` into the weight and the bias of `conv`."""
    weight, bias = fuse_conv_bn_weights(
        wide(conv.weight), wide(conv.bias), wide(norm.running_mean), wide(norm.running_var), norm.eps,
        wide(norm.weight), wide(norm.bias))
    set_weights(conv, weight, bias, like=conv.weight)


def what_remains(norm: Any) -> nn.Module:
    """Return what timm's batch norms do after the normalisation: dropout and activation."""
    modules = [getattr(norm, name, None) for name in ('drop', 'act')]
    present = [module for module in modules if module is not None and not is_identity(module)]
    return present[0] if len(present) == 1 else nn.Sequential(*present) if present else nn.Identity()


def wide(tensor: Any) -> Any:
    """Return `tensor` in float64, on the CPU where the device has none; None stays None."""
    if tensor is None:
        return None
    return tensor.to('cpu' if tensor.device.type == 'mps' else tensor.device, torch.float64)


def set_weights(conv: Any, weight: Tensor, bias: Tensor, like: Tensor) -> None:
    """Give `conv` new parameters, with dtype and device of `like`."""
    conv.weight = nn.Parameter(weight.to(like), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(like), requires_grad=False)


# Residual blocks


def exchange_blocks(module: nn.Module, shared: set[int]) -> nn.Module:
    """Return `module`, with the residual blocks in it, itself included, exchanged where that is possible."""
    block = folded_block(module, shared)
    if block is not None:
        return block
    for name, child in module.named_children():
        exchanged = exchange_blocks(child, shared)
        if exchanged is not child:
            module.set_submodule(name, exchanged)
    return module


def folded_block(block: nn.Module, shared: set[int]) -> FoldedBlock | None:
    """Return the folded form of a residual block, or None if `block` is not one that has it."""
    known = block_of(block)
    if known is None or any(is_hooked(module) for module in block.modules()):
        return None
    tail = known.tail(block)
    if not isinstance(tail, Tail) or tail.se is None or id(block) in shared:
        return None
    if not is_identity(tail.drop_path) and type(tail.drop_path) is not DropPath:
        return None
    body, excitation = body_of(block, known.body), excitation_of(tail.se)
    if body is None or excitation is None:
        return None
    if can_fold(tail.conv, tail.norm, shared) and is_identity(what_remains(tail.norm)):
        fold_norm(tail.conv, tail.norm)
    elif not is_identity(tail.norm) or type(tail.conv) not in CONVOLUTIONS:
        return None
    # the sum is a new tensor, so that the activation may always work in it
    act = nn.ReLU(inplace=True) if type(tail.act) is nn.ReLU else tail.act
    if is_pointwise(tail.conv) and is_pointwise(excitation[0]) and excitation[0].groups == 1:
        gate = nn.Sequential(composed(tail.conv, excitation[0]), *excitation[1:])
        return FoldedBottleneck(nn.Sequential(*body), tail.conv, gate, tail.downsample, act)
    return FoldedBlock(nn.Sequential(*body), tail.conv, nn.Sequential(*excitation), tail.downsample, act)


class Body(nn.Module):
    """The part of a block before its last convolution, as a module that can be traced."""

    def __init__(self, block: nn.Module, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of the last convolution."""
        return self.body(self.block, x)


def body_of(block: nn.Module, body: Callable[[Any, Tensor], Tensor]) -> list[nn.Module] | None:
    """Return the modules that `body` applies one after the other, or None if it does anything else."""
    root = Body(block, body)
    if (graph := trace(root)) is None:
        return None
    x, *nodes, output = graph.nodes
    modules = chain(root, nodes, start=x)
    if modules is None or output.args != ((nodes[-1] if nodes else x),):
        return None
    return [module for module in modules if not is_identity(module)]


def excitation_of(se: nn.Module) -> list[Any] | None:
    """Return the modules between the means and the gates if `se` is `x * excitation(mean_hw(x))`, else None."""
    graph = trace(se)
    if graph is None or len(graph.nodes) < 5:
        return None
    x, mean, *nodes, product, output = graph.nodes
    squeezes = (mean.op, mean.target, mean.args, mean.kwargs) == ('call_method', 'mean', (x, (2, 3)), {'keepdim': True})
    scales = product.target is operator.mul and product.args in ((x, nodes[-1]), (nodes[-1], x))
    return chain(se, nodes, start=mean) if squeezes and scales and output.args == (product,) else None


def is_pointwise(module: nn.Module) -> bool:
    """Return whether `module` is a 1x1 convolution that maps each position to one position."""
    return (type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.stride == (1, 1)
            and module.padding == (0, 0))


def composed(first: Any, second: Any) -> nn.Module:
    """Return the 1x1 convolution that does what the 1x1 convolutions `first` and then `second` do.

    `F (W m + b) + f = (F W) m + (F b + f)`: here it maps the means of C / 4 channels to C / r ones.
    """
    inner = torch.block_diag(*wide(first.weight).flatten(1).chunk(first.groups))  # groups are blocks of one matrix
    outer = wide(second.weight).flatten(1)
    bias = outer.new_zeros(len(outer))
    if first.bias is not None:
        bias = bias + outer @ wide(first.bias)
    if second.bias is not None:
        bias = bias + wide(second.bias)
    conv = nn.Conv2d(first.in_channels, second.out_channels, kernel_size=1, device='meta')  # spares the initialisation
    set_weights(conv, (outer @ inner)[:, :, None, None], bias, like=second.weight)
    return conv
