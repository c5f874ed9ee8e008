"""attention on CUDA, interpreted, against its reference: decode, prefill and both in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.engines.expressions import evaluate
from enginery.engines.fields import LARGEST
from enginery.plugins.attention import cuda
from enginery.plugins.attention.cuda import TILE_TOKENS, Attention, Split, attention_launches
from enginery.plugins.attention.reference import attention
from enginery.plugins.kv_write.cuda import StateLayout
from enginery.plugins.launches import Launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import launch
from .paged_state import PagedState

Array = NDArray[Any]
KV_DTYPES = ("bf16", "fp8", "i8")
TOLERANCE = {"bf16": 0.015, "fp8": 0.015, "i8": 0.015}
NUM_LAYERS, LAYER = 2, 1
Q_OFFSET = 24


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, as each takes the interpreter milliseconds, and splits of a single tile."""
    splits = (Split(4, 3, 64), Split(6, 2, 128), Split(None, 1, 64))
    monkeypatch.setattr(cuda, "_splits", lambda *_: splits)


class Scene:
    """Sequences with paged caches, and queries at the ends of their contexts. A sequence with one query decodes.

    contexts  of each sequence how many keys it has, and how many of its last tokens ask
    """

    def __init__(
        self,
        kv_dtype: str,
        contexts: Sequence[tuple[int, int]],
        *,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 16,
        rot_dim: int = 0,
        q_norm: bool = False,
        window: int = 0,
        softcap: float = 0.0,
        seed: int = 0,
        scale: float | None = None,
    ) -> None:
        random = np.random.default_rng(seed)
        self.contexts = contexts
        lengths, queries = zip(*contexts, strict=True)
        blocks = [-(-length // 64) for length in lengths]
        order = random.permutation(sum(blocks) + 1).astype(np.int32)
        self.block_table = np.full((len(lengths), max(blocks) + 1), -1, np.int32)
        written = np.zeros((len(order), 64), bool)
        for sequence, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            mine = order[sum(blocks[:sequence]) :][:count]
            self.block_table[sequence, :count] = mine
            written.reshape(-1)[(mine[:, None] * 64 + np.arange(64)).reshape(-1)[:length]] = True
            gone = max(0, length - queries[sequence] - window + 1) // 64 if window else 0
            self.block_table[sequence, :gone] = -1
            written[mine[:gone]] = False
        self.positions = np.concatenate([np.arange(n - q, n) for n, q in contexts]).astype(np.int32)
        self.token_sequence = np.repeat(np.arange(len(lengths)), queries).astype(np.int32)
        tokens, columns = len(self.positions), kv_heads * group * head_dim
        stride = -(-(columns + 2 * Q_OFFSET) // 128) * 128
        self.q = np.full((tokens, stride), np.nan, ml_dtypes.bfloat16)
        self.q[:, Q_OFFSET : Q_OFFSET + columns] = random.standard_normal((tokens, columns)) * 2
        angles = random.standard_normal((tokens, rot_dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.q_norm = random.standard_normal(head_dim).astype(np.float32) if q_norm else None
        self.state = PagedState(kv_heads, head_dim, kv_dtype, len(order), NUM_LAYERS)
        self.state.bytes[:] = 0xFF
        keys, values = random.standard_normal((2, len(order), 64, kv_heads, head_dim)).astype(np.float32)
        self.state.fill(LAYER, keys, values, written)
        self.operator = Attention(
            self.state.layout,
            kv_heads * group,
            Q_OFFSET,
            stride,
            rot_dim,
            1e-6,
            head_dim**-0.5 if scale is None else scale,
            softcap,
            window,
            q_norm,
        )

    def run(self, rows: Array | None = None, architecture: int = 90, way: int = 0) -> Array:
        """f32 [M, columns]: of all tokens, or of `rows` alone. way: 0, or the place among a launch's others, from 1."""
        operator, tokens = self.operator, len(self.positions)
        columns = operator.num_heads * operator.layout.head_dim
        q = self.q if rows is None else np.ascontiguousarray(self.q[rows])
        out = np.full((len(q), -(-columns // 128) * 128), np.nan, ml_dtypes.bfloat16)
        inputs: dict[str, Any] = {"q": q, "cos": self.cos, "sin": self.sin, "out": out, "positions": self.positions}
        inputs |= {"block_table": self.block_table, "token_sequence": self.token_sequence}
        inputs |= {"max_blocks": self.block_table.shape[1]} | self.state.arguments(LAYER)
        if self.q_norm is not None:
            inputs["q_norm"] = self.q_norm
        sizes = {"tokens": tokens, "max_blocks": self.block_table.shape[1]}
        if rows is not None:
            sizes["rows"], inputs["rows"] = len(rows), rows.astype(np.int32)
        else:
            decodes, tiles = self.split_step()
            sizes |= {"decodes": len(decodes), "tiles": len(tiles)}
            inputs |= {"decode_tokens": decodes, "tiles": tiles}
        launches = attention_launches(operator, architecture, "tokens" if rows is None else "rows", pdl=False)
        run_launches(tuple((each, *each.others)[min(way, len(each.others))] for each in launches), sizes, inputs)
        assert not out[: len(q) if rows is None else (rows >= 0).sum(), columns:].astype(np.float32).any()
        return out[:, :columns].astype(np.float32)

    def split_step(self) -> tuple[Array, Array]:
        """The step inputs decode_tokens and tiles."""
        decodes, tiles, token = [], [], 0
        for _, queries in self.contexts:
            if queries == 1:
                decodes.append(token)
            else:
                tiles += [(token + i, min(TILE_TOKENS, queries - i)) for i in range(0, queries, TILE_TOKENS)]
            token += queries
        return np.array(decodes, np.int32), np.array(tiles, np.int32).reshape(-1, 2)

    def wanted(self) -> Array:
        operator = self.operator
        head_dim = operator.layout.head_dim
        keys, values = self.state.unpacked(LAYER)
        return attention(
            self.q[:, Q_OFFSET : Q_OFFSET + operator.num_heads * head_dim].astype(np.float32),
            keys,
            values,
            self.block_table,
            self.positions,
            self.token_sequence,
            self.cos if operator.rot_dim else None,
            self.sin if operator.rot_dim else None,
            self.q_norm,
            num_heads=operator.num_heads,
            num_kv_heads=operator.layout.num_kv_heads,
            head_dim=head_dim,
            scale=operator.scale,
            softcap=operator.softcap,
            window=operator.window,
            rot_dim=operator.rot_dim,
            eps=operator.eps,
        )

    def check(self, found: Array | None = None, wanted: Array | None = None) -> None:
        found = self.run() if found is None else found
        wanted = self.wanted() if wanted is None else wanted
        assert np.isfinite(found).all()
        reach = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found - wanted) <= TOLERANCE[self.operator.layout.kv_dtype] * reach).all()


def run_launches(launches: tuple[Launch, ...], sizes: dict[str, int], inputs: dict[str, Any]) -> None:
    """Every launch whose guard holds, twice, as scratch must be left as it was found."""
    for case in launches:
        if not all(g.low <= sizes[g.variable] <= g.high for g in case.guard):
            continue
        scratch = {}
        for name, wanted in case.scratch.items():
            kind = np.int32 if dict(case.kernel.parameters)[name] == "*i32" else np.float32
            scratch[name] = np.full(evaluate(wanted.bytes, sizes) // 4, 0 if wanted.zeroed else -1, kind)
        names = [name for name, _ in case.kernel.parameters]
        given = inputs | {name: inputs[of] for name, of in case.inputs.items()}
        arguments = {name: given[name] for name in names if name in given} | scratch | case.values
        x, y, z = (evaluate(size, sizes) for size in case.grid)
        for _ in range(2 if scratch else 1):
            launch(case.kernel, (x, y, z), arguments)
            assert not any(scratch[name].any() for name, wanted in case.scratch.items() if wanted.zeroed)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contexts=st.lists(
        st.tuples(st.integers(1, 150) | st.sampled_from([64, 128, 320]), st.sampled_from([1, 1, 2, 17, 130])),
        min_size=1,
        max_size=2,
    ),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([8, 24, 64, 80]),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    q_norm=st.booleans(),
    window=st.sampled_from([0, 1, 5, 40, 100, 600]),
    softcap=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_matches_reference(
    kv_dtype: str, contexts: list[tuple[int, int]], head_dim: int, rotated: float, **options: Any
) -> None:
    scene = Scene(
        kv_dtype,
        [(length, min(length, queries)) for length, queries in contexts],
        head_dim=head_dim,
        rot_dim=int(head_dim * rotated) // 2 * 2,
        **options,
    )
    scene.check()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_that_ask_alone_get_the_same(kv_dtype: str) -> None:
    scene = Scene(kv_dtype, [(90, 30), (20, 20), (700, 1)], rot_dim=16)
    rows = np.array([0, 7, 29, 30, 49, 50])
    found = scene.run(np.append(rows, -1))
    assert np.isnan(found[-1]).all()
    scene.check(found[:-1], scene.wanted()[rows])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_splits_are_combined(kv_dtype: str) -> None:
    """In three splits; in two, which the short sequences do not need."""
    Scene(kv_dtype, [(500, 1)]).check()
    Scene(kv_dtype, [(330, 1), (90, 1), (5, 1)], group=3, head_dim=24).check()


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_wide_heads_in_the_tiles_of_each_architecture(kv_dtype: str, architecture: int) -> None:
    scene = Scene(kv_dtype, [(200, 70), (150, 1)], kv_heads=1, head_dim=256, rot_dim=256, q_norm=True, window=90)
    scene.check(scene.run(architecture=architecture))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_tiles_that_take_the_place_of_others_compute_the_same(kv_dtype: str) -> None:
    scene = Scene(kv_dtype, [(200, 70), (330, 1)], head_dim=24, rot_dim=16, window=90)
    numbers = [len(each.others) for each in attention_launches(scene.operator, 90, "tokens", pdl=False)]
    for way in range(1, max(numbers) + 1):
        scene.check(scene.run(way=way))
    many = Scene(kv_dtype, [(330, 1)], kv_heads=1, group=65, head_dim=24, rot_dim=16)
    many.check(many.run(way=99))  # the last: tiles of 16 keys
    scene.operator = replace(scene.operator, invariant=True)
    numbers = [len(each.others) for each in attention_launches(scene.operator, 90, "tokens", pdl=False)]
    scene.check(scene.run(way=max(numbers)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scores_may_be_huge(kv_dtype: str) -> None:
    for softcap in (0.0, 30.0):
        scene = Scene(kv_dtype, [(70, 10), (130, 1)], kv_heads=1, scale=50.0, softcap=softcap)
        found = scene.run()
        values = scene.state.unpacked(LAYER)[1]
        assert np.abs(found).max() <= 1.01 * np.abs(values[np.isfinite(values)]).max()


@pytest.mark.parametrize("num_kv_heads", [1, 8, 96, 2048])
@pytest.mark.parametrize("domain", ["tokens", "rows"])
def test_guards_cover_every_count_once(monkeypatch: pytest.MonkeyPatch, domain: str, num_kv_heads: int) -> None:
    monkeypatch.undo()
    layout = StateLayout(num_kv_heads, 64, "i8", 1 << 20)
    operator = Attention(layout, 2 * num_kv_heads, 0, 1, 64, 0.0, 1.0, 0.0, 0, False)
    launches = attention_launches(operator, 90, domain, pdl=True)
    for variable in {g.variable for case in launches for g in case.guard}:
        ranges = sorted((g.low, g.high) for case in launches for g in case.guard if g.variable == variable)
        assert [low for low, _ in ranges] == [1, *(high + 1 for _, high in ranges[:-1])]
        assert ranges[-1][1] == LARGEST
