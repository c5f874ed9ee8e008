"""kv_write: norm and rotate keys, then store keys and values in their slots of the paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rms_norm.reference import rms_norm

Array = NDArray[Any]


def kv_write(
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    slots: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    k_norm: Array | None = None,
    *,
    head_dim: int,
    rot_dim: int = 0,
    eps: float = 0.0,
    kv_dtype: str = "f32",
) -> tuple[Array, Array]:
    """k, v f32 [tokens, kv_heads · head_dim] into new copies of keys, values [blocks, block_size, kv_heads, head_dim].

    slots [tokens]: block · block_size + offset, or -1 to write nothing. kv_dtype: what is stored is rounded to it.
    """
    keys, values = keys.copy(), values.copy()
    block_size, written = keys.shape[1], slots >= 0
    blocks, offsets = slots[written] // block_size, slots[written] % block_size
    heads = prepare_heads(k, head_dim, cos, sin, k_norm, rot_dim=rot_dim, eps=eps)
    keys[blocks, offsets] = round_state(heads, kv_dtype)[written]
    values[blocks, offsets] = round_state(v.reshape(heads.shape), kv_dtype)[written]
    return keys, values


def prepare_heads(
    x: Array, head_dim: int, cos: Array | None, sin: Array | None, norm: Array | None, *, rot_dim: int, eps: float
) -> Array:
    """[M, heads · head_dim] -> [M, heads, head_dim]: each head normed if there is a weight, rot_dim of it rotated."""
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    if norm is not None:
        heads = rms_norm(heads, None, None, norm, eps=eps)[0]
    if cos is None or sin is None:
        return heads
    half = rot_dim // 2
    first, second, rest = heads[..., :half], heads[..., half:rot_dim], heads[..., rot_dim:]
    cos, sin = cos[:, None], sin[:, None]
    rotated: Array = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated


def round_state(x: Array, kv_dtype: str) -> Array:
    """f32 [tokens, heads, head_dim] as a cache of this type gives it back."""
    if kv_dtype == "bf16":
        bits = x.astype(np.float32).view(np.uint32)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        return (nearest & np.uint32(0xFFFF0000)).view(np.float32)
    if kv_dtype in ("fp8", "i8"):
        largest = np.float32(448 if kv_dtype == "fp8" else 127)
        exact = np.abs(x).max(axis=-1, keepdims=True) / largest
        scale = exact.astype(np.float16).astype(np.float32)
        safe = np.where(scale > 0, scale, np.float32(1))
        values = np.clip(x / safe, -largest, largest)
        rounded: Array = ((_round_e4m3(values) if kv_dtype == "fp8" else np.rint(values)) * scale).astype(np.float32)
        return rounded
    return x


def _round_e4m3(x: Array) -> Array:
    """|x| <= 448 as e4m3 holds it: three bits of mantissa, the smallest normal number 2^-6, ties to even."""
    _, exponent = np.frexp(x)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3).astype(np.float32)
    rounded: Array = (np.rint(x / step) * step).astype(np.float32)
    return rounded
