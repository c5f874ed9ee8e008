"""kv_write on CUDA, interpreted: what it stores, and where."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.plugins.kv_write.cuda import KvWrite, StateLayout, kv_write_launches
from enginery.plugins.kv_write.reference import kv_write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import launch
from .paged_state import PagedState

Array = NDArray[Any]
NUM_LAYERS, LAYER = 3, 1


def run(operator: KvWrite, state: PagedState, rows: Array, slots: Array, cos: Array, sin: Array, norm: Any) -> None:
    (case,) = kv_write_launches(operator, pdl=False)
    heads = dict(case.kernel.constants)["HEADS"]
    assert isinstance(heads, int)
    arguments: dict[str, Any] = {"k": rows, "v": rows, "cos": cos, "sin": sin, "slots": slots, "count": len(slots)}
    if operator.has_norm:
        arguments["k_norm"] = norm
    launch(
        case.kernel, (-(-len(slots) * operator.layout.num_kv_heads // heads), 1, 1), arguments | state.arguments(LAYER)
    )


def build(kv_dtype: str, tokens: int, heads: int, head_dim: int, rot_dim: int, norm: bool, seed: int) -> Any:
    """An operator, its state, its arguments, and the reference's."""
    random = np.random.default_rng(seed)
    columns = heads * head_dim
    stride = -(-(2 * columns + 24) // 128) * 128
    rows = (random.standard_normal((tokens, stride)) * 3).astype(ml_dtypes.bfloat16)
    angles = random.standard_normal((tokens, rot_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    weight = random.standard_normal(head_dim).astype(np.float32)
    blocks = -(-tokens // 64) + 2
    slots = random.permutation(blocks * 64)[:tokens].astype(np.int64)
    slots[random.random(tokens) < 0.2] = -1
    state = PagedState(heads, head_dim, kv_dtype, blocks, NUM_LAYERS)
    operator = KvWrite(state.layout, 16, 24 + columns, stride, rot_dim, 1e-6, norm)
    return operator, state, (rows, slots, cos, sin, weight)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 64, 80, 128, 256]),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "i8"])
def test_writes_each_token_to_its_slot(kv_dtype: str, head_dim: int, rotated: float, **shape: Any) -> None:
    rot_dim = int(head_dim * rotated) // 2 * 2
    operator, state, (rows, slots, cos, sin, weight) = build(kv_dtype, head_dim=head_dim, rot_dim=rot_dim, **shape)
    before = state.bytes.copy()
    run(operator, state, rows, slots, cos, sin, weight)
    columns = shape["heads"] * head_dim
    k, v = (rows[:, at : at + columns].astype(np.float32) for at in (operator.k_offset, operator.v_offset))
    old = state.unpacked(LAYER, before)
    keys, values = kv_write(
        k,
        v,
        old[0],
        old[1],
        slots,
        cos,
        sin,
        weight if operator.has_norm else None,
        head_dim=head_dim,
        rot_dim=rot_dim,
        eps=operator.eps,
        kv_dtype=kv_dtype,
    )
    found_keys, found_values = state.unpacked(LAYER)
    # The last bit of a norm may take a value to the neighbour of what the reference stores.
    step = {"bf16": 2.0**-7, "fp8": 2.0**-3, "i8": 1.01 / 127}[kv_dtype]
    for found, wanted in ((found_keys, keys), (found_values, values)):
        reach = np.abs(wanted).max(axis=-1, keepdims=True) if kv_dtype == "i8" else np.abs(wanted)
        least = np.abs(wanted).max(axis=-1, keepdims=True) * 2.0**-17
        assert (np.abs(found - wanted) <= step * reach + least).all()
        assert (found != wanted).mean() <= 0.01
    np.testing.assert_array_equal(state.of_layers([0, 2]), state.of_layers([0, 2], before))


@pytest.mark.parametrize("kv_dtype", ["fp8", "i8"])
def test_stores_zeros_and_huge_values(kv_dtype: str) -> None:
    operator, state, (rows, _, cos, sin, weight) = build(kv_dtype, 4, 1, 16, 0, False, 0)
    rows[:], rows[1, operator.k_offset : operator.k_offset + 16] = 0, 1e30
    run(operator, state, rows, np.arange(4, dtype=np.int64), cos, sin, weight)
    keys, _, scales, _ = state.parts(LAYER)
    assert not keys[0, 0, [0, 2, 3]].astype(np.float32).any()
    np.testing.assert_array_equal(keys[0, 0, 1].astype(np.float32), 448 if kv_dtype == "fp8" else 127)
    assert scales[0, 0, 1] == np.float16(65504)
    assert not scales[0, 0, [0, 2, 3]].any()


def test_stores_no_nan_in_8_bits() -> None:
    operator, state, (rows, _, cos, sin, weight) = build("fp8", 2, 1, 16, 0, False, 0)
    rows[0, operator.k_offset + 3] = rows[0, operator.v_offset + 4] = np.nan
    run(operator, state, rows, np.arange(2, dtype=np.int64), cos, sin, weight)
    keys, values, _, _ = state.parts(LAYER)
    assert np.isfinite(keys.astype(np.float32)).all()
    assert np.isfinite(values.astype(np.float32)).all()


def test_a_head_takes_as_many_bytes_as_the_contract_says() -> None:
    assert StateLayout(2, 80, "bf16", 0).head_bytes == 64 * 80 * 2 * 2
    assert StateLayout(2, 80, "fp8", 0).layer_bytes == 2 * (64 * 80 * 2 + 256)
