"""gather_rows on a GPU: the rows that are sampled; the columns of a row are cut among programs."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def gather_rows(
    rows,  # i32 [rows]
    x,  # bf16 [tokens, STRIDE]
    out,  # bf16 [rows, STRIDE]
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part): BLOCK columns, padding included."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows + row).to(tl.int64)
    values = tl.load(x + source * STRIDE + columns, mask=columns < STRIDE)
    tl.store(out + row * STRIDE + columns, values, mask=columns < STRIDE)
