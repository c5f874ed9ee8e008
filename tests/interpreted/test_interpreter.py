"""The interpreter itself: bfloat16 is multiplied, added and rounded as a GPU does it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

from .interpreter import Pointer


@triton.jit
def _dot(a, b, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


@triton.jit
def _arithmetic(a, b, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x * y + x)


def normal(*shape: int, kind: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(kind)


def test_bfloat16_products_and_rounding() -> None:
    a, b = (normal(32, 32, kind=ml_dtypes.bfloat16, seed=seed) for seed in (0, 1))
    out = np.zeros((32, 32), ml_dtypes.bfloat16)
    _dot[(1,)](Pointer(a), Pointer(b), Pointer(out), N=32)
    wanted = (a.astype(np.float32) @ b.astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out.view(np.uint16), wanted.view(np.uint16))


def test_bfloat16_arithmetic_rounds_each_result() -> None:
    a, b = (normal(64, kind=ml_dtypes.bfloat16, seed=seed) for seed in (2, 3))
    out = np.zeros(64, ml_dtypes.bfloat16)
    _arithmetic[(1,)](Pointer(a), Pointer(b), Pointer(out), N=64)
    np.testing.assert_array_equal(out.view(np.uint16), (a * b + a).view(np.uint16))


def test_fp8_and_int8_products_are_exact() -> None:
    for kind, sums in ((ml_dtypes.float8_e4m3fn, np.float32), (np.int8, np.int32)):
        values = [np.clip(normal(32, 32, seed=seed) * 20, -127, 127).astype(kind) for seed in (4, 5)]
        out = np.zeros((32, 32), sums if sums is np.float32 else np.int32)
        _dot[(1,)](Pointer(values[0]), Pointer(values[1]), Pointer(out), N=32)
        wanted = values[0].astype(np.float64) @ values[1].astype(np.float64)
        np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-3)
