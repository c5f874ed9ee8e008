"""rms_norm on the CPU: sums, norms and quantization against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.plugins.rms_norm.reference import quantize_rows, rms_norm
from hypothesis import given, settings
from hypothesis import strategies as st

ELEMENTS = {"f32": np.float32, "bf16": np.uint16, "i8": np.int8, "u8": np.uint8}


def build(
    kernels: Any, dtype: str, rows: int, hidden: int, *, delta: bool, post: bool, weight: bool, seed: int
) -> tuple[Any, dict[str, Any]]:
    """A call, and the reference's arguments."""
    random = np.random.default_rng(seed)
    x, change = random.normal(size=(2, rows, hidden)).astype(np.float32)
    post_weight, norm_weight = random.normal(size=(2, hidden)).astype(np.float32)
    given_ = {"x": x, "delta": change if delta else None, "weight": norm_weight if weight else None}
    given_["post_weight"] = post_weight if delta and post else None
    call = kernels.Call("rms_norm", {"hidden": hidden, "eps": 1e-5, "domain": "rows"}, {"num_rows": rows})
    call.buffer("x", kernels.pad_rows(x))
    stride = call.arrays["x"].shape[1]
    if delta:
        call.buffer("delta", kernels.pad_rows(change))
        call.buffer("sum", np.full((rows, stride), np.nan, np.float32))
    for name in ("weight", "post_weight"):
        if given_[name] is not None:
            call.weight(name, "rows_f32", given_[name])
    call.buffer("out", np.full((rows, stride), 77, ELEMENTS[dtype]))
    if dtype in ("i8", "u8"):
        call.buffer("out_scale", np.full(rows, np.nan, np.float32))
    if dtype == "i8":
        call.buffer("out_sums", np.full((rows, stride // 32), 77, np.int32))
    return call, given_


def check(kernels: Any, dtype: str, call: Any, given_: dict[str, Any], hidden: int) -> None:
    """Compares what `call` has written with the reference."""
    out, total = rms_norm(**given_, eps=1e-5)
    found = call.arrays["out"]
    if "sum" in call.arrays:
        kernels.assert_close(call.arrays["sum"][:, :hidden], total, "f32")
        assert not call.arrays["sum"][:, hidden:].any()
    assert not found[:, hidden:].any()
    if "out_sums" in call.arrays:
        sums = found.astype(np.int32).reshape(len(found), found.shape[1] // 32, 32).sum(axis=2)
        np.testing.assert_array_equal(call.arrays["out_sums"], -8 * sums)
    found = found[:, :hidden]
    if dtype == "f32":
        kernels.assert_close(found, out, "f32")
    elif dtype == "bf16":
        np.testing.assert_allclose(kernels.from_bf16(found), out, rtol=2**-8, atol=1e-6)
    else:
        wanted, scale = quantize_rows(out)
        np.testing.assert_allclose(call.arrays["out_scale"], scale, rtol=1e-6)
        signed = found.astype(np.int32) - (128 if dtype == "u8" else 0)
        # A quotient beside a half may fall on either side of it.
        assert np.abs(signed - wanted).max(initial=0) <= 1
        assert (signed != wanted).mean() <= 0.01 if signed.size else True


@settings(max_examples=15)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 300),
    delta=st.booleans(),
    post=st.booleans(),
    weight=st.booleans(),
    seed=st.integers(0, 2**31),
    num_threads=st.integers(1, 3),
)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_matches_reference(
    isa: str, kernels: Any, dtype: str, rows: int, hidden: int, num_threads: int, **options: Any
) -> None:
    call, given_ = build(kernels, dtype, rows, hidden, **options)
    call.run(isa, num_threads)
    check(kernels, dtype, call, given_, hidden)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_row_is_the_same_alone_and_among_others(isa: str, kernels: Any, dtype: str) -> None:
    call, _ = build(kernels, dtype, 33, 333, delta=True, post=True, weight=True, seed=1)
    call.run(isa, num_threads=2)
    for row in (0, 7, 32):
        alone, _ = build(kernels, dtype, 33, 333, delta=True, post=True, weight=True, seed=1)
        for name in {"x", "delta", "sum", "out", "out_scale", "out_sums"} & alone.arrays.keys():
            alone.arrays[name] = alone.arrays[name][row : row + 1].copy()
        alone.step = {"num_rows": 1}
        alone.run(isa)
        for name in {"sum", "out", "out_scale"} & alone.arrays.keys():
            np.testing.assert_array_equal(alone.arrays[name][0], call.arrays[name][row])


def test_every_thread_fills_a_buffer_of_its_own(isa: str, kernels: Any) -> None:
    call, given_ = build(kernels, "i8", 3, 70, delta=True, post=False, weight=True, seed=2)
    call.buffer("out", np.zeros((3, 3, 128), np.int8), per_thread=True)
    call.buffer("out_scale", np.zeros((3, 3), np.float32), per_thread=True)
    call.buffer("out_sums", np.zeros((3, 3, 4), np.int32), per_thread=True)
    call.run(isa, num_threads=3)
    outs, scales, sums = (call.arrays[name] for name in ("out", "out_scale", "out_sums"))
    for thread in range(3):
        call.arrays |= {"out": outs[thread], "out_scale": scales[thread], "out_sums": sums[thread]}
        check(kernels, "i8", call, given_, 70)


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_quantizes_ties_to_even_and_zero_rows_to_zero(isa: str, kernels: Any, dtype: str) -> None:
    call, _ = build(kernels, dtype, 2, 6, delta=False, post=False, weight=False, seed=0)
    call.arrays["x"][:, :6] = [[127, 0.5, 1.5, 2.5, -0.5, -127], [0, 0, 0, 0, 0, 0]]
    call.run(isa)
    bias = 128 if dtype == "u8" else 0
    found = call.arrays["out"][:, :6].astype(np.int32) - bias
    np.testing.assert_array_equal(found, [[127, 0, 2, 2, 0, -127], [0] * 6])
    np.testing.assert_array_equal(call.arrays["out_scale"], [1, 0])


@pytest.mark.parametrize("place", [0, 69])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_a_row_that_is_not_finite_has_no_scale(isa: str, kernels: Any, dtype: str, number: float, place: int) -> None:
    call, _ = build(kernels, dtype, 3, 70, delta=False, post=False, weight=False, seed=0)
    call.arrays["x"][1, place] = number
    call.run(isa)
    np.testing.assert_array_equal(np.isnan(call.arrays["out_scale"]), [False, True, False])


HOSTILE = {
    "a small x": (lambda call: call.arrays.update(x=call.arrays["x"].ravel()[:-1].copy()), "operand x: wanted"),
    "a small weight": (lambda call: call.arrays.update(weight=call.arrays["weight"][:-1].copy()), "weight: wanted"),
    "a huge row": (lambda call: call.attributes.update(hidden=1 << 62), "attribute hidden"),
    "an unknown domain": (lambda call: call.attributes.update(domain="blocks"), "domain: wanted one of tokens, rows"),
    "no scale": (lambda call: (call.operands.pop("out_scale"), call.arrays.pop("out_scale")), "out_scale is missing"),
    "a sum that shares memory": (
        lambda call: (
            call.buffer("out", np.zeros((2, 4, 64), np.int8), per_thread=True),
            call.buffer("out_scale", np.zeros((2, 4), np.float32), per_thread=True),
            call.arrays.update(sum=call.arrays["x"]),
        ),
        "share memory",
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = HOSTILE[fault]
    call, _ = build(kernels, "i8", 4, 64, delta=True, post=True, weight=True, seed=0)
    call.run(isa, 2)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa, 2)
