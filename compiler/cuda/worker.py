"""One kernel to machine code through Triton. In processes of its own: Triton holds the GIL."""

from __future__ import annotations

import importlib
import os
import subprocess
from functools import cache

from ...engines.errors import CompileError
from ...engines.plan import KernelImage
from ...plugins.launches import Kernel
from .machine_code import read_machine_code

# Triton passes two pointers behind the arguments: global and profile scratch. Kernels that need them are not launched.
_HIDDEN = 2


def prepare_process(directory: str) -> None:
    """Once, before Triton is imported: what its environment decides must not depend on the user's.

    directory: for Triton's own cache, which is of no use afterwards
    """
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    os.environ["TRITON_CACHE_DIR"] = directory
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # it would hold the paths of this machine


def compile_kernel(kernel: Kernel, arch: int, file: str) -> tuple[KernelImage, bytes]:
    """The kernel's description, as in a plan that has its cubin in `file`, and the cubin.

    Deterministic: the same kernel, sources and version of Triton give the same bytes. Raises CompileError where
    Triton's assembler does not know the architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _require_architecture(arch)
    module = importlib.import_module(f"...plugins.{kernel.plugin}.triton", __package__)
    function = getattr(module, kernel.function)
    types, constants = dict(kernel.parameters), dict(kernel.constants)
    unknown = (set(types) | set(constants)) ^ set(function.arg_names)
    assert not unknown, f"{kernel.name}: parameters {unknown} are given or wanted, not both"
    pointers = [name for name, kind in kernel.parameters if kind.startswith("*")]
    source = ASTSource(
        function,
        {name: "constexpr" if name in constants else types[name] for name in function.arg_names},
        constants,
        {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
        "launch_pdl": kernel.pdl,
        "maxnreg": kernel.registers or None,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata, cubin = compiled.metadata, compiled.asm["cubin"]
    assert metadata.global_scratch_size == 0, f"{kernel.name} needs global scratch"
    assert metadata.num_ctas == 1, f"{kernel.name} is launched in clusters"
    code = read_machine_code(cubin)
    image = KernelImage(
        name=kernel.name,
        file=file,
        symbol=metadata.name,
        role=kernel.role,
        arch=arch,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        instruction=code.instruction,
        parameters=tuple("pointer" if kind.startswith("*") else kind for _, kind in kernel.parameters),
        hidden=_HIDDEN,
        pdl=kernel.pdl,
    )
    return image, cubin


@cache
def _require_architecture(arch: int) -> None:
    """Before Triton asks: it would print pages."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    command = [get_ptxas(arch).path, f"--gpu-name={sm_arch_from_capability(arch)}", "--version"]
    if subprocess.run(command, capture_output=True).returncode:
        raise CompileError(
            f"cuda-sm{arch}: the assembler of Triton {triton.__version__} does not know this architecture. Install the "
            f'version that knows every target: pip install "enginery[cuda]"'
        )
