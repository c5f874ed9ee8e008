"""rms_norm on a GPU: residual addition, norm and quantization of a row by one program, in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _normalize(values, HIDDEN: tl.constexpr, EPS: tl.constexpr):
    """values · 1 / sqrt(mean(values²) + EPS), of a row whose padding is zero."""
    return values * (1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / HIDDEN + EPS))


@triton.jit
def rms_norm(
    x,  # bf16 [rows, STRIDE], padding zero
    delta,  # bf16 [rows, STRIDE] or None, padding zero
    post_weight,  # f32 [HIDDEN] or None
    weight,  # f32 [HIDDEN] or None
    sum,  # bf16 [rows, STRIDE] or None: x + delta
    out,  # bf16, fp8 or i8 [rows, STRIDE]
    out_scale,  # f32 [rows], None where out is bf16
    HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least STRIDE
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row)."""
    columns = tl.arange(0, BLOCK)
    stored = columns < STRIDE
    if post_weight is not None:
        post_gain = tl.load(post_weight + columns, mask=columns < HIDDEN, other=0.0)
    if weight is not None:
        gain = tl.load(weight + columns, mask=columns < HIDDEN, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    row = tl.program_id(0).to(tl.int64)
    at = row * STRIDE + columns
    values = tl.load(x + at, mask=stored, other=0.0).to(tl.float32)
    if delta is not None:
        change = tl.load(delta + at, mask=stored, other=0.0).to(tl.float32)
        if post_weight is not None:
            change = _normalize(change, HIDDEN, EPS) * post_gain
        # Later layers read the rounded sum: what is normalised here must be the same.
        values = (values + change).to(tl.bfloat16).to(tl.float32)
    if sum is not None:
        tl.store(sum + at, values.to(tl.bfloat16), mask=stored)
    if weight is not None:
        values = _normalize(values, HIDDEN, EPS) * gain

    if out_scale is None:
        tl.store(out + at, values.to(tl.bfloat16), mask=stored)
    else:
        largest: tl.constexpr = 127.0 if out.dtype.element_ty == tl.int8 else 448.0
        scale = tl.div_rn(tl.max(tl.abs(values), axis=0), largest)
        tl.store(out_scale + row, scale)
        # A scale that is no normal number is rounded so coarsely that quotients exceed the largest value.
        quotients = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
        quotients = tl.minimum(tl.maximum(quotients, -largest), largest)
        if out.dtype.element_ty == tl.int8:
            quotients = (quotients + 12582912.0) - 12582912.0  # 1.5 · 2^23: rounds to an integer, half to even
        tl.store(out + at, quotients.to(out.dtype.element_ty), mask=stored)
