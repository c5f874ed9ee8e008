"""The packer of weights: plugins/linear/pack.cpp where the machine can run it, else the layouts in NumPy.

Both make the same bytes; NumPy takes some fifty times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.layouts import LAYOUTS, ROW_PADDING
from ..engines.targets import host_features
from ..plugins.linear import layouts
from ..plugins.linear.quantize_int4 import quantize_int4

PackRows = Callable[..., int]
# What pack.cpp is compiled for.
_FEATURES = ("avx2", "fma", "f16c", "bmi2")


def find_packer(features: list[str] | None = None) -> PackRows:
    """pack_rows for a machine with these CPU features, by default this machine."""
    if set(_FEATURES) <= set(host_features() if features is None else features):
        from ._pack import pack_rows as compiled

        return compiled
    return pack_rows


def pack_rows(
    source: NDArray[np.uint8],
    source_dtype: str,
    n: int,
    k: int,
    layout: str,
    out: NDArray[np.uint8],
    scale: NDArray[np.float32] | NDArray[np.uint16] | None = None,
    sums: NDArray[np.int32] | None = None,
    zeros: NDArray[np.uint8] | None = None,
    *,
    add: float = 0.0,
    stride: int = 1,
    num_threads: int = 1,
) -> int:
    """Packs `n` stored rows of `k` values, each plus `add`, into `out`: panel p at p · stride, or row r at r · stride.

    scale (f32, or of groups the bits of f16), sums, zeros: of each row, placed as the rows are.

    Returns the least row · k + column whose value is not finite in the layout, or -1; where there is one, what is
    written means nothing. num_threads: as pack.cpp has it.
    """
    values = widen_source(source, source_dtype, add).reshape(n, k)
    if (bad := first_not_finite(values, layout)) >= 0:
        return bad
    if not LAYOUTS[layout].panels:
        rows, scales = layouts.encode_rows(values, layout)
        _place(np.ascontiguousarray(rows).view(np.uint8).reshape(n, -1), out, stride)
        if scale is not None:
            _place(scales.reshape(n, 1), scale, stride)
        return -1
    if LAYOUTS[layout].group:
        assert scale is not None
        codes, halves, zero_points = quantize_int4(values, LAYOUTS[layout].group, symmetric=not LAYOUTS[layout].zeros)
        place_codes(codes, halves, zero_points, layout, out, scale, zeros, stride)
        return -1
    if layout == "int8_k4n16.v0":
        assert scale is not None
        assert sums is not None
        quantized, scales = layouts.quantize_int8(values)
        _place(layouts.pad_vector(scales).reshape(-1, ROW_PADDING), scale, stride)
        _place(layouts.pad_vector(layouts.row_sums(quantized)).reshape(-1, ROW_PADDING), sums, stride)
        packed: NDArray[Any] = layouts.pack_int8_k4n16(quantized)
    else:
        packed = layouts.pack_bf16_k2n16(values) if layout == "bf16_k2n16.v0" else layouts.pack_f32_k1n16(values)
    _place(packed.reshape(len(packed), -1).view(np.uint8), out, stride)
    return -1


def place_codes(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zero_points: NDArray[np.uint8],
    layout: str,
    out: NDArray[np.uint8],
    scale: NDArray[Any],
    zeros: NDArray[np.uint8] | None,
    stride: int,
) -> None:
    """Codes [n, k], scales and zero points [n, G] into the panels of a layout in groups."""
    groups = LAYOUTS[layout].num_groups(codes.shape[1])
    packed = layouts.pack_int4_k8n16(codes)
    _place(packed.reshape(len(packed), -1), out, stride)
    _place(layouts.pack_groups(scales.view(np.uint16), groups).reshape(len(packed), -1), scale, stride)
    if zeros is not None:
        _place(layouts.pack_groups(zero_points, groups).reshape(len(packed), -1), zeros, stride)


def first_not_finite(values: NDArray[np.float32], layout: str) -> int:
    """The least index of a value [n, k] that is not finite in the layout, or -1."""
    limit = 0x7F7F8000 if "bf16" in layout else 0x7F800000  # bf16 rounds the last f32 values to infinity
    finite = (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)) < limit
    return -1 if finite.all() else int(np.argmin(finite))


def widen_source(source: NDArray[np.uint8], dtype: str, add: float) -> NDArray[np.float32]:
    """Stored numbers as float32, plus `add`."""
    flat = source.reshape(-1)
    if dtype == "bf16":
        values = layouts.from_bf16(flat.view(np.uint16))
    else:
        values = flat.view(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
    return values + np.float32(add) if add else values


def _place(panels: NDArray[Any], out: NDArray[Any], stride: int) -> None:
    """Rows of `panels` into every stride-th row of `out`."""
    width = panels.shape[1]
    for index, panel in enumerate(panels):
        out[index * stride * width :][:width] = panel
