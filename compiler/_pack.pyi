"""The packer of weights (plugins/linear/pack.cpp): rows of a checkpoint's tensor into a layout of engines/FORMAT.md."""

import numpy as np
from numpy.typing import NDArray

def pack_rows(
    source: NDArray[np.uint8],
    source_dtype: str,
    n: int,
    k: int,
    layout: str,
    out: NDArray[np.uint8],
    scale: NDArray[np.float32] | None = None,
    sums: NDArray[np.int32] | None = None,
    add: float = 0.0,
    stride: int = 1,
    num_threads: int = 1,
) -> int:
    """Packs n rows of k columns. Returns row · k + column of the first value that is not finite in the layout, or -1.

    source        raw bytes [n, k], C-contiguous; source_dtype: "f32", "bf16" or "f16"
    layout        one of matrices or rows in engines/layouts.py
    out           bytes, written in place. In layouts of panels, panel p begins at p · stride panels, the last one being
                  filled up with zeros: row ranges of a tensor begin at multiples of 16. In others row r begins at
                  r · stride rows
    scale         for int8 and fp8 layouts only: one for each row, placed as the rows are
    sums          for int8_k4n16 only, likewise
    add           added to every value in float32
    stride        2 for gated weights: gate into `out`, up into `out` from its second panel, or row, on

    Where a value is not finite, what was written means nothing. Runs without the GIL, on num_threads threads, with the
    same bytes for any number of them. Raises ValueError for sizes that contradict each other, TypeError for arrays of
    another type or not contiguous.
    """
