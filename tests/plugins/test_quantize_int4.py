"""Four-bit weights: rounding to nearest as it is defined, and GPTQ, which must do better where it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.plugins.linear.quantize_int4 import GROUPS, dequantize_int4, quantize_int4

Array = np.ndarray[Any, Any]
BOTH = pytest.mark.parametrize("symmetric", [True, False])


def weights(n: int = 40, k: int = 172, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def correlated(k: int, tokens: int = 2000, seed: int = 1) -> Array:
    """Inputs [tokens, K] that go together, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, k // 3)) @ rng.standard_normal((k // 3, k))
    return ((mixed + rng.standard_normal((tokens, k))) * rng.lognormal(0, 1, k)).astype(np.float32)


def moments_of(x: Array) -> Array:
    blocks = -(-x.shape[1] // 128)
    padded = np.pad(x, ((0, 0), (0, blocks * 128 - x.shape[1]))).reshape(len(x), blocks, 128).astype(np.float64)
    out: Array = (np.einsum("tbi,tbj->bij", padded, padded) / len(x)).astype(np.float32)
    return out


def row_by_row(w: Array, group: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """The definition, one group at a time."""
    n, k = w.shape
    codes = np.zeros((n, k), np.uint8)
    scales, zeros = np.zeros((n, -(-k // group)), np.float16), np.zeros((n, -(-k // group)), np.uint8)
    for row in range(n):
        for index, start in enumerate(range(0, k, group)):
            part = w[row, start : start + group]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            exact = (
                part[np.abs(part).argmax()] / np.float32(-8)
                if symmetric
                else high / np.float32(15) - low / np.float32(15)
            )
            scale = np.float32(np.float16(np.clip(exact, -65504, 65504)))
            zero = 8 if symmetric else (min(np.rint(low / -scale), 15) if scale else 0)
            scales[row, index], zeros[row, index] = scale + 0, zero
            steps = np.rint(part / scale) if scale else np.zeros(len(part))
            codes[row, start : start + group] = np.clip(steps + zero, 0, 15)
    return codes, scales, zeros


@BOTH
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", [172, 128, 31])
def test_rounds_to_nearest_as_defined(group: int, symmetric: bool, k: int) -> None:
    w = weights(k=k) * np.float32(0.03)
    w[3] = 0
    w[5, : k // 2] = 0
    for got, wanted in zip(quantize_int4(w, group, symmetric), row_by_row(w, group, symmetric), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@BOTH
def test_nearest_stays_within_half_a_step(symmetric: bool) -> None:
    w = weights()
    codes, scales, zeros = quantize_int4(w, 32, symmetric)
    steps = np.abs(scales.astype(np.float32)).repeat(32, axis=1)[:, : w.shape[1]]
    error = np.abs(dequantize_int4(codes, scales, zeros, 32) - w)
    # What lies at the end opposite to the largest of a symmetric group is clipped: by a step at most.
    assert (error <= steps * (1.01 if symmetric else 0.51)).all()
    assert np.mean(error <= steps * 0.51) > 0.95


def test_the_largest_of_a_symmetric_group_is_exact() -> None:
    w = np.zeros((2, 32), np.float32)
    w[0, 5], w[1, 7] = 4.0, -4.0
    codes, scales, zeros = quantize_int4(w, 32, True)
    assert scales.tolist() == [[-0.5], [0.5]]
    assert (codes[0, 5], codes[1, 7]) == (0, 0)
    np.testing.assert_array_equal(dequantize_int4(codes, scales, zeros, 32), w)


@BOTH
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 2e-7, 1e5, 3e38])
def test_scales_beyond_halves_give_finite_numbers(symmetric: bool, calibrated: bool, size: float) -> None:
    w = np.clip(weights(k=128), -1, 1) * np.float32(size)
    codes, scales, zeros = quantize_int4(w, 32, symmetric, moments_of(correlated(128)) if calibrated else None)
    assert np.isfinite(scales).all()
    assert not np.signbit(scales[scales == 0]).any()
    got = dequantize_int4(codes, scales, zeros, 32)
    if size < 1e-7:
        np.testing.assert_allclose(got, 0, atol=1e-7)
    if size == 0:
        np.testing.assert_array_equal(codes, np.repeat(zeros, 32, axis=1))
    if not calibrated:  # not even where all that is large is cut down to 15 · 65504
        assert (got * np.sign(w) >= -np.abs(scales.astype(np.float32)).repeat(32, axis=1) / 2).all()


@BOTH
@pytest.mark.parametrize("group", GROUPS)
def test_gptq_is_better_where_it_is_measured(group: int, symmetric: bool) -> None:
    x, fresh = correlated(172), correlated(172, seed=1)[::-1]
    w, h = weights(), moments_of(x)

    def error(*quantized: Array) -> float:
        return float((((dequantize_int4(*quantized, group) - w) @ fresh.T) ** 2).sum())

    nearest, gptq = error(*quantize_int4(w, group, symmetric)), error(*quantize_int4(w, group, symmetric, h))
    diagonal = h * np.eye(128, dtype=np.float32)
    clipped = error(*quantize_int4(w, group, symmetric, diagonal))
    assert gptq < 0.75 * clipped
    assert clipped < nearest


@BOTH
def test_gptq_without_correlation_only_searches_the_grid(symmetric: bool) -> None:
    """Errors are handed to nobody: every code is the nearest one of its group's grid."""
    w, h = weights(k=128), np.eye(128, dtype=np.float32)[None]
    codes, scales, zeros = quantize_int4(w, 64, symmetric, h)
    steps = np.rint(w.reshape(40, 2, 64) / scales.astype(np.float32)[..., None]) + zeros[..., None]
    np.testing.assert_array_equal(codes, np.clip(steps, 0, 15).reshape(40, 128))


@BOTH
def test_rows_do_not_depend_on_each_other(symmetric: bool) -> None:
    w, h = weights(), moments_of(correlated(172))
    whole = quantize_int4(w, 32, symmetric, h)
    for part in (slice(0, 7), slice(7, 40)):
        for got, wanted in zip(quantize_int4(w[part], 32, symmetric, h), whole, strict=True):
            np.testing.assert_array_equal(got, wanted[part])


@BOTH
@pytest.mark.parametrize("dead", [slice(0, 0), slice(40, 90), slice(128, 172), slice(0, 172)])
def test_channels_that_are_never_seen_do_no_harm(symmetric: bool, dead: slice) -> None:
    """A block whose moments are singular, or nothing but zeros, and two channels that are one."""
    x = correlated(172)
    x[:, 1] = x[:, 0]
    x[:, dead] = 0
    w = weights()
    got = dequantize_int4(*quantize_int4(w, 32, symmetric, moments_of(x)), 32)
    nearest = dequantize_int4(*quantize_int4(w, 32, symmetric), 32)
    assert np.isfinite(got).all()
    assert (((got - w) @ x.T) ** 2).sum() <= (((nearest - w) @ x.T) ** 2).sum()
    assert np.abs(got - w)[:, dead].max(initial=0) < 0.5 * np.abs(w).max()
