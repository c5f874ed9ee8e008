"""How attention walks over the keys of a paged cache, tile by tile, with a running maximum and sum (FlashAttention-2).

Scores are in units of log2, so that exp2 is enough: the scale and log2(e) are in the query. Products are made in bf16,
but in f16 where the cache is fp8: f16 holds every e4m3 value, and hardware converts to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Keeps products of probabilities and small f16 scales out of f16's subnormal range.
VALUE_FACTOR = tl.constexpr(256.0)


@triton.jit
def attend(
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
    first_column=0,
):
    """Takes the keys begin … stop − 1 of one head into largest, total [M] and sums [M, N], tile by tile.

    sums: of N of the WIDTH elements of the values, those from first_column on.
    state, state_scales of the head in block 0. `begin` is a multiple of TILE, or of 64 if TILE is more. MASKED: rows
    see keys within `positions` [M] and WINDOW; else all rows see all. What the cache holds at `end` or later has no
    effect, if in fp8 it is no NaN.
    """
    index, column = tl.arange(0, TILE), tl.arange(0, WIDTH)
    value_column = first_column + tl.arange(0, sums.shape[1])
    inside, value_inside = column < HEAD_DIM, value_column < HEAD_DIM
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
            at = _places(state + VALUES, block, second, key, HEAD_DIM, 1, TILE)[:, None] + value_column[None, :]
            written = (key + index < end)[:, None]
            is_value = value_inside[None, :]
            values = _load(at, written & is_value if MASKED else is_value, WHOLE and not MASKED)
        else:
            at = _places(state + VALUES, block, second, key, 1, 1, TILE)[None, :] + value_column[:, None] * 64
            values = tl.trans(_load(at, value_inside[:, None], WHOLE))
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
def attend_to_all(
    queries,
    largest,
    total,
    sums,
    state,
    state_scales,
    table,
    position,
    num_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Takes all keys that `num_rows` successive tokens from `position` on see, as `attend` does."""
    end = position + num_rows
    positions = position + tl.arange(0, largest.shape[0])
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
        largest, total, sums = attend(
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
            full,
            True,
            HEAD_DIM,
            WIDTH,
            SOFTCAP,
            WINDOW,
            BLOCK_STRIDE,
            TILE,
        )
    largest, total, sums = attend(
        queries,
        largest,
        total,
        sums,
        state,
        state_scales,
        table,
        positions,
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
    return attend(
        queries,
        largest,
        total,
        sums,
        state,
        state_scales,
        table,
        positions,
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
