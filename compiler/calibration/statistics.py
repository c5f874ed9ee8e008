"""What a text shows of one activation: the greatest magnitudes and the second moments of its channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...plugins.linear.quantize_int4 import BLOCK


@dataclass
class Statistics:
    """Of one activation [tokens, K].

    tensors  the checkpoint's that are multiplied by it; the first one names it
    absmax   [K]: the greatest magnitude of each channel
    moments  [ceil(K / 128), 128, 128]: E[x xᵀ] of each 128 channels, zeros where there are fewer
    """

    tensors: list[str]
    absmax: NDArray[np.float32]
    moments: NDArray[np.float32]
    _tokens: int = field(default=0, repr=False)

    @staticmethod
    def of(columns: int, tensors: list[str]) -> Statistics:
        """Of nothing yet."""
        blocks = -(-columns // BLOCK)
        return Statistics(tensors, np.zeros(columns, np.float32), np.zeros((blocks, BLOCK, BLOCK), np.float32))

    def add(self, x: NDArray[np.float32]) -> None:
        """More tokens: [tokens, K] float32."""
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
