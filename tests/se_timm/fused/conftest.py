"""Triton's kernels: run on the CPU by its interpreter, on CUDA where there is a GPU; or compiled for a Hopper GPU."""
import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from se_timm.fused import kernels, launch, vector_kernels
from se_timm.fused.function import Passes

MODULES = ('launch', 'kernels', 'vector_kernels')
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int64: '*i64'}


@pytest.fixture(scope='session')
def load():
    """Return a function that runs modules of the kernels once more, and returns them as attributes."""
    def run(*names):
        with pytest.MonkeyPatch.context() as patch:
            for name in MODULES:
                patch.delitem(sys.modules, f'se_timm.fused.{name}')
                patch.setattr(sys.modules['se_timm.fused'], name, None)
            return SimpleNamespace(**{name: importlib.import_module(f'se_timm.fused.{name}') for name in names})

    return run


@pytest.fixture(scope='session')
def interpreted(load):
    """Return the modules with kernels that the interpreter runs: Triton asks for this while it decorates them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        return load(*MODULES)


@pytest.fixture(params=[
    'interpreter', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'))])
def backend(request, interpreted, monkeypatch):
    """Return the module under test, its passes and steps, and a function that gives random tensors on its device."""
    tl = pytest.importorskip('triton').language
    modules = SimpleNamespace(launch=launch, kernels=kernels, vector_kernels=vector_kernels)
    device = 'cuda'
    if request.param == 'interpreter':
        modules, device = interpreted, 'cpu'
        # `tl.sum` was decorated when Triton was imported, not to be interpreted
        monkeypatch.setattr(tl, 'sum', lambda value, axis: tl.reduce(value, axis, tl.standard._sum_combine))
    generator = torch.Generator().manual_seed(0)

    def full(*shape, dtype=torch.float32, memory_format=None):
        value = torch.randn(shape, generator=generator).to(device, dtype)
        return value if memory_format is None else value.contiguous(memory_format=memory_format)

    return SimpleNamespace(
        module=modules.kernels, vectors=modules.vector_kernels.VECTORS,
        track=modules.vector_kernels.track, full=full,
        passes=Passes(*(getattr(modules.kernels, name) for name in Passes._fields)))


@pytest.fixture
def for_hopper(tmp_path):
    """Return a function that compiles a kernel as a launch would on an H100, and returns the code for its driver."""
    triton = pytest.importorskip('triton')

    def in_memory(name):
        """Return which bytes may be: Triton 3.9 keeps two registers of `_weigh` there, to fit a fourth program."""
        return '[08]' if name == '_weigh' and Version(triton.__version__) >= Version('3.9') else '0'

    def run(kernel, warps, arguments):
        signature, constants, attributes = {}, {}, {}
        for position, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(position,)] = 'constexpr', value
            if isinstance(value, torch.Tensor) or (signature[parameter.name] == 'i32' and value % 16 == 0):
                attributes[(position,)] = [['tt.divisibility', 16]]
        code = triton.compile(
            triton.compiler.ASTSource(kernel, signature, constants, attributes),
            target=triton.backends.compiler.GPUTarget('cuda', 90, 32), options={'num_warps': warps, **launch.OPTIONS})
        (tmp_path / 'cubin').write_bytes(code.asm['cubin'])
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, '-res-usage', tmp_path / 'cubin'],
                               check=True, capture_output=True, text=True).stdout
        name = kernel.__name__
        assert re.search(rf'STACK:{in_memory(name)}\b', usage), f'{name} holds registers in memory: {usage}'
        return code.asm['ptx']

    return run
