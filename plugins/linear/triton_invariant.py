"""linear where a row must get the same bits whatever stands beside it: one kernel for any number of rows.

K is cut into SPLITS parts, whose sums begin at zero and are added in their order. Few rows have a program for each
part, many rows one for all of them: what is multiplied and added in which order is the same machine code.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_epilogue import finish
from .triton_tiles import grouped, prefetch, weight_tile


@triton.jit
def gemm_any(
    a,
    a_scale,
    weight,
    weight_scale,
    bias,
    residual,
    out,
    partials,
    counters,
    count,
    N: tl.constexpr,
    K: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    IMPRECISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS x COLUMNS, as gemm's. Grid: (row tiles x column tiles, SPLITS or 1, 1)."""
    row_tile, column_tile = grouped(tl.program_id(0), tl.cdiv(count, ROWS), COLUMN_TILES, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    depths = tl.arange(0, DEPTH)
    weights = weight_tile(weight, column_tile, N, K, COLUMN_TILES, COLUMNS, DEPTH)
    a_tile = a + tl.minimum(rows, count - 1).to(tl.int64)[:, None] * K + depths[None, :]
    first = tl.program_id(1)
    alone = tl.num_programs(1) == 1
    if PDL:
        prefetch(weight + first * SHARE, column_tile, N, K, COLUMN_TILES, COLUMNS, PREFETCH)
        gdc_launch_dependents()
        gdc_wait()
    row_scale = None if a_scale is None else tl.load(a_scale + rows, mask=rows < count, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for part in tl.range(first, tl.where(alone, SPLITS, first + 1)):
        sums = tl.zeros((ROWS, COLUMNS), total.dtype)
        for depth in tl.range(part * SHARE, tl.minimum(part * SHARE + SHARE, K), DEPTH):
            left = tl.load(a_tile + depth)
            right = tl.load(weights + depth)
            sums = tl.dot(left, tl.trans(right), sums, max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype)
        total += sums
    tile = row_tile * COLUMN_TILES + column_tile
    if alone:
        finish(
            total, row_scale, weight_scale, bias, residual, out, partials, counters, tile,
            rows, column_tile * COLUMNS, count,
            N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, COLUMNS, AT_ONCE, 1,
        )  # fmt: skip
    elif SPLITS > 1:
        finish(
            total, row_scale, weight_scale, bias, residual, out, partials, counters, tile,
            rows, column_tile * COLUMNS, count,
            N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, COLUMNS, AT_ONCE, SPLITS, True,
        )  # fmt: skip
