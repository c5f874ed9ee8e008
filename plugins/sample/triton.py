"""sample on a GPU: each row of logits in chunks, one program each; the last program of a row to arrive combines them.

scan finds the likeliest token, which ends greedy rows; weigh turns logits into weights, and tells how many lie above
each of a few levels; choose collects the weights that the filters can leave, and draws (triton_filters.py); rank counts
what is likelier than the token; likeliest lists the largest. A chunk is the same whatever else is in the step, and so
is every sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_filters import choose, weigh
from .triton_rows import DONE, LOG_TOTAL, LOGIT_PEAK, PEAK, PEAK_TOKEN, ROW_STATE, edit, finish, is_last, write_edits

__all__ = ["choose", "likeliest", "rank", "scan", "weigh", "write_edits"]

NOT_FINITE = tl.constexpr(-1)
NOTHING_ALLOWED = tl.constexpr(-2)
GREEDY_BELOW = tl.constexpr(1e-5)  # temperatures that only overflow


@triton.jit
def scan(
    logits,  # f32 [rows, STRIDE]
    temperature,  # f32 [rows], None where all rows are greedy
    edit_slots,  # i32 [rows] or None (then the next five too): of each row its slot of edits, -1 for none
    token_counts,  # i32 [slots, STRIDE]: 0 unknown token, 1 of the prompt, 1 + n generated n times
    token_bias,  # f32 [slots, STRIDE]
    presence_penalty,  # f32 [rows]
    frequency_penalty,  # f32 [rows]
    repetition_penalty,  # f32 [rows]
    token,  # i32 [rows]
    logprob,  # f32 [rows]
    rank,  # i32 [rows]: 1, to which rank adds
    chunk_peaks,  # f32 [rows, 2, CHUNKS]: of logits, of edited logits
    chunk_sums,  # f32 [rows, CHUNKS]
    chunk_tokens,  # i32 [rows, CHUNKS]
    row_state,  # i32 [rows, ROW_STATE]
    arrivals,  # i32 [rows], zero
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (chunk, row)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = columns < VOCAB
    values = tl.load(logits + row * STRIDE + columns, mask=inside, other=-float("inf"))
    peak = tl.max(values, axis=0)
    # Times 0 a number is 0, anything else NaN: the sum tells whether all are finite.
    terms = tl.where(inside, tl.exp(values - peak) + values * 0.0, 0.0)
    tl.store(chunk_peaks + row * 2 * CHUNKS + chunk, peak)
    tl.store(chunk_sums + row * CHUNKS + chunk, tl.sum(terms, axis=0))
    if edit_slots is not None:
        values = edit(
            values, columns, row, edit_slots, token_counts, token_bias,
            presence_penalty, frequency_penalty, repetition_penalty, VOCAB, STRIDE,
        )  # fmt: skip
        peak = tl.max(values, axis=0)
    tl.store(chunk_peaks + (row * 2 + 1) * CHUNKS + chunk, peak)
    first = tl.min(tl.where(inside & (values == peak), columns, VOCAB), axis=0)
    tl.store(chunk_tokens + row * CHUNKS + chunk, first)
    if is_last(arrivals + row, CHUNKS):
        chosen, done = _combine(temperature, chunk_peaks, chunk_sums, chunk_tokens, row_state, row, VOCAB, CHUNKS)
        if done:
            finish(chosen, logits, edit_slots, token_counts, token, logprob, rank, row_state, row, STRIDE)


@triton.jit
def _combine(
    temperature, chunk_peaks, chunk_sums, chunk_tokens, row_state, row, VOCAB: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """The likeliest token or a fault, and whether that ends the row; fills row_state."""
    PARTS: tl.constexpr = triton.next_power_of_2(CHUNKS)
    parts = tl.arange(0, PARTS)
    there = parts < CHUNKS
    minus_infinity = -float("inf")
    peaks = tl.load(chunk_peaks + row * 2 * CHUNKS + parts, mask=there, other=minus_infinity, cache_modifier=".cg")
    edited = tl.load(
        chunk_peaks + (row * 2 + 1) * CHUNKS + parts, mask=there, other=minus_infinity, cache_modifier=".cg"
    )
    sums = tl.load(chunk_sums + row * CHUNKS + parts, mask=there, other=0.0, cache_modifier=".cg")
    tokens = tl.load(chunk_tokens + row * CHUNKS + parts, mask=there, other=VOCAB, cache_modifier=".cg")
    logit_peak = tl.max(peaks, axis=0)
    total = tl.sum(tl.where(there, sums * tl.exp(peaks - logit_peak), 0.0), axis=0)
    peak = tl.max(edited, axis=0)
    likeliest = tl.min(tl.where(edited == peak, tokens, VOCAB), axis=0)
    likeliest = tl.where(peak == minus_infinity, NOTHING_ALLOWED, likeliest)
    likeliest = tl.where((total == total) & (likeliest < VOCAB), likeliest, NOT_FINITE)
    done = likeliest < 0
    if temperature is None:
        done = done | True
    else:
        done = done | (tl.load(temperature + row) < GREEDY_BELOW)
    state = row_state + row * ROW_STATE
    tl.store(state + DONE, done.to(tl.int32))
    tl.store(state + PEAK_TOKEN, likeliest)
    tl.store(state + PEAK, peak.to(tl.int32, bitcast=True))
    tl.store(state + LOGIT_PEAK, logit_peak.to(tl.int32, bitcast=True))
    tl.store(state + LOG_TOTAL, tl.log(total).to(tl.int32, bitcast=True))
    tl.debug_barrier()
    return likeliest, done


@triton.jit
def rank(
    logits,  # f32 [rows, STRIDE]
    token,  # i32 [rows]
    rank,  # i32 [rows]
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (chunk, row): adds the number of tokens that come before, of equals those of lower id."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    chosen = tl.load(token + row)
    if chosen >= 0:
        logit = tl.load(logits + row * STRIDE + chosen)
        values = tl.load(logits + row * STRIDE + columns, mask=columns < VOCAB, other=-float("inf"))
        before = (values > logit) | ((values == logit) & (columns < chosen))
        tl.atomic_add(rank + row, tl.sum((before & (columns < VOCAB)).to(tl.int32), axis=0), sem="relaxed")


@triton.jit
def likeliest(
    logits,  # f32 [rows, STRIDE]
    row_state,  # as scan leaves it
    top_tokens,  # i32 [rows, TOP]: the largest logits, largest first, of equals the lower id first
    top_logprobs,  # f32 [rows, TOP]
    chunk_tops,  # f32 [rows, CHUNKS · TOP]
    chunk_top_tokens,  # i32 [rows, CHUNKS · TOP]
    arrivals,  # i32 [rows], zero
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (chunk, row): the TOP of a chunk; the last one, of these."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * STRIDE + columns, mask=columns < VOCAB, other=-float("inf"))
    tops, tokens = chunk_tops + row * CHUNKS * TOP, chunk_top_tokens + row * CHUNKS * TOP
    for place in range(TOP):
        peak, token = _take_largest(values, columns, VOCAB)
        tl.store(tops + chunk * TOP + place, peak)
        tl.store(tokens + chunk * TOP + place, token)
        values = tl.where(columns == token, -float("inf"), values)
    if is_last(arrivals + row, CHUNKS):
        index = tl.arange(0, triton.next_power_of_2(CHUNKS * TOP))
        there = index < CHUNKS * TOP
        best = tl.load(tops + index, mask=there, other=-float("inf"), cache_modifier=".cg")
        found = tl.load(tokens + index, mask=there, other=VOCAB, cache_modifier=".cg")
        state = row_state + row * ROW_STATE
        logit_peak = tl.load(state + LOGIT_PEAK).to(tl.float32, bitcast=True)
        log_total = tl.load(state + LOG_TOTAL).to(tl.float32, bitcast=True)
        for place in range(TOP):
            peak, token = _take_largest(best, found, VOCAB)
            tl.store(top_tokens + row * TOP + place, token)
            tl.store(top_logprobs + row * TOP + place, (peak - logit_peak) - log_total)
            best = tl.where(found == token, -float("inf"), best)


@triton.jit
def _take_largest(values, tokens, VOCAB: tl.constexpr):
    peak = tl.max(values, axis=0)
    return peak, tl.min(tl.where(values == peak, tokens, VOCAB), axis=0)
