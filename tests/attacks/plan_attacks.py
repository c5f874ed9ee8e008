"""Plans whose signature is right and whose content is not. Results may be wrong; memory must not be."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import msgpack

from .forge import PLAN, Attack, Attacks, Forge, Place, calls_of, places, put, remove, set_calls

INTEGERS = (0, 1, -1, 15, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 48) - 1, 1 << 48, 1 << 62, (1 << 64) - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e38, 1e308, 5e-324)
_OTHERS: tuple[object, ...] = (None, True, "", [], {}, "x" * (1 << 20), b"\xff\xfe", "tokens", ["+", 1, 1])


def edit_plan(name: str, edit: Callable[[dict[str, Any]], object]) -> Attack:
    """Rank 0's plan after `edit`."""
    return Attack(name, lambda forge: forge.edit_plan(edit))


def set_in_plan(at: Place, value: object) -> Attack:
    """Rank 0's plan with another value at a place."""
    shown = repr(value)
    return edit_plan(f"{'.'.join(map(str, at))} = {shown[:40]}", lambda plan: put(plan, at, copy.deepcopy(value)))


def _sample_calls(plan: dict[str, Any]) -> set[int]:
    """Two calls of each operator: the first, and the last."""
    calls = calls_of(plan)
    names = [call["op"] for call in calls]
    return {names.index(name) for name in names} | {len(names) - 1 - names[::-1].index(name) for name in names}


def _interesting(plan: dict[str, Any]) -> list[tuple[Place, object]]:
    """Places that are not the fifth copy of another."""
    sample = _sample_calls(plan)
    return [
        (at, value)
        for at, value in places(plan)
        if not (at[:3] == ("entry_points", "forward", "instructions") and len(at) > 3 and at[3] not in sample)
    ]


