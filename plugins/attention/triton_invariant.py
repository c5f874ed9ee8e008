"""attention where a token must get the same bits whatever stands beside it: one kernel for decode and for prefill.

Keys are walked in spans at absolute positions, each span from nothing, and what is found in them is taken together in
their order, in sums whose roundings the source decides. A program may take one span of one token or all spans of many
tokens: the bits are the same, as what a token does not see (masked, later, behind its window) changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_rows import prepare_queries, write_heads
from .triton_walk import attend


@triton.jit
def attend_any(
    q,
    cos,
    sin,
    q_norm,
    state,
    state_scales,
    block_table,
    positions,
    token_sequence,
    items,
    out,
    partials,
    partial_sums,
    arrivals,
    max_blocks,
    single,
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
    ROWS: tl.constexpr,
    ROWS_OF_A_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SLICES: tl.constexpr,
    IN_SHARED: tl.constexpr,
    SPAN: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (items, parts of heads, spans or 1). A program's ROWS are tokens by GROUP_ROWS of the heads that share a KV
    head, which has one part or more, each of them SLICES times: a program takes WIDTH / SLICES elements of the values.

    items         i32: if `single`, tokens (decode_tokens or rows), -1 is padding; else tiles [tiles, 2], of which each
                  makes ROWS_OF_A_TILE / (ROWS / GROUP_ROWS) items, with one program for all spans
    PACKED        q and out have a row for each item, not for each token
    partials      f32 [items, parts of heads, spans, GROUP_ROWS, HEAD_DIM or WIDTH / SLICES if that is less]
    partial_sums  f32 [items, parts of heads, spans, 2, GROUP_ROWS]: largest scores, sums of the weights
    arrivals      i32 [items, parts of heads], zeros before and after
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # The last tokens of a prompt see the most keys, and are begun first.
    item, head_part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    token, num_tokens = _tokens(items, item, single != 0, ROWS // GROUP_ROWS, ROWS_OF_A_TILE)
    place = item if PACKED else token
    if (token < 0) | (num_tokens <= 0):
        return
    position = tl.load(positions + token)
    end = position + num_tokens
    table = block_table + tl.load(token_sequence + token).to(tl.int64) * max_blocks
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // 64 * 64
    num_spans = tl.cdiv(end, SPAN) - first // SPAN
    alone = tl.num_programs(2) == 1
    split = tl.program_id(2)
    if split >= num_spans:
        return

    PARTS: tl.constexpr = (GROUP + GROUP_ROWS - 1) // GROUP_ROWS
    COLUMNS: tl.constexpr = WIDTH // SLICES
    first_column = 0
    if SLICES > 1:
        first_column = head_part % SLICES * COLUMNS
    kv_head = head_part // (PARTS * SLICES)
    index = tl.arange(0, ROWS)
    offset = index // GROUP_ROWS
    member = head_part // SLICES % PARTS * GROUP_ROWS + index % GROUP_ROWS
    live = ((offset < num_tokens) & (member < GROUP))[:, None]
    head_at = ((kv_head * GROUP + member) * HEAD_DIM)[:, None]
    table_at = token.to(tl.int64) * (ROT_DIM // 2) + (offset * (ROT_DIM // 2))[:, None]
    heads = q + Q_OFFSET + place.to(tl.int64) * STRIDE + (offset * STRIDE)[:, None] + head_at
    cos += table_at
    sin += table_at
    queries = prepare_queries(
        heads, cos, sin, q_norm, live, state, split >= 0, HEAD_DIM, WIDTH, ROT_DIM, EPS, SCALE, SOFTCAP
    )
    state += kv_head * HEAD_STRIDE
    if state_scales is not None:
        state_scales += kv_head * (HEAD_STRIDE // 2) + 64 * HEAD_DIM
    largest, total, sums = _nothing(ROWS, COLUMNS)
    begin = first // SPAN + split
    stop = tl.where(alone, begin + num_spans, begin + 1)
    if IN_SHARED:
        # One turn: see `prefill`.
        for _ in tl.range(0, tl.cdiv(num_tokens, ROWS), num_stages=1):
            largest, total, sums = _attend_to_spans(
                queries, largest, total, sums, state, state_scales, table, position + offset, end, first, begin, stop,
                first_column, HEAD_DIM, WIDTH, SOFTCAP, WINDOW, BLOCK_STRIDE, TILE, SPAN,
            )  # fmt: skip
            queries = tl.zeros((ROWS, WIDTH), queries.dtype)
        # Made of what is read again: else the loop would keep it in registers.
        again, num_tokens = _tokens(items, item, single != 0, ROWS // GROUP_ROWS, ROWS_OF_A_TILE)
        place = item if PACKED else again
        index = tl.arange(0, ROWS) + (again - token)
        offset = index // GROUP_ROWS
        member = head_part // SLICES % PARTS * GROUP_ROWS + index % GROUP_ROWS
        live = ((offset < num_tokens) & (member < GROUP))[:, None]
        head_at = ((kv_head * GROUP + member) * HEAD_DIM)[:, None]
    else:
        largest, total, sums = _attend_to_spans(
            queries, largest, total, sums, state, state_scales, table, position + offset, end, first, begin, stop,
            first_column, HEAD_DIM, WIDTH, SOFTCAP, WINDOW, BLOCK_STRIDE, TILE, SPAN,
        )  # fmt: skip

    OUT_COLUMNS: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD_DIM
    OUT_STRIDE: tl.constexpr = (OUT_COLUMNS + 127) // 128 * 128
    out += place.to(tl.int64) * OUT_STRIDE + (offset * OUT_STRIDE)[:, None]
    is_last_head = head_part == NUM_KV_HEADS * PARTS * SLICES - 1
    last = alone | (num_spans == 1)
    if not last:
        pair = item * tl.num_programs(1) + head_part
        last, total, sums = _exchange(
            largest, total, sums, live, partials, partial_sums, arrivals + pair, pair, split, num_spans,
            first_column, GROUP_ROWS, HEAD_DIM,
        )  # fmt: skip
    if last:
        # Rows that are no token's may have seen no key.
        result = sums / tl.maximum(total, 1e-30)[:, None]
        write_heads(out, head_at, result, live, is_last_head, OUT_COLUMNS, HEAD_DIM, COLUMNS, first_column)


@triton.jit
def _attend_to_spans(
    queries,
    largest,
    total,
    sums,
    state,
    state_scales,
    table,
    positions,
    end,
    first,
    begin,
    stop,
    first_column,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Takes the spans begin … stop − 1, from the key `first` on, to what those before have; the rest as in `attend`."""
    for span in range(begin, stop):
        highest, weight, found = _nothing(sums.shape[0], sums.shape[1])
        highest, weight, found = attend(
            queries, highest, weight, found, state, state_scales, table, positions, end,
            tl.maximum(span * SPAN, first), tl.minimum(span * SPAN + SPAN, end), True,
            HEAD_DIM, WIDTH, SOFTCAP, WINDOW, BLOCK_STRIDE, TILE, first_column,
        )  # fmt: skip
        largest, total, sums = _take(largest, total, sums, highest, weight, found)
    return largest, total, sums


