"""all_gather on a GPU: every rank reads the columns of all ranks where they are."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..all_reduce.triton_meeting import meet


@triton.jit
def _copy(
    part,  # f32 [count, COLUMNS, padded]
    out,  # f32 [count, STRIDE], from the first of these columns on
    count,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns that are written, zeros behind those that there are
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's share of one rank's columns."""
    PART_STRIDE: tl.constexpr = (COLUMNS + PADDING - 1) // PADDING * PADDING
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    for block in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
        row = tl.cast(block // BLOCKS, tl.int64)
        at = block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(part + row * PART_STRIDE + at, mask=at < COLUMNS, other=0.0)
        tl.store(out + row * STRIDE + at, values, mask=at < WIDTH)


@triton.jit
def all_gather(
    parts,  # i64 [WORLD]: of each rank, the address of f32 [count, its columns, padded]
    out,  # f32 [count, STRIDE]
    flags,
    signals,
    count,
    rank,
    half,
    STARTS: tl.constexpr,  # of each rank's columns in out, and the end of all
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,  # rows of parts are padded to a multiple of it
    BLOCK: tl.constexpr,  # columns that a program copies at a time
    PROGRAMS: tl.constexpr,
    WORLD: tl.constexpr,
    MEETINGS: tl.constexpr,  # 2: nobody returns before all have read
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (one for some blocks of some rows each)."""
    if PDL:
        gdc_wait()
    meet(flags, signals, rank, half, PROGRAMS, WORLD, WAIT)
    if PDL:
        gdc_launch_dependents()
    for peer in tl.static_range(WORLD):
        part = tl.multiple_of(tl.load(parts + peer).to(tl.pointer_type(tl.float32)), 16)
        _copy(
            part,
            out + STARTS[peer],
            count,
            STARTS[peer + 1] - STARTS[peer],
            (STARTS[peer + 1] if peer < WORLD - 1 else STRIDE) - STARTS[peer],
            STRIDE,
            PADDING,
            BLOCK,
        )
    if MEETINGS == 2:
        meet(flags, signals, rank, 1 - half, PROGRAMS, WORLD, WAIT)