def numbers(forge: Forge) -> Attacks:
    """Every number of the plan as other numbers."""
    for at, value in _interesting(forge.plan):
        if isinstance(value, bool):
            yield set_in_plan(at, not value)
        elif isinstance(value, (int, float)):
            for other in INTEGERS if isinstance(value, int) else (*FLOATS, 0, 1 << 40):
                yield set_in_plan(at, other)
            if isinstance(value, int) and value > 1:
                for other in (value + 1, value - 1, value * 2, value // 2, value + 64):
                    yield set_in_plan(at, other)


def operands(forge: Forge) -> Attacks:
    """Operands that are others, missing or too many; and texts that are other texts of the plan."""
    plan = forge.plan
    chance = random.Random(0)
    buffers = [buffer["name"] for buffer in plan["buffers"]]
    everything = [operand for call in calls_of(plan) for operand in call["operands"].values()]
    for index in sorted(_sample_calls(plan)):
        call = calls_of(plan)[index]
        at: Place = ("entry_points", "forward", "instructions", index)
        for name, operand in call["operands"].items():
            place = (*at, "operands", name)
            yield edit_plan(f"call {index} {call['op']} without {name}", lambda plan, place=place: remove(plan, place))
            for other in chance.sample(everything, 6):
                yield set_in_plan(place, other)
            for kind in ("buffer", "weight", "input", "state", "peers"):
                yield set_in_plan((*place, "kind"), kind)
            if operand["kind"] == "buffer":
                for buffer in chance.sample(buffers, min(4, len(buffers))):
                    yield set_in_plan((*place, "name"), buffer)
            for change in ({"extent": 0}, {"offset": 2}, {"offset": 4}, {"offset": 64}, {"extent": ["*", "rows", 4]}):
                yield set_in_plan(place, operand | change)
        for name in ("x", "residual", "delta", "bias", "out_scale", "q_norm", "inv_freq_long", "table_scale", "\x00"):
            yield set_in_plan((*at, "operands", name), chance.choice(everything))
        for name in call["attributes"]:
            yield edit_plan(
                f"call {index} {call['op']} without attribute {name}",
                lambda plan, place=(*at, "attributes", name): remove(plan, place),
            )
        yield set_in_plan((*at, "attributes", "new"), 1)
        for domain in ("tokens", "rows"):
            yield set_in_plan((*at, "attributes", "domain"), domain)
        for other in ("linear", "rms_norm", "attention", "all_reduce", "all_gather", "gather_rows", "system"):
            yield set_in_plan((*at, "op"), other)


def structure(forge: Forge) -> Attacks:
    """Calls in another order, buffers of another size or in one place, groups of another shape."""
    plan, chance = forge.plan, random.Random(1)
    count = len(calls_of(plan))

    def calls(name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Attack:
        return edit_plan(name, lambda plan: set_calls(plan, change(calls_of(plan))))

    def in_one_region(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [call | {"region": 0} for call in calls]

    def in_own_regions(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [call | {"region": region} for region, call in enumerate(calls)]

    yield calls("no calls", lambda calls: [])
    yield calls("backwards", lambda calls: in_own_regions(calls[::-1]))
    yield calls("one region", in_one_region)
    yield calls("absurd regions", lambda calls: [call | {"region": 1 << 24} for call in calls])
    yield calls("many times", lambda calls: in_own_regions(calls * 40))
    yield calls("many times in one region", lambda calls: in_one_region(calls * 10))
    for _ in range(20):
        order = chance.sample(range(count), count)
        yield calls(f"shuffled {order[:4]}", lambda calls, order=order: in_own_regions([calls[i] for i in order]))
    for index in range(count):
        yield calls(f"without call {index}", lambda calls, i=index: calls[:i] + calls[i + 1 :])
    for index in chance.sample(range(count), min(count, 12)):
        yield calls(f"call {index} twice", lambda calls, i=index: [*calls[: i + 1], *calls[i:]])
        for low, high in ((0, 0), (2, 1), (1, 1), (0, 1 << 48), (1 << 48, 1 << 48), (1, 3)):
            for variable in ("tokens", "rows", "sequences"):
                guard = [[variable, low, high]]
                yield set_in_plan(("entry_points", "forward", "instructions", index, "guard"), guard)
    yield calls("every guard", lambda calls: [call | {"guard": [["tokens", 1, 1]] * 8} for call in calls])
    for index in range(len(plan["buffers"])):
        at = ("buffers", index)
        for size in (0, 1, 63, 64, "rows", ["*", "tokens", 4], ["min", "tokens", 1], ["*", "sequences", 1 << 24]):
            yield set_in_plan((*at, "bytes"), size)
        yield set_in_plan((*at, "per_thread"), True)
        for dtype in ("f32", "bf16", "i8", "u8", "i32"):
            yield set_in_plan((*at, "dtype"), dtype)
        yield edit_plan(f"buffer {index} gone", lambda plan, at=at: remove(plan, at))
    yield edit_plan("one slot for all", lambda plan: [buffer.update(slot=0) for buffer in plan["buffers"]])
    yield edit_plan("all per thread", lambda plan: [buffer.update(per_thread=True) for buffer in plan["buffers"]])
    yield edit_plan("no buffers", lambda plan: plan.update(buffers=[]))
    yield from _groups(plan)
    yield from _costly(plan)


def _groups(plan: dict[str, Any]) -> Attacks:
    def groups(name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Attack:
        return edit_plan(name, lambda plan: plan.update(state_groups=change(plan["state_groups"])))

    first = plan["state_groups"][0]
    yield groups("no groups", lambda groups: [])
    yield groups("groups turned round", lambda groups: groups[::-1])
    yield groups("one group twice", lambda groups: [*groups, groups[0]])
    for count in (20, 64, 5000):
        yield groups(
            f"{count} groups more", lambda groups, n=count: groups + [first | {"name": f"g{i}"} for i in range(n)]
        )
    tiny = {"name": "tiny", "block_bytes": 1, "layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 16}
    yield groups("a group of one-byte blocks", lambda groups: [*groups, first | tiny])
    for index, group in enumerate(plan["state_groups"]):
        at = ("state_groups", index)
        for window in (1, 2, 15, 16, 17, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 48):
            yield set_in_plan(at, group | {"kind": "window", "window": window})
        yield set_in_plan(at, group | {"kind": "full", "window": 0})
        for factor in (2, 4):
            halves = {"block_size": group["block_size"] // factor, "block_bytes": group["block_bytes"] // factor}
            yield set_in_plan(at, group | halves)
            yield set_in_plan(at, group | {"layers": group["layers"] * factor})
            yield set_in_plan(at, group | {"block_bytes": group["block_bytes"] // factor})
        for dtype in ("f32", "bf16", "i8"):
            yield set_in_plan((*at, "dtype"), dtype)
        for block_size in (16, 24, 48, 1024):
            yield set_in_plan((*at, "block_size"), block_size)
        yield set_in_plan((*at, "name"), "other")


def _costly(plan: dict[str, Any]) -> Attacks:
    """Sound plans that cost more than they may: work, memory, threads."""
    norm = next(call for call in calls_of(plan) if call["op"] == "rms_norm" and len(call["operands"]) >= 3)

    def wide_work(plan: dict[str, Any]) -> None:
        size = 262144 * 4 * 128
        plan["buffers"] += [
            {"name": f"wide{i}", "dtype": "f32", "bytes": size, "slot": 60000 + i, "per_thread": False} for i in (0, 1)
        ]
        wide = {
            name: {"kind": "buffer", "name": f"wide{i}", "offset": 0, "extent": size, "access": access, "layer": -1}
            for i, (name, access) in enumerate((("x", "r"), ("out", "w")))
        }
        call = norm | {
            "operands": wide,
            "attributes": {"hidden": 262144, "eps": 1e-5, "domain": "tokens"},
            "guard": [["tokens", 0, 128]],
            "region": 1 << 24,
        }
        set_calls(plan, calls_of(plan) + [call] * 40000)

    yield edit_plan("forty thousand wide norms", wide_work)
    calls = calls_of(plan)
    yield edit_plan("ten thousand calls", lambda plan: set_calls(plan, [calls[0]] * 10000 + calls))
    yield set_in_plan(("buffers", 0, "bytes"), 1 << 30)
    yield edit_plan("every buffer of half a gigabyte", lambda plan: [b.update(bytes=1 << 29) for b in plan["buffers"]])
    yield edit_plan(
        "threads' buffers of a gigabyte", lambda plan: plan["buffers"][0].update(bytes=1 << 29, per_thread=True)
    )


def _nested(depth: int, leaf: object) -> object:
    value = leaf
    for _ in range(depth):
        value = ["*", value, value]
    return value


def encodings(forge: Forge) -> Attacks:
    """What is no plan, or hardly."""
    for at, _ in _interesting(forge.plan):
        yield edit_plan(f"without {'.'.join(map(str, at))}", lambda plan, at=at: remove(plan, at))
    chance = random.Random(2)
    for at, _ in chance.sample(_interesting(forge.plan), 80):
        for value in (*_OTHERS, chance.choice(FLOATS)):
            yield set_in_plan(at, value)
    for depth in (15, 16, 17):
        for at in (("buffers", 0, "bytes"), ("entry_points", "forward", "instructions", 0, "operands")):
            nested = _nested(min(depth, 14), 1 << 48)
            for _ in range(depth - 14):
                nested = ["+", nested, "tokens"]
            if at[-1] == "bytes":
                yield set_in_plan(at, nested)
            else:
                for name in calls_of(forge.plan)[0]["operands"]:
                    yield set_in_plan((*at, name, "extent"), nested)
    documents = {
        "nothing": b"",
        "nil": b"\xc0",
        "deep lists": b"\x91" * (1 << 20),
        "deep maps": b"\x81\xa0" * (1 << 20),
        "empty maps": b"\xdd\x00\xf0\x00\x00" + b"\x80" * 0xF00000,
        "maps of one": b"\xdd\x00\x50\x00\x00" + b"\x81\xa0\x00" * 0x500000,
        "a long list that is not there": b"\xdd\xff\xff\xff\xff",
        "a long map that is not there": b"\xdf\xff\xff\xff\xff",
        "a long text that is not there": b"\xdb\xff\xff\xff\xff",
        "an extension": b"\xd4\x05\x00",
        "a date": b"\xd6\xff\x00\x00\x00\x00",
        "an empty extension": b"\xc7\x00\x05",
        "a map of numbers": b"\x81\x01\x02",
        "no UTF-8": b"\x81\xa1\xff\x01",
        "a surrogate": b"\x81\xa3\xed\xa0\x80\x01",
        "too much": b"\x00" * (17 << 20),
    }
    for name, data in documents.items():
        yield Attack(name, lambda forge, data=data: forge.write(PLAN, data))
    packed = msgpack.packb(forge.plan)
    again = msgpack.packb("buffers") + msgpack.packb([])
    yield Attack("a key twice", lambda forge: forge.write(PLAN, bytes([packed[0] + 1]) + packed[1:] + again))
    yield Attack("something after it", lambda forge: forge.write(PLAN, packed + b"\x00"))
