"""Scratch memory of launches: one buffer for each name, as large as the hungriest launch needs it."""

from __future__ import annotations

from ...engines.expressions import Expression
from ...engines.plan import Buffer, Operand, Range
from ...plugins.launches import Launch, Scratch


class Scratchpad:
    """Launches follow one another, so those of all layers use the same scratch."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, bool], list[Expression]] = {}

    def operand(self, parameter: str, launch: Launch) -> Operand:
        """The memory of a launch's scratch parameter."""
        scratch: Scratch = launch.scratch[parameter]
        sizes = self._sizes.setdefault((parameter, scratch.zeroed), [])
        size = bounded(scratch.bytes, launch.guard)
        if size not in sizes:
            sizes.append(size)
        return Operand("buffer", _name(parameter, scratch.zeroed), 0, scratch.bytes, "rw")

    def buffers(self) -> list[Buffer]:
        """All that launches asked for."""
        return [
            Buffer(_name(name, zeroed), "i32" if zeroed else "f32", widest(sizes), 0, zeroed=zeroed)
            for (name, zeroed), sizes in self._sizes.items()
        ]


def bounded(expression: Expression, guard: tuple[Range, ...]) -> Expression:
    """`expression` with each variable at most what the guard allows."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        highs = [part.high for part in guard if part.variable == expression]
        return ["min", expression, min(highs)] if highs and min(highs) < 1 << 40 else expression
    operator, left, right = expression
    return [operator, bounded(left, guard), bounded(right, guard)]


def widest(sizes: list[Expression]) -> Expression:
    """The largest of several sizes, nested as little as possible."""
    if len(sizes) == 1:
        return sizes[0]
    middle = len(sizes) // 2
    return ["max", widest(sizes[:middle]), widest(sizes[middle:])]


def _name(parameter: str, zeroed: bool) -> str:
    return f"scratch.{parameter}{'.zeroed' if zeroed else ''}"
