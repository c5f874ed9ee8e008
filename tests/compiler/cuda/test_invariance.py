"""Batch-invariant builds launch one kernel for an operator, however many rows there are; only its grid differs.

So a row's products are added by the same instructions in the same order: DEPTH, SPLITS, tiles and types are constants
of the kernel. That the programs of a larger or smaller grid add alike is shown in tests/interpreted/test_invariance.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.fields import LARGEST
from enginery.engines.manifest import read_manifest
from enginery.engines.plan import Launch as PlannedLaunch
from enginery.engines.plan import Operand
from enginery.plugins.attention.cuda import SPAN, Attention, attention_launches
from enginery.plugins.kv_write.cuda import BLOCK_TOKENS, StateLayout
from enginery.plugins.launches import Launch
from enginery.plugins.linear.cuda import Linear, fused_rows, linear_launches
from enginery.runtime.inspect import describe_engine, inspect_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from ...tiny import CASES, edit_config, make_checkpoint

ARCHITECTURES = st.sampled_from([80, 86, 89, 90, 100, 120])
LINEARS = st.builds(
    Linear,
    n=st.integers(1, 300_000),
    k=st.integers(1, 30_000),
    dtype=st.sampled_from(["bf16", "fp8", "int8"]),
    domain=st.sampled_from(["tokens", "rows"]),
    out_dtype=st.sampled_from(["bf16", "f32"]),
    activation=st.sampled_from(["none", "silu_gated", "gelu_tanh_gated"]),
    bias=st.booleans(),
    residual=st.booleans(),
    prologue=st.sampled_from([None, "quantize", "norm"]),
    invariant=st.just(True),
)


def constants_of(launches: tuple[Launch, ...]) -> dict[str, Any]:
    """Of the one kernel that they all launch."""
    (kernel,) = {each.kernel for each in launches}
    return dict(kernel.constants)


def ways_of(launches: tuple[Launch, ...]) -> Iterator[tuple[Launch, ...]]:
    """Theirs, and those of which an engine may have one instead."""
    yield launches
    yield from zip(*(each.others for each in launches), strict=True)


def ranges_of(launches: tuple[Launch, ...], variable: str) -> list[tuple[int, int]]:
    return [(g.low, g.high) for each in launches for g in each.guard if g.variable == variable]


def assert_cover_every_count_once(ranges: list[tuple[int, int]]) -> None:
    assert [low for low, _ in ranges] == [1, *(high + 1 for _, high in ranges[:-1])]
    assert ranges[-1][1] == LARGEST


@settings(max_examples=200, deadline=None)
@given(LINEARS, ARCHITECTURES, st.sampled_from([1, 8, 84, 132, 170]))
def test_products(linear: Linear, arch: int, num_sms: int) -> None:
    for launches in ways_of(linear_launches(linear, arch, num_sms)):
        constants = constants_of(launches)
        share, splits = constants["SHARE"], constants["SPLITS"]
        assert [each.grid[1] for each in launches] == ([splits, 1] if splits > 1 else [1])
        assert share % constants["DEPTH"] == 0
        assert share * (splits - 1) < constants["K"] <= share * splits
        assert_cover_every_count_once(ranges_of(launches, linear.domain))
    assert fused_rows(linear, arch) == 0


@settings(max_examples=200, deadline=None)
@given(
    arch=ARCHITECTURES,
    domain=st.sampled_from(["tokens", "rows"]),
    kv_dtype=st.sampled_from(["bf16", "fp8", "i8"]),
    kv_heads=st.sampled_from([1, 2, 8, 96, 2048]),
    group=st.sampled_from([1, 2, 3, 7, 48, 64, 71]),
    head_dim=st.integers(1, 256),
    window=st.sampled_from([0, 1, 63, 64, 65, 4096]),
)
def test_attention(
    arch: int, domain: str, kv_dtype: str, kv_heads: int, group: int, head_dim: int, window: int
) -> None:
    layout = StateLayout(kv_heads, head_dim, kv_dtype, 1 << 20)
    operator = Attention(layout, kv_heads * group, 0, 128, head_dim // 2 * 2, 0.0, 1.0, 0.0, window, False, True)
    for launches in ways_of(attention_launches(operator, arch, domain, arch >= 90)):
        constants = constants_of(launches)
        # Tiles of keys begin at multiples: spans do, and so does whatever block a window begins in.
        assert SPAN % constants["TILE"] == BLOCK_TOKENS % constants["TILE"] == SPAN % BLOCK_TOKENS == 0
        assert constants["ROWS"] % constants["GROUP_ROWS"] == 0
        assert_cover_every_count_once(ranges_of(launches, "rows" if domain == "rows" else "decodes"))
        assert ranges_of(launches, "tiles") == ([] if domain == "rows" else [(1, LARGEST)])


def kernels_by_result(prepared: Any) -> dict[str, set[str]]:
    found = defaultdict(set)
    for launch in prepared.ranks[0].plan.forward:
        assert isinstance(launch, PlannedLaunch)
        if isinstance(out := launch.arguments.get("out"), Operand):
            found[out.name].add(launch.kernel)
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("case", ["llama-biases", "gemma3_text-softcap", "qwen2-window", "qwen3", "phi3-partial"])
def test_whole_plans(case: str, precision: str, tmp_path: Path) -> None:
    assert case in CASES
    make_checkpoint(case, tmp_path)
    request = BuildRequest(str(tmp_path), None, target="h100", precision=precision)
    with prepare(request) as prepared:
        assert max(map(len, kernels_by_result(prepared).values())) > 2
        assert not prepared.batch_invariant
    with prepare(BuildRequest(**{**vars(request), "batch_invariant": True})) as prepared:
        assert set(map(len, kernels_by_result(prepared).values())) == {1}
        assert prepared.batch_invariant


def test_memory_is_that_of_the_longest_context(tmp_path: Path) -> None:
    """Each span of keys has a place for what is found in it."""
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, max_position_embeddings=1 << 20)

    def activations(invariant: bool, length: int) -> int:
        request = BuildRequest(str(tmp_path), None, "h100", "bf16", max_model_len=length, batch_invariant=invariant)
        with prepare(request) as prepared:
            return prepared.memory(1).activations

    assert activations(False, 4 * SPAN) == activations(False, 1 << 20)
    assert activations(True, 4 * SPAN) < 2 * activations(False, 4 * SPAN)
    # Of 64 pairs: 4 rows, of 8 elements and two sums.
    longer = ((1 << 20) - 4 * SPAN) // SPAN
    assert activations(True, 1 << 20) - activations(True, 4 * SPAN) == longer * 64 * 4 * (8 + 2) * 4


@pytest.mark.parametrize("asked", [False, True])
def test_cpu_engines_always_are_and_say_so(asked: bool, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    request = BuildRequest(str(tmp_path / "model"), tmp_path / "engine", "cpu-avx2", batch_invariant=asked)
    with prepare(request) as prepared:
        assert read_manifest(build(prepared)).batch_invariant
    facts = inspect_engine(tmp_path / "engine")
    assert facts["batch_invariant"] is True
    assert "batch invariant  yes" in describe_engine(facts)
