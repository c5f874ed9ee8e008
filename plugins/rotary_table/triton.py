"""rotary_table on a GPU: cos and sin of the positions of a few tokens by one program."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rotary_table(
    positions,  # i32 [count]
    prompt_lengths,  # i32 [count], None where KIND is static
    inv_freq,  # f32 [HALF]
    inv_freq_long,  # f32 [HALF], None unless KIND is longrope
    cos,  # f32 [count, HALF]
    sin,  # f32 [count, HALF]
    count,
    HALF: tl.constexpr,
    KIND: tl.constexpr,  # static, longrope or dynamic
    ATTENTION_FACTOR: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOG2_BASE: tl.constexpr,
    FACTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least HALF
    PDL: tl.constexpr,
):
    """Program (part): TOKENS tokens. The angle is float32(position) · frequency, rounded to float32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    frequencies = tl.load(inv_freq + columns, mask=inside, other=0.0)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < count
    position = tl.load(positions + tokens, mask=there, other=0)
    if KIND == "longrope":
        long = tl.load(inv_freq_long + columns, mask=inside, other=0.0)[None, :]
        prompt_length = tl.load(prompt_lengths + tokens, mask=there, other=0)
        frequencies = tl.where((prompt_length > THRESHOLD)[:, None], long, frequencies)
    if KIND == "dynamic":
        length = tl.maximum(tl.load(prompt_lengths + tokens, mask=there, other=0), position + 1)
        frequencies = tl.where(
            (length > THRESHOLD)[:, None],
            _stretched(length, columns, HALF, THRESHOLD, LOG2_BASE, FACTOR),
            frequencies,
        )
    angle = position.to(tl.float32)[:, None] * frequencies
    at = tokens.to(tl.int64)[:, None] * HALF + columns[None, :]
    stored = there[:, None] & inside[None, :]
    tl.store(cos + at, tl.cos(angle) * ATTENTION_FACTOR, mask=stored)
    tl.store(sin + at, tl.sin(angle) * ATTENTION_FACTOR, mask=stored)


@triton.jit
def _stretched(
    length,
    columns,
    HALF: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOG2_BASE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Frequencies of the base that grows with length: in float64, as positions multiply their errors."""
    stretch = tl.maximum(length.to(tl.float64) * FACTOR / THRESHOLD - (FACTOR - 1), 1.0)
    log2_base = LOG2_BASE + tl.log2(stretch) * (HALF / (HALF - 1))
    return tl.exp2(columns.to(tl.float64)[None, :] * (-1.0 / HALF) * log2_base[:, None]).to(tl.float32)
