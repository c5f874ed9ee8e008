"""linear's kernels against the reference: every type, epilogue and prologue, over tails of all dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.engines.expressions import evaluate
from enginery.plugins.launches import Launch
from enginery.plugins.linear import reference
from enginery.plugins.linear.cuda import Linear, fused_rows, linear_launches
from enginery.plugins.rms_norm.reference import rms_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import launch

Array = NDArray[Any]

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
STORED = {"bf16": BF16, "fp8": FP8, "int8": np.int8}
LIMITS = {"fp8": np.float32(448), "int8": np.float32(127)}
ARCH = 90
UNTOUCHED = 7


@dataclass(frozen=True)
class Case:
    """Operands as a plan lays them out, and the values of a and weight that they stand for."""

    operands: dict[str, Array]
    a: Array
    weight: Array


def padded(count: int) -> int:
    return -(-count // 128) * 128


def pad(values: Array, *shape: int, kind: Any = np.float32) -> Array:
    whole = np.zeros(shape, kind)
    whole[tuple(slice(0, length) for length in values.shape)] = values.astype(kind)
    return whole


def quantize(values: Array, dtype: str) -> tuple[Array, Array]:
    """f32 [M, K] -> (values as they are stored, f32 scales [M]). By a product, as the kernels' prologue does it."""
    if dtype == "bf16":
        return values.astype(BF16), np.ones(len(values), np.float32)
    absmax = np.abs(values).max(axis=1)
    scaled = values * (LIMITS[dtype] / np.where(absmax > 0, absmax, np.float32(1)))[:, None]
    return (np.rint(scaled) if dtype == "int8" else scaled).astype(STORED[dtype]), absmax / LIMITS[dtype]


def prepare(x: Array, norm_weight: Array | None, linear: Linear) -> tuple[Array, Array]:
    """x -> (a, a_scale). The norm is left to the scale, where there is one."""
    if norm_weight is None:
        return quantize(x, linear.dtype)
    if linear.dtype == "bf16":
        return quantize(rms_norm(x, weight=norm_weight, eps=linear.eps)[0], linear.dtype)
    stored, scale = quantize(x * norm_weight, linear.dtype)
    return stored, scale / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1) + linear.eps).astype(np.float32)


