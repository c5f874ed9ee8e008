"""plugins/linear/tuning.json, written as by hand: a tile a line, keys in an order that does not depend on chance."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from enginery.plugins.linear.cuda import Tile

from ..machine import ROOT

PATH = ROOT / "plugins" / "linear" / "tuning.json"
Table = dict[str, list[dict[str, Any]]]
_DEFAULTS = {item.name: item.default for item in fields(Tile)}
_TYPES = ("bf16", "fp8", "int8")


def read(path: Path | None = None) -> Table:
    """As it is: the checkout's, or another."""
    table: Table = json.loads((path or PATH).read_text(encoding="utf-8"))
    return table


def as_entry(tile: Tile) -> dict[str, Any]:
    """What a line says: all but what is usual."""
    return {name: value for name, value in asdict(tile).items() if name == "most" or value != _DEFAULTS[name]}


def render(table: Table) -> str:
    """The file."""
    keys = sorted(table, key=_order)
    entries = []
    for key in keys:
        tiles = ",\n".join(f"    {json.dumps(tile)}" for tile in table[key])
        entries.append(f"  {json.dumps(key)}: [\n{tiles}\n  ]")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _order(key: str) -> tuple[Any, ...]:
    """Those of any count of rows first, then by type, architecture and shape; the general before the special."""
    parts = key.split("/")
    invariant = parts[0] == "invariant"
    kind, *rest = parts[1:] if invariant else parts
    arch = int(rest[0].removeprefix("sm")) if rest else 0
    shape = tuple(map(int, rest[1].split("x"))) if len(rest) > 1 else ()
    return invariant, _TYPES.index(kind) if kind in _TYPES else len(_TYPES), kind, arch, shape
