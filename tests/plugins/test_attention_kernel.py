"""attention on the CPU against its reference; alone, in chunks and on several threads to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.plugins.attention.reference import attention
from enginery.plugins.kv_write.reference import round_state
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
KV_DTYPES = ("f32", "bf16", "i8")


class Scene:
    """Sequences with paged caches, and queries at the ends of their contexts.

    lengths: keys of each sequence; queries: how many of its last tokens ask.
    """

    def __init__(
        self,
        kernels: Any,
        dtype: str,
        lengths: list[int],
        queries: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 32,
        rot_dim: int = 0,
        q_norm: bool = False,
        window: int = 0,
        softcap: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.kernels, self.dtype, self.block_size = kernels, dtype, block_size
        self.heads, self.kv_heads, self.head_dim, self.rot_dim = heads, kv_heads, head_dim, rot_dim
        random = np.random.default_rng(seed)
        blocks = [-(-length // block_size) for length in lengths]
        order = random.permutation(sum(blocks) + 1).astype(np.int32)
        self.block_table = np.full((len(lengths), max(blocks) + 1), -1, np.int32)
        for sequence, count in enumerate(blocks):
            self.block_table[sequence, :count] = order[sum(blocks[:sequence]) :][:count]
        shape = (len(order), block_size, kv_heads, head_dim)
        self.keys, self.values = random.normal(size=(2, *shape)).astype(np.float32)
        self.positions = np.concatenate([np.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)]).astype(
            np.int32
        )
        self.token_sequence = np.repeat(np.arange(len(lengths)), queries).astype(np.int32)
        tokens = len(self.positions)
        self.q = random.normal(size=(tokens, heads * head_dim)).astype(np.float32)
        angles = random.normal(size=(tokens, rot_dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.q_norm = random.normal(size=head_dim).astype(np.float32) if q_norm else None
        self.shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        self.rule = {"scale": head_dim**-0.5, "softcap": softcap, "window": window, "rot_dim": rot_dim, "eps": 1e-6}
        self.garbage = False

    def call(self, tokens: Any = slice(None), rows: Array | None = None) -> Any:
        """A step of `tokens`; of these only `rows` ask, if given."""
        positions, sequences = self.positions[tokens], self.token_sequence[tokens]
        q = self.q[tokens] if rows is None else self.q[tokens][rows]
        columns, offset = self.heads * self.head_dim, 8
        fused = np.full((len(q), columns + 24), np.nan, np.float32)
        fused[:, offset : offset + columns] = q
        place = {"q_offset": offset, "stride": columns + 24, "domain": "tokens" if rows is None else "rows"}
        state = self.kernels.pack_state(self.keys, self.values, self.dtype)
        if self.garbage:
            state = self._spoil(state)
        step = {
            "positions": positions,
            "token_sequence": sequences,
            "groups": [{"block_table": self.block_table}],
        }
        group = self.kernels.state_group(self.block_size, self.kv_heads, self.head_dim, self.dtype)
        call = self.kernels.Call("attention", self.shape | self.rule | place, step, [group])
        call.inputs("block_table", "positions")
        if rows is not None:
            call.inputs("rows")
            call.step["rows"] = rows
        call.buffer("q", fused)
        call.buffer("cos", np.ascontiguousarray(self.cos[tokens]))
        call.buffer("sin", np.ascontiguousarray(self.sin[tokens]))
        if self.q_norm is not None:
            call.weight("q_norm", "rows_f32", self.q_norm)
        call.state(state)
        call.buffer("out", np.full((len(q), -(-columns // 64) * 64), np.nan, np.float32))
        return call

    def _spoil(self, state: Array) -> Array:
        """Every byte that no key of these sequences has written is 0xff: NaN in every float type."""
        written = np.zeros(self.keys.shape[:2], bool)
        for position, sequence in zip(self.positions, self.token_sequence, strict=True):
            seen = np.arange(position + 1)
            written[self.block_table[sequence][seen // self.block_size], seen % self.block_size] = True
        ones = self.kernels.pack_state(
            *[np.broadcast_to(written[..., None, None], self.keys.shape).astype(np.float32)] * 2, self.dtype
        )
        element = {"f32": np.uint32, "bf16": np.uint16, "i8": np.uint8}[self.dtype]
        spoiled = state.view(element).copy()
        spoiled[ones.view(element) == 0] = np.iinfo(element).max
        assert (spoiled != state.view(element)).any()
        return spoiled.view(np.int8)

    def run(self, isa: str, tokens: Any = slice(None), rows: Array | None = None, num_threads: int = 1) -> Array:
        call = self.call(tokens, rows)
        call.run(isa, num_threads)
        columns = self.heads * self.head_dim
        assert not call.arrays["out"][:, columns:].any()
        result: Array = call.arrays["out"][:, :columns]
        return result

    def wanted(self) -> Array:
        keys, values = (
            round_state(x.reshape(-1, *x.shape[2:]), self.dtype).reshape(x.shape) for x in (self.keys, self.values)
        )
        return attention(
            self.q,
            keys,
            values,
            self.block_table,
            self.positions,
            self.token_sequence,
            self.cos if self.rot_dim else None,
            self.sin if self.rot_dim else None,
            self.q_norm,
            **self.shape,  # type: ignore[arg-type]
            **self.rule,  # type: ignore[arg-type]
        )

    def tolerance(self) -> str:
        return "f32" if self.dtype == "f32" else f"kv {self.dtype}"


@settings(max_examples=12)
@given(
    contexts=st.lists(
        st.tuples(st.integers(1, 150) | st.sampled_from([512, 700, 1100]), st.integers(1, 40)), max_size=4
    ),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 40]),
    head_dim=st.sampled_from([8, 16, 24, 64, 80, 256]),
    block_size=st.sampled_from([16, 32, 48, 64, 1024]),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    q_norm=st.booleans(),
    window=st.sampled_from([0, 1, 5, 40, 600]),
    softcap=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 2**31),
    num_threads=st.integers(1, 3),
)
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_matches_reference(
    isa: str,
    kernels: Any,
    dtype: str,
    contexts: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    rotated: float,
    num_threads: int,
    **options: Any,
) -> None:
    contexts = contexts or [(1, 1)]
    scene = Scene(
        kernels,
        dtype,
        [length for length, _ in contexts],
        [min(pair) for pair in contexts],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rot_dim=int(head_dim * rotated) // 2 * 2,
        **options,
    )
    kernels.assert_close(scene.run(isa, num_threads=num_threads), scene.wanted(), scene.tolerance())


@pytest.mark.parametrize("window", [0, 37, 600])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_is_the_same_in_chunks_and_on_several_threads(isa: str, kernels: Any, dtype: str, window: int) -> None:
    scene = Scene(kernels, dtype, [1300, 61], [130, 61], heads=6, head_dim=24, window=window, q_norm=True, rot_dim=24)
    whole = scene.run(isa)
    np.testing.assert_array_equal(scene.run(isa, num_threads=2), whole)
    for begin, end in [(0, 1), (1, 4), (4, 37), (37, 129), (129, 130), (130, 191), (100, 150)]:
        for num_threads in (1, 2):
            np.testing.assert_array_equal(scene.run(isa, slice(begin, end), num_threads=num_threads), whole[begin:end])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_contexts_of_several_sequences_are_split_apart(isa: str, kernels: Any, dtype: str) -> None:
    scene = Scene(kernels, dtype, [1300, 700, 1100], [1, 2, 1], heads=6, head_dim=24)
    whole = scene.run(isa)
    for num_threads in (2, 3, 2):
        np.testing.assert_array_equal(scene.run(isa, num_threads=num_threads), whole)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_many_keys_of_little_weight_count(isa: str, kernels: Any, dtype: str) -> None:
    scene = Scene(kernels, dtype, [2100], [1], heads=2, kv_heads=1)
    scene.q[:], scene.keys[:], scene.values[:] = 1, 0, 1
    block, offset = scene.block_table[0, 0], 5
    scene.keys[block, offset], scene.values[block, offset] = 11 / 4, 0  # all others weigh e^-11, and add up to 3 %
    kernels.assert_close(scene.run(isa), scene.wanted(), scene.tolerance())


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_query_that_is_not_a_number_has_no_answer(isa: str, kernels: Any, dtype: str) -> None:
    scene = Scene(kernels, dtype, [70], [2])
    clean = scene.run(isa)[1]
    scene.q[0, 3] = np.nan
    found = scene.run(isa)
    assert np.isnan(found[0, : scene.head_dim]).all()
    np.testing.assert_array_equal(found[1], clean)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_who_sees_a_key_that_is_not_a_number_has_no_answer(isa: str, kernels: Any, dtype: str, softcap: float) -> None:
    scene = Scene(kernels, dtype, [90], [40], softcap=softcap)
    clean = scene.run(isa)
    block, offset = divmod(70, scene.block_size)
    scene.keys[scene.block_table[0, block], offset, :, 3] = np.nan
    found = scene.run(isa)
    np.testing.assert_array_equal(found[:20], clean[:20])
    assert np.isnan(found[20:]).all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_rows_that_ask_alone_get_the_same(isa: str, kernels: Any, dtype: str) -> None:
    scene = Scene(kernels, dtype, [90, 20, 700], [40, 20, 3], rot_dim=16)
    rows = np.array([0, 7, 39, 40, 59, 62], np.int32)
    np.testing.assert_array_equal(scene.run(isa, rows=rows), scene.run(isa)[rows])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_never_looks_at_slots_that_nobody_has_written(isa: str, kernels: Any, dtype: str) -> None:
    for length in (1, 2, 15, 16, 17, 33, 63, 65, 67):
        scene = Scene(kernels, dtype, [length], [min(length, 3)])
        clean = scene.run(isa)
        scene.garbage = True
        np.testing.assert_array_equal(scene.run(isa), clean)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_blocks_behind_the_window_may_be_gone(isa: str, kernels: Any, dtype: str) -> None:
    scene = Scene(kernels, dtype, [1200], [5], window=100)
    before = scene.run(isa)
    scene.block_table[0, : (1195 - 99) // 32] = -1
    np.testing.assert_array_equal(scene.run(isa), before)


HOSTILE = {
    "a small q": (lambda call: call.arrays.update(q=call.arrays["q"].ravel()[:-1].copy()), "operand q: wanted"),
    "a small output": (lambda call: call.arrays.update(out=call.arrays["out"].ravel()[:-1].copy()), "out: wanted"),
    "a small table": (lambda call: call.arrays.update(cos=call.arrays["cos"].ravel()[:-1].copy()), "cos: wanted"),
    "an offset beyond the row": (lambda call: call.attributes.update(q_offset=1 << 20), "q_offset"),
    "a negative offset": (lambda call: call.attributes.update(q_offset=-4), "q_offset"),
    "a head of 12": (lambda call: call.attributes.update(head_dim=12), "multiple of 8"),
    "heads that do not divide": (lambda call: call.attributes.update(num_heads=3), "multiple of num_kv_heads"),
    "too many heads": (lambda call: call.attributes.update(num_heads=4096, stride=70000), "do not fit|wanted"),
    "other heads than the state": (lambda call: call.attributes.update(num_kv_heads=1), "KV heads"),
    "blocks of another size": (lambda call: call.groups[0].update(block_bytes=64), "blocks of"),
    "blocks of 24 tokens": (lambda call: call.groups[0].update(block_size=24), "multiple of 16"),
    "a state of another type": (lambda call: call.groups[0].update(dtype="f64"), "dtype"),
    "a layer too far": (lambda call: call.operands["state"].update(layer=1), "layer 1 of 1"),
    "a group that is not there": (lambda call: call.operands["state"].update(index=9), "state group"),
    "another input": (lambda call: call.operands["positions"].update(name="token_ids"), "step input positions"),
    "an unknown attribute": (lambda call: call.attributes.update(alibi=True), "alibi = true is not known"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = HOSTILE[fault]
    call = Scene(kernels, "f32", [40], [3], rot_dim=8).call()
    call.run(isa)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa)
