"""attention: causal attention over a paged cache, grouped queries, windows and soft-capping."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kv_write.reference import prepare_heads

Array = NDArray[Any]


def attention(
    q: Array,
    keys: Array,
    values: Array,
    block_table: Array,
    positions: Array,
    token_sequence: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    q_norm: Array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    rot_dim: int = 0,
    eps: float = 0.0,
) -> Array:
    """q f32 [M, num_heads · head_dim] -> f32 [M, num_heads · head_dim], in float64 inside.

    keys, values   [blocks, block_size, num_kv_heads, head_dim]
    block_table    [sequences, max_blocks], -1 where there is none
    positions, token_sequence  [M]: a query sees positions max(0, p − window + 1) … p of its sequence (window 0: from 0)
    """
    heads = prepare_heads(q, head_dim, cos, sin, q_norm, rot_dim=rot_dim, eps=eps).astype(np.float64)
    block_size, group = keys.shape[1], num_heads // num_kv_heads
    out = np.zeros((len(q), num_heads, head_dim))
    for row, (position, sequence) in enumerate(zip(positions, token_sequence, strict=True)):
        seen = np.arange(max(0, position - window + 1) if window else 0, position + 1)
        blocks = block_table[sequence][seen // block_size]
        k = np.repeat(keys[blocks, seen % block_size].astype(np.float64), group, axis=1)
        v = np.repeat(values[blocks, seen % block_size].astype(np.float64), group, axis=1)
        scores = np.einsum("hd,thd->ht", heads[row], k) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[row] = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    return out.reshape(len(q), -1).astype(np.float32)
