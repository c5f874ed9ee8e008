"""From logits to a token: weights, what the filters can leave of them, and the draw (triton_search.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_rows import DONE, PEAK, PEAK_TOKEN, ROW_STATE, edit, finish, is_last
from .triton_search import MOST_BITS, as_variables, draw_filtered, first_above, uniform

LEVELS = tl.constexpr(16)
PART = tl.constexpr(256)  # of a chunk, that is compared with all levels at once
LEVEL_BITS = tl.constexpr(0x00C00000)  # between two levels: a factor of 2^-1.5 or so
ONE_BITS = tl.constexpr(0x3F800000)
BLOCK = tl.constexpr(2048)  # weights that a search looks at together; divides CHUNK and CAPACITY


@triton.jit
def weigh(
    logits,  # as in scan
    temperature,
    top_k,  # i32 [rows], 0 for all
    top_p,  # f32 [rows]
    min_p,  # f32 [rows]
    edit_slots,
    token_counts,
    token_bias,
    presence_penalty,
    frequency_penalty,
    repetition_penalty,
    row_state,
    weights,  # f32 [rows, CHUNKS · CHUNK + CAPACITY]
    level_counts,  # i32 [rows, LEVELS, CHUNKS]: weights not below each level
    level_sums,  # f32 [rows, LEVELS, CHUNKS]: their sums
    chunk_sums,  # f32 [rows, CHUNKS]: of all
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (chunk, row): weight = exp((logit - peak) / temperature), 0 below min_p."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    state = row_state + row * ROW_STATE
    if tl.load(state + DONE) == 0:
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(logits + row * STRIDE + columns, mask=columns < VOCAB, other=-float("inf"))
        if edit_slots is not None:
            values = edit(
                values, columns, row, edit_slots, token_counts, token_bias,
                presence_penalty, frequency_penalty, repetition_penalty, VOCAB, STRIDE,
            )  # fmt: skip
        peak = tl.load(state + PEAK).to(tl.float32, bitcast=True)
        x = (values - peak) * tl.div_rn(1.0, tl.load(temperature + row))
        smallest = tl.load(min_p + row)
        floor = tl.where(smallest > 0, tl.log(tl.maximum(smallest, 1e-37)), -87.0)
        found = tl.where(x < tl.maximum(floor, -87.0), 0.0, tl.exp(x))
        row_weights = weights + row * (CHUNKS * CHUNK + CAPACITY)
        tl.store(row_weights + columns, found)
        tl.store(chunk_sums + row * CHUNKS + chunk, tl.sum(found, axis=0))
        most = tl.load(top_k + row)
        if ((most > 0) & (most < VOCAB)) | (tl.load(top_p + row) < 1):
            tl.debug_barrier()
            _measure_levels(row_weights + chunk * CHUNK, level_counts, level_sums, row, chunk, CHUNK, CHUNKS)


@triton.jit
def choose(
    logits,  # as in scan and weigh
    top_k,
    top_p,
    seed,  # i64 [rows]
    num_generated,  # i32 [rows]: tokens before this one
    edit_slots,
    token_counts,
    token,
    logprob,
    rank,
    row_state,
    weights,
    level_counts,
    level_sums,
    chunk_sums,
    candidates,  # i32 [rows, CAPACITY]: the tokens whose weights are collected
    arrivals,  # i32 [rows], zero
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (chunk, row)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(row_state + row * ROW_STATE + DONE) == 0:
        PARTS: tl.constexpr = triton.next_power_of_2(CHUNKS)
        parts = tl.arange(0, PARTS)
        sums = tl.load(chunk_sums + row * CHUNKS + parts, mask=parts < CHUNKS, other=0.0).to(tl.float64)
        total = tl.sum(sums, axis=0)
        most = tl.load(top_k + row)
        most = tl.where(most < VOCAB, most, 0)
        nucleus = tl.load(top_p + row)
        level, length = _level(level_counts, level_sums, total, most, nucleus, row, CHUNK, CHUNKS, CAPACITY)
        row_weights = weights + row * (CHUNKS * CHUNK + CAPACITY)
        row_candidates = candidates + row * CAPACITY
        collected = row_weights + CHUNKS * CHUNK
        if level >= 0:
            counts = level_counts + (row * LEVELS + level) * CHUNKS + parts
            start = tl.sum(tl.load(counts, mask=parts < chunk, other=0), axis=0)
            _collect(row_weights, collected, row_candidates, level, start, chunk, CHUNK, CAPACITY)
        if is_last(arrivals + row, CHUNKS):
            number = uniform(tl.load(seed + row), tl.load(num_generated + row))
            if (most == 0) & (nucleus >= 1):
                goal = number * total
                # The chunk where the running sum exceeds the goal, else the last that has any weight.
                runs = tl.cumsum(sums, axis=0)
                found = tl.min(tl.where((runs > goal) & (sums > 0), parts, PARTS), axis=0)
                found = tl.minimum(found, tl.max(tl.where(sums > 0, parts, 0), axis=0))
                goal -= tl.sum(tl.where(parts < found, sums, 0.0), axis=0)
                base = found * CHUNK
                length = tl.full((), CHUNK, tl.int32)
                low, high, by_count = as_variables(1, MOST_BITS, False)
            else:
                base = tl.where(level >= 0, CHUNKS * CHUNK, 0)
                length = _pad(row_weights + base, length)
                low, high, goal, by_count = draw_filtered(
                    row_weights + base, length, most, nucleus, total, number, BLOCK
                )
            index = base + first_above(row_weights + base, length, low, high, goal, by_count, BLOCK)
            place = tl.maximum(index - CHUNKS * CHUNK, 0)
            chosen = tl.where(level >= 0, tl.load(row_candidates + place), index)
            # Where rounding hides the choice: the likeliest token is always among the kept.
            chosen = tl.where(low > 0, chosen, tl.load(row_state + row * ROW_STATE + PEAK_TOKEN))
            finish(chosen, logits, edit_slots, token_counts, token, logprob, rank, row_state, row, STRIDE)


@triton.jit
def _measure_levels(weights, level_counts, level_sums, row, chunk, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Of the weights of a chunk, which this program has stored, those above each level: how many, and their sum."""
    levels = tl.arange(0, LEVELS)
    lowest = _bits_of(levels)[:, None]
    counts = tl.zeros((LEVELS, PART), tl.int32)
    sums = tl.zeros((LEVELS, PART), tl.float32)
    for start in tl.range(0, CHUNK, PART, loop_unroll_factor=4):
        found = tl.load(weights + start + tl.arange(0, PART))
        reaches = found.to(tl.int32, bitcast=True)[None, :] >= lowest
        counts += reaches.to(tl.int32)
        sums += tl.where(reaches, found[None, :], 0.0)
    at = (row * LEVELS + levels) * CHUNKS + chunk
    tl.store(level_counts + at, tl.sum(counts, axis=1))
    tl.store(level_sums + at, tl.sum(sums, axis=1))


