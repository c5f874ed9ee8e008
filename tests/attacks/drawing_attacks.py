"""Plans for a GPU whose launches draw tokens from the wrong memory, or into it. The null device runs what is loaded."""

from __future__ import annotations

import random
from typing import Any

from .forge import Attacks, Forge, Place
from .plan_attacks import FLOATS, INTEGERS, edit_plan, set_in_plan

_SAMPLE: Place = ("entry_points", "sample")
_DRAWS: Place = (*_SAMPLE, "outputs", "draws")
_BUFFERS = ("token", "logprob", "rank", "top_tokens", "top_logprobs")
_VARIABLES = ("rows", "drawn", "edited", "ranked", "listed", "edits")


def attacks(forge: Forge) -> Attacks:
    """Where the drawn lies, what draws it, what lives from step to step."""
    yield from _outputs(forge.plan)
    yield from _launches(forge.plan)
    yield from _arguments(forge.plan)
    yield from _kept(forge.plan)


def _outputs(plan: dict[str, Any]) -> Attacks:
    buffers = [buffer["name"] for buffer in plan["buffers"]]
    for name in _BUFFERS:
        for other in (
            *random.Random(name).sample(buffers, 6),
            plan["entry_points"]["forward"]["outputs"]["logits"]["buffer"],
        ):
            yield set_in_plan((*_DRAWS, name), other)
        for other in ("", "nothing", "model.norm.weight", 0, None):
            yield set_in_plan((*_DRAWS, name), other)
    for name in ("top", "edit_slots"):
        for number in (*INTEGERS, 2, 21, 64, 65, 1024, 1025):
            yield set_in_plan((*_DRAWS, name), number)
    yield edit_plan("nothing draws", lambda plan: plan["entry_points"].pop("sample"))
    yield set_in_plan(_SAMPLE, {})
    yield set_in_plan((*_SAMPLE, "outputs"), {})
    for inputs in ([], ["token_ids"], [*plan["step_inputs"], "edited_moons"]):
        yield set_in_plan(("step_inputs",), inputs)


def _launches(plan: dict[str, Any]) -> Attacks:
    launches = plan["entry_points"]["sample"]["instructions"]
    at: Place = (*_SAMPLE, "instructions")

    def renumbered(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first = launches[0]["region"]
        return [launch | {"region": first + index} for index, launch in enumerate(chosen)]

    yield set_in_plan(at, [])
    yield set_in_plan(at, renumbered(launches[::-1]))
    yield set_in_plan(at, launches[::-1])
    yield set_in_plan(at, renumbered(launches * 9))
    yield set_in_plan(at, renumbered(plan["entry_points"]["forward"]["instructions"]))
    call = {
        "kind": "call",
        "op": "linear",
        "version": 0,
        "region": 1 << 20,
        "guard": [],
        "operands": {},
        "attributes": {},
    }
    yield set_in_plan(at, [*launches, call])
    for index, launch in enumerate(launches):
        yield set_in_plan(at, renumbered(launches[:index] + launches[index + 1 :]))
        for variable in _VARIABLES:
            for low, high in ((0, 0), (1, 1 << 48), (2, 1)):
                yield set_in_plan((*at, index, "guard"), [[variable, low, high]])
        yield set_in_plan((*at, index, "guard"), [])
        yield set_in_plan((*at, index, "region"), 0)
        for axis in range(3):
            for size in (0, 1, "edits", "tokens", ["*", "rows", 1 << 40], 1 << 17, 1 << 31):
                yield set_in_plan((*at, index, "grid", axis), size)
        for kernel in random.Random(index).sample(plan["kernels"], 3):
            yield set_in_plan((*at, index, "kernel"), kernel["name"])
        yield set_in_plan((*at, index), launch | {"arguments": {}})


def _arguments(plan: dict[str, Any]) -> Attacks:
    chance = random.Random(3)
    places = [(*_SAMPLE, "instructions"), ("entry_points", "forward", "instructions")]
    for at in places:
        launches: Any = plan
        for key in at:
            launches = launches[key]
        for index, launch in enumerate(launches):
            if at == places[1] and "drawn" not in launch["arguments"]:
                continue
            for name, item in launch["arguments"].items():
                place = (*at, index, "arguments", name)
                if item["kind"] == "value":
                    for number in (*INTEGERS, *FLOATS):
                        yield set_in_plan((*place, "value"), number)
                    continue
                for kind in ("buffer", "weight", "input", "state", "peers"):
                    yield set_in_plan((*place, "kind"), kind)
                for buffer in chance.sample(plan["buffers"], 3):
                    yield set_in_plan((*place, "name"), buffer["name"])
                for change in (
                    {"extent": 0},
                    {"extent": 1 << 40},
                    {"offset": 16},
                    {"offset": 8},
                    {"access": "rw"},
                    {"layer": 7},
                ):
                    yield set_in_plan(place, item | change)


def _kept(plan: dict[str, Any]) -> Attacks:
    for index, buffer in enumerate(plan["buffers"]):
        if not buffer["name"].startswith("sample."):
            continue
        at: Place = ("buffers", index)
        yield set_in_plan((*at, "kept"), not buffer["kept"])
        yield set_in_plan((*at, "zeroed"), not buffer["zeroed"])
        yield set_in_plan((*at, "slot"), plan["buffers"][index - 1]["slot"])
        for size in (0, 1, 4, "rows", ["*", "rows", 1 << 36], 1 << 40, ["*", "edits", 4]):
            yield set_in_plan((*at, "bytes"), size)
    yield edit_plan("all kept", lambda plan: [buffer.update(kept=True) for buffer in plan["buffers"]])
    yield edit_plan("all kept in one place", lambda plan: [b.update(kept=True, slot=0) for b in plan["buffers"]])
    yield edit_plan("nothing kept", lambda plan: [buffer.update(kept=False) for buffer in plan["buffers"]])
