"""rms_norm: residual addition, RMS norm (Zhang and Sennrich, 2019) and quantization per token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rms_norm(
    x: Array, delta: Array | None = None, post_weight: Array | None = None, weight: Array | None = None, *, eps: float
) -> tuple[Array, Array]:
    """f32 [M, hidden] -> (out, sum), both f32 [M, hidden].

    sum = x + delta, delta first normalised with post_weight if that is given; out = norm(sum) · weight, or sum.
    """
    if delta is not None:
        x = x + (delta if post_weight is None else _norm(delta, eps) * post_weight)
    out: Array = x if weight is None else _norm(x, eps) * weight
    return out, x


def quantize_rows(x: Array, kind: str = "i8") -> tuple[Array, Array]:
    """f32 [M, K] -> (int8 or e4m3 [M, K], f32 scale [M]): scale = absmax / 127 or / 448, values round half to even.

    kind: i8 or fp8.
    """
    largest = np.float32(127 if kind == "i8" else 448)
    scale = (np.abs(x).max(axis=1, initial=0) / largest).astype(np.float32)
    safe = np.where(scale > 0, scale, np.float32(1))
    quotients = np.clip(x / safe[:, None], -largest, largest)
    if kind == "i8":
        return np.rint(quotients).astype(np.int8), scale
    import ml_dtypes

    return quotients.astype(ml_dtypes.float8_e4m3fn), scale


def _norm(x: Array, eps: float) -> Array:
    wide = x.astype(np.float64)
    out: Array = (wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(np.float32)
    return out
