"""The packer against the layouts in NumPy, bit for bit; the layouts against their definition in FORMAT.md."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.compiler import _pack
from enginery.compiler import pack as in_numpy
from enginery.compiler.pack import PackRows, find_packer
from enginery.engines.layouts import GROUPS, LAYOUTS, padded_columns, padded_rows
from enginery.plugins.linear import layouts
from enginery.plugins.linear.quantize_int4 import dequantize_int4, quantize_int4
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
CODES = [f"{codes}_k8n16g{group}.v0" for codes in ("int4", "uint4") for group in GROUPS]
PACKED = ["f32_k1n16.v0", "bf16_k2n16.v0", "int8_k4n16.v0", *CODES]
ROWS = ["rows_f32.v0", "rows_bf16.v0"]
GPU = ["bf16_p128.v0", "fp8_p128.v0", "int8_p128.v0"]
SOURCES = ["f32", "bf16", "f16"]
SHAPES = st.tuples(st.integers(1, 50), st.integers(1, 200))


@pytest.fixture(scope="module", params=[_pack.pack_rows, in_numpy.pack_rows], ids=["compiled", "numpy"])
def pack_rows(request: pytest.FixtureRequest) -> PackRows:
    """The packer of this machine, and that of one without AVX2."""
    packer: PackRows = request.param
    return packer


def weights(n: int, k: int, seed: int) -> NDArray[np.float32]:
    """Rows of very different sizes, with ties of rounding, zeros of both signs and whole rows of them."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * 10.0 ** rng.integers(-4, 4, (n, 1))
    w[rng.random((n, k)) < 0.1] = -0.0
    w[rng.random(n) < 0.1] = 0.0
    ties = rng.random(n) < 0.2
    w[ties] = rng.integers(-254, 255, (int(ties.sum()), k)) / 2
    w[ties, 0] = 127
    return w.astype(np.float32)


