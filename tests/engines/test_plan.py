"""Plans: what is written is read, what is damaged is refused, what reaches outside is refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.expressions import VARIABLES, check_expression, evaluate
from enginery.engines.plan import (
    Buffer,
    Call,
    Collective,
    Draws,
    KernelImage,
    Launch,
    Logits,
    Operand,
    Plan,
    PrefixKey,
    Range,
    StateGroup,
    Value,
    check_bounds,
    plan_arena,
)
from enginery.engines.plan_format import decode_plan, encode_plan
from hypothesis import given
from hypothesis import strategies as st

LIMITS = {"tokens": 8, "rows": 2, "sequences": 2}
WEIGHTS = {"w": 100}


def make_plan(**operands: Operand) -> Plan:
    default = {
        "x": Operand("buffer", "x", 0, ["*", "tokens", 256], "r"),
        "weight": Operand("weight", "w", 0, 100, "r"),
        "ids": Operand("input", "token_ids"),
        "state": Operand("state", "full", 0, 0, "rw", 1),
    }
    call = Call(
        "linear", 0, 3, default | operands, {"n": 4, "softcap": 0.5, "domain": "tokens"}, (Range("tokens", 0, 4),)
    )
    return Plan(
        rank=0,
        world_size=1,
        step_inputs=("token_ids",),
        state_groups=(StateGroup("full", "full", 0, 2, 32, 4096, 2, 8, "bf16"),),
        buffers=(
            Buffer("x", "f32", ["*", "tokens", 256], 0),
            Buffer("y", "f32", ["*", "rows", 400], 0),
            Buffer("p", "u8", 100, 1, per_thread=True),
        ),
        forward=(call,),
        logits=Logits("y", 99, 100),
        prefix_key=PrefixKey(48, True),
    )


def test_what_is_written_is_read() -> None:
    plan = make_plan()
    assert decode_plan(encode_plan(plan), "plan") == plan
    check_bounds(plan, LIMITS, WEIGHTS, "plan")


def test_buffers_of_one_slot_share_bytes() -> None:
    arena = plan_arena(make_plan(), LIMITS)
    assert arena.offsets["x"] == arena.offsets["y"] == 0
    assert (arena.arena_bytes, arena.per_thread_bytes) == (2048, 128)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ({"x": Operand("buffer", "x", 0, ["*", "tokens", 1000], "r")}, "reaches byte 4000"),
        ({"x": Operand("buffer", "x", 2048, 1, "r")}, "reaches byte 2049"),
        ({"x": Operand("buffer", "nothing", 0, 1, "r")}, "does not exist"),
        ({"weight": Operand("weight", "w", 1, 100, "r")}, "reaches byte 101"),
        ({"ids": Operand("input", "rows")}, "not declared"),
        ({"state": Operand("state", "full", 0, 0, "rw", 2)}, "layer 2"),
        ({"state": Operand("state", "window", 0, 0, "rw", 0)}, "does not exist"),
    ],
)
def test_operands_outside_of_what_they_name_are_refused(operands: dict[str, Operand], reason: str) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        check_bounds(make_plan(**operands), LIMITS, WEIGHTS, "plan")


def test_a_guard_bounds_what_its_call_touches() -> None:
    plan = make_plan(p=Operand("buffer", "p", 0, ["*", "tokens", 25], "w"))
    check_bounds(plan, LIMITS, WEIGHTS, "plan")
    unguarded = replace(plan, forward=(replace(plan.forward[0], guard=()),))
    with pytest.raises(EngineFormatError, match="reaches byte 200"):
        check_bounds(unguarded, LIMITS, WEIGHTS, "plan")


def test_logits_must_fit_their_buffer() -> None:
    with pytest.raises(EngineFormatError, match="logits"):
        check_bounds(replace(make_plan(), logits=Logits("y", 99, 101)), LIMITS, WEIGHTS, "plan")


def with_launch() -> Plan:
    """The plan, and a kernel on a GPU that it launches."""
    kernel = KernelImage("k", "k.cubin", "k", "norm", 90, 4, 0, 32, 0, "", ("pointer", "i32"), hidden=2)
    arguments = {"x": Operand("buffer", "x", 0, ["*", "tokens", 256], "rw"), "count": Value("i32", "tokens")}
    launch = Launch("k", 1, ("tokens", 1, ["ceil_div", "decodes", 4]), arguments, (Range("tokens", 1, 4),))
    plan = make_plan()
    return replace(plan, forward=(*plan.forward, launch), kernels=(kernel,), tile_tokens=64)


def test_launches_are_read_as_written() -> None:
    assert decode_plan(encode_plan(with_launch()), "plan") == with_launch()
    check_bounds(with_launch(), LIMITS, WEIGHTS, "plan")
    unguarded = replace(with_launch().forward[1], guard=())
    check_bounds(replace(with_launch(), forward=(unguarded,)), LIMITS, WEIGHTS, "plan")
    reaching = replace(unguarded, arguments={"x": Operand("buffer", "x", 1, ["*", "tokens", 256], "rw")})
    with pytest.raises(EngineFormatError, match=r"instruction 0 \(k\), operand x: reaches byte 2049"):
        check_bounds(replace(with_launch(), forward=(reaching,)), LIMITS, WEIGHTS, "plan")


def with_draws(**changes: Any) -> Plan:
    """The plan, and a kernel that draws tokens into buffers of their own. changes: of Draws."""
    plan = with_launch()
    names = ("token", "logprob", "rank", "top_tokens", "top_logprobs")
    sizes = {name: ["*", "rows", 4 if index < 3 else 80] for index, name in enumerate(names)}
    buffers = tuple(Buffer(name, "i32", size, 9 + i, kept=i == 0) for i, (name, size) in enumerate(sizes.items()))
    arguments = {"token": Operand("buffer", "token", 0, ["*", "rows", 4], "w"), "count": Value("i32", "listed")}
    guard = (Range("drawn", 0, 0), Range("edited", 1, 1 << 40))
    launch = Launch("k", 2, (["max", "edits", "ranked"], 1, 1), arguments, guard)
    draws = replace(Draws(*names, 20, 64), **changes)
    return replace(plan, buffers=(*plan.buffers, *buffers), sample=(launch,), draws=draws)


def test_what_draws_is_read_as_written() -> None:
    assert decode_plan(encode_plan(with_draws()), "plan") == with_draws()
    limits = LIMITS | dict.fromkeys(("drawn", "edited", "ranked", "listed"), 2) | {"edits": 9}
    check_bounds(with_draws(), limits, WEIGHTS, "plan")
    assert [launch.region for launch in with_draws().instructions] == [3, 1, 2]
    reaching = replace(with_draws().sample[0], arguments={"token": Operand("buffer", "token", 4, ["*", "rows", 4])})
    with pytest.raises(EngineFormatError, match=r"instruction 2 \(k\), operand token: reaches byte 12"):
        check_bounds(replace(with_draws(), sample=(reaching,)), limits, WEIGHTS, "plan")


@pytest.mark.parametrize(
    ("changes", "buffer"),
    [
        *(({name: "nothing"}, "nothing") for name in ("token", "logprob", "rank", "top_tokens", "top_logprobs")),
        ({"top": 21}, "top_tokens"),
        ({"top_logprobs": "rank"}, "rank"),
    ],
)
def test_what_is_drawn_must_fit_its_buffers(changes: dict[str, Any], buffer: str) -> None:
    limits = LIMITS | dict.fromkeys(("drawn", "edited", "ranked", "listed", "edits"), 2)
    with pytest.raises(EngineFormatError, match=f"what is drawn does not fit the buffer '{buffer}'"):
        check_bounds(with_draws(**changes), limits, WEIGHTS, "plan")


def test_what_peers_read_is_a_buffer() -> None:
    launch = with_launch().forward[1]
    assert isinstance(launch, Launch)

    def peers(name: str, offset: int) -> Plan:
        table = Operand("peers", name, offset, ["*", "tokens", 256], "r")
        return replace(with_launch(), forward=(replace(launch, arguments=launch.arguments | {"x": table}),))

    assert decode_plan(encode_plan(peers("x", 0)), "plan") == peers("x", 0)
    check_bounds(peers("x", 1024), LIMITS, WEIGHTS, "plan")
    with pytest.raises(EngineFormatError, match=r"operand x: reaches byte 2049 of peers 'x', which has 2048"):
        check_bounds(peers("x", 1025), LIMITS, WEIGHTS, "plan")
    with pytest.raises(EngineFormatError, match=r"peers 'w' does not exist"):
        check_bounds(peers("w", 0), LIMITS, WEIGHTS, "plan")


def with_collective() -> Plan:
    """The plan, and a launch that a library may do: the sum of every rank's x into y."""
    arguments: dict[str, Operand | Value] = {
        "parts": Operand("peers", "x", 0, ["*", "rows", 256], "r"),
        "sum": Operand("buffer", "y", 0, ["*", "rows", 256], "w"),
    }
    launch = Launch("r", 4, (1, 1, 1), arguments, collective=Collective("all_reduce", "parts", "sum", "bf16"))
    kernel = KernelImage("r", "r.cubin", "r", "collective", 90, 4, 0, 32, 0, "", ("pointer", "pointer"))
    return replace(make_plan(), forward=(launch,), kernels=(kernel,))


