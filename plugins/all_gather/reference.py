"""all_gather: every rank's columns side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def all_gather(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The arrays [M, columns] of all ranks -> [M, all columns]."""
    return np.concatenate(parts, axis=1)
