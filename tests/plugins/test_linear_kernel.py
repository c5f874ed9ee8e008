"""linear on the CPU against its reference, for every type, and for rows alone as among others."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.layouts import LAYOUTS
from enginery.plugins.linear import layouts
from enginery.plugins.linear.quantize_int4 import dequantize_int4, quantize_int4
from enginery.plugins.linear.reference import linear
from enginery.plugins.rms_norm.reference import quantize_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
TYPES = ("f32", "bf16", "i8", "u8", *(f"{codes}g{group}" for codes in ("int4", "uint4") for group in (32, 64, 128)))


class Problem:
    """Random operands of one product, as arrays and packed. gated: weight and bias hold gate and up."""

    def __init__(self, kernels: Any, dtype: str, m: int, n: int, k: int, seed: int, **options: Any) -> None:
        self.kernels, self.dtype, self.shape, self.options = kernels, dtype, (m, n, k), options
        random = np.random.default_rng(seed)
        self.matrices = 1 if options["activation"] == "none" else 2
        self.a = random.normal(size=(m, k)).astype(np.float32)
        self.weights = [random.normal(size=(n, k)).astype(np.float32) for _ in range(self.matrices)]
        self.biases = [random.normal(size=n).astype(np.float32) for _ in range(self.matrices)]
        self.residual = random.normal(size=(m, n)).astype(np.float32)

    def interleave(self, parts: list[Array]) -> Array:
        """Panels of 16 rows of gate and up in turn."""
        if len(parts) == 1:
            return parts[0]
        padded = [np.pad(part, ((0, -len(part) % 16), *[(0, 0)] * (part.ndim - 1))) for part in parts]
        return np.stack([p.reshape(-1, 16, *p.shape[1:]) for p in padded], 1).reshape(-1, *parts[0].shape[1:])

    def call(self) -> Any:
        m, n, k = self.shape
        attributes = {"n": n, "k": k, "domain": "tokens"} | {
            name: self.options[name] for name in ("activation", "softcap")
        }
        call = self.kernels.Call("linear", attributes, {"num_tokens": m})
        a, scales = self.a, None
        if self.dtype == "f32":
            call.weight("weight", "f32_k1n16", layouts.pack_f32_k1n16(self.interleave(self.weights)))
        elif self.dtype == "bf16":
            a = self.kernels.to_bf16(self.a)
            call.weight("weight", "bf16_k2n16", layouts.pack_bf16_k2n16(self.interleave(self.weights)))
        elif "int4" in self.dtype:
            a, scales = quantize_rows(self.a)
            call.buffer("a_scale", scales)
            padded = self.kernels.pad_rows(a).astype(np.int32)
            call.buffer("a_sums", -8 * padded.reshape(m, padded.shape[1] // 32, 32).sum(axis=2, dtype=np.int32))
            name, group = self.dtype.split("g")
            layout = f"{name}_k8n16g{group}"
            groups = LAYOUTS[f"{layout}.v0"].num_groups(k)
            codes, halves, zeros = quantize_int4(self.interleave(self.weights), int(group), name == "int4")
            call.weight("weight", layout, layouts.pack_int4_k8n16(codes))
            call.weight("weight_scale", "scale_f16_n16", layouts.pack_groups(halves, groups))
            if name == "uint4":
                call.weight("weight_zero", "zero_u8_n16", layouts.pack_groups(zeros, groups))
        else:
            a, scales = quantize_rows(self.a)
            quantized, scale = layouts.quantize_int8(self.interleave(self.weights))
            call.weight("weight", "int8_k4n16", layouts.pack_int8_k4n16(quantized))
            call.weight("weight_scale", "scale_f32", layouts.pad_vector(scale))
            sums = quantized.sum(axis=1, dtype=np.int32)
            call.weight("weight_sum", "sum_i32", layouts.pad_vector(sums))
            call.buffer("a_scale", scales)
        if self.dtype == "u8":
            call.buffer("a", self.kernels.pad_rows((a.astype(np.int16) + 128).astype(np.uint8), fill=128))
        else:
            call.buffer("a", self.kernels.pad_rows(a))
        if self.options["bias"]:
            call.weight("bias", "bias_f32", layouts.pad_vector(self.interleave(self.biases)))
        if self.options["residual"]:
            call.buffer("residual", self.kernels.pad_rows(self.residual))
        call.buffer("out", np.full((m, -(-n // 64) * 64), np.nan, np.float32))
        return call

    def wanted(self) -> Array:
        a, weights = self.a, self.weights
        if self.dtype == "bf16":
            a, *weights = [self.kernels.from_bf16(self.kernels.to_bf16(x)) for x in (a, *weights)]
        elif "int4" in self.dtype:
            name, group = self.dtype.split("g")
            coded = [quantize_int4(w, int(group), name == "int4") for w in weights]
            weights = [dequantize_int4(*parts, int(group)) for parts in coded]
            q, scale = quantize_rows(a)
            a = q.astype(np.float32) * scale[:, None]
        elif self.dtype in ("i8", "u8"):
            a, *weights = [q.astype(np.float32) * s[:, None] for q, s in map(quantize_rows, (a, *weights))]
        biases: list[Any] = self.biases if self.options["bias"] else [None, None]
        gated = {"up_weight": weights[1], "up_bias": biases[1]} if self.matrices == 2 else {}
        residual = self.residual if self.options["residual"] else None
        return linear(
            a,
            weights[0],
            biases[0],
            residual,
            activation=self.options["activation"],
            softcap=self.options["softcap"],
            **gated,
        )


PLAIN = {"activation": "none", "softcap": 0.0, "bias": False, "residual": False}


@settings(max_examples=12)
@given(
    m=st.sampled_from([0, 1, 2, 3, 5, 8, 13, 33, 260]),
    n=st.integers(1, 150),
    k=st.integers(1, 150) | st.sampled_from([1100, 2050]),
    seed=st.integers(0, 2**31),
    activation=st.sampled_from(["none", "silu_gated", "gelu_tanh_gated"]),
    softcap=st.sampled_from([0.0, 30.0]),
    bias=st.booleans(),
    residual=st.booleans(),
    num_threads=st.integers(1, 3),
)
@pytest.mark.parametrize("dtype", TYPES)
def test_matches_reference(
    isa: str, kernels: Any, dtype: str, m: int, n: int, k: int, seed: int, num_threads: int, **options: Any
) -> None:
    problem = Problem(kernels, dtype, m, n, k, seed, **options)
    call = problem.call()
    call.run(isa, num_threads)
    out = call.arrays["out"]
    kernels.assert_close(
        out[:, :n],
        problem.wanted(),
        "codes" if "int4" in dtype else dtype,
        k if options["activation"] != "none" else k**0.5,
    )
    assert not out[:, n:].any()


@pytest.mark.parametrize("activation", ["none", "silu_gated"])
@pytest.mark.parametrize("dtype", ["f32", "u8", "uint4g64"])
def test_variants_change_no_result(isa: str, kernels: Any, dtype: str, activation: str) -> None:
    # 38 units: threads and parts of unequal length; 2100 columns: two blocks.
    problem = Problem(kernels, dtype, 40, 600, 2100, 3, **PLAIN | {"activation": activation, "bias": True})
    usual = problem.call()
    usual.run(isa)
    for units, apart, ahead, num_threads in product((1, 2, 3, 4), (0, 1), (0, 1), (1, 2)):
        call = problem.call()
        call.attributes |= {"units": units, "apart": apart, "ahead": ahead}
        call.run(isa, num_threads)
        np.testing.assert_array_equal(call.arrays["out"], usual.arrays["out"])


@pytest.mark.parametrize("activation", ["none", "silu_gated"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_is_the_same_alone_and_among_others(isa: str, kernels: Any, dtype: str, activation: str) -> None:
    n, k = 200, 2100
    whole = Problem(kernels, dtype, 300, n, k, 7, **PLAIN | {"activation": activation, "residual": True})
    call = whole.call()
    call.run(isa, num_threads=2)
    for begin, end in [(0, 1), (1, 3), (3, 10), (10, 43), (43, 173), (299, 300)]:
        part = whole.call()
        rows = {"a", "a_scale", "a_sums", "residual", "out"} & part.arrays.keys()
        part.arrays |= {name: part.arrays[name][begin:end].copy() for name in rows}
        part.step = {"num_tokens": end - begin}
        part.run(isa)
        np.testing.assert_array_equal(part.arrays["out"], call.arrays["out"][begin:end])


def test_int8_extremes_do_not_saturate(isa: str, kernels: Any) -> None:
    k = 4096
    for dtype, activation in (("i8", -127), ("u8", 1), ("i8", 127), ("u8", 255)):
        problem = Problem(kernels, dtype, 4, 16, k, 0, **PLAIN)
        call = problem.call()
        call.arrays["a"][:] = activation
        call.arrays["a_scale"][:] = 1
        weight = np.full((16, k), 127, np.int8)
        weight[1::2] = -127
        call.weight("weight", "int8_k4n16", layouts.pack_int8_k4n16(weight))
        call.weight("weight_scale", "scale_f32", np.ones(16, np.float32))
        call.weight("weight_sum", "sum_i32", weight.sum(axis=1, dtype=np.int32))
        call.run(isa)
        signed = activation - 128 if dtype == "u8" else activation
        np.testing.assert_array_equal(call.arrays["out"][:, :16], np.tile(weight.sum(axis=1) * float(signed), (4, 1)))


def test_codes_at_their_extremes_do_not_saturate(isa: str, kernels: Any) -> None:
    k = 4096
    for value, code in ((-127, 15), (127, 15), (127, 0), (-127, 0)):
        call = Problem(kernels, "uint4g128", 4, 16, k, 0, **PLAIN).call()
        call.arrays["a"][:] = value
        call.arrays["a_scale"][:] = 1
        call.arrays["a_sums"][:] = -8 * 32 * value
        call.arrays["weight"][:] = code * 17
        call.arrays["weight_scale"][:] = 2
        call.arrays["weight_zero"][:] = 3
        call.run(isa)
        np.testing.assert_array_equal(call.arrays["out"][:, :16], float(value * (code - 3) * 2 * k))


HOSTILE = {
    "a small weight": (lambda call: call.arrays.update(weight=call.arrays["weight"].ravel()[:-1].copy()), "weight"),
    "a small output": (lambda call: call.arrays.update(out=call.arrays["out"].ravel()[:-1].copy()), "out: wanted"),
    "a small activation": (
        lambda call: call.arrays.update(a=call.arrays["a"].ravel()[:-1].copy()),
        "operand a: wanted",
    ),
    "a huge n": (lambda call: call.attributes.update(n=1 << 40), "attribute n"),
    "a larger n": (lambda call: call.attributes.update(n=70), "weight: wanted"),
    "a negative k": (lambda call: call.attributes.update(k=-64), "attribute k"),
    "a number as text": (lambda call: call.attributes.update(k="64"), "attribute k"),
    "an unknown activation": (lambda call: call.attributes.update(activation="relu"), "activation: wanted one of"),
    "an endless softcap": (lambda call: call.attributes.update(softcap=float("nan")), "softcap"),
    "five units": (lambda call: call.attributes.update(units=5, apart=0, ahead=0), "attribute units"),
    "half a variant": (lambda call: call.attributes.update(units=2), "attribute apart is missing"),
    "an unknown attribute": (lambda call: call.attributes.update(alpha=2), "alpha = 2 is not known"),
    "a missing attribute": (lambda call: call.attributes.pop("k"), "attribute k is missing"),
    "an unknown operand": (lambda call: call.inputs("slots"), "operand slots is not known"),
    "a missing operand": (lambda call: (call.operands.pop("weight"), call.arrays.pop("weight")), "weight is missing"),
    "an unknown layout": (lambda call: call.operands["weight"].update(layout="f32_k9n16.v0"), "layout f32_k1n16.v0"),
    "mixed types": (lambda call: call.operands["a"].update(layout="bf16"), "layout bf16_k2n16.v0"),
    "a newer version": (lambda call: setattr(call, "version", 1), "version 1"),
}


HOSTILE_CODES = {
    "sums that are none": (lambda call: call.operands["a_sums"].update(layout="f32"), "a_sums"),
    "too few sums": (lambda call: call.arrays.update(a_sums=call.arrays["a_sums"].ravel()[:-1].copy()), "a_sums"),
    "too few scales of groups": (
        lambda call: call.arrays.update(weight_scale=call.arrays["weight_scale"].ravel()[:-1].copy()),
        "weight_scale: wanted",
    ),
    "zero points that are missing": (
        lambda call: call.operands["weight"].update(layout="uint4_k8n16g32.v0"),
        "weight_zero is missing",
    ),
}


@pytest.mark.parametrize("fault", [*HOSTILE, *HOSTILE_CODES])
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = (HOSTILE | HOSTILE_CODES)[fault]
    call = Problem(kernels, "int4g32" if fault in HOSTILE_CODES else "f32", 3, 32, 64, 0, **PLAIN).call()
    call.run(isa)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa)


def test_reports_every_fault_at_once(isa: str, kernels: Any) -> None:
    call = Problem(kernels, "f32", 3, 32, 64, 0, **PLAIN).call()
    call.attributes.update(alpha=2, n=-1)
    with pytest.raises(EngineFormatError, match=r"attribute n: wanted .* got -1.*alpha"):
        call.run(isa)
