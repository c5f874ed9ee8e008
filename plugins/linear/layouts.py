"""Weight layouts in NumPy (engines/FORMAT.md): what pack.cpp does fast, said plainly.

Matrices are [N, K], output channels by inputs; packed ones have N padded to 16 and K to 64 with zeros: Np, Kp. bfloat16
is held as its bits, uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.layouts import COLUMN_PADDING, LAYOUTS, ROW_PADDING, padded_columns, padded_rows, round_up

Array = NDArray[Any]


def pad_matrix(w: Array) -> Array:
    """[N, K] -> [Np, Kp], with zeros."""
    n, k = w.shape
    return np.pad(w, ((0, padded_rows(n) - n), (0, padded_columns(k) - k)))


def pad_vector(v: Array) -> Array:
    """[N] -> [Np], with zeros: the layouts scale_f32, sum_i32 and bias_f32."""
    return np.pad(v, (0, padded_rows(len(v)) - len(v)))


def pack_f32_k1n16(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, K] -> [Np/16, Kp, 16]."""
    return _pack(w, 1)[..., 0]


def unpack_f32_k1n16(packed: NDArray[np.float32], n: int, k: int) -> NDArray[np.float32]:
    """[Np/16, Kp, 16] -> [n, k]."""
    return _unpack(packed, n, k, 1)


def pack_bf16_k2n16(w: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 [N, K] -> bfloat16 bits [Np/16, Kp/2, 16, 2], rounded to nearest even."""
    return _pack(to_bf16(w), 2)


def unpack_bf16_k2n16(packed: NDArray[np.uint16], n: int, k: int) -> NDArray[np.float32]:
    """bfloat16 bits [Np/16, Kp/2, 16, 2] -> float32 [n, k]."""
    return from_bf16(_unpack(packed, n, k, 2))


def pack_int8_k4n16(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """[N, K] -> [Np/16, Kp/4, 16, 4]."""
    return _pack(q, 4)


def unpack_int8_k4n16(packed: NDArray[np.int8], n: int, k: int) -> NDArray[np.int8]:
    """[Np/16, Kp/4, 16, 4] -> [n, k]."""
    return _unpack(packed, n, k, 4)


def pack_int4_k8n16(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes 0 … 15 [N, K] -> [Np/16, Kp/8, 16, 4]: low halves hold columns k … k + 3, high ones k + 4 … k + 7."""
    eights = _pack(codes, 8)
    packed: NDArray[np.uint8] = eights[..., :4] | (eights[..., 4:] << np.uint8(4))
    return packed


def unpack_int4_k8n16(packed: NDArray[np.uint8], n: int, k: int) -> NDArray[np.uint8]:
    """[Np/16, Kp/8, 16, 4] -> codes [n, k]."""
    return _unpack(np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1), n, k, 8)


def pack_groups(values: Array, num_groups: int) -> Array:
    """Scales or zero points [N, G] -> [Np/16, num_groups, 16], with zeros: scale_f16_n16 and zero_u8_n16."""
    n, groups = values.shape
    padded = np.pad(values, ((0, padded_rows(n) - n), (0, num_groups - groups)))
    return np.ascontiguousarray(padded.reshape(-1, ROW_PADDING, num_groups).transpose(0, 2, 1))


def quantize_int8(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """float32 [N, K] -> int8 [N, K] in -127 … 127 and its scale [N]: w ≈ int8 · scale.

    scale is the row's absmax / 127; where that is 0 the row's values are 0 too. Rounds half to even.
    """
    w = np.asarray(w, np.float32)
    scale = np.max(np.abs(w), axis=1) / np.float32(127)
    divisor = np.where(scale > 0, scale, np.float32(np.inf))[:, None]
    # A scale that is subnormal is coarse: the quotient can leave the range.
    return np.clip(np.rint(w / divisor), -127, 127).astype(np.int8), scale


def quantize_fp8(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """float32 [N, K] -> e4m3 codes [N, K] and their scale [N]: w ≈ e4m3 · scale; scale is the row's absmax / 448."""
    import ml_dtypes

    w = np.asarray(w, np.float32)
    scale = np.max(np.abs(w), axis=1) / np.float32(448)
    divisor = np.where(scale > 0, scale, np.float32(np.inf))[:, None]
    quotient = np.clip(w / divisor, -448, 448)
    return quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def encode_rows(w: NDArray[np.float32], layout: str) -> tuple[Array, NDArray[np.float32]]:
    """float32 [N, K] -> rows of a layout without panels, padded along K, and their scales (if it has them)."""
    rows: Array
    scale = np.zeros(len(w), np.float32)
    if layout == "rows_f32.v0":
        return w, scale
    if layout.startswith("int8"):
        rows, scale = quantize_int8(w)
    elif layout.startswith("fp8"):
        rows, scale = quantize_fp8(w)
    else:
        rows = to_bf16(w)
    columns = round_up(w.shape[1], LAYOUTS[layout].column_padding)
    return np.pad(rows, ((0, 0), (0, columns - w.shape[1]))), scale


def row_sums(q: NDArray[np.int8]) -> NDArray[np.int32]:
    """int8 [N, K] -> the sum of each row's values [N]."""
    sums: NDArray[np.int32] = np.sum(q, axis=1, dtype=np.int32)
    return sums


def interleave_gated(gate: Array, up: Array) -> Array:
    """Two [I, ...] -> [2 · Ip, ...] in panels of 16 rows, the gate's and the up's in turn; zeros fill the last two."""
    pad = [(0, padded_rows(len(gate)) - len(gate))] + [(0, 0)] * (gate.ndim - 1)
    panels = [np.pad(half, pad).reshape(-1, ROW_PADDING, *gate.shape[1:]) for half in (gate, up)]
    return np.stack(panels, axis=1).reshape(-1, *gate.shape[1:])


def interleave_rows(gate: Array, up: Array) -> Array:
    """Two [I, ...] -> [2 · I, ...], a row of the gate and a row of the up in turn."""
    return np.stack([gate, up], axis=1).reshape(-1, *gate.shape[1:])


def deinterleave_gated(gated: Array, rows: int) -> tuple[Array, Array]:
    """[2 · Ip, ...] -> gate and up [rows, ...]."""
    panels = gated.reshape(-1, 2, ROW_PADDING, *gated.shape[1:])
    gate, up = (panels[:, i].reshape(-1, *gated.shape[1:])[:rows] for i in (0, 1))
    return gate, up


def to_bf16(w: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> bfloat16 bits, rounded to nearest even; for finite values."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _pack(w: Array, columns: int) -> Array:
    """[N, K] -> [Np/16, Kp/columns, 16, columns]."""
    padded = pad_matrix(w)
    np_, kp = padded.shape
    assert kp % COLUMN_PADDING == 0
    panels = padded.reshape(np_ // ROW_PADDING, ROW_PADDING, kp // columns, columns)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3))


def _unpack(packed: Array, n: int, k: int, columns: int) -> Array:
    panels = packed.reshape(padded_rows(n) // ROW_PADDING, padded_columns(k) // columns, ROW_PADDING, columns)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3).reshape(padded_rows(n), padded_columns(k))[:n, :k])
