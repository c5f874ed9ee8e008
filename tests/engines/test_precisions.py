"""Precisions and the bytes of layouts: the numbers that FORMAT.md and the README promise."""

from __future__ import annotations

import pytest
from enginery.engines.layouts import LAYOUTS
from enginery.engines.precisions import KV_CACHE_DTYPES, PRECISIONS


@pytest.mark.parametrize(
    ("layout", "num_bytes"),
    [
        ("rows_f32.v0", 17 * 65 * 4),
        ("rows_bf16.v0", 17 * 65 * 2),
        ("f32_k1n16.v0", 32 * 128 * 4),
        ("bf16_k2n16.v0", 32 * 128 * 2),
        ("int8_k4n16.v0", 32 * 128),
        ("int4_k8n16g32.v0", 32 * 128 // 2),
        ("uint4_k8n16g128.v0", 32 * 128 // 2),
        ("scale_f16_n16.v0", 32 * 65 * 2),
        ("zero_u8_n16.v0", 32 * 65),
        ("scale_f32.v0", 32 * 4),
        ("sum_i32.v0", 32 * 4),
        ("bias_f32.v0", 32 * 4),
    ],
)
def test_layouts_take_the_bytes_that_the_format_says(layout: str, num_bytes: int) -> None:
    """17 rows of 65 columns, padded to 16 and 64 where the layout pads."""
    vector = layout.startswith(("scale_f32", "sum", "bias"))
    assert LAYOUTS[layout].num_bytes(17, 1 if vector else 65) == num_bytes


@pytest.mark.parametrize("layout", ["f32_k1n16.v0", "int8_k4n16.v0", "scale_f32.v0", "bias_f32.v0"])
def test_gated_matrices_interleave_by_whole_panels(layout: str) -> None:
    assert [LAYOUTS[layout].gated_rows(rows) for rows in (16, 17)] == [32, 64]


@pytest.mark.parametrize(
    ("name", "activation", "table", "kv_cache"),
    [("fp32", "f32", "f32", "fp32"), ("bf16", "bf16", "bf16", "bf16"), ("int8", "int8", "bf16", "bf16")],
)
def test_precisions_hold(name: str, activation: str, table: str, kv_cache: str) -> None:
    precision = PRECISIONS[name]
    assert (precision.name, precision.activation) == (name, activation)
    assert (precision.table, precision.kv_cache) == (table, kv_cache)


def test_kv_cache_dtypes_are_called_as_plans_do() -> None:
    wanted = {"fp32": "f32", "bf16": "bf16", "int8": "i8"}
    assert KV_CACHE_DTYPES | wanted == KV_CACHE_DTYPES
