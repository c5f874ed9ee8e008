"""all_reduce: the sum of every rank's array, in the order of ranks, and of a residual that all have."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def all_reduce(parts: list[NDArray[Any]], residual: NDArray[Any] | None = None) -> NDArray[Any]:
    """The arrays of all ranks -> their sum, + residual."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if residual is None else total + residual
