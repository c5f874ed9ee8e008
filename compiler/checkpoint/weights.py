"""Weights as the compiler moves them about: slices of stored tensors, put one below the other, read when written.

A weight is [N, K] (output channels, inputs) or a vector [N]. To fuse is to append parts, to shard is to narrow them; no
number is touched before the engine is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

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


class Factors:
    """What the rows or columns of a weight are multiplied by: float32, computed when first asked for."""

    def __init__(self, compute: Callable[[], NDArray[np.float32]]) -> None:
        self._compute = compute

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """One for each row or column."""
        return self._compute()

    def take(self, start: int, stop: int) -> Factors:
        """Those of [start, stop)."""
        return Factors(lambda: self.values[start:stop])


@dataclass(frozen=True)
class Weight:
    """Parts one below the other, plus a constant (Gemma's norms are 1 + weight), times factors if there are any."""

    checkpoint: Checkpoint = field(repr=False, compare=False)
    parts: tuple[Part, ...]
    vector: bool
    add: float = 0.0
    row_factors: Factors | None = None
    column_factors: Factors | None = None

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

    @property
    def stored_as_is(self) -> bool:
        """True if its numbers are those of the checkpoint, plus the constant."""
        return self.row_factors is None and self.column_factors is None

    def plus(self, constant: float) -> Weight:
        """This weight with `constant` added to every element."""
        assert self.stored_as_is, "constants are added before factors are applied"
        return replace(self, add=self.add + constant)

    def times(self, rows: Factors | None = None, columns: Factors | None = None) -> Weight:
        """This weight with its rows, or its columns, multiplied."""
        assert rows is None or self.row_factors is None, "rows have factors already"
        assert columns is None or self.column_factors is None, "columns have factors already"
        return replace(self, row_factors=rows or self.row_factors, column_factors=columns or self.column_factors)

    def take_rows(self, start: int, stop: int) -> Weight:
        """Rows [start, stop) of this weight."""
        parts, position = [], 0
        for part in self.parts:
            low, high = max(start - position, 0), min(stop - position, part.num_rows)
            if low < high:
                parts.append(replace(part, rows=(part.rows[0] + low, part.rows[0] + high)))
            position += part.num_rows
        factors = self.row_factors.take(start, stop) if self.row_factors else None
        return replace(self, parts=tuple(parts), row_factors=factors)

    def take_columns(self, start: int, stop: int) -> Weight:
        """Columns [start, stop) of this weight."""
        parts = (replace(p, columns=(p.columns[0] + start, p.columns[0] + stop)) for p in self.parts)
        factors = self.column_factors.take(start, stop) if self.column_factors else None
        return replace(self, parts=tuple(parts), column_factors=factors)

    def below(self, other: Weight) -> Weight:
        """`other`, and this weight below it."""
        assert self.stored_as_is, "weights are stacked before factors are applied"
        assert other.stored_as_is, "weights are stacked before factors are applied"
        return replace(other, parts=other.parts + self.parts)

    def read(self, start: int, stop: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Raw bytes of rows [start, stop), as stored, without constant and factors; into `buffer` if given."""
        row_bytes = self.num_columns * ELEMENT_BYTES[self.dtype]
        size, position = (stop - start) * row_bytes, 0
        out = (np.empty(size, np.uint8) if buffer is None else buffer[:size]).reshape(stop - start, row_bytes)
        for part in self.take_rows(start, stop).parts:
            self.checkpoint.read(part.tensor, part.rows, part.columns, out[position : position + part.num_rows])
            position += part.num_rows
        return out

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [rows, K], a vector's as [rows, 1]."""
        values = widen(self.read(start, stop), self.dtype)
        if self.add:
            values = values + np.float32(self.add)
        if self.row_factors is not None:
            values = values * self.row_factors.values[start:stop, None]
        if self.column_factors is not None:
            values = values * self.column_factors.values
        return values

    def numpy(self) -> NDArray[np.float32]:
        """The whole weight as float32."""
        return self.values(0, self.num_rows).reshape(self.shape)
