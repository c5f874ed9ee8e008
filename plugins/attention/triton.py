"""attention on CUDA: causal attention over a paged cache, as FlashAttention-2 orders it (Dao, 2023).

`decode` takes one query of each sequence, and the heads that share a KV head as the rows of one tile; its keys are
split over programs, of which the last one done combines what all have found (Flash-Decoding, Dao et al., 2023).
`prefill` takes one head and up to ROWS tokens of a sequence. Both walk over the same tiles of keys, in `_attend`.
Scores are in units of log2, so that exp2 is enough: the scale and log2(e) are in the query.

Products are made in bf16, but in f16 where the cache is fp8: f16 holds every e4m3 value, and hardware converts to it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..kv_write.triton import prepare_heads

LOG2_E = tl.constexpr(1.4426950408889634)
# Keeps products of probabilities and small f16 scales out of f16's subnormal range.
VALUE_FACTOR = tl.constexpr(256.0)


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
    queries = _queries(
        heads, cos, sin, q_norm, in_group[:, None], state, split >= 0, HEAD_DIM, WIDTH, ROT_DIM, EPS, SCALE, SOFTCAP
    )
    largest = tl.full((GROUP_ROWS,), -1e30, tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    sums = tl.zeros((GROUP_ROWS, WIDTH), tl.float32)
    if state_scales is not None:
        state_scales += kv_head * (HEAD_STRIDE // 2) + 64 * HEAD_DIM
    largest, total, sums = _attend(
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
        _write(out, head_at, sums / total[:, None], in_group[:, None], is_last_head, COLUMNS, HEAD_DIM, WIDTH)
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
            combined = _combine(partials, partial_sums, num_splits, GROUP, GROUP_ROWS, HEAD_DIM, WIDTH)
            _write(out, head_at, combined, in_group[:, None], is_last_head, COLUMNS, HEAD_DIM, WIDTH)
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
    end = position + num_rows
    table = block_table + tl.load(token_sequence + token).to(tl.int64) * max_blocks
    index = tl.arange(0, ROWS)
    live = (index < num_rows)[:, None]
    heads = q + Q_OFFSET + token.to(tl.int64) * STRIDE + head * HEAD_DIM + (index * STRIDE)[:, None]
    table_at = token.to(tl.int64) * (ROT_DIM // 2) + (index * (ROT_DIM // 2))[:, None]
    cos += table_at
    sin += table_at
    queries = _queries(
        heads, cos, sin, q_norm, live, state, num_rows > 0, HEAD_DIM, WIDTH, ROT_DIM, EPS, SCALE, SOFTCAP
    )
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    state += kv_head * HEAD_STRIDE
    if state_scales is not None:
        state_scales += kv_head * (HEAD_STRIDE // 2) + 64 * HEAD_DIM

    # Keys in three parts: those that the window hides from some rows, those that all rows see, those that are later
    # than some rows or than all.
    first = 0
    full = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // 64 * 64
        full = first + tl.cdiv(tl.maximum(end - WINDOW - first, 0), TILE) * TILE
    full = tl.minimum(full, end)
    diagonal = tl.maximum(first + (position + 1 - first) // TILE * TILE, full)
    if WINDOW > 0:
        largest, total, sums = _attend(
            queries,
            largest,
            total,
            sums,
            state,
            state_scales,
            table,
            position + index,
            end,
            first,
            full,
            True,
            HEAD_DIM,
            WIDTH,
            SOFTCAP,
            WINDOW,
            BLOCK_STRIDE,
            TILE,
        )
    largest, total, sums = _attend(
        queries,
        largest,
        total,
        sums,
        state,
        state_scales,
        table,
        position + index,
        end,
        full,
        diagonal,
        False,
        HEAD_DIM,
        WIDTH,
        SOFTCAP,
        WINDOW,
        BLOCK_STRIDE,
        TILE,
    )
    largest, total, sums = _attend(
        queries,
        largest,
        total,
        sums,
        state,
        state_scales,
        table,
        position + index,
        end,
        diagonal,
        end,
        True,
        HEAD_DIM,
        WIDTH,
        SOFTCAP,
        WINDOW,
        BLOCK_STRIDE,
        TILE,
    )
    # Rows that are no token's have seen no key where there is a window.
    sums = sums / tl.maximum(total, 1e-30)[:, None]
    COLUMNS: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD_DIM
    OUT_STRIDE: tl.constexpr = (COLUMNS + 127) // 128 * 128
    out += token.to(tl.int64) * OUT_STRIDE + (index * OUT_STRIDE)[:, None]
    is_last_head = head == NUM_KV_HEADS * GROUP - 1
    _write(out, head * HEAD_DIM, sums, live, is_last_head, COLUMNS, HEAD_DIM, WIDTH)


@triton.jit
def _attend(
    queries,
    largest,
    total,
    sums,
    state,
    state_scales,
    table,
    positions,
    end,
    begin,
    stop,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Takes the keys begin … stop − 1 of one head into largest, total [M] and sums [M, WIDTH], tile by tile.

    state, state_scales of the head in block 0. `begin` is a multiple of 32, and of 64 if TILE is not 32. MASKED: rows
    see keys within `positions` [M] and WINDOW; else all rows see all. What the cache holds at `end` or later has no
    effect, if in fp8 it is no NaN.
    """
    index, column = tl.arange(0, TILE), tl.arange(0, WIDTH)
    inside = column < HEAD_DIM
    VALUES: tl.constexpr = 64 * HEAD_DIM
    WHOLE: tl.constexpr = HEAD_DIM == WIDTH
    # The block table is read a tile ahead: loads that other loads of an iteration wait for would take a stage of the
    # loop's pipeline. So are the scales, too few to be copied asynchronously.
    block, second = _blocks(table, begin, end, BLOCK_STRIDE, TILE)
    if state_scales is not None:
        scale_at = _places(state_scales, block, second, begin, 1, 2, TILE)
        key_scales, value_scales = tl.load(scale_at), tl.load(scale_at + 64)
    for key in range(begin, stop, TILE):
        keys = _load(
            _places(state, block, second, key, HEAD_DIM, 1, TILE)[:, None] + column[None, :], inside[None, :], WHOLE
        )
        if state_scales is None:
            at = _places(state + VALUES, block, second, key, HEAD_DIM, 1, TILE)[:, None] + column[None, :]
            written = (key + index < end)[:, None]
            values = _load(at, written & inside[None, :] if MASKED else inside[None, :], WHOLE and not MASKED)
        else:
            at = _places(state + VALUES, block, second, key, 1, 1, TILE)[None, :] + column[:, None] * 64
            values = tl.trans(_load(at, inside[:, None], WHOLE))
        block, second = _blocks(table, key + TILE, end, BLOCK_STRIDE, TILE)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)))
        if state_scales is not None:
            scores *= key_scales.to(tl.float32)[None, :]
        if SOFTCAP > 0.0:
            # softcap · tanh(x) without its constant term, which softmax does not see; scores are 2 · log2(e) · x.
            scores = (-2.0 * SOFTCAP * LOG2_E) / (tl.exp2(scores) + 1.0)
        if MASKED:
            seen = (key + index)[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen &= (key + index)[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        fade = tl.exp2(largest - larger)
        largest = larger
        total = total * fade + tl.sum(weights, 1) * (VALUE_FACTOR if queries.dtype == tl.float16 else 1.0)
        if state_scales is not None:
            factors = value_scales.to(tl.float32)
            if queries.dtype == tl.float16:
                factors = tl.minimum(factors * VALUE_FACTOR, 65504.0)
            if MASKED:
                factors = tl.where(key + index < end, factors, 0.0)
            weights *= factors[None, :]
            scale_at = _places(state_scales, block, second, key + TILE, 1, 2, TILE)
            key_scales, value_scales = tl.load(scale_at), tl.load(scale_at + 64)
        sums = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), sums * fade[:, None])
    return largest, total, sums


