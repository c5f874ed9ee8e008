"""attention on CUDA: causal attention over a paged cache, as FlashAttention-2 orders it (Dao, 2023).

`decode` takes one query of each sequence, and the heads that share a KV head as the rows of one tile; its keys are
split over programs, of which the last one done combines what all have found (Flash-Decoding, Dao et al., 2023).
`prefill` takes one head and up to ROWS tokens of a sequence. Both walk over the same tiles of keys (triton_walk.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_invariant import attend_any
from .triton_rows import combine, prepare_queries, write_heads
from .triton_walk import attend, attend_to_all

__all__ = ["attend_any", "decode", "prefill"]


@triton.jit
def decode(
    q,
    cos,
    sin,
    q_norm,
    state,
    state_scales,
    block_table,
    positions,
    token_sequence,
    decode_tokens,
    rows,
    out,
    partials,
    partial_sums,
    arrivals,
    max_blocks,
    least_tiles,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (queries, NUM_KV_HEADS, splits). Query i is the token decode_tokens[i], or rows[i], its q and out row i.
    Token -1 is padding. A split has least_tiles tiles of keys or more; those that have none do nothing.

    partials      f32 [queries, NUM_KV_HEADS, splits, GROUP, HEAD_DIM]
    partial_sums  f32 [queries, NUM_KV_HEADS, splits, 2, GROUP]: largest scores, sums of the weights
    arrivals      i32 [queries, NUM_KV_HEADS], zeros before and after
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    query, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if rows is not None:
        token = tl.load(rows + query)
        row = query
    else:
        token = tl.load(decode_tokens + query)
        row = token
    if token < 0:
        return
    position = tl.load(positions + token)
    table = block_table + tl.load(token_sequence + token).to(tl.int64) * max_blocks
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // 64 * 64
    num_tiles = tl.cdiv(position + 1 - first, TILE)
    tiles_each = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(2)), least_tiles)
    num_splits = tl.cdiv(num_tiles, tiles_each)
    if split >= num_splits:
        return

    group = tl.arange(0, GROUP_ROWS)
    in_group = group < GROUP
    head_at = ((kv_head * GROUP + group) * HEAD_DIM)[:, None]
    table_at = token.to(tl.int64) * (ROT_DIM // 2) + group[:, None] * 0
    heads = q + Q_OFFSET + row.to(tl.int64) * STRIDE + head_at
    cos += table_at
    sin += table_at
    queries = prepare_queries(
        heads, cos, sin, q_norm, in_group[:, None], state, split >= 0, HEAD_DIM, WIDTH, ROT_DIM, EPS, SCALE, SOFTCAP
    )
    largest = tl.full((GROUP_ROWS,), -1e30, tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    sums = tl.zeros((GROUP_ROWS, WIDTH), tl.float32)
    if state_scales is not None:
        state_scales += kv_head * (HEAD_STRIDE // 2) + 64 * HEAD_DIM
    largest, total, sums = attend(
        queries,
        largest,
        total,
        sums,
        state + kv_head * HEAD_STRIDE,
        state_scales,
        table,
        position + group * 0,
        position + 1,
        first + split * tiles_each * TILE,
        tl.minimum(first + (split + 1) * tiles_each * TILE, position + 1),
        True,
        HEAD_DIM,
        WIDTH,
        SOFTCAP,
        WINDOW,
        BLOCK_STRIDE,
        TILE,
    )
    COLUMNS: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD_DIM
    OUT_STRIDE: tl.constexpr = (COLUMNS + 127) // 128 * 128
    out += row.to(tl.int64) * OUT_STRIDE
    is_last_head = kv_head == NUM_KV_HEADS - 1
    if num_splits == 1:
        write_heads(out, head_at, sums / total[:, None], in_group[:, None], is_last_head, COLUMNS, HEAD_DIM, WIDTH)
    else:
        pair = query * NUM_KV_HEADS + kv_head
        partials += pair.to(tl.int64) * tl.num_programs(2) * (GROUP * HEAD_DIM)
        partial_sums += pair.to(tl.int64) * tl.num_programs(2) * (2 * GROUP)
        column = tl.arange(0, WIDTH)[None, :]
        inside = in_group[:, None] & (column < HEAD_DIM)
        tl.store(partials + split * (GROUP * HEAD_DIM) + group[:, None] * HEAD_DIM + column, sums, mask=inside)
        tl.store(partial_sums + split * (2 * GROUP) + group, largest, mask=in_group)
        tl.store(partial_sums + split * (2 * GROUP) + GROUP + group, total, mask=in_group)
        # The barrier puts every thread's stores before the count that releases them.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == num_splits - 1:
            combined = combine(partials, partial_sums, num_splits, GROUP, GROUP_ROWS, HEAD_DIM, WIDTH)
            write_heads(out, head_at, combined, in_group[:, None], is_last_head, COLUMNS, HEAD_DIM, WIDTH)
            tl.store(arrivals + pair, 0)


@triton.jit
def prefill(
    q,
    cos,
    sin,
    q_norm,
    state,
    state_scales,
    block_table,
    positions,
    token_sequence,
    tiles,
    out,
    max_blocks,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_OF_A_TILE: tl.constexpr,
    TILE: tl.constexpr,
    IN_SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (heads, tiles · ROWS_OF_A_TILE / ROWS). The last tokens, which see the most keys, are begun first."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, part = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = head // GROUP
    PARTS: tl.constexpr = ROWS_OF_A_TILE // ROWS
    skipped = part % PARTS * ROWS
    token = tl.load(tiles + part // PARTS * 2) + skipped
    num_rows = tl.minimum(tl.load(tiles + part // PARTS * 2 + 1) - skipped, ROWS)
    if num_rows <= 0:
        return

    position = tl.load(positions + token)
    table = block_table + tl.load(token_sequence + token).to(tl.int64) * max_blocks
    index = tl.arange(0, ROWS)
    live = (index < num_rows)[:, None]
    heads = q + Q_OFFSET + token.to(tl.int64) * STRIDE + head * HEAD_DIM + (index * STRIDE)[:, None]
    table_at = token.to(tl.int64) * (ROT_DIM // 2) + (index * (ROT_DIM // 2))[:, None]
    cos += table_at
    sin += table_at
    state += kv_head * HEAD_STRIDE
    if state_scales is not None:
        state_scales += kv_head * (HEAD_STRIDE // 2) + 64 * HEAD_DIM
    queries = prepare_queries(
        heads, cos, sin, q_norm, live, state, num_rows > 0, HEAD_DIM, WIDTH, ROT_DIM, EPS, SCALE, SOFTCAP
    )
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    if IN_SHARED:
        # One turn: Triton's wgmma takes what a loop hands on from shared memory, and what was computed before it from
        # registers, which wide heads have none left for. Handed on is something else, or nothing would be.
        for _ in tl.range(0, tl.cdiv(num_rows, ROWS), num_stages=1):
            largest, total, sums = attend_to_all(
                queries, largest, total, sums, state, state_scales, table, position, num_rows,
                HEAD_DIM, WIDTH, SOFTCAP, WINDOW, BLOCK_STRIDE, TILE,
            )  # fmt: skip
            queries = tl.zeros((ROWS, WIDTH), queries.dtype)
    else:
        largest, total, sums = attend_to_all(
            queries, largest, total, sums, state, state_scales, table, position, num_rows,
            HEAD_DIM, WIDTH, SOFTCAP, WINDOW, BLOCK_STRIDE, TILE,
        )  # fmt: skip
    # Rows that are no token's have seen no key where there is a window.
    sums = sums / tl.maximum(total, 1e-30)[:, None]
    COLUMNS: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD_DIM
    OUT_STRIDE: tl.constexpr = (COLUMNS + 127) // 128 * 128
    out += token.to(tl.int64) * OUT_STRIDE + (index * OUT_STRIDE)[:, None]
    is_last_head = head == NUM_KV_HEADS * GROUP - 1
    write_heads(out, head * HEAD_DIM, sums, live, is_last_head, COLUMNS, HEAD_DIM, WIDTH)
