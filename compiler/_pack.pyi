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
    panel_stride: int = 1,
    num_threads: int = 1,
) -> int:
    """Packs n rows of k columns. Returns row · k + column of the first value that is not finite in the layout, or -1.

    source        raw bytes [n, k], C-contiguous; source_dtype: "f32", "bf16" or "f16"
    layout        "f32_k1n16.v0", "bf16_k2n16.v0", "int8_k4n16.v0", "rows_f32.v0" or "rows_bf16.v0"
    out           bytes of the panels, written in place; in packed layouts panel p begins at p · panel_stride panels,
                  the last one being filled up with zeros: row ranges of a tensor begin at multiples of 16
    scale, sums   for int8_k4n16 only: [16 · panels], spaced as the panels are
    add           added to every value in float32
    panel_stride  2 for gated weights: gate into `out`, up into `out` from its second panel on

    Where a value is not finite, what was written means nothing. Runs without the GIL, on num_threads threads, with the
    same bytes for any number of them. Raises ValueError for sizes that contradict each other, TypeError for arrays of
    another type or not contiguous.
    """