def make_case(linear: Linear, rows: int, seed: int) -> Case:
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape).astype(np.float32)

    n, k, stride, kind = linear.n, linear.k, padded(linear.n), STORED[linear.dtype]
    weight_rows = 2 * n if linear.gated else n
    x = (3 * normal(rows, k)).astype(BF16)
    if rows > 1:
        x[rows // 2] *= generator.integers(0, 2)  # a row may be zero
    norm_weight = 1 + normal(k) / 4 if linear.prologue == "norm" else None
    a, a_scale = prepare(x.astype(np.float32), norm_weight, linear)
    weight, weight_scale = quantize(normal(weight_rows, k) / np.float32(np.sqrt(k)), linear.dtype)
    operands = {
        "x": pad(x, rows, padded(k), kind=BF16),
        "a": pad(a, rows, padded(k), kind=kind),
        "a_scale": a_scale,
        "weight": pad(weight, padded(weight_rows), padded(k), kind=kind),
        "weight_scale": pad(weight_scale, padded(weight_rows)),
        "bias": pad(normal(weight_rows), padded(weight_rows)),
        "residual": pad(normal(rows, n), rows, stride, kind=BF16),
        "out": np.full((rows + 1, stride), UNTOUCHED, BF16 if linear.out_dtype == "bf16" else np.float32),
    }
    if norm_weight is not None:
        operands["norm_weight"] = norm_weight
    return Case(operands, a.astype(np.float32) * a_scale[:, None], weight.astype(np.float32) * weight_scale[:, None])


def chosen(linear: Linear, rows: int, num_sms: int, way: int = 0) -> Launch:
    """way: 0, or the place among the launch's others, from 1."""
    (fitting,) = [
        one for one in linear_launches(linear, ARCH, num_sms) if all(r.low <= rows <= r.high for r in one.guard)
    ]
    return (fitting, *fitting.others)[way]


def make_scratch(linear: Linear, rows: int, num_sms: int, way: int = 0) -> dict[str, Array]:
    one = chosen(linear, rows, num_sms, way)
    kinds = {"*i32": np.int32, "*fp32": np.float32}
    return {
        name: np.full(evaluate(memory.bytes, {linear.domain: rows}) // 4, 0 if memory.zeroed else 99, kinds[kind])
        for name, kind in one.kernel.parameters
        if (memory := one.scratch.get(name)) is not None
    }


def run(linear: Linear, case: Case, rows: int, num_sms: int, scratch: dict[str, Array], way: int = 0) -> Array:
    one, sizes = chosen(linear, rows, num_sms, way), {linear.domain: rows}
    given: dict[str, Array | int] = {**case.operands, **scratch, "count": rows}
    launch(
        one.kernel,
        (evaluate(one.grid[0], sizes), evaluate(one.grid[1], sizes), evaluate(one.grid[2], sizes)),
        {name: given[name] for name, _ in one.kernel.parameters},
    )
    return case.operands["out"].astype(np.float32)


def wanted(linear: Linear, case: Case) -> Array:
    gate = slice(0, 2 * linear.n, 2) if linear.gated else slice(0, linear.n)
    up = slice(1, 2 * linear.n, 2)
    bias = case.operands["bias"] if linear.bias else None
    return reference.linear(
        case.a,
        case.weight[gate],
        None if bias is None else bias[gate],
        case.operands["residual"][:, : linear.n].astype(np.float32) if linear.residual else None,
        up_weight=case.weight[up],
        up_bias=None if bias is None else bias[up],
        activation=linear.activation,
        softcap=linear.softcap,
    )


def check(linear: Linear, rows: int, seed: int = 0, num_sms: int = 1, way: int = 0) -> None:
    case, scratch = make_case(linear, rows, seed), make_scratch(linear, rows, num_sms, way)
    out = run(linear, case, rows, num_sms, scratch, way)
    tolerance = 2**-8 if linear.out_dtype == "bf16" else 5e-5
    if linear.dtype == "bf16" and linear.prologue == "norm":
        tolerance = 1e-2  # sums of squares differ in their last bit, and then now and then a rounded value of a
    np.testing.assert_allclose(out[:rows, : linear.n], wanted(linear, case), rtol=tolerance, atol=tolerance)
    assert not out[:rows, linear.n :].any(), "padding is zero"
    assert (out[rows] == UNTOUCHED).all(), "nothing is written behind the last row"
    assert not scratch.get("counters", np.zeros(1)).any(), "counters are left as they were"


LINEARS = st.builds(
    Linear,
    n=st.integers(1, 300),
    k=st.integers(1, 400),
    dtype=st.sampled_from(["bf16", "fp8", "int8"]),
    domain=st.sampled_from(["tokens", "rows"]),
    out_dtype=st.sampled_from(["bf16", "f32"]),
    activation=st.sampled_from(["none", "silu_gated", "gelu_tanh_gated"]),
    softcap=st.sampled_from([0.0, 2.0]),
    bias=st.booleans(),
    residual=st.booleans(),
    prologue=st.sampled_from([None, "quantize", "norm"]),
    eps=st.just(1e-3),
)


@settings(max_examples=20, deadline=None)
@given(LINEARS, st.integers(1, 20), st.integers(0, 99))
def test_few_rows(linear: Linear, rows: int, seed: int) -> None:
    check(linear, rows, seed)


@settings(max_examples=8, deadline=None)
@given(LINEARS, st.one_of(st.integers(21, 150), st.sampled_from([256, 520])), st.integers(0, 99))
def test_many_rows(linear: Linear, rows: int, seed: int) -> None:
    check(linear, rows, seed)


@pytest.mark.parametrize("rows", [3, 70])
def test_padding_behind_the_last_row_of_the_weight(rows: int) -> None:
    """128 rows of the weight make 64 outputs, which are padded to 128: half of them have no weights."""
    check(Linear(64, 100, "bf16", activation="silu_gated", residual=True), rows)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize(("rows", "prologue"), [(1, "norm"), (4, "quantize"), (13, None), (33, None), (130, None)])
def test_splits_along_k(dtype: str, rows: int, prologue: str | None) -> None:
    k = 1300 if dtype == "bf16" else 2590
    linear = Linear(140, k, dtype, bias=True, residual=True, prologue=prologue, eps=1e-3)
    assert chosen(linear, rows, num_sms=8).grid[1] != 1
    check(linear, rows, num_sms=8)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh_gated"])
@pytest.mark.parametrize(("rows", "num_sms"), [(3, 8), (130, 8), (600, 1)])
def test_tiles_that_take_the_place_of_others_compute_the_same(activation: str, rows: int, num_sms: int) -> None:
    linear = Linear(140, 200, "int8", activation=activation, bias=True, residual=True)
    for way in range(1, len(chosen(linear, rows, num_sms).others) + 1):
        check(linear, rows, num_sms=num_sms, way=way)


def test_scratch_can_be_used_again() -> None:
    linear = Linear(128, 2048, "int8")
    case, scratch = make_case(linear, 3, seed=0), make_scratch(linear, 3, num_sms=8)
    first = run(linear, case, 3, 8, scratch)
    case.operands["out"][:] = 0
    np.testing.assert_array_equal(run(linear, case, 3, 8, scratch)[:3], first[:3])


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_the_prologue_does_what_the_norm_would(dtype: str) -> None:
    """Within half a step of what is quantized: the tests above take the prologue's own arithmetic for granted."""
    linear = Linear(8, 200, dtype, prologue="norm", eps=1e-3)
    x = np.random.default_rng(0).standard_normal((4, 200)).astype(BF16).astype(np.float32)
    weight = np.linspace(0.5, 2, 200, dtype=np.float32)
    a, scale = prepare(x, weight, linear)
    step = np.maximum(np.abs(a.astype(np.float32)) / 8, 2**-9) if dtype == "fp8" else np.ones_like(x)
    normed = rms_norm(x, weight=weight, eps=1e-3)[0]
    assert (np.abs(a.astype(np.float32) * scale[:, None] - normed) <= 0.5001 * step * scale[:, None]).all()


@settings(max_examples=50, deadline=None)
@given(LINEARS, st.sampled_from([80, 86, 89, 90, 100, 120]), st.integers(1, 3000))
def test_every_count_has_one_launch(linear: Linear, arch: int, rows: int) -> None:
    if (linear.dtype, arch) in (("fp8", 80), ("fp8", 86), ("int8", 100)):
        return
    launches = linear_launches(linear, arch, 132)
    (one,) = [one for one in launches if one.guard[0].low <= rows <= one.guard[0].high]
    assert one.guard[0].variable == linear.domain
    assert ("x" in dict(one.kernel.parameters)) == (rows <= fused_rows(linear, arch))
    assert one.kernel.function == "gemm" or rows <= int(dict(one.kernel.constants)["ROWS"] or 0)
    assert one.kernel.name.startswith("linear_gemm")


def test_wide_rows_are_not_prepared_in_every_program() -> None:
    assert fused_rows(Linear(4096, 4096, "fp8", prologue="norm"), ARCH) == 4
    assert fused_rows(Linear(4096, 14336, "fp8", prologue="quantize"), ARCH) == 1
    assert fused_rows(Linear(4096, 28672, "fp8", prologue="quantize"), ARCH) == 0
    assert fused_rows(Linear(4096, 4096, "bf16", prologue="quantize"), ARCH) == 0
