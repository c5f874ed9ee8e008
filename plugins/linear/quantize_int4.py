"""Weights in groups of four-bit codes: rounding to nearest, and GPTQ where the moments of the inputs are known.

A group is `group` columns of a row (the last one of a row may be shorter) with one scale; w ≈ (code - zero) · scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...engines.layouts import GROUPS

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Halves = NDArray[np.float16]

SYMMETRIC_ZERO = 8
_LARGEST_CODE = 15
_LARGEST_HALF = np.float32(65504)


def quantize_int4(w: Floats, group: int, symmetric: bool, moments: Floats | None = None) -> tuple[Codes, Halves, Codes]:
    """float32 [N, K], finite -> codes [N, K] in 0 … 15, scales f16 [N, G] and zeros [N, G], G = ceil(K / group).

    moments: [ceil(K / 128), 128, 128], the blocks on the diagonal of E[x xᵀ]; without them rounds to nearest:
    scale   symmetric: the group's element m of greatest magnitude (the first of equals) / -8, so that m is code 0 and
            the sign of the scale is that of -m; else max(w, 0) / 15 - min(w, 0) / 15. Computed in f32, clipped to
            65504 in magnitude, rounded to f16, +0 rather than -0
    zero    symmetric: 8, else min(w, 0) / -scale, to the nearest (half to even), at most 15
    code    w / scale in f32, to the nearest (half to even), + zero, clipped to 0 … 15; zero where the scale is 0
    """
    assert group in GROUPS
    scales, zeros = _nearest_grid(_grouped(np.asarray(w, np.float32), group), symmetric)
    codes = _encode(_grouped(np.asarray(w, np.float32), group), scales, zeros)
    return codes.reshape(len(w), -1)[:, : w.shape[1]].copy(), scales, zeros


def dequantize_int4(codes: Codes, scales: Halves, zeros: Codes, group: int) -> Floats:
    """What the codes [N, K] stand for: (code - zero) · scale in f32."""
    columns = np.arange(codes.shape[1]) // group
    steps = codes.astype(np.float32) - zeros.astype(np.float32)[:, columns]
    return steps * scales.astype(np.float32)[:, columns]


def _grouped(w: Floats, group: int) -> Floats:
    """[N, K] -> [N, G, group]; the zeros that fill the last group change neither its scale nor its zero."""
    n, k = w.shape
    return np.pad(w, ((0, 0), (0, -k % group))).reshape(n, -1, group)


def _nearest_grid(w: Floats, symmetric: bool) -> tuple[Halves, Codes]:
    """[N, G, group] -> the scale and zero of each group."""
    if symmetric:
        first = np.argmax(np.abs(w), axis=2)[..., None]
        scales = _to_half(np.take_along_axis(w, first, axis=2)[..., 0] / np.float32(-8))
        return scales, np.full(scales.shape, SYMMETRIC_ZERO, np.uint8)
    low = np.minimum(w.min(axis=2), np.float32(0))
    high = np.maximum(w.max(axis=2), np.float32(0))
    # Halves first: the difference of two large numbers may be too large for f32.
    scales = _to_half(high / np.float32(15) - low / np.float32(15))
    zeros = np.minimum(np.rint(low / -_divisor(scales)), _LARGEST_CODE)
    return scales, zeros.astype(np.uint8)


def _encode(w: Floats, scales: Halves, zeros: Codes) -> Codes:
    """[N, G, group] -> codes."""
    steps = np.rint(w / _divisor(scales)[..., None]) + zeros[..., None].astype(np.float32)
    return np.clip(steps, 0, _LARGEST_CODE).astype(np.uint8)


def _to_half(scales: Floats) -> Halves:
    halves = np.clip(scales, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
    return halves + np.float16(0)  # which makes 0 of -0


def _divisor(scales: Halves) -> Floats:
    """The scales in f32; infinity for those that are 0, so that quotients are 0."""
    wide = scales.astype(np.float32)
    return np.where(wide == 0, np.float32(np.inf), wide)