@triton.jit
def _load(at, mask, ALL: tl.constexpr):
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _blocks(table, key, end, BLOCK_STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Where the block of `key` begins and, if a tile takes two, the one after it: elements of the state."""
    block = tl.load(table + key // 64, mask=key < end, other=0).to(tl.int64) * BLOCK_STRIDE
    second = block
    if TILE > 64:
        second = tl.load(table + key // 64 + 1, mask=key + 64 < end, other=0).to(tl.int64) * BLOCK_STRIDE
    return block, second


@triton.jit
def _places(state, block, second, key, TOKEN_STRIDE: tl.constexpr, SHRINK: tl.constexpr, TILE: tl.constexpr):
    """Pointers [TILE] to what the state has of the tokens from `key` on. SHRINK: state elements in one of these."""
    index = tl.arange(0, TILE)
    if TILE > 64:
        return state + tl.where(index < 64, block // SHRINK, second // SHRINK) + index % 64 * TOKEN_STRIDE
    elif TILE == 64:
        return state + block // SHRINK + index * TOKEN_STRIDE
    else:
        return state + block // SHRINK + key % 64 * TOKEN_STRIDE + index * TOKEN_STRIDE


@triton.jit
def _queries(
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
def _combine(
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
def _write(
    rows, head_at, result, live, is_last_head, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Heads into `rows` (pointers [M, 1] or [1, 1]) at head_at; with the last head the rows' padding, as zeros."""
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(rows + head_at + column, result.to(tl.bfloat16), mask=live & (column < HEAD_DIM))
    if COLUMNS % 128 != 0:
        padding = COLUMNS // 128 * 128 + tl.arange(0, 128)[None, :]
        zeros = tl.zeros((result.shape[0], 128), tl.bfloat16)
        tl.store(rows + padding + head_at * 0, zeros, mask=live & (padding >= COLUMNS) & is_last_head)
