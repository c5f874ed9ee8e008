"""Plans at their limits: what the largest step makes of sizes, and fields just beyond what may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.plan import (
    ALIGNMENT,
    Buffer,
    Logits,
    Operand,
    Range,
    check_bounds,
    guarded_limits,
    plan_arena,
)
from enginery.engines.plan_format import LARGEST_PLAN_BYTES, MOST_CALLS, decode_plan, encode_plan

from .test_plan import LIMITS, WEIGHTS, make_plan


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ({"state": Operand("state", "full", 0, 0, "rw", -1)}, "layer -1"),
        ({"x": Operand("buffer", "x", 1, ["*", "tokens", 512], "r")}, "reaches byte 2049"),
        ({"weight": Operand("weight", "nothing", 0, 1, "r")}, "does not exist"),
    ],
)
def test_operands_outside_of_what_they_name_are_refused(operands: dict[str, Operand], reason: str) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        check_bounds(make_plan(**operands), LIMITS, WEIGHTS, "plan")


def test_a_slot_is_as_large_as_its_largest_buffer_and_slots_are_aligned() -> None:
    buffers = (
        Buffer("large", "f32", ALIGNMENT + 4, 4),
        Buffer("small", "f32", 8, 4),
        Buffer("next", "f32", ["*", "tokens", 10], 7),
        Buffer("last", "u8", 1, 9),
        Buffer("private", "u8", 65, 4, per_thread=True),
        Buffer("other", "u8", 1, 9, per_thread=True),
    )
    arena = plan_arena(replace(make_plan(), buffers=buffers), LIMITS)
    assert arena.sizes == {"large": ALIGNMENT + 4, "small": 8, "next": 80, "last": 1, "private": 65, "other": 1}
    places = {"large": 0, "small": 0, "next": 2, "last": 3}
    assert {name: arena.offsets[name] for name in places} == {name: n * ALIGNMENT for name, n in places.items()}
    assert (arena.arena_bytes, arena.per_thread_bytes) == (4 * ALIGNMENT, 128 + 64)


def test_a_guard_above_the_limits_allows_no_more_than_they() -> None:
    call = replace(make_plan().forward[0], guard=(Range("tokens", 0, 4), Range("rows", 1, 1 << 40)))
    assert guarded_limits(call, LIMITS) == LIMITS | {"tokens": 4}
    assert guarded_limits(replace(call, guard=(Range("tokens", 5, 1 << 40),)), LIMITS) == LIMITS


@pytest.mark.parametrize("logits", [Logits("y", 99, 101), Logits("y", 101, 100), Logits("nothing", 99, 100)])
def test_logits_must_fit_their_buffer_and_its_rows(logits: Logits) -> None:
    with pytest.raises(EngineFormatError, match="logits"):
        check_bounds(replace(make_plan(), logits=logits), LIMITS, WEIGHTS, "plan")


_CALL = ["entry_points", "forward", "instructions", 0]


def changed(path: list[Any], value: Any) -> bytes:
    """The plan's bytes with another value at `path`."""
    document = msgpack.unpackb(encode_plan(make_plan()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return bytes(msgpack.packb(document))


def test_two_state_groups_of_one_name_are_refused() -> None:
    groups = msgpack.unpackb(encode_plan(make_plan()))["state_groups"]
    with pytest.raises(EngineFormatError, match=r"state_groups: two entries have the same name"):
        decode_plan(changed(["state_groups"], groups * 2), "plan")


def test_a_plan_too_large_is_not_read() -> None:
    with pytest.raises(EngineFormatError, match=f"at most {LARGEST_PLAN_BYTES}"):
        decode_plan(bytes(LARGEST_PLAN_BYTES + 1), "plan")
    with pytest.raises(EngineFormatError, match=f"instructions: wanted a list of at most {MOST_CALLS} items"):
        decode_plan(changed(_CALL[:-1], [None] * (MOST_CALLS + 1)), "plan")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["state_groups", 0, "window"], 5, "from 0 to 0"),
        (["state_groups", 0, "dtype"], "f99", "f99"),
        (["state_groups", 0, "layers"], 0, "from 1"),
        (["state_groups", 0, "moon"], 0, "unknown field 'moon'"),
        (["prefix_key", "threshold"], -1, "from 0"),
        (["prefix_key", "exact"], 1, "true or false"),
        (["buffers", 0, "per_thread"], 1, "true or false"),
        (["buffers", 0, "slot"], -1, "from 0"),
        (["buffers", 0, "moon"], 1, "unknown field 'moon'"),
        (["world_size"], 0, "from 1"),
        ([*_CALL, "moon"], 0, "unknown field 'moon'"),
        ([*_CALL, "region"], -1, "from 0"),
        ([*_CALL, "guard"], [["moons", 0, 1]], "low, high"),
        ([*_CALL, "guard"], [["tokens", True, 1]], "low, high"),
        ([*_CALL, "guard"], [["tokens", 0, -1]], "low, high"),
        ([*_CALL, "guard"], [["tokens", 0, 1]] * 9, "at most 8"),
        ([*_CALL, "operands", "x", "kind"], "moon", "buffer, weight, input, state"),
        ([*_CALL, "operands", "x", "moon"], 0, "unknown field 'moon'"),
        ([*_CALL, "attributes", "n"], 1 << 60, "number, text or boolean"),
        ([*_CALL, "attributes", "n"], None, "number, text or boolean"),
        (["entry_points", "forward", "outputs", "hidden"], {}, "unknown field 'hidden'"),
        (["entry_points", "forward", "outputs", "logits", "columns"], 0, "from 1"),
    ],
)
def test_fields_beyond_their_limits_are_refused_by_name(path: list[Any], value: Any, reason: str) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        decode_plan(changed(path, value), "plan")
