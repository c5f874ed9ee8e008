"""The rows of attention: queries as products want them, what splits of their keys have found, results as heads."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kv_write.triton import prepare_heads
from .triton_walk import LOG2_E


@triton.jit
def prepare_queries(
    heads,
    cos,
    sin,
    norm,
    live,
    state,
    always,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Pointers [M, 1] to heads -> bf16 or f16 [M, WIDTH], such that products with keys are scores in units of log2, or
    what SOFTCAP takes. `always` is true, which the compiler does not know.
    """
    KIND: tl.constexpr = tl.float16 if state.dtype.element_ty == tl.float8e4nv else tl.bfloat16
    FACTOR: tl.constexpr = SCALE * LOG2_E if SOFTCAP == 0.0 else SCALE * LOG2_E * 2.0 / SOFTCAP
    queries = tl.zeros((live.shape[0], WIDTH), KIND)
    # In a branch, as Triton takes numbers that it sees joined for packed ones of 8 bits, and reads both factors of
    # products more slowly.
    if always:
        prepared = prepare_heads(heads, norm, cos, sin, live, HEAD_DIM, WIDTH, ROT_DIM, EPS)
        queries = (prepared * FACTOR).to(KIND)
    return queries


@triton.jit
def combine(
    partials,
    partial_sums,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the splits of one query and KV head have found, in their order -> f32 [GROUP_ROWS, WIDTH]."""
    group = tl.arange(0, GROUP_ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (group < GROUP)[:, None] & (column < HEAD_DIM)
    largest = tl.full((GROUP_ROWS,), -1e30, tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    sums = tl.zeros((GROUP_ROWS, WIDTH), tl.float32)
    for split in tl.range(0, num_splits, loop_unroll_factor=4):
        at = split * (GROUP * HEAD_DIM) + group[:, None] * HEAD_DIM + column
        found = tl.load(partials + at, mask=inside, other=0.0, cache_modifier=".cg")
        sums_at = partial_sums + split * (2 * GROUP) + group
        highest = tl.load(sums_at, mask=group < GROUP, other=0.0, cache_modifier=".cg")
        weight = tl.load(sums_at + GROUP, mask=group < GROUP, other=1.0, cache_modifier=".cg")
        larger = tl.maximum(largest, highest)
        fade, gain = tl.exp2(largest - larger), tl.exp2(highest - larger)
        largest = larger
        total = total * fade + weight * gain
        sums = sums * fade[:, None] + found * gain[:, None]
    return sums / total[:, None]


@triton.jit
def write_heads(
    rows,
    head_at,
    result,
    live,
    is_last_head,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    first_column=0,
):
    """WIDTH elements of heads, from first_column on, into `rows` (pointers [M, 1] or [1, 1]), where the heads are at
    head_at; with the last head the rows' padding, as zeros.
    """
    column = first_column + tl.arange(0, WIDTH)[None, :]
    tl.store(rows + head_at + column, result.to(tl.bfloat16), mask=live & (column < HEAD_DIM))
    if COLUMNS % 128 != 0:
        padding = COLUMNS // 128 * 128 + tl.arange(0, 128)[None, :]
        zeros = tl.zeros((result.shape[0], 128), tl.bfloat16)
        tl.store(rows + padding + head_at * 0, zeros, mask=live & (padding >= COLUMNS) & is_last_head)
