"""gather_rows for a GPU, interpreted: rows arrive to the bit, padding included."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from enginery.plugins.gather_rows.cuda import launches
from enginery.plugins.gather_rows.reference import gather_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from .interpreter import launch


@settings(max_examples=15, deadline=None, database=None)
@given(columns=st.sampled_from([1, 128, 1000, 1025, 2176]), rows=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_matches_reference(columns: int, rows: list[int]) -> None:
    stride = -(-columns // 128) * 128
    x = np.zeros((7, stride), ml_dtypes.bfloat16)
    x[:, :columns] = np.random.default_rng(columns).normal(size=(7, columns)).astype(ml_dtypes.bfloat16)
    indices = np.array(rows, np.int32)
    out = np.full((len(rows), stride), np.nan, ml_dtypes.bfloat16)
    (plan,) = launches(columns=columns, architecture=80)
    launch(plan.kernel, (len(rows), plan.grid[1], 1), {"rows": indices, "x": x, "out": out})  # type: ignore[arg-type]
    np.testing.assert_array_equal(out.view(np.uint16), gather_rows(x, indices).view(np.uint16))
