"""embedding on a GPU: copies rows of the table, scaled; the columns of a row are cut among programs."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embedding(
    token_ids,  # i32 [tokens]; -1 - row: the token that the step before has drawn for that row
    drawn,  # i32 [rows of the step before]
    table,  # [Np, STRIDE] bf16, fp8 or i8, padding zero
    table_scale,  # f32 [Np] or None
    out,  # bf16 [tokens, STRIDE]
    VOCAB: tl.constexpr,  # rows of the table that are tokens
    VOCAB_START: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part): BLOCK columns; ids outside [VOCAB_START, VOCAB_START + VOCAB) give zeros."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.load(token_ids + token)
    if token_id < 0:
        token_id = tl.load(drawn - 1 - token_id)
    row = token_id.to(tl.int64) - VOCAB_START
    inside = (row >= 0) & (row < VOCAB)
    values = tl.load(table + row * STRIDE + columns, mask=inside & (columns < STRIDE), other=0.0).to(tl.float32)
    if table_scale is not None:
        values *= tl.load(table_scale + row, mask=inside, other=0.0)
    values *= SCALE
    tl.store(out + token * STRIDE + columns, values.to(tl.bfloat16), mask=columns < STRIDE)
