"""gather_rows: the rows that are sampled."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def gather_rows(x: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """[tokens, columns], [rows] -> [rows, columns]."""
    out: NDArray[Any] = x[rows]
    return out
