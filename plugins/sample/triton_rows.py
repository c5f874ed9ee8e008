"""What the kernels of sample share: how rows are changed before they are drawn from, and how they are finished."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What row_state holds of a row, i32 or the bits of f32.
DONE = tl.constexpr(0)
PEAK_TOKEN = tl.constexpr(1)
PEAK = tl.constexpr(2)  # of the edited logits
LOGIT_PEAK = tl.constexpr(3)
LOG_TOTAL = tl.constexpr(4)
ROW_STATE = tl.constexpr(8)


@triton.jit
def edit(
    values, columns, row, edit_slots, token_counts, token_bias, presence_penalty, frequency_penalty,
    repetition_penalty, VOCAB: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Bias and masks, then penalties of the tokens that are known."""
    slot = tl.load(edit_slots + row).to(tl.int64)
    if slot >= 0:
        inside = columns < VOCAB
        values += tl.load(token_bias + slot * STRIDE + columns, mask=inside, other=0.0)
        seen = tl.load(token_counts + slot * STRIDE + columns, mask=inside, other=0)
        repetition = tl.load(repetition_penalty + row)
        generated = tl.maximum(seen - 1, 0)
        penalized = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
        penalized = tl.fma(generated.to(tl.float32), -tl.load(frequency_penalty + row), penalized)
        penalized -= tl.where(generated > 0, tl.load(presence_penalty + row), 0.0)
        values = tl.where(seen > 0, penalized, values)
    return values


@triton.jit
def is_last(arrivals, CHUNKS: tl.constexpr):
    """Whether all other programs of the row have come here; what they wrote before is visible then."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") == CHUNKS - 1
    if arrived:
        tl.store(arrivals, 0)
    tl.debug_barrier()
    return arrived


@triton.jit
def finish(chosen, logits, edit_slots, token_counts, token, logprob, rank, row_state, row, STRIDE: tl.constexpr):
    """Writes the results of a row, and counts its token."""
    state = row_state + row * ROW_STATE
    logit_peak = tl.load(state + LOGIT_PEAK).to(tl.float32, bitcast=True)
    log_total = tl.load(state + LOG_TOTAL).to(tl.float32, bitcast=True)
    logit = tl.load(logits + row * STRIDE + tl.maximum(chosen, 0))
    tl.store(token + row, chosen)
    tl.store(logprob + row, tl.where(chosen >= 0, (logit - logit_peak) - log_total, 0.0))
    tl.store(rank + row, 1)
    if edit_slots is not None:
        slot = tl.load(edit_slots + row).to(tl.int64)
        if (slot >= 0) & (chosen >= 0):
            place = token_counts + slot * STRIDE + chosen
            tl.store(place, tl.maximum(tl.load(place), 1) + 1)


@triton.jit
def write_edits(
    slots,  # i32 [count]
    tokens,  # i32 [count], -1: clears the slot
    counts,  # i32 [count]
    biases,  # f32 [count]
    token_counts,  # as in scan
    token_bias,
    CLEAR: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (entry, part): CLEAR zeroes CHUNK columns of entries whose token is -1; otherwise the others are set."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    entry = tl.program_id(0)
    base = tl.load(slots + entry).to(tl.int64) * STRIDE
    column = tl.load(tokens + entry)
    if CLEAR:
        columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        cleared = (columns < STRIDE) & (column < 0)
        tl.store(token_counts + base + columns, tl.zeros((CHUNK,), tl.int32), mask=cleared)
        tl.store(token_bias + base + columns, tl.zeros((CHUNK,), tl.float32), mask=cleared)
    elif column >= 0:
        tl.store(token_counts + base + column, tl.load(counts + entry))
        tl.store(token_bias + base + column, tl.load(biases + entry))
