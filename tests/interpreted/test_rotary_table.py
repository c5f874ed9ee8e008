"""rotary_table for a GPU, interpreted, against its reference, up to positions of a million."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.plugins.rotary_table.cuda import RotaryTable, launches
from enginery.plugins.rotary_table.reference import rotary_table
from hypothesis import given, settings
from hypothesis import strategies as st

from .interpreter import launch


@settings(max_examples=12, deadline=None, database=None)
@given(
    positions=st.lists(st.integers(0, 1_000_000), min_size=1, max_size=9),
    rot_dim=st.sampled_from([4, 16, 30, 128, 256]),
)
@pytest.mark.parametrize("kind", ["static", "longrope", "dynamic"])
def test_matches_reference(kind: str, positions: list[int], rot_dim: int) -> None:
    table = RotaryTable(rot_dim, kind, attention_factor=1.25, threshold=4096, base=10000.0, factor=2.0)
    short = (10000.0 ** -(np.arange(0, rot_dim, 2) / rot_dim)).astype(np.float32)
    long = (short / 3).astype(np.float32)
    at = np.array(positions, np.int32)
    lengths = at // 2
    cos, sin = np.full((2, len(at), rot_dim // 2), np.nan, np.float32)
    arguments: dict[str, Any] = {"positions": at, "inv_freq": short, "cos": cos, "sin": sin, "count": len(at)}
    if kind != "static":
        arguments["prompt_lengths"] = lengths
    if kind == "longrope":
        arguments["inv_freq_long"] = long
    (plan,) = launches(table, architecture=80)
    expression = plan.grid[0]
    assert isinstance(expression, list)
    launch(plan.kernel, (-(-len(at) // int(expression[2])), 1, 1), arguments)  # type: ignore[arg-type]
    wanted = rotary_table(
        at,
        lengths,
        short,
        long,
        rot_dim=rot_dim,
        kind=kind,
        attention_factor=table.attention_factor,
        threshold=table.threshold,
        base=table.base,
        factor=table.factor,
    )
    # NumPy's float32 cosine, which stands for the GPU's, is off by an ulp or two. A frequency of the dynamic kind may
    # round to the other neighbour: then the angle is off by half an ulp of itself.
    tolerance = 1e-6 if kind != "dynamic" else 1e-6 + max(positions) * 2.0**-22
    for found, table_wanted in zip((cos, sin), wanted, strict=True):
        np.testing.assert_allclose(found, table_wanted, rtol=0, atol=tolerance)