def test_what_a_library_may_do_is_read_as_written() -> None:
    plan = with_collective()
    assert decode_plan(encode_plan(plan), "plan") == plan
    check_bounds(plan, LIMITS, WEIGHTS, "plan")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["collective", "op"], "all_to_all", "wanted one of all_reduce"),
        (["collective", "dtype"], "f32", "wanted one of bf16"),
        (["collective", "part"], "nothing", "argument 'nothing' is no part of every rank's that is read"),
        (["collective", "part"], "sum", "argument 'sum' is no part of every rank's that is read"),
        (["collective", "sum"], "parts", "argument 'parts' is no buffer that is written"),
        (["collective", "sum"], 7, "text"),
        (["collective", "more"], 1, "unknown field 'more'"),
        (["collective"], [], "a map"),
        (["arguments", "parts", "access"], "rw", "argument 'parts' is no part"),
        (["arguments", "sum", "access"], "r", "argument 'sum' is no buffer that is written"),
        (["arguments", "sum", "extent"], ["*", "rows", 128], "the sum is not as large as a part"),
    ],
)
def test_what_no_library_could_do_is_refused(path: list[Any], value: Any, reason: str) -> None:
    document = msgpack.unpackb(encode_plan(with_collective()))
    place = document["entry_points"]["forward"]["instructions"][0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(EngineFormatError, match=reason):
        decode_plan(msgpack.packb(document), "plan")


def test_calls_have_no_peers() -> None:
    plan = make_plan(x=Operand("peers", "x", 0, 1, "r"))
    with pytest.raises(EngineFormatError, match=r"operands.x.kind.*'peers'"):
        decode_plan(encode_plan(plan), "plan")


def _document() -> dict[str, Any]:
    document: dict[str, Any] = msgpack.unpackb(encode_plan(with_draws()))
    return document


def _set(path: list[Any], value: Any) -> dict[str, Any]:
    document = _document()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


_CALL = ["entry_points", "forward", "instructions", 0]
_LAUNCH = ["entry_points", "forward", "instructions", 1]
_SAMPLE = ["entry_points", "sample"]
_DRAWS = [*_SAMPLE, "outputs", "draws"]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["version"], 1, "newer than 0"),
        (["version"], True, "integer"),
        (["surprise"], 1, "unknown field 'surprise'"),
        (["rank"], 1, "from 0 to 0"),
        (["step_inputs", 0], "moon_phase", "moon_phase"),
        (["buffers", 0, "bytes"], ["-", "tokens", 1], "expression"),
        (["buffers", 0, "bytes"], "moons", "expression"),
        (["buffers", 0, "bytes"], ["ceil_div", "tokens", 0], "positive"),
        (["buffers", 0, "bytes"], -1, "expression"),
        (["buffers", 0, "bytes"], 1 << 60, "expression"),
        (["buffers", 0, "dtype"], "f99", "f99"),
        (["buffers", 1, "name"], "x", "same name"),
        (["state_groups", 0, "kind"], "recurrent", "full, window"),
        (["state_groups", 0, "block_size"], 0, "from 16"),
        ([*_CALL, "kind"], "jump", "call, launch"),
        ([*_CALL, "kind"], "launch", "unknown field"),
        ([*_LAUNCH, "kernel"], "nobody", "'nobody' is not among the plan's kernels"),
        ([*_LAUNCH, "grid"], [1, 1], "three expressions"),
        ([*_LAUNCH, "grid", 0], "moons", "expression"),
        ([*_LAUNCH, "arguments", "count"], {"kind": "value", "dtype": "i64", "value": 1}, "i32, fp32"),
        ([*_LAUNCH, "arguments", "count"], {"kind": "value", "dtype": "fp32", "value": 1.0}, r"takes \(pointer, i32\)"),
        ([*_LAUNCH, "arguments", "count"], {"kind": "value", "dtype": "fp32", "value": 1}, "a number with a point"),
        (
            [*_LAUNCH, "arguments", "more"],
            {"kind": "value", "dtype": "i32", "value": 1},
            r"gives \(pointer, i32, i32\)",
        ),
        (["kernels", 0, "num_warps"], 33, "from 1 to 32"),
        (["kernels", 0, "parameters"], ["pointer"], r"takes \(pointer\)"),
        (["kernels", 0, "parameters"], ["f64"], "pointer, i32, fp32"),
        ([*_CALL, "guard"], [["tokens", 0]], "low, high"),
        ([*_CALL, "operands", "x", "access"], "x", "r, w, rw"),
        ([*_CALL, "operands", "x", "offset"], -1, "from 0"),
        ([*_CALL, "attributes", "n"], [1], "number, text or boolean"),
        (["entry_points", "draft"], {}, "draft"),
        (_SAMPLE, {}, "outputs"),
        ([*_SAMPLE, "guard"], [], "unknown field 'guard'"),
        ([*_SAMPLE, "outputs", "logits"], {}, "unknown field 'logits'"),
        ([*_SAMPLE, "instructions", 0, "kind"], "call", "wanted one of launch"),
        ([*_SAMPLE, "instructions", 0, "kernel"], "nobody", "instruction 2: kernel 'nobody'"),
        ([*_SAMPLE, "instructions", 0, "guard"], [["dreamed", 0, 1]], "low, high"),
        ([*_DRAWS, "token"], 3, "token"),
        ([*_DRAWS, "top"], 0, "from 1 to 1024"),
        ([*_DRAWS, "top"], 1 << 20, "from 1 to 1024"),
        ([*_DRAWS, "edit_slots"], 0, "from 1 to 65536"),
        ([*_DRAWS, "edit_slots"], 1 << 40, "from 1 to 65536"),
        ([*_DRAWS, "bottom"], 1, "unknown field 'bottom'"),
        (["buffers", 3, "kept"], 1, "kept"),
        (["entry_points"], 3, "a map"),
    ],
)
def test_damaged_plans_are_refused_by_name(path: list[Any], value: Any, reason: str) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        decode_plan(msgpack.packb(_set(path, value)), "plan")


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(EngineFormatError):
        decode_plan(data, "plan")


@given(st.data())
def test_truncated_and_flipped_plans_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encode_plan(with_draws()))
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(EngineFormatError):
        check_bounds(decode_plan(bytes(whole[:end]), "plan"), dict.fromkeys(VARIABLES, 2), WEIGHTS, "plan")


_leaf = st.one_of(st.integers(0, 100), st.sampled_from(["tokens", "rows", "sequences"]))
_expressions = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "*", "min", "max"]), inner, inner).map(list),
        st.tuples(st.sampled_from(["ceil_div", "round_up"]), inner, st.integers(1, 64)).map(list),
    ),
    max_leaves=8,
)


@given(_expressions, st.integers(0, 50), st.integers(0, 50))
def test_expressions_never_fall(expression: Any, tokens: int, more: int) -> None:
    checked = check_expression(expression, "here")
    small = {"tokens": tokens, "rows": 3, "sequences": 2}
    assert evaluate(checked, small) <= evaluate(checked, small | {"tokens": tokens + more})
