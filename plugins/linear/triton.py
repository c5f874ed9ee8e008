"""linear on NVIDIA GPUs: matrix products, which share their epilogue (triton_epilogue.py).

gemm        for many rows: they are the M side of the tensor cores' instruction, a tile of the weights the N side.
gemm_small  for few: out transposed = weight x a transposed, so that tiles of weights fill the M side, which is 64 at
            least on sm_90; reads x in place of a where it normalises and quantizes its rows itself.
gemm_any    for any number, with the same bits for a row among however many (triton_invariant.py).

Pointers, with rows of K (a, x, weight) and OUT_STRIDE (out, residual) elements, K and N padded to 128 with zeros:
    a [count, K], a_scale [count]?, x [count, K], norm_weight [X_COLUMNS]?, weight [N, K], weight_scale [N]?, bias [N]?,
    residual? and out [count, OUT_STRIDE], partials [tiles, SPLITS, ROWS * COLUMNS], counters [tiles]
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_epilogue import finish
from .triton_invariant import gemm_any
from .triton_tiles import grouped, prefetch, share_of_depth, weight_tile

__all__ = ["gemm", "gemm_any", "gemm_small"]

_NORM_TILE = tl.constexpr(4096)


@triton.jit
def gemm(
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
    """A tile of ROWS x COLUMNS. Grid: (row tiles x column tiles, SPLITS, 1).

    PREFETCH  bytes of each weight row to bring into the L2 cache while the kernel before is still at work
    """
    row_tile, column_tile = grouped(tl.program_id(0), tl.cdiv(count, ROWS), COLUMN_TILES, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    depths = tl.arange(0, DEPTH)
    weights = weight_tile(weight, column_tile, N, K, COLUMN_TILES, COLUMNS, DEPTH)
    # Rows that do not exist are copies of the last: so loads need no masks.
    a_tile = a + tl.minimum(rows, count - 1).to(tl.int64)[:, None] * K + depths[None, :]
    begin, end = share_of_depth(K, SHARE)
    if PDL:
        prefetch(weight + begin, column_tile, N, K, COLUMN_TILES, COLUMNS, PREFETCH)
        gdc_launch_dependents()
        gdc_wait()
    row_scale = None if a_scale is None else tl.load(a_scale + rows, mask=rows < count, other=0.0)
    sums = tl.zeros((ROWS, COLUMNS), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for depth in tl.range(begin, end, DEPTH):
        left = tl.load(a_tile + depth)
        right = tl.load(weights + depth)
        sums = tl.dot(left, tl.trans(right), sums, max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype)
    finish(
        sums, row_scale, weight_scale, bias, residual, out, partials, counters, row_tile * COLUMN_TILES + column_tile,
        rows, column_tile * COLUMNS, count,
        N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, COLUMNS, AT_ONCE, SPLITS,
    )  # fmt: skip


@triton.jit
def gemm_small(
    a,
    a_scale,
    x,
    norm_weight,
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
    X_COLUMNS: tl.constexpr,
    X_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    IMPRECISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of COLUMNS weights by all rows, of which there are at most ROWS. Grid: (column tiles, SPLITS, 1).

    X_ROWS    with x: the most rows there are
    """
    column_tile = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    depths = tl.arange(0, DEPTH)
    exists = rows[:, None] < count
    weights = weight_tile(weight, column_tile, N, K, COLUMN_TILES, COLUMNS, DEPTH)
    begin, end = share_of_depth(K, SHARE)
    if PDL:
        prefetch(weight + begin, column_tile, N, K, COLUMN_TILES, COLUMNS, PREFETCH)
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = weight.dtype.element_ty
    sums = tl.zeros((COLUMNS, ROWS), tl.int32 if kind == tl.int8 else tl.float32)
    if x is None:
        row_scale = None if a_scale is None else tl.load(a_scale + rows, mask=rows < count, other=0.0)
        a_tile = a + rows[:, None] * K + depths[None, :]
        for depth in tl.range(begin, end, DEPTH):
            left = tl.load(weights + depth)
            right = tl.load(a_tile + depth, mask=exists, other=0.0)
            sums = tl.dot(left, tl.trans(right), sums, max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype)
    else:
        factor, row_scale = _row_factors(x, norm_weight, count, K, X_COLUMNS, X_ROWS, EPS, ROWS, kind)
        x_tile = x + rows[:, None] * K + depths[None, :]
        for depth in tl.range(begin, end, DEPTH):
            left = tl.load(weights + depth)
            values = tl.load(x_tile + depth, mask=exists, other=0.0).to(tl.float32)
            if norm_weight is not None:
                at = depth + depths
                values = values * tl.load(norm_weight + at, mask=at < X_COLUMNS, other=0.0)[None, :]
            right = _convert(values * factor[:, None], kind)
            sums = tl.dot(left, tl.trans(right), sums, max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype)
    finish(
        tl.trans(sums), row_scale, weight_scale, bias, residual, out, partials, counters, column_tile,
        rows, column_tile * COLUMNS, count,
        N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, COLUMNS, AT_ONCE, SPLITS,
    )  # fmt: skip


@triton.jit
def _row_factors(
    x,
    norm_weight,
    count,
    K: tl.constexpr,
    X_COLUMNS: tl.constexpr,
    X_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    kind: tl.constexpr,
):
    """What x (times norm_weight) is multiplied by to be an operand of the product, and the scale of that, each [ROWS].

    1/rms does not change quantized values, only their scale: so one pass over the rows is enough.
    """
    TILE: tl.constexpr = max(_NORM_TILE // X_ROWS, 128)
    rows = tl.arange(0, X_ROWS)[:, None]
    squares = tl.zeros((X_ROWS, TILE), tl.float32)
    largest = tl.zeros((X_ROWS, TILE), tl.float32)
    for first in tl.static_range(0, K, TILE):
        at = first + tl.arange(0, TILE)[None, :]
        values = tl.load(x + rows * K + at, mask=(rows < count) & (at < K), other=0.0).to(tl.float32)
        squares += values * values
        if norm_weight is not None:
            values = values * tl.load(norm_weight + at, mask=at < X_COLUMNS, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
    inverse = tl.full((X_ROWS,), 1.0, tl.float32)
    if norm_weight is not None:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 1) / X_COLUMNS + EPS)
    if kind == tl.bfloat16:
        factor, scale = inverse, tl.full((X_ROWS,), 1.0, tl.float32)
    else:
        LIMIT: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
        absmax = tl.max(largest, 1)
        factor = LIMIT / tl.where(absmax > 0, absmax, 1.0)
        scale = absmax * inverse / LIMIT
    return _repeat(factor, X_ROWS, ROWS), _repeat(scale, X_ROWS, ROWS)


@triton.jit
def _repeat(values, LENGTH: tl.constexpr, WANTED: tl.constexpr):
    """[LENGTH] -> [WANTED], again and again."""
    return tl.reshape(tl.broadcast_to(values[None, :], (WANTED // LENGTH, LENGTH)), (WANTED,))


@triton.jit
def _convert(values, kind: tl.constexpr):
    if kind == tl.int8:
        # Above 2^23 there are integers only: adding it rounds to the nearest, ties to even.
        values = (values + 12582912.0) - 12582912.0
    return values.to(kind)
