"""Plans of two GPUs that misstate what a library may do in place of a launch. Both ranks', or the first one's."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgpack

from .forge import PLAN, Attack, Attacks, Forge, Place, calls_of, put, remove

_OTHER_PLAN = PLAN.replace("rank0", "rank1")
_NOTHING: tuple[object, ...] = (None, 0, -1, True, "", "nothing", "all_to_all", "f32", [], {}, "x" * 5000)


def attacks(forge: Forge) -> Attacks:
    """What it says of its launch, and that launch's arguments."""
    chance, calls = random.Random(0), calls_of(forge.plan)
    chosen = [index for index, call in enumerate(calls) if "collective" in call]
    buffers = [buffer["name"] for buffer in forge.plan["buffers"]]
    sound = calls[chosen[0]]["collective"]
    for index in (chosen[0], chosen[-1]):
        at: Place = ("entry_points", "forward", "instructions", index)
        yield from _both(f"{index} has no collective", lambda plan, at=at: remove(plan, (*at, "collective")))
        for value in _NOTHING:
            yield from _set((*at, "collective"), value)
        for field in sound:
            yield from _both(
                f"{index} without {field}", lambda plan, at=at, f=field: remove(plan, (*at, "collective", f))
            )
            for value in (*_NOTHING, *calls[index]["arguments"]):
                yield from _set((*at, "collective", field), value)
        for name in (sound["part"], sound["sum"]):
            place, operand = (*at, "arguments", name), calls[index]["arguments"][name]
            for kind in ("buffer", "weight", "input", "state", "peers"):
                yield from _set((*place, "kind"), kind)
            for access in ("r", "w", "rw"):
                yield from _set((*place, "access"), access)
            for buffer in chance.sample(buffers, 4):
                yield from _set((*place, "name"), buffer)
            for extent in (0, 1, 2, 1 << 40, "tokens", ["*", "tokens", 1 << 30], ["*", "rows", 256]):
                yield from _set((*place, "extent"), extent)
            for offset in (1, 2, 16, 1 << 20, 1 << 47):
                yield from _set(place, operand | {"offset": offset})
    others = [index for index, call in enumerate(calls) if "collective" not in call]
    for index in chance.sample(others, 20):
        names = list(calls[index]["arguments"])
        claim = sound | {"part": chance.choice(names), "sum": chance.choice(names)}
        yield from _set(("entry_points", "forward", "instructions", index, "collective"), claim)
        yield from _set(("entry_points", "forward", "instructions", index, "collective"), sound)


def _set(at: Place, value: object) -> Attacks:
    shown = repr(value)[:40]
    yield from _both(f"{'.'.join(map(str, at))} = {shown}", lambda plan: put(plan, at, copy.deepcopy(value)))


def _both(name: str, edit: Any) -> Attacks:
    """Of both ranks alike, so that they agree; and of the first alone."""

    def edit_both(forge: Forge) -> None:
        forge.edit_plan(edit)
        plan = msgpack.unpackb(forge.files[_OTHER_PLAN])
        edit(plan)
        forge.write(_OTHER_PLAN, msgpack.packb(plan))

    yield Attack(name, edit_both)
    yield Attack(f"{name}, alone", lambda forge: forge.edit_plan(edit))
