"""What is measured: cells, in groups. One turn of an engine measures all cells of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..roofs import Limits, decode_roof, prefill_roof, serve_roof

CLIENTS, CLIENT_INPUT, CLIENT_OUTPUT = 16, 256, 64
REQUESTS_PER_CLIENT = 3


@dataclass(frozen=True)
class Cell:
    """One number. Rates are better when more, all else when less.

    must, roof_must  the ratio to the best rival that is wanted, or instead this share of the roof
    """

    name: str
    kind: str
    unit: str = "tokens/s"
    batch: int = 1
    input: int = 0
    output: int = 1
    must: float = 1.3
    roof_must: float | None = 0.88

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit == "tokens/s"

    def roof(self, shape: dict[str, Any], precision: str, limits: Limits) -> float | None:
        """What the machine could do at most; None where no arithmetic says it."""
        if self.kind == "prefill":
            return prefill_roof(shape, precision, self.input, limits)
        if self.kind == "decode":
            return decode_roof(shape, precision, self.batch, self.input + self.output / 2, limits)
        if self.kind == "clients" and self.is_rate:
            return serve_roof(shape, precision, self.batch, self.input, self.output, limits)
        return None

    def ratio(self, value: float, other: float) -> float:
        """How many times better `value` is."""
        return value / other if self.is_rate else other / value


def _client(name: str, unit: str, must: float = 1.0) -> Cell:
    return Cell(f"{CLIENTS} clients, {name}", "clients", unit, CLIENTS, CLIENT_INPUT, CLIENT_OUTPUT, must, None)


GROUPS: dict[str, tuple[Cell, ...]] = {
    "core": (
        Cell("prefill 512", "prefill", input=512),
        Cell("prefill 2048", "prefill", input=2048),
        Cell("decode b1", "decode", batch=1, input=128, output=128),
        Cell("decode b8", "decode", batch=8, input=128, output=128),
        Cell("decode b32", "decode", batch=32, input=128, output=128),
        Cell("peak RSS", "rss", "MB", must=1.0, roof_must=None),
    ),
    "load": (
        Cell("first token, warm", "load", "s", must=1.0, roof_must=None),
        Cell("first token, cold", "load", "s", must=1.0, roof_must=None),
        Cell("whole process, warm", "load", "s", must=1.0, roof_must=None),
    ),
    "long": (
        Cell("decode b1 at 4k", "decode", batch=1, input=4096, output=128),
        Cell("decode b1 at 16k", "decode", batch=1, input=16384, output=64),
    ),
    "server": (
        _client("output", "tokens/s", 1.5),
        _client("TTFT p50", "s"),
        _client("TTFT p99", "s"),
        _client("ITL p50", "ms"),
        _client("ITL p99", "ms"),
    ),
}
DEFAULT_GROUPS = ("core", "load")


def cells_of(groups: list[str]) -> list[Cell]:
    """In the order of the groups."""
    return [cell for group in groups for cell in GROUPS[group]]
