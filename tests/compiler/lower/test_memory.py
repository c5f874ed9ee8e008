"""Buffers share memory only where their lives, counted in regions, do not meet."""

from __future__ import annotations

import pytest
from enginery.compiler.lower.memory import assign_slots
from enginery.engines.expressions import Expression
from enginery.engines.plan import Buffer, Call, Launch, Operand
from hypothesis import given
from hypothesis import strategies as st


def calls_of(lives: dict[str, tuple[int, int]]) -> list[Call]:
    """Every buffer is touched in the first region of its life and in the last."""
    operands = {name: Operand("buffer", name) for name in lives}
    return [Call("linear", 0, region, {name: operands[name]}, {}) for name, life in lives.items() for region in life]


def slots(lives: dict[str, tuple[int, int]], kept: tuple[str, ...] = (), **sizes: Expression) -> list[int]:
    """The slot of each buffer, in the order of `lives`."""
    buffers = [Buffer(name, "f32", sizes.get(name, 64), 0) for name in lives]
    placed = {buffer.name: buffer.slot for buffer in assign_slots(buffers, calls_of(lives), set(kept))}
    return [placed[name] for name in lives]


def test_one_after_the_other_share() -> None:
    assert slots({"a": (0, 1), "b": (2, 3), "c": (4, 4)}) == [0, 0, 0]


def test_those_that_meet_in_a_region_do_not() -> None:
    """No barrier parts the calls of a region."""
    assert slots({"a": (0, 2), "b": (2, 3)}) == [0, 1]
    assert slots({"a": (0, 9), "b": (3, 4), "c": (5, 6)}) == [0, 1, 1]


@pytest.mark.parametrize("kept", ["a", "b"])
def test_what_is_kept_shares_with_nobody(kept: str) -> None:
    """Neither with what comes after it, nor with what came before: the step before may not have ended everywhere."""
    assert slots({"a": (0, 1), "b": (2, 3)}, kept=(kept,)) == [0, 1]


def test_what_peers_read_lives() -> None:
    """Others may read it in a region in which this rank does not touch it."""
    buffers = [Buffer(name, "f32", 64, 0) for name in ("a", "b")]
    arguments = {"parts": Operand("peers", "a"), "out": Operand("buffer", "b", access="w")}
    launches = [Launch("gemm", 0, (1, 1, 1), {"out": Operand("buffer", "a")}), Launch("sum", 1, (1, 1, 1), arguments)]
    first, second = assign_slots(buffers, launches, set())
    assert first.slot != second.slot


def test_sizes_that_grow_differently_do_not_share() -> None:
    assert slots({"a": (0, 1), "b": (2, 3)}, a=["*", "tokens", 64], b=["*", "rows", 64]) == [0, 1]


def test_a_thread_keeps_what_is_its_own() -> None:
    buffers = [Buffer("a", "f32", 64, 0), Buffer("b", "f32", 64, 0, per_thread=True)]
    first, second = assign_slots(buffers, calls_of({"a": (0, 1), "b": (2, 3)}), set())
    assert first.slot != second.slot


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([64, 128])), min_size=1, max_size=12))
def test_no_two_that_live_together_share(found: list[tuple[int, int, int]]) -> None:
    lives = {f"b{index}": (min(a, b), max(a, b)) for index, (a, b, _) in enumerate(found)}
    sizes = {f"b{index}": size for index, (_, _, size) in enumerate(found)}
    chosen = dict(zip(lives, slots(lives, **sizes), strict=True))
    for a, (a_first, a_last) in lives.items():
        for b, (b_first, b_last) in lives.items():
            if a != b and chosen[a] == chosen[b]:
                assert a_last < b_first or b_last < a_first
                assert sizes[a] == sizes[b]
