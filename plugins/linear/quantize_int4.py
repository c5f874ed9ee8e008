"""Weights in groups of four-bit codes: rounding to nearest, and GPTQ where the moments of the inputs are known.

A group is `group` columns of a row (the last one of a row may be shorter) with one scale; w ≈ (code - zero) · scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...engines.layouts import GROUPS

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Halves = NDArray[np.float16]

SYMMETRIC_ZERO = 8
BLOCK = 128
_LARGEST_CODE = 15
_DAMPING = 0.01
_RATIOS = [np.float32(1 - 0.04 * i) for i in range(12)]
_LARGEST_HALF = np.float32(65504)
# Above what any code can stand for.
_LARGEST = np.float32(1 << 20)


def quantize_int4(w: Floats, group: int, symmetric: bool, moments: Floats | None = None) -> tuple[Codes, Halves, Codes]:
    """float32 [N, K], finite -> codes [N, K] in 0 … 15, scales f16 [N, G] and zeros [N, G], G = ceil(K / group).

    moments: [ceil(K / 128), 128, 128], the blocks on the diagonal of E[x xᵀ], by which `quantize_gptq` quantizes.
    Without them rounds to nearest:
    scale   symmetric: the group's element m of greatest magnitude (the first of equals) / -8, so that m is code 0 and
            the sign of the scale is that of -m; else max(w, 0) / 15 - min(w, 0) / 15. Computed in f32, clipped to
            65504 in magnitude, rounded to f16, +0 rather than -0
    zero    symmetric: 8, else min(w, 0) / -scale, to the nearest (half to even), at most 15
    code    w / scale in f32, to the nearest (half to even), + zero, clipped to 0 … 15; zero where the scale is 0
    """
    assert group in GROUPS
    w = np.asarray(w, np.float32)
    if moments is not None:
        return quantize_gptq(w, group, symmetric, find_feedback(moments))
    groups = np.pad(w, ((0, 0), (0, -w.shape[1] % group))).reshape(len(w), -1, group)
    columns = np.moveaxis(groups, 2, 0)
    scales, zeros = _nearest_grid(columns, symmetric)
    codes = np.moveaxis(_encode(columns, scales, zeros), 0, 2)
    return codes.reshape(len(w), -1)[:, : w.shape[1]].copy(), scales, zeros


def dequantize_int4(codes: Codes, scales: Halves, zeros: Codes, group: int) -> Floats:
    """What the codes [N, K] stand for: (code - zero) · scale in f32."""
    columns = np.arange(codes.shape[1]) // group
    steps = codes.astype(np.float32) - zeros.astype(np.float32)[:, columns]
    return steps * scales.astype(np.float32)[:, columns]


@dataclass(frozen=True)
class Feedback:
    """What GPTQ knows of the inputs, in blocks of 128 columns.

    shares  [blocks, 128, 128]: how much of a column's error each column after it makes up for
    weights [blocks, 128]: what an error of the column costs where nothing makes up for it, 1 at most
    """

    shares: Floats
    weights: Floats


def find_feedback(moments: Floats) -> Feedback:
    """[blocks, 128, 128], E[x xᵀ], dampened by a hundredth of the mean of its diagonal.

    With H = V D Vᵀ, V upper triangular with ones on its diagonal, the shares are V⁻¹: the rows of the Cholesky factor
    of H⁻¹ (Frantar et al., GPTQ, 2022), each divided by its diagonal.
    """
    shares = np.broadcast_to(np.eye(BLOCK), moments.shape).copy()
    weights = np.empty(moments.shape[:2], np.float32)
    for h, share, weight in zip(moments.astype(np.float64), shares, weights, strict=True):
        diagonal = np.einsum("ii->i", h)
        seen = diagonal > 0
        diagonal += _DAMPING * math.fsum(diagonal) / seen.sum() if seen.any() else 1.0
        weight[:] = diagonal / diagonal.max()
        for j in range(BLOCK - 1, 0, -1):
            column = h[:j, j] / h[j, j]
            h[:j, :j] -= column[:, None] * h[:j, j]
            share[:j, j:] -= column[:, None] * share[j, j:]
    return Feedback(shares.astype(np.float32), weights)


def quantize_gptq(w: Floats, group: int, symmetric: bool, feedback: Feedback) -> tuple[Codes, Halves, Codes]:
    """GPTQ (Frantar et al., 2022), each block of 128 columns by itself; shapes as in `quantize_int4`.

    Column after column is rounded, and those after it in its block make up for the error. A group's scale and zero are
    chosen when its first column is reached, out of some that clip, by the weighted error. Rows do not depend on each
    other. No sum is left to a library that would add in an order of its own: the same bytes on any machine.
    """
    n, k = w.shape
    num_groups = -(-k // group)
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((num_groups, n), np.float16), np.empty((num_groups, n), np.uint8)
    for block, begin in enumerate(range(0, k, BLOCK)):
        left = np.ascontiguousarray(np.clip(w[:, begin : begin + BLOCK].T, -_LARGEST, _LARGEST))
        for start in range(0, len(left), group):
            stop, index = min(start + group, len(left)), (begin + start) // group
            scale, zero = _search_grid(left[start:stop], symmetric, feedback.weights[block, start:stop])
            scales[index], zeros[index] = scale, zero
            wide, divisor, offset = scale.astype(np.float32), _divisor(scale), zero.astype(np.float32)
            for column in range(start, stop):
                step = np.clip(np.rint(left[column] / divisor) + offset, 0, _LARGEST_CODE)
                codes[begin + column] = step
                error = left[column] - (step - offset) * wide
                left[column + 1 :] -= feedback.shares[block, column, column + 1 : len(left), None] * error
    return codes.T.copy(), scales.T.copy(), zeros.T.copy()


def _search_grid(w: Floats, symmetric: bool, weights: Floats) -> tuple[Halves, Codes]:
    """[group, N] -> the scale and zero of each group with the least error, weighed by column, of those tried."""
    tried = [_nearest_grid(ratio * w, symmetric) for ratio in _RATIOS]
    if symmetric:
        tried += [(-scale, zero) for scale, zero in tried]
    best, (scales, zeros) = np.full(w.shape[1], np.inf, np.float32), tried[0]
    for scale, zero in tried:
        steps = _encode(w, scale, zero).astype(np.float32) - zero.astype(np.float32)
        error = np.sum((w - steps * scale.astype(np.float32)) ** 2 * weights[:, None], axis=0)
        better = error < best
        best = np.where(better, error, best)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros


def _nearest_grid(w: Floats, symmetric: bool) -> tuple[Halves, Codes]:
    """[group, ...] -> the scale and zero of each group."""
    if symmetric:
        first = np.argmax(np.abs(w), axis=0)[None]
        scales = _to_half(np.take_along_axis(w, first, axis=0)[0] / np.float32(-8))
        return scales, np.full(scales.shape, SYMMETRIC_ZERO, np.uint8)
    low = np.minimum(w.min(axis=0), np.float32(0))
    high = np.maximum(w.max(axis=0), np.float32(0))
    # Divided before subtracted: the difference of two large numbers may be too large for f32.
    scales = _to_half(high / np.float32(15) - low / np.float32(15))
    zeros = np.minimum(np.rint(low / -_divisor(scales)), _LARGEST_CODE)
    return scales, zeros.astype(np.uint8)


def _encode(w: Floats, scales: Halves, zeros: Codes) -> Codes:
    """[group, ...] -> codes."""
    steps = np.rint(w / _divisor(scales)) + zeros.astype(np.float32)
    codes: Codes = np.clip(steps, 0, _LARGEST_CODE).astype(np.uint8)
    return codes


def _to_half(scales: Floats) -> Halves:
    halves = np.clip(scales, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
    return halves + np.float16(0)  # which makes 0 of -0


def _divisor(scales: Halves) -> Floats:
    """The scales in f32; infinity for those that are 0, so that quotients are 0."""
    wide = scales.astype(np.float32)
    return np.where(wide == 0, np.float32(np.inf), wide)
