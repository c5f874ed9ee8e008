"""kv_write on the CPU: what it stores, byte for byte, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.plugins.kv_write.reference import prepare_heads
from hypothesis import given, settings
from hypothesis import strategies as st

NUM_LAYERS = 3


def build(
    kernels: Any,
    dtype: str,
    tokens: int,
    heads: int,
    head_dim: int,
    block_size: int,
    rot_dim: int,
    norm: bool,
    seed: int,
) -> tuple[Any, Any]:
    """A call that writes layer 1 of 3, and the keys and values [tokens, heads, head_dim] that it should write."""
    random = np.random.default_rng(seed)
    columns = heads * head_dim
    rows = random.normal(size=(tokens, 2 * columns + 40)).astype(np.float32)
    k, v = rows[:, 16 : 16 + columns], rows[:, 24 + columns : 24 + 2 * columns]
    angles = random.normal(size=(tokens, rot_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    k_norm = random.normal(size=head_dim).astype(np.float32)
    blocks = -(-tokens // block_size) + 2
    slots = random.permutation(blocks * block_size)[:tokens].astype(np.int64)
    slots[random.random(tokens) < 0.2] = -1
    attributes = {"num_kv_heads": heads, "head_dim": head_dim, "rot_dim": rot_dim, "eps": 1e-6}
    attributes |= {"k_offset": 16, "v_offset": 24 + columns, "stride": rows.shape[1]}
    group = kernels.state_group(block_size, heads, head_dim, dtype, NUM_LAYERS)
    step = {"positions": np.zeros(tokens, np.int32), "groups": [{"slots": slots}]}
    call = kernels.Call("kv_write", attributes, step, [group])
    call.inputs("positions", "slots")
    call.buffer("k", rows)
    call.buffer("v", rows)
    call.buffer("cos", cos)
    call.buffer("sin", sin)
    if norm:
        call.weight("k_norm", "rows_f32", k_norm)
    call.state(np.zeros((blocks, group["block_bytes"]), np.int8))
    call.operands["state"]["layer"] = 1
    keys = prepare_heads(k, head_dim, cos, sin, k_norm if norm else None, rot_dim=rot_dim, eps=1e-6)
    return call, (keys, v.reshape(tokens, heads, head_dim))


@settings(max_examples=15)
@given(
    tokens=st.integers(0, 70),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 24, 64, 256]),
    block_size=st.sampled_from([16, 32, 64]),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    norm=st.booleans(),
    seed=st.integers(0, 2**31),
    num_threads=st.integers(1, 3),
)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8"])
def test_writes_each_token_to_its_slot(
    isa: str, kernels: Any, dtype: str, head_dim: int, rotated: float, num_threads: int, **shape: Any
) -> None:
    call, (keys, values) = build(kernels, dtype, head_dim=head_dim, rot_dim=int(head_dim * rotated) // 2 * 2, **shape)
    call.run(isa, num_threads)
    slots, block_size = call.step["groups"][0]["slots"], shape["block_size"]
    state = call.arrays["state"].reshape(len(call.arrays["state"]), NUM_LAYERS, -1)
    assert not state[:, [0, 2]].any()
    wanted = np.zeros((2, len(state), block_size, shape["heads"], head_dim), np.float32)
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[:, slot // block_size, slot % block_size] = keys[token], values[token]
    packed = kernels.pack_state(*wanted, dtype)
    if dtype == "f32":
        kernels.assert_close(state[:, 1].view(np.float32), packed.view(np.float32), "f32")
        return
    # The reference's last bit may round to the neighbour of what the kernel rounds to.
    element = {"bf16": np.int16, "i8": np.int8}[dtype]
    found, expected = (x.copy().view(element).astype(np.int32) for x in (state[:, 1], packed))
    assert np.abs(found - expected).max(initial=0) <= 1
    assert (found != expected).mean() <= 0.01


def test_stores_zeros_and_huge_values(isa: str, kernels: Any) -> None:
    call, _ = build(kernels, "i8", 4, 1, 16, 16, 0, False, 0)
    call.arrays["k"][:] = call.arrays["v"][:] = 0
    call.arrays["k"][1] = 1e30
    call.step["groups"][0]["slots"] = np.arange(4)
    call.run(isa)
    state = call.arrays["state"].reshape(len(call.arrays["state"]), NUM_LAYERS, -1)[0, 1]
    keys = state[: 16 * 16].reshape(8, 16, 2)
    scales = state[2 * 16 * 16 :].view(np.float16)
    assert not keys[:, 0].any()
    np.testing.assert_array_equal(keys[:, 1], 127)
    assert scales[1] == np.float16(65504)
    assert not scales[[0, 2, 3]].any()


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_keys_and_values_that_are_not_finite_make_the_scores_nan(
    isa: str, kernels: Any, number: float, name: str
) -> None:
    call, _ = build(kernels, "i8", 4, 1, 24, 16, 0, False, 0)
    call.step["groups"][0]["slots"] = np.arange(4)
    first = call.attributes[f"{name}_offset"]
    call.arrays[name] = call.arrays[name].copy()
    call.arrays[name][2, first + 23] = number
    call.run(isa)
    state = call.arrays["state"].reshape(len(call.arrays["state"]), NUM_LAYERS, -1)[0, 1]
    key_scales = state[16 * (24 + 32) :].view(np.float16)[:4]
    np.testing.assert_array_equal(np.isnan(key_scales), [False, False, True, False])


HOSTILE = {
    "a small k": (lambda call: call.arrays.update(k=call.arrays["k"].ravel()[:-1].copy()), "operand k: wanted"),
    "keys beyond the row": (lambda call: call.attributes.update(k_offset=1 << 20), "k_offset"),
    "values beyond the row": (lambda call: call.attributes.update(v_offset=100), "v_offset"),
    "an odd rotation": (lambda call: call.attributes.update(rot_dim=7), "rot_dim"),
    "a rotation wider than the head": (lambda call: call.attributes.update(rot_dim=32), "rot_dim"),
    "an eps that is no number": (lambda call: call.attributes.update(eps=float("nan")), "eps"),
    "no state": (lambda call: (call.operands.pop("state"), call.arrays.pop("state")), "state is missing"),
    "an unknown operand": (lambda call: call.inputs("rows"), "operand rows is not known"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = HOSTILE[fault]
    call, _ = build(kernels, "bf16", 5, 2, 16, 16, 8, True, 0)
    call.run(isa)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa)
