"""rms_norm for a GPU, interpreted, against its reference: every combination of operands and types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.engines.errors import CompileError
from enginery.plugins.rms_norm.cuda import RmsNorm, launches
from enginery.plugins.rms_norm.reference import quantize_rows, rms_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import launch

TYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn, "i8": np.int8}


def padded(x: NDArray[Any], kind: Any) -> NDArray[Any]:
    return np.ascontiguousarray(np.pad(x, ((0, 0), (0, -x.shape[1] % 128)))).astype(kind)


def run(norm: RmsNorm, rows: int, seed: int = 0, size: float = 1.0, gain: float = 1.0) -> dict[str, NDArray[Any]]:
    """Operands and results under their names."""
    random = np.random.default_rng(seed)
    arrays = {"x": padded(random.normal(size=(rows, norm.hidden)) * size, ml_dtypes.bfloat16)}
    if norm.delta:
        arrays["delta"] = padded(random.normal(size=(rows, norm.hidden)) * size, ml_dtypes.bfloat16)
    for name in ("post_weight", "weight"):
        if getattr(norm, name):
            arrays[name] = (random.normal(size=norm.hidden) * gain).astype(np.float32)
    stride = arrays["x"].shape[1]
    if norm.sum:
        arrays["sum"] = np.full((rows, stride), np.nan, ml_dtypes.bfloat16)
    arrays["out"] = np.full((rows, stride), 77, TYPES[norm.out])
    if norm.out != "bf16":
        arrays["out_scale"] = np.full(rows, np.nan, np.float32)
    (plan,) = launches(norm, architecture=80)
    launch(plan.kernel, (rows, 1, 1), arrays)
    return arrays


def wanted(norm: RmsNorm, arrays: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """out and sum in float32; the sum is rounded before it is normalised."""
    wide = {name: arrays[name][:, : norm.hidden].astype(np.float32) for name in ("x", "delta") if name in arrays}
    _, total = rms_norm(wide["x"], wide.get("delta"), arrays.get("post_weight"), None, eps=norm.eps)
    total = total.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rms_norm(total, None, None, arrays.get("weight"), eps=norm.eps)


@settings(max_examples=12, deadline=None, database=None)
@given(
    hidden=st.sampled_from([1, 64, 100, 128, 333, 1024, 2880]),
    rows=st.integers(1, 3),
    delta=st.booleans(),
    post_weight=st.booleans(),
    weight=st.booleans(),
    size=st.sampled_from([1.0, 1e-20, 1e15]),
)
@pytest.mark.parametrize("out", TYPES)
def test_matches_reference(
    out: str, hidden: int, rows: int, delta: bool, post_weight: bool, weight: bool, size: float
) -> None:
    norm = RmsNorm(hidden, 1e-5, out, delta, delta and post_weight, weight, delta)
    arrays = run(norm, rows, size=size)
    values, total = wanted(norm, arrays)
    found = arrays["out"].astype(np.float32)
    assert not found[:, hidden:].any()
    if norm.sum:
        assert not arrays["sum"][:, hidden:].any()
        # Where the float32 sum lies between two bfloat16, the last bit of a norm decides.
        np.testing.assert_allclose(arrays["sum"][:, :hidden].astype(np.float32), total, rtol=2**-7)
        values, _ = rms_norm(arrays["sum"][:, :hidden].astype(np.float32), weight=arrays.get("weight"), eps=norm.eps)
    if out == "bf16":
        np.testing.assert_allclose(found[:, :hidden], values, rtol=2**-8 + 1e-6, atol=0)
        return
    kind = "i8" if out == "i8" else "fp8"
    quantized, scale = quantize_rows(values, kind)
    np.testing.assert_allclose(arrays["out_scale"], scale, rtol=3e-6)
    step = 1.0 if out == "i8" else np.maximum(np.abs(quantized.astype(np.float32)) / 8, 2.0**-9)
    assert (np.abs(found[:, :hidden] - quantized.astype(np.float32)) <= step).all()
    assert (found[:, :hidden] == quantized.astype(np.float32)).mean() > 0.98


@pytest.mark.parametrize("out", ["fp8", "i8"])
def test_plain_quantization_is_the_reference_to_the_bit(out: str) -> None:
    norm = RmsNorm(500, 1e-5, out, weight=False)
    arrays = run(norm, 20)
    quantized, scale = quantize_rows(arrays["x"][:, :500].astype(np.float32), out)
    np.testing.assert_array_equal(arrays["out"][:, :500].astype(np.float32), quantized.astype(np.float32))
    np.testing.assert_array_equal(arrays["out_scale"], scale)


@pytest.mark.parametrize("out", ["fp8", "i8"])
@pytest.mark.parametrize("size", [0.0, 1e-39, 3e-43])
def test_zero_and_tiny_rows(out: str, size: float) -> None:
    arrays = run(RmsNorm(128, 1e-5, out, weight=False), 2, size=size)
    quantized, scale = quantize_rows(arrays["x"].astype(np.float32), out)
    np.testing.assert_array_equal(arrays["out_scale"], scale)
    np.testing.assert_array_equal(arrays["out"].astype(np.float32), quantized.astype(np.float32))


@pytest.mark.parametrize("out", ["fp8", "i8"])
def test_scales_below_the_normal_numbers_do_not_overflow(out: str) -> None:
    """absmax / 127 is then rounded so coarsely that quotients exceed 127."""
    for seed in range(8):
        arrays = run(RmsNorm(128, 1e-5, out), 1, seed=seed, gain=1e-43)
        x, found = arrays["x"].astype(np.float32), arrays["out"].astype(np.float32)
        assert np.isfinite(found).all()
        assert (found * (x * arrays["weight"]) >= 0).all()


def test_a_row_that_no_program_can_hold_is_refused() -> None:
    with pytest.raises(CompileError, match="rows of 40000 elements"):
        launches(RmsNorm(40000, 1e-5, "bf16"), architecture=90)
