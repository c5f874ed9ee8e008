"""rotary_table: cos and sin of a step's positions (Su et al., RoFormer, 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rotary_table(
    positions: Array,
    prompt_lengths: Array,
    inv_freq: Array,
    inv_freq_long: Array | None = None,
    *,
    rot_dim: int,
    kind: str = "static",
    attention_factor: float = 1.0,
    threshold: int = 0,
    base: float = 0.0,
    factor: float = 1.0,
) -> tuple[Array, Array]:
    """[tokens], [tokens], f32 [rot_dim / 2] -> cos, sin f32 [tokens, rot_dim / 2], both times attention_factor.

    kind "longrope": prompts longer than threshold take inv_freq_long. "dynamic": L = max(prompt_length, position + 1)
    above threshold the base is base · (factor · L / threshold − (factor − 1)) ^ (rot_dim / (rot_dim − 2)).
    """
    frequencies = np.broadcast_to(inv_freq, (len(positions), len(inv_freq)))
    if kind == "longrope":
        assert inv_freq_long is not None
        frequencies = np.where((prompt_lengths > threshold)[:, None], inv_freq_long, frequencies)
    elif kind == "dynamic":
        length = np.maximum(prompt_lengths, positions + 1)
        stretch = np.maximum(factor * length / threshold - (factor - 1), 1.0)
        grown = base * stretch ** (rot_dim / (rot_dim - 2))
        dynamic = grown[:, None] ** -(np.arange(0, rot_dim, 2) / rot_dim)
        frequencies = np.where((length > threshold)[:, None], dynamic.astype(np.float32), frequencies)
    # The angle is rounded to float32, as in the checkpoint's own implementation.
    angles = (positions[:, None].astype(np.float32) * frequencies.astype(np.float32)).astype(np.float64)
    return (np.cos(angles) * attention_factor).astype(np.float32), (np.sin(angles) * attention_factor).astype(
        np.float32
    )
