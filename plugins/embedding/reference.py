"""embedding: rows of a table, scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def embedding(
    token_ids: NDArray[Any], table: NDArray[Any], *, scale: float = 1.0, vocab_start: int = 0
) -> NDArray[Any]:
    """[tokens], [vocab, hidden] -> f32 [tokens, hidden]; ids outside [vocab_start, vocab_start + vocab) give zeros."""
    local = token_ids - vocab_start
    inside = (local >= 0) & (local < len(table))
    rows = table[np.where(inside, local, 0)] * np.float32(scale)
    return np.where(inside[:, None], rows, np.float32(0))
