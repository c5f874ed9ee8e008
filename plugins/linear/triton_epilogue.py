"""What both products do with their sums.

A product may be split along K: every program then leaves its sums in `partials`, and the one that comes last to a tile
adds them up in the order of K, so that the result does not depend on who that was, and resets the tile's counter.
"""

import triton
import triton.language as tl


@triton.jit
def finish(
    sums,
    row_scale,
    weight_scale,
    bias,
    residual,
    out,
    partials,
    counters,
    tile,
    rows,
    first,
    count,
    N: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPARSE: tl.constexpr = False,
):
    """What every program does with its sums [ROWS, COLUMNS]; `first` is the weight row of their first column.

    SPARSE  most of the ROWS may not exist: partial results of those are left out
    """
    if SPLITS == 1:
        _store(
            sums, row_scale, weight_scale, bias, residual, out, rows, first, count,
            N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, COLUMNS, AT_ONCE,
        )  # fmt: skip
    else:
        SIZE: tl.constexpr = ROWS * COLUMNS
        places = partials + tile.to(tl.int64) * (SPLITS * SIZE) + tl.arange(0, ROWS)[:, None] * COLUMNS
        exists = (rows < count)[:, None] if SPARSE else None
        tl.store(places + tl.program_id(1) * SIZE + tl.arange(0, COLUMNS)[None, :], sums, mask=exists)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            for column in tl.static_range(0, COLUMNS, AT_ONCE):
                part = places + column + tl.arange(0, AT_ONCE)[None, :]
                total = tl.load(part, mask=exists, cache_modifier=".cg")
                for split in tl.static_range(1, SPLITS):
                    total += tl.load(part + split * SIZE, mask=exists, cache_modifier=".cg")
                _store(
                    total, row_scale, weight_scale, bias, residual, out, rows, first + column, count,
                    N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, AT_ONCE, AT_ONCE,
                )  # fmt: skip
            tl.store(counters + tile, 0)


@triton.jit
def _store(
    sums,
    row_scale,
    weight_scale,
    bias,
    residual,
    out,
    rows,
    first,
    count,
    N: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The epilogue of sums [ROWS, COLUMNS], and the store, padding included; AT_ONCE columns at a time."""
    if COLUMNS > AT_ONCE:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        _store(
            left, row_scale, weight_scale, bias, residual, out, rows, first, count,
            N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, HALF, AT_ONCE,
        )  # fmt: skip
        _store(
            right, row_scale, weight_scale, bias, residual, out, rows, first + HALF, count,
            N, OUT_COLUMNS, OUT_STRIDE, ACTIVATION, SOFTCAP, ROWS, HALF, AT_ONCE,
        )  # fmt: skip
    else:
        values = sums.to(tl.float32)
        columns = first + tl.arange(0, COLUMNS)
        if row_scale is not None:
            values = values * row_scale[:, None]
        if weight_scale is not None:
            values = values * tl.load(weight_scale + columns, mask=columns < N, other=0.0)[None, :]
        if bias is not None:
            values = values + tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
        WIDTH: tl.constexpr = COLUMNS if ACTIVATION == "none" else COLUMNS // 2
        if ACTIVATION != "none":
            gate, up = tl.split(tl.reshape(values, (ROWS, WIDTH, 2)))
            values = _activation(gate, ACTIVATION) * up
            first = first // 2
        if SOFTCAP > 0:
            values = SOFTCAP * _tanh(values / SOFTCAP)
        columns = first + tl.arange(0, WIDTH)
        places = rows.to(tl.int64)[:, None] * OUT_STRIDE + columns[None, :]
        exists = (rows[:, None] < count) & (columns[None, :] < OUT_STRIDE)
        if residual is not None:
            values = values + tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
        if OUT_COLUMNS != OUT_STRIDE:
            values = tl.where(columns[None, :] < OUT_COLUMNS, values, 0.0)
        tl.store(out + places, values.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu_gated":
        return x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh_gated")
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(x, 20.0)) + 1.0)
