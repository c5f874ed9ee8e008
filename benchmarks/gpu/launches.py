"""What a launch costs inside a graph: chains of empty kernels, one waiting for the other, plain and with programmatic
dependent launch. It decides how far operators should be fused.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tests.gpu.driver import Function, make_current

from .results import Cell, Results
from .timing import graph_seconds

PART = "launches"
# A plain lowering of 32 layers has 11 of each and 4 more; with what is fused into products about six of each.
CHAINS = (356, 196)
GRIDS = (1, 132, 1056)


@triton.jit
def empty(PDL: tl.constexpr, EARLY: tl.constexpr):
    """Waits for its predecessor; lets its successor begin before that, or after."""
    if PDL:
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        else:
            gdc_wait()
            gdc_launch_dependents()


def run(results: Results) -> None:
    """Microseconds of a node of the chain."""
    results.begin(PART)
    for form, (pdl, early) in {"plain": (False, False), "pdl": (True, False), "pdl, early": (True, True)}.items():
        for grid in GRIDS:
            for length in CHAINS:
                with results.attempt(PART, f"{form} {grid} {length}"):
                    seconds = chain_seconds(pdl, early, grid, length)
                    results.add(Cell(PART, f"{form}, {length} of {grid} programs", seconds * 1e6, "us each"))


def machine_code(pdl: bool, early: bool, arch: int) -> tuple[bytes, str]:
    """The cubin of `empty`, and its symbol."""
    source = ASTSource(empty, {"PDL": "constexpr", "EARLY": "constexpr"}, {"PDL": pdl, "EARLY": early})
    options = {"num_warps": 4, "launch_pdl": pdl}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.name


def chain_seconds(pdl: bool, early: bool, grid: int, length: int) -> float:
    """Of one kernel in a graph of `length`."""
    major, minor = torch.cuda.get_device_capability(0)
    torch.cuda.init()
    make_current()
    cubin, symbol = machine_code(pdl, early, 10 * major + minor)
    call = Function(cubin, symbol, 4, 0, pdl).bind((grid, 1, 1), [ctypes.c_uint64(0), ctypes.c_uint64(0)])
    return graph_seconds([lambda: call(torch.cuda.current_stream().cuda_stream)] * length)
