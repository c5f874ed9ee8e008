"""What a text shows of one activation: greatest magnitudes and second moments of its channels, and some tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...plugins.linear.quantize_int4 import BLOCK

# Of each activation.
MOST_SAMPLES = 64
_GOLDEN = (5**0.5 - 1) / 2


@dataclass
class Statistics:
    """Of one activation [tokens, K].

    tensors  the checkpoint's that are multiplied by it; the first one names it
    absmax   [K]: the greatest magnitude of each channel
    moments  [ceil(K / 128), 128, 128]: E[x xᵀ] of each 128 channels, zeros where there are fewer
    samples  [up to 64, K]: itself, of tokens from everywhere
    """

    tensors: list[str]
    absmax: NDArray[np.float32]
    moments: NDArray[np.float32]
    samples: NDArray[np.float32]
    _sampled: frozenset[int] = field(default=frozenset(), repr=False)
    _tokens: int = field(default=0, repr=False)

    @staticmethod
    def of(columns: int, tensors: list[str], tokens: int) -> Statistics:
        """Of nothing yet; `tokens` will come."""
        # Multiples of the golden ratio, modulo 1: no two lie close together, and none at the same place of a sequence.
        places = ((np.arange(MOST_SAMPLES) + 0.5) * _GOLDEN % 1 * tokens).astype(int)
        return Statistics(
            tensors,
            np.zeros(columns, np.float32),
            np.zeros((-(-columns // BLOCK), BLOCK, BLOCK), np.float32),
            np.zeros((0, columns), np.float32),
            frozenset(places.tolist()),
        )

    def add(self, x: NDArray[np.float32]) -> None:
        """More tokens: [tokens, K] float32."""
        rows = [row for row in range(len(x)) if self._tokens + row in self._sampled]
        self.samples = np.concatenate([self.samples, x[rows]])
        np.maximum(self.absmax, np.abs(x).max(axis=0), out=self.absmax)
        share = np.float32(self._tokens / (self._tokens + len(x)))
        for index, block in enumerate(self.moments):
            columns = np.ascontiguousarray(x[:, index * BLOCK : (index + 1) * BLOCK])
            size = columns.shape[1]
            block *= share
            block[:size, :size] += columns.T @ columns * np.float32(1 / (self._tokens + len(x)))
        self._tokens += len(x)

    @property
    def finite(self) -> bool:
        """True if no number overflowed."""
        return bool(np.isfinite(self.absmax).all() and np.isfinite(self.moments).all())
