"""all_reduce: the sum of every rank's array, in the order of ranks."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def all_reduce(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The arrays of all ranks -> their sum."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
