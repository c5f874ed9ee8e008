"""Which buffers may share memory: those whose lives, counted in regions, do not meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...engines.plan import Buffer, Instruction


def assign_slots(buffers: list[Buffer], calls: Sequence[Instruction], kept: set[str]) -> list[Buffer]:
    """The buffers with slots, in as few bytes as a greedy choice finds; `kept` have theirs for themselves.

    A region runs without barriers inside, so a buffer lives from its first region to its last, both included.
    """
    lives: dict[str, tuple[int, int]] = {}
    for call in calls:
        for operand in call.operands.values():
            if operand.kind in ("buffer", "peers"):
                first, last = lives.get(operand.name, (call.region, call.region))
                lives[operand.name] = (min(first, call.region), max(last, call.region))
    end = max(call.region for call in calls)
    placed: list[list[tuple[int, int]]] = []
    kinds: list[object] = []
    result = []
    for buffer in sorted(buffers, key=lambda item: lives[item.name]):
        life = (0, end) if buffer.name in kept else lives[buffer.name]
        # Only buffers of one size share: the sizes depend on the step, and a slot is as large as its largest.
        kind = (str(buffer.bytes), buffer.per_thread)
        slot = next(
            (i for i, k in enumerate(kinds) if k == kind and all(b < life[0] or life[1] < a for a, b in placed[i])),
            None,
        )
        if slot is None:
            slot = len(placed)
            placed.append([])
            kinds.append(kind)
        placed[slot].append(life)
        result.append(replace(buffer, slot=slot))
    return result