def stored(w: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The bytes of w as a checkpoint stores it in dtype, and those values in float32."""
    if dtype == "bf16":
        bits = layouts.to_bf16(w)
        return bits.view(np.uint8), layouts.from_bf16(bits)
    values = w.astype(np.float16 if dtype == "f16" else np.float32)
    return values.view(np.uint8), values.astype(np.float32)


def expected(w: NDArray[np.float32], layout: str) -> tuple[bytes, ...]:
    """Bytes of the packed matrix, and of its scale, sums and zero points."""
    if layout in CODES:
        groups, has_zeros = LAYOUTS[layout].num_groups(w.shape[1]), LAYOUTS[layout].zeros
        codes, scales, zeros = quantize_int4(w, LAYOUTS[layout].group, symmetric=not has_zeros)
        beside = [layouts.pack_groups(x, groups).tobytes() for x in (scales, zeros)]
        return layouts.pack_int4_k8n16(codes).tobytes(), beside[0], b"", beside[1] if has_zeros else b""
    if layout == "int8_k4n16.v0":
        q, scale = layouts.quantize_int8(w)
        sums = layouts.row_sums(q)
        vectors = map(layouts.pad_vector, (scale, sums))
        return (*(x.tobytes() for x in (layouts.pack_int8_k4n16(q), *vectors)), b"")
    if layout in GPU:
        rows, scale = layouts.encode_rows(w, layout)
        assert rows.shape[1] % 128 == 0
        assert not rows[:, w.shape[1] :].any()
        return rows.tobytes(), scale.tobytes() if LAYOUTS[layout].scaled else b"", b"", b""
    whole = {
        "f32_k1n16.v0": layouts.pack_f32_k1n16,
        "bf16_k2n16.v0": layouts.pack_bf16_k2n16,
        "rows_f32.v0": np.array,
        "rows_bf16.v0": layouts.to_bf16,
    }[layout](w)
    return whole.tobytes(), b"", b"", b""


def beside(layout: str, rows: int, k: int) -> list[Array | None]:
    """Garbage for scale, sums and zero points, where the layout has them."""
    groups = LAYOUTS[layout].num_groups(k)
    scale: Array = np.full(rows, np.nan, np.float32)
    if LAYOUTS[layout].group:
        scale = np.full(rows * groups, 0xAAAA, np.uint16)
    return [
        scale if LAYOUTS[layout].scaled else None,
        np.full(rows, -7, np.int32) if layout == "int8_k4n16.v0" else None,
        np.full(rows * groups, 0xAA, np.uint8) if LAYOUTS[layout].zeros else None,
    ]


def pack(
    pack_rows: PackRows, source: Array, dtype: str, n: int, k: int, layout: str, **options: Any
) -> tuple[bytes, ...]:
    """What pack_rows writes, where there was garbage before; it must find all values finite."""
    rows = n if layout in GPU else padded_rows(n)
    out = np.full(LAYOUTS[layout].row_bytes(k) * n, 0xAA, np.uint8)
    if layout not in GPU:
        out = np.full(LAYOUTS[layout].num_bytes(n, k), 0xAA, np.uint8)
    arrays = beside(layout, rows, k)
    assert pack_rows(source, dtype, n, k, layout, out, *arrays, **options) == -1
    return out.tobytes(), *(b"" if array is None else array.tobytes() for array in arrays)


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("layout", PACKED + ROWS + GPU)
@given(shape=SHAPES, seed=st.integers(0, 1000), add=st.sampled_from([0.0, 1.0]), num_threads=st.integers(1, 4))
def test_packer_equals_numpy(
    pack_rows: PackRows, dtype: str, layout: str, shape: tuple[int, int], seed: int, add: float, num_threads: int
) -> None:
    source, w = stored(weights(*shape, seed), dtype)
    wanted = expected(w + np.float32(add) if add else w, layout)
    assert pack(pack_rows, source, dtype, *shape, layout, add=add, num_threads=num_threads) == wanted


@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_unpack_restores_what_was_packed(shape: tuple[int, int], seed: int) -> None:
    w = weights(*shape, seed)
    np.testing.assert_array_equal(layouts.unpack_f32_k1n16(layouts.pack_f32_k1n16(w), *shape), w)
    rounded = layouts.from_bf16(layouts.to_bf16(w))
    np.testing.assert_array_equal(layouts.unpack_bf16_k2n16(layouts.pack_bf16_k2n16(w), *shape), rounded)
    q, _ = layouts.quantize_int8(w)
    np.testing.assert_array_equal(layouts.unpack_int8_k4n16(layouts.pack_int8_k4n16(q), *shape), q)
    codes = (q & 15).astype(np.uint8)
    np.testing.assert_array_equal(layouts.unpack_int4_k8n16(layouts.pack_int4_k8n16(codes), *shape), codes)


@pytest.mark.parametrize(("layout", "columns"), [("f32_k1n16.v0", 1), ("bf16_k2n16.v0", 2), ("int8_k4n16.v0", 4)])
def test_element_lies_where_the_format_says(pack_rows: PackRows, layout: str, columns: int) -> None:
    n, k = 35, 70
    for row, column in [(0, 0), (15, 3), (16, 1), (34, 69), (20, 64)]:
        w = np.zeros((n, k), np.float32)
        w[row, column] = 1.0
        data, *_ = pack(pack_rows, w.view(np.uint8), "f32", n, k, layout)
        elements = np.frombuffer(data, np.uint8).reshape(-1, LAYOUTS[layout].bits // 8)
        panel = row // 16 * padded_columns(k) * 16
        wanted = panel + (column // columns * 16 + row % 16) * columns + column % columns
        assert list(np.flatnonzero(elements.any(axis=1))) == [wanted]


@pytest.mark.parametrize("layout", CODES)
def test_code_lies_where_the_format_says(pack_rows: PackRows, layout: str) -> None:
    n, k = 35, 70
    group, groups = LAYOUTS[layout].group, LAYOUTS[layout].num_groups(k)
    for row, column in [(0, 0), (15, 3), (16, 4), (34, 69), (20, 64), (33, 39)]:
        w = np.zeros((n, k), np.float32)
        w[row, column] = -8.0
        data, scale, *_ = pack(pack_rows, w.view(np.uint8), "f32", n, k, layout)
        wanted = np.full((48, 128), 8 if layout.startswith("int4") else 0, np.uint8)
        wanted[n:], wanted[:, k:] = 0, 0
        first = column // group * group
        wanted[row, first : min(first + group, k)] = 8 if layout.startswith("int4") else 15
        wanted[row, column] = 0
        flat = np.frombuffer(data, np.uint8)
        for r, c in np.ndindex(*wanted.shape):
            byte = flat[((r // 16 * 16 + c // 8) * 16 + r % 16) * 4 + c % 4]
            assert (byte >> 4 if c % 8 > 3 else byte & 15) == wanted[r, c]
        halves = np.frombuffer(scale, np.float16).reshape(-1, groups, 16)
        assert np.argwhere(halves).tolist() == [[row // 16, column // group, row % 16]]


@given(shape=SHAPES, seed=st.integers(0, 1000), group=st.sampled_from(GROUPS), symmetric=st.booleans())
def test_codes_stand_for_what_they_were_made_of(shape: tuple[int, int], seed: int, group: int, symmetric: bool) -> None:
    w = np.clip(weights(*shape, seed), -1e4, 1e4)
    codes, scales, zeros = quantize_int4(w, group, symmetric)
    step = np.abs(scales.astype(np.float32))[:, np.arange(shape[1]) // group]
    error = np.abs(dequantize_int4(codes, scales, zeros, group) - w)
    # Half a step; a whole one at an end of the grid; and what f16 cannot tell from 0.
    assert (error <= step * 1.01 + 1e-6).all()
    assert np.median(error / np.maximum(step, 1e-6)) < 0.5


@pytest.mark.parametrize("layout", PACKED + ROWS)
def test_pieces_equal_the_whole(pack_rows: PackRows, layout: str) -> None:
    n, k = 75, 130
    source, _ = stored(weights(n, k, 1), "bf16")
    pieces = [pack(pack_rows, source[i:j], "bf16", j - i, k, layout) for i, j in [(0, 32), (32, 48), (48, n)]]
    assert tuple(b"".join(parts) for parts in zip(*pieces, strict=True)) == pack(
        pack_rows, source, "bf16", n, k, layout
    )


@pytest.mark.parametrize("layout", PACKED)
def test_gated_weight_interleaves_panels(pack_rows: PackRows, layout: str) -> None:
    n, k = 40, 100
    gate, up = weights(n, k, 2), weights(n, k, 3)
    half = LAYOUTS[layout].num_bytes(n, k)
    out, arrays = np.full(2 * half, 0xAA, np.uint8), beside(layout, 2 * 48, k)
    for panel, w in enumerate((gate, up)):
        vectors = [None if array is None else array[panel * len(array) // 6 :] for array in arrays]
        source = w.view(np.uint8)
        assert pack_rows(source, "f32", n, k, layout, out[panel * half // 3 :], *vectors, stride=2) == -1
    wanted = expected(layouts.interleave_gated(gate, up), layout)
    if layout in CODES:  # of rows that are padding, even codes are 0
        groups, has_zeros = LAYOUTS[layout].num_groups(k), LAYOUTS[layout].zeros
        halves = [quantize_int4(w, LAYOUTS[layout].group, symmetric=not has_zeros) for w in (gate, up)]
        codes, scales, zeros = (layouts.interleave_gated(*pair) for pair in zip(*halves, strict=True))
        vectors = [layouts.pack_groups(x, groups).tobytes() for x in (scales, zeros)]
        wanted = (layouts.pack_int4_k8n16(codes).tobytes(), vectors[0], b"", vectors[1] if has_zeros else b"")
    assert (out.tobytes(), *(b"" if array is None else array.tobytes() for array in arrays)) == wanted


@pytest.mark.parametrize("layout", GPU)
def test_gated_weight_interleaves_rows(pack_rows: PackRows, layout: str) -> None:
    n, k = 40, 100
    gate, up = weights(n, k, 2), weights(n, k, 3)
    row_bytes = LAYOUTS[layout].row_bytes(k)
    out, scale = np.full(2 * n * row_bytes, 0xAA, np.uint8), np.full(2 * n, np.nan, np.float32)
    for row, w in enumerate((gate, up)):
        scales = scale[row:] if LAYOUTS[layout].scaled else None
        assert pack_rows(w.view(np.uint8), "f32", n, k, layout, out[row * row_bytes :], scales, stride=2) == -1
    matrix, wanted, *_ = expected(layouts.interleave_rows(gate, up), layout)
    assert out.tobytes() == matrix
    assert not LAYOUTS[layout].scaled or scale.tobytes() == wanted


def test_every_fp8_code_is_rounded_to() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).view(ml_dtypes.float8_e4m3fn)
    exact = np.sort(codes.astype(np.float32))
    middles = (exact[1:] + exact[:-1]) / 2
    w = np.concatenate([exact, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])[None]
    w = np.repeat(w, 3, axis=0) * np.array([[1.0], [2.0**-20], [2.0**20]], np.float32)
    got = pack(_pack.pack_rows, w.view(np.uint8), "f32", *w.shape, "fp8_p128.v0")
    assert got == expected(w, "fp8_p128.v0")


@given(rows=st.integers(1, 50), columns=st.integers(1, 5))
def test_gated_halves_come_back(rows: int, columns: int) -> None:
    gate, up = weights(rows, columns, 4), weights(rows, columns, 5)
    gated = layouts.interleave_gated(gate, up)
    assert gated.shape == (2 * padded_rows(rows), columns)
    for got, wanted in zip(layouts.deinterleave_gated(gated, rows), (gate, up), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("layout", PACKED + ROWS + GPU)
@given(data=st.data(), shape=SHAPES, value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_first_value_that_is_not_finite_is_found(
    pack_rows: PackRows, dtype: str, layout: str, data: st.DataObject, shape: tuple[int, int], value: float
) -> None:
    n, k = shape
    w = weights(n, k, 6)
    where = data.draw(st.lists(st.integers(0, n * k - 1), min_size=1, max_size=3))
    source, _ = stored(w, dtype)
    bits = {
        "f32": np.array([value], np.float32),
        "bf16": (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "f16": np.array([value], np.float16),
    }[dtype]
    source.view(bits.dtype).reshape(-1)[where] = bits
    out = np.zeros(LAYOUTS[layout].num_bytes(n, k), np.uint8)
    assert pack_rows(source, dtype, n, k, layout, out, *beside(layout, padded_rows(n), k), num_threads=3) == min(where)


def test_value_that_bf16_rounds_to_infinity_is_not_finite(pack_rows: PackRows) -> None:
    w = np.array([[0x3F800000, 0x7F7F7FFF, 0x7F7F8000]], np.uint32)  # 1, the last that is finite in bf16, the next
    out = np.zeros(LAYOUTS["bf16_k2n16.v0"].num_bytes(1, 3), np.uint8)
    assert pack_rows(w.view(np.uint8), "f32", 1, 3, "bf16_k2n16.v0", out) == 2
    assert pack_rows(w[:, :2].copy().view(np.uint8), "f32", 1, 2, "bf16_k2n16.v0", out) == -1


def test_zero_row_has_scale_and_values_zero() -> None:
    q, scale = layouts.quantize_int8(np.array([[0.0, -0.0], [1.0, -2.0]], np.float32))
    assert q.tolist() == [[0, 0], [64, -127]]  # 63.5 goes to the even neighbour
    assert scale.tolist() == [0.0, np.float32(2) / np.float32(127)]


def test_subnormal_rows_stay_in_range(pack_rows: PackRows) -> None:
    w = np.outer(np.arange(1, 400), np.array([1.0, -1.0, 0.5])) * 1.401298464324817e-45
    w = w.astype(np.float32)
    q, _ = layouts.quantize_int8(w)
    assert q.min() >= -127
    assert pack(pack_rows, w.view(np.uint8), "f32", *w.shape, "int8_k4n16.v0") == expected(w, "int8_k4n16.v0")


def test_unaligned_source(pack_rows: PackRows) -> None:
    w = weights(17, 33, 7)
    shifted = np.empty(w.nbytes + 1, np.uint8)[1:]
    shifted[:] = w.view(np.uint8).reshape(-1)
    assert pack(pack_rows, shifted, "f32", 17, 33, "int8_k4n16.v0") == expected(w, "int8_k4n16.v0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 17}, "source has 256 elements, wanted 272"),
        ({"source_dtype": "i8"}, "unknown source_dtype 'i8'"),
        ({"layout": "rows_i8.v0"}, "unknown layout 'rows_i8.v0'"),
        ({"stride": 0}, "must be positive"),
        ({"out": np.zeros(4095, np.uint8)}, "out has 4095 elements, wanted at least 4096"),
        ({"scale": np.zeros(16, np.float32)}, "scale belongs to int8, fp8 and int4 layouts"),
        ({"layout": "int8_k4n16.v0"}, "scale belongs to int8, fp8 and int4 layouts"),
        ({"layout": "int4_k8n16g32.v0"}, "scale belongs to int8, fp8 and int4 layouts"),
        ({"layout": "uint4_k8n16g32.v0", "scale": np.zeros(32, np.uint16)}, "zeros to uint4"),
        ({"layout": "int4_k8n16g32.v0", "scale": np.zeros(31, np.uint16)}, "scale has 31 elements, wanted at least 32"),
    ],
)
def test_sizes_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "source": np.zeros((16, 16), np.uint8),
        "source_dtype": "f32",
        "n": 16,
        "k": 4,
        "layout": "f32_k1n16.v0",
        "out": np.zeros(4096, np.uint8),
    }
    with pytest.raises(ValueError, match=message):
        _pack.pack_rows(**{**arguments, **changes})


def test_array_that_would_have_to_be_copied_is_refused() -> None:
    with pytest.raises(TypeError):
        _pack.pack_rows(np.zeros((16, 16), np.uint8), "f32", 16, 4, "f32_k1n16.v0", np.zeros(1024, np.float32))


def test_packer_is_chosen_by_the_machine() -> None:
    assert find_packer(["sse4_2", "avx"]) is in_numpy.pack_rows
    assert find_packer(["avx2", "fma", "f16c", "bmi2"]) is _pack.pack_rows
