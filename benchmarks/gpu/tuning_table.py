"""plugins/*/tuning.json, written as by hand: a line an entry, keys in an order that does not depend on chance."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from enginery.plugins.attention.cuda import Split, Tiles
from enginery.plugins.linear.cuda import Tile

from ..machine import ROOT

LINEAR = ROOT / "plugins" / "linear" / "tuning.json"
ATTENTION = ROOT / "plugins" / "attention" / "tuning.json"
Table = dict[str, list[dict[str, Any]]]
# In this order.
_WORDS = (
    *("bf16", "fp8", "int8", "i8", "invariant"),
    *("decode", "128B", "256B", "512B", "few", "some", "many"),
    *("prefill", "whole", "part", "wide-whole", "wide-part", "attend_any", "narrow", "wide", "splits"),
)


def read(path: Path) -> Table:
    """As it is."""
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


def write(path: Path, table: Table) -> str:
    """What the file holds then; it is whole at any time."""
    text, beside = render(table), path.with_suffix(".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return text


def as_entry(item: Tile | Tiles | Split) -> dict[str, Any]:
    """What a line says: all but what is usual."""
    usual = {field.name: field.default for field in fields(item)}
    return {name: value for name, value in asdict(item).items() if name == "most" or value != usual[name]}


def render(table: Table) -> str:
    """The file."""
    entries = []
    for key in sorted(table, key=_order):
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table[key])
        entries.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _order(key: str) -> tuple[Any, ...]:
    """By words, architecture and shape; the general before the special."""
    return tuple(map(_place, key.split("/")))


def _place(part: str) -> tuple[Any, ...]:
    if part in _WORDS:
        return 0, _WORDS.index(part)
    if part.startswith("sm"):
        return 1, int(part.removeprefix("sm"))
    return 2, *map(int, part.split("x"))
