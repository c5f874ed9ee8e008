"""all_reduce on a GPU: every rank reads the parts of all ranks where they are, and adds them for itself."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_meeting import meet


@triton.jit
def all_reduce(
    parts,  # i64 [WORLD]: of each rank, the address of bf16 [count, STRIDE], padding zero
    residual,  # bf16 [count, STRIDE] or None, padding zero
    out,  # bf16 [count, STRIDE]
    flags,
    signals,
    count,
    rank,
    half,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # elements that a program adds at a time
    PROGRAMS: tl.constexpr,
    WORLD: tl.constexpr,
    MEETINGS: tl.constexpr,  # 2: nobody returns before all have read
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (one for some blocks each)."""
    if PDL:
        gdc_wait()
    meet(flags, signals, rank, half, PROGRAMS, WORLD, WAIT)
    # Not earlier: on a GPU that ranks share, what waits for this launch would take the room that others need to come.
    if PDL:
        gdc_launch_dependents()
    at = tl.arange(0, BLOCK)
    elements = count.to(tl.int64) * STRIDE
    for start in range(tl.program_id(0) * BLOCK, elements, tl.num_programs(0) * BLOCK):
        exists = at < elements - start
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            part = tl.multiple_of(tl.load(parts + peer).to(tl.pointer_type(tl.bfloat16)), 16)
            total += tl.load(part + start + at, mask=exists, other=0.0).to(tl.float32)
        if residual is not None:
            total += tl.load(residual + start + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(out + start + at, total.to(tl.bfloat16), mask=exists)
    if MEETINGS == 2:
        meet(flags, signals, rank, 1 - half, PROGRAMS, WORLD, WAIT)
