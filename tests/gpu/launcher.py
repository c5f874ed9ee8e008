"""Launches of the plugins' kernels on torch tensors: on a GPU the machine code that engines hold.

With TRITON_INTERPRET=1 Triton's interpreter runs them on the CPU instead, at the sizes that it can: so the tests
themselves are tried out where there is no GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from enginery.compiler.cuda.choice import compile_chosen
from enginery.compiler.cuda.kernels import CompiledKernel, compile_kernels
from enginery.engines.errors import CompileError
from enginery.engines.expressions import evaluate
from enginery.engines.targets import TARGETS, Target
from enginery.plugins.launches import Kernel, Launch

from .driver import Function, make_current

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i8": torch.int8,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
_GARBAGE = 0x7B


@dataclass(frozen=True)
class Address:
    """A place in a tensor of bytes, `offset` bytes from its beginning."""

    tensor: torch.Tensor
    offset: int = 0


Argument = torch.Tensor | Address | int | float
_compiled: dict[str, CompiledKernel] = {}
_chosen: dict[Kernel, Kernel] = {}


def target() -> Target:
    """Of the first GPU; where there is none, an H200: its kernels can be compiled, or interpreted."""
    if INTERPRETED or not torch.cuda.is_available():
        return TARGETS["cuda-sm90"]
    major, minor = torch.cuda.get_device_capability(0)
    return TARGETS[f"cuda-sm{10 * major + minor}"]


def prepare(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Compiles what is missing, on all cores at once: one after the other they take minutes. Returns those that cannot
    be compiled; the others are.
    """
    if INTERPRETED:
        return []
    missing = [kernel for kernel in dict.fromkeys(kernels) if kernel.name not in _compiled]
    refused: list[Kernel] = []
    while missing:
        try:
            _compiled.update(compile_kernels(missing, target(), os.cpu_count() or 1))
            break
        except CompileError as error:
            # What the others have given is in the cache.
            named = [kernel for kernel in missing if f"kernel {kernel.name} " in str(error)]
            if len(missing) > 1 and ("terminated abruptly" in str(error) or not named):
                # The compiler itself broke down, and took the others with it.
                half = len(missing) // 2
                return [*refused, *prepare(missing[:half]), *prepare(missing[half:])]
            print(f"{error}"[:2000], flush=True)
            refused += named or missing
            missing = [kernel for kernel in missing if kernel not in refused]
    return refused


def compiled(kernel: Kernel) -> CompiledKernel:
    """The kernel's machine code and what is known of it."""
    if kernel.name not in _compiled:
        _compiled.update(compile_kernels([kernel], target(), 1))
    return _compiled[kernel.name]


def bind(kernel: Kernel, grid: tuple[int, int, int], arguments: Mapping[str, Argument]) -> Callable[[], None]:
    """A launch on torch's current stream, which can be made again and captured. Tensors have the kernel's types."""
    items = [(name, kind, arguments[name]) for name, kind in kernel.parameters]
    for name, kind, item in items:
        if isinstance(item, torch.Tensor):
            assert item.dtype == TYPES[kind], f"{kernel.name}: {name} is {item.dtype}, the kernel takes {kind}"
            assert item.is_contiguous(), f"{kernel.name}: {name} is not contiguous"
    if INTERPRETED:
        return _interpreted(kernel, grid, items)
    call = _function(kernel).bind(grid, [*(_packed(kind, item) for _, kind, item in items), *_hidden()])
    kept = list(arguments.values())  # or their memory would go to others

    def launch() -> None:
        assert kept is not None
        call(torch.cuda.current_stream().cuda_stream)

    return launch


def chosen(launch: Launch) -> Launch:
    """What an engine has of it: itself, or the first of its others whose machine code is as it must be."""
    if INTERPRETED or not launch.others:
        return launch
    ways = {each.kernel: each for each in (launch, *launch.others)}
    if launch.kernel not in _chosen:
        found = compile_chosen([tuple(ways)], target(), os.cpu_count() or 1)[launch.kernel.name]
        _chosen[launch.kernel] = next(kernel for kernel in ways if kernel.name == found.image.name)
        _compiled[found.image.name] = found
    return ways[_chosen[launch.kernel]]


