"""The packer of calibrated weights of four bits: GPTQ in NumPy (plugins/linear/quantize_int4.py), rows in threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.layouts import LAYOUTS, ROW_PADDING, round_up
from ..plugins.linear.quantize_int4 import Feedback, quantize_gptq
from .pack import PackRows, first_not_finite, place_codes, widen_source

# Rows of one call of NumPy, which costs as much as a hundred.
ROWS_AT_A_TIME = 1024


def gptq_packer(feedback: Feedback) -> PackRows:
    """`pack_rows` for a matrix in groups whose inputs are known so well."""
    return partial(_pack_rows, feedback)


def _pack_rows(
    feedback: Feedback,
    source: NDArray[np.uint8],
    source_dtype: str,
    n: int,
    k: int,
    layout: str,
    out: NDArray[np.uint8],
    scale: NDArray[Any],
    sums: None,
    zeros: NDArray[np.uint8] | None,
    *,
    add: float,
    stride: int,
    num_threads: int,
) -> int:
    """As `pack.pack_rows`."""
    assert sums is None, "no layout in groups has sums"
    values = widen_source(source, source_dtype, add).reshape(n, k)
    if (bad := first_not_finite(values, layout)) >= 0:
        return bad
    group, symmetric = LAYOUTS[layout].group, not LAYOUTS[layout].zeros
    step = min(ROWS_AT_A_TIME, round_up(-(-n // num_threads), ROW_PADDING))
    chunks = [values[start : start + step] for start in range(0, n, step)]
    with ThreadPoolExecutor(num_threads) as pool:
        parts = list(pool.map(lambda chunk: quantize_gptq(chunk, group, symmetric, feedback), chunks))
    codes, scales, zero_points = (np.concatenate(each) for each in zip(*parts, strict=True))
    place_codes(codes, scales, zero_points, layout, out, scale, zeros, stride)
    return -1