@triton.jit
def _level(
    level_counts, level_sums, total, most, nucleus, row, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The highest level above which lies all that the filters leave, and how many weights that are.

    -1 and CHUNKS · CHUNK where there are no filters, or more than CAPACITY such weights.
    """
    PARTS: tl.constexpr = triton.next_power_of_2(CHUNKS)
    levels = tl.arange(0, LEVELS)
    parts = tl.arange(0, PARTS)[None, :]
    at = row * LEVELS * CHUNKS + levels[:, None] * CHUNKS + parts
    counts = tl.sum(tl.load(level_counts + at, mask=parts < CHUNKS, other=0), axis=1)
    sums = tl.sum(tl.load(level_sums + at, mask=parts < CHUNKS, other=0.0), axis=1).to(tl.float64)
    # A little more than the nucleus, as sums in another order round otherwise.
    enough = tl.where(most > 0, counts >= most, sums >= nucleus.to(tl.float64) * total * 1.000001)
    level = tl.min(tl.where(enough, levels, LEVELS), axis=0)
    length = tl.sum(tl.where(levels == level, counts, 0), axis=0)
    fits = (level < LEVELS) & (length <= CAPACITY) & ((most > 0) | (nucleus < 1))
    return tl.where(fits, level, -1), tl.where(fits, length, CHUNKS * CHUNK)


@triton.jit
def _bits_of(level):
    """Of the lowest weight that is not below a level."""
    return (level + 1) * -LEVEL_BITS + ONE_BITS


@triton.jit
def _collect(
    row_weights, collected, row_candidates, level, start, chunk, CHUNK: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """Copies the weights of a chunk that are not below `level` to `start`, in the order of their tokens."""
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(row_weights + columns)
    reaches = found.to(tl.int32, bitcast=True) >= _bits_of(level)
    place = start + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    stored = reaches & (place < CAPACITY)
    tl.store(collected + place, found, mask=stored)
    tl.store(row_candidates + place, columns, mask=stored)


@triton.jit
def _pad(weights, length):
    """Zeros behind weights [length], up to a multiple of BLOCK, which is returned."""
    padded = tl.cdiv(length, BLOCK) * BLOCK
    index = length + tl.arange(0, BLOCK)
    tl.store(weights + index, tl.zeros((BLOCK,), tl.float32), mask=index < padded)
    tl.debug_barrier()
    return padded