def bind_launches(
    launches: Iterable[Launch],
    sizes: Mapping[str, int],
    inputs: Mapping[str, Argument],
    scratch: dict[str, torch.Tensor] | None = None,
) -> list[Callable[[], None]]:
    """Those whose guards hold for these sizes, in order, each as an engine has it (`chosen`). scratch: what they share
    by name, made where it is missing.
    """
    scratch, sizes = {} if scratch is None else scratch, dict(sizes)
    bound = []
    for case in map(chosen, launches):
        grid = (evaluate(case.grid[0], sizes), evaluate(case.grid[1], sizes), evaluate(case.grid[2], sizes))
        if not all(g.low <= sizes[g.variable] <= g.high for g in case.guard) or 0 in grid:
            continue
        for name, kind in case.kernel.parameters:
            if (memory := case.scratch.get(name)) is not None and name not in scratch:
                size, fill = evaluate(memory.bytes, sizes), 0 if memory.zeroed else _GARBAGE
                scratch[name] = torch.full((size,), fill, dtype=torch.uint8, device=DEVICE).view(TYPES[kind])
        values = {name: sizes[item] if isinstance(item, str) else item for name, item in case.values.items()}
        known: dict[str, Argument] = {**inputs, **scratch, **values}
        known |= {name: inputs[source] for name, source in case.inputs.items()}
        bound.append(bind(case.kernel, grid, {name: known[name] for name, _ in case.kernel.parameters}))
    return bound


def run_launches(
    launches: Iterable[Launch], sizes: Mapping[str, int], inputs: Mapping[str, Argument], times: int = 1
) -> None:
    """Launches those whose guards hold, `times` times; counters must be left at zero."""
    launches, scratch = list(launches), dict[str, torch.Tensor]()
    for call in bind_launches(launches, sizes, inputs, scratch) * times:
        call()
    zeroed = {name for case in launches for name, memory in case.scratch.items() if memory.zeroed}
    for name in zeroed & set(scratch):
        assert not scratch[name].any(), f"{name} is not left at zero"


@cache
def _function(kernel: Kernel) -> Function:
    image = compiled(kernel).image
    torch.cuda.init()
    make_current()
    return Function(_compiled[kernel.name].cubin, image.symbol, image.num_warps, image.shared_bytes, image.pdl)


def _packed(kind: str, item: Argument) -> Any:
    if isinstance(item, torch.Tensor):
        return ctypes.c_uint64(item.data_ptr())
    if isinstance(item, Address):
        return ctypes.c_uint64(item.tensor.data_ptr() + item.offset)
    return ctypes.c_float(item) if kind == "fp32" else ctypes.c_int32(int(item))


def _hidden() -> list[Any]:
    """Triton's two pointers behind the arguments, of scratch that no kernel of ours needs."""
    return [ctypes.c_uint64(0), ctypes.c_uint64(0)]


@dataclass(frozen=True)
class _Pointer:
    """As the interpreter wants its tensors."""

    item: Any
    dtype: str
    address: int

    def data_ptr(self) -> int:
        return self.address


def _interpreted(
    kernel: Kernel, grid: tuple[int, int, int], items: list[tuple[str, str, Argument]]
) -> Callable[[], None]:
    function = getattr(importlib.import_module(f"enginery.plugins.{kernel.plugin}.triton"), kernel.function)
    # Nothing runs beside the programs: there is nobody to wait for.
    given: dict[str, Any] = {name: False if name == "PDL" else value for name, value in kernel.constants}
    for name, kind, item in items:
        place = Address(item) if isinstance(item, torch.Tensor) else item
        if isinstance(place, Address):
            given[name] = _Pointer(place.tensor, kind.removeprefix("*"), place.tensor.data_ptr() + place.offset)
        else:
            given[name] = place
    return lambda: function[grid](**given)