@triton.jit
def _exchange(
    largest,
    total,
    sums,
    live,
    partials,
    partial_sums,
    arrivals,
    pair,
    split,
    num_spans,
    first_column,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Leaves what a span of one token has found. Whether all spans have; if so, the total and sums of all."""
    index = tl.arange(0, sums.shape[0])
    KEPT: tl.constexpr = sums.shape[1] if sums.shape[1] < HEAD_DIM else HEAD_DIM
    column = tl.arange(0, sums.shape[1])[None, :]
    one, inside = index < GROUP_ROWS, live & (first_column + column < HEAD_DIM)
    first = pair.to(tl.int64) * tl.num_programs(2)
    at = partials + first * (GROUP_ROWS * KEPT) + index[:, None] * KEPT + column
    sums_at = partial_sums + first * (2 * GROUP_ROWS) + index
    tl.store(at + split * (GROUP_ROWS * KEPT), sums, mask=inside)
    tl.store(sums_at + split * (2 * GROUP_ROWS), largest, mask=one)
    tl.store(sums_at + split * (2 * GROUP_ROWS) + GROUP_ROWS, total, mask=one)
    # The barrier puts every thread's stores before the count that releases them.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == num_spans - 1
    if last:
        largest, total, sums = _nothing(sums.shape[0], sums.shape[1])
        for span in range(num_spans):
            highest = tl.load(sums_at + span * (2 * GROUP_ROWS), mask=one, other=0.0, cache_modifier=".cg")
            weight = tl.load(sums_at + span * (2 * GROUP_ROWS) + GROUP_ROWS, mask=one, other=1.0, cache_modifier=".cg")
            found = tl.load(at + span * (GROUP_ROWS * KEPT), mask=inside, other=0.0, cache_modifier=".cg")
            largest, total, sums = _take(largest, total, sums, highest, weight, found)
        tl.store(arrivals, 0)
    return last, total, sums


@triton.jit
def _tokens(items, item, single, TOKENS: tl.constexpr, ROWS_OF_A_TILE: tl.constexpr):
    """First token of an item, and how many it has, which may be none or less."""
    PARTS: tl.constexpr = ROWS_OF_A_TILE // TOKENS
    at = items + tl.where(single, item, item // PARTS * 2)
    skipped = tl.where(single, 0, item % PARTS * TOKENS)
    count = tl.load(at + 1, mask=single == 0, other=1) - skipped
    return tl.load(at) + skipped, tl.minimum(count, TOKENS)


@triton.jit
def _nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """What is found where nothing is: the largest score, the sum of weights, the sums of values."""
    largest = tl.full((ROWS,), -1e30, tl.float32)
    return largest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def _take(largest, total, sums, highest, weight, found):
    """Takes what a span has found to what those before have; nothing and x are x. Products are fused with sums here,
    as otherwise the compiler may fuse one or the other.
    """
    larger = tl.maximum(largest, highest)
    fade, gain = tl.exp2(largest - larger), tl.exp2(highest - larger)
    fade_of, gain_of = tl.broadcast_to(fade[:, None], sums.shape), tl.broadcast_to(gain[:, None], sums.shape)
    return larger, tl.fma(total, fade, weight * gain), tl.fma(sums, fade_of, found * gain_of)
