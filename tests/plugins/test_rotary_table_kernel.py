"""rotary_table on the CPU against its reference, up to positions of 131072."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.plugins.rotary_table.reference import rotary_table
from hypothesis import given, settings
from hypothesis import strategies as st

POSITIONS = st.lists(st.integers(0, 131072), max_size=8)


def build(
    kernels: Any, positions: list[int], rot_dim: int, kind: str, per_thread: bool = False
) -> tuple[Any, list[Any]]:
    """A call, and the reference's positional arguments."""
    short = (10000.0 ** -(np.arange(0, rot_dim, 2) / rot_dim)).astype(np.float32)
    lengths = np.array([position // 2 for position in positions], np.int32)
    arguments = [np.array(positions, np.int32), lengths, short, (short / 3).astype(np.float32)]
    attributes = {"rot_dim": rot_dim, "kind": kind, "attention_factor": 1.25, "threshold": 4096}
    attributes |= {"base": 10000.0, "factor": 2.0}
    call = kernels.Call("rotary_table", attributes, {"positions": arguments[0], "prompt_lengths": lengths})
    call.inputs("positions", "prompt_lengths")
    call.weight("inv_freq", "rows_f32", short)
    if kind == "longrope":
        call.weight("inv_freq_long", "rows_f32", arguments[3])
    for name in ("cos", "sin"):
        call.buffer(name, np.full((len(positions), rot_dim // 2), np.nan, np.float32), per_thread)
    return call, arguments


@settings(max_examples=15)
@given(positions=POSITIONS, rot_dim=st.sampled_from([4, 16, 30, 128]), num_threads=st.integers(1, 3))
@pytest.mark.parametrize("kind", ["static", "longrope", "dynamic"])
def test_matches_reference(
    isa: str, kernels: Any, kind: str, positions: list[int], rot_dim: int, num_threads: int
) -> None:
    call, arguments = build(kernels, positions, rot_dim, kind)
    call.run(isa, num_threads)
    wanted = rotary_table(*arguments, **call.attributes)
    # `dynamic` computes its frequencies in float32: at position p an angle is off by p * 2^-22 of itself.
    tolerance = 1e-6 if kind != "dynamic" else 1e-6 + max(positions, default=0) * 2.0**-20
    for name, table in zip(("cos", "sin"), wanted, strict=True):
        np.testing.assert_allclose(call.arrays[name], table, rtol=0, atol=tolerance)


HOSTILE = {
    "small tables": (lambda call: call.arrays.update(sin=call.arrays["sin"].ravel()[:-1].copy()), "sin: wanted"),
    "few frequencies": (
        lambda call: call.arrays.update(inv_freq=call.arrays["inv_freq"][:-1].copy()),
        "inv_freq: wanted",
    ),
    "an odd dimension": (lambda call: call.attributes.update(rot_dim=15), "even number"),
    "an unknown kind": (lambda call: call.attributes.update(kind="yarn2"), "kind: wanted one of"),
    "no threshold": (lambda call: call.attributes.pop("threshold"), "threshold is missing"),
    "an endless factor": (lambda call: call.attributes.update(factor=float("inf")), "attribute factor"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = HOSTILE[fault]
    call, _ = build(kernels, [0, 5000, 7], 16, "dynamic")
    call.run(isa)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa)
