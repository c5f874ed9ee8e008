"""Weights as the compiler moves them about: slices of stored tensors, put one below the other, read when written.

A weight is [N, K] (output channels, inputs) or a vector [N]. To fuse is to append parts, to shard is to narrow them; no
number is touched before the engine is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .tensors import ELEMENT_BYTES, Checkpoint, widen


@dataclass(frozen=True)
class Part:
    """Rows and columns of one stored tensor; a vector has the single column (0, 1)."""

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def num_rows(self) -> int:
        """Rows that it contributes."""
        return self.rows[1] - self.rows[0]

    def __str__(self) -> str:
        return f"{self.tensor}[{self.rows[0]}:{self.rows[1]},{self.columns[0]}:{self.columns[1]}]"


@dataclass(frozen=True)
class Weight:
    """Parts one below the other, plus a constant (Gemma's norms are 1 + weight)."""

    checkpoint: Checkpoint = field(repr=False, compare=False)
    parts: tuple[Part, ...]
    vector: bool
    add: float = 0.0

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_columns(self) -> int:
        """K, 1 for a vector."""
        return self.parts[0].columns[1] - self.parts[0].columns[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N] or [N, K]."""
        return (self.num_rows,) if self.vector else (self.num_rows, self.num_columns)

    @property
    def dtype(self) -> str:
        """How the checkpoint stores it."""
        return self.checkpoint.tensors[self.parts[0].tensor].dtype

    def plus(self, constant: float) -> Weight:
        """This weight with `constant` added to every element."""
        return replace(self, add=self.add + constant)

    def take_rows(self, start: int, stop: int) -> Weight:
        """Rows [start, stop) of this weight."""
        parts, position = [], 0
        for part in self.parts:
            low, high = max(start - position, 0), min(stop - position, part.num_rows)
            if low < high:
                parts.append(replace(part, rows=(part.rows[0] + low, part.rows[0] + high)))
            position += part.num_rows
        return replace(self, parts=tuple(parts))

    def take_columns(self, start: int, stop: int) -> Weight:
        """Columns [start, stop) of this weight."""
        parts = (replace(p, columns=(p.columns[0] + start, p.columns[0] + stop)) for p in self.parts)
        return replace(self, parts=tuple(parts))

    def below(self, other: Weight) -> Weight:
        """`other`, and this weight below it."""
        return replace(other, parts=other.parts + self.parts)

    def read(self, start: int, stop: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Raw bytes of rows [start, stop), as stored, without the constant; into `buffer` if given."""
        row_bytes = self.num_columns * ELEMENT_BYTES[self.dtype]
        size, position = (stop - start) * row_bytes, 0
        out = (np.empty(size, np.uint8) if buffer is None else buffer[:size]).reshape(stop - start, row_bytes)
        for part in self.take_rows(start, stop).parts:
            self.checkpoint.read(part.tensor, part.rows, part.columns, out[position : position + part.num_rows])
            position += part.num_rows
        return out

    def numpy(self) -> NDArray[np.float32]:
        """The whole weight as float32."""
        values = widen(self.read(0, self.num_rows), self.dtype)
        if self.add:
            values = values + np.float32(self.add)
        return values.reshape(self.shape)
