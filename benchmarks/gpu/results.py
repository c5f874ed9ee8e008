"""Results as they come: every cell is written at once, so that a run that is killed leaves what it has measured."""

from __future__ import annotations

import json
import os
import subprocess
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..machine import describe

FILE = "results.json"


@dataclass(frozen=True)
class Cell:
    """One measurement. ratio: what is to be compared with `must` (None: told, not judged) and `goal`; more is better.

    value, against   in `unit`: ours, and the limit or the rival
    """

    part: str
    name: str
    value: float
    unit: str
    against: float | None = None
    rival: str = ""
    ratio: float | None = None
    must: float | None = None
    goal: float | None = None

    @property
    def verdict(self) -> str:
        """pass, FAIL, or nothing where nothing must be reached."""
        if self.must is None:
            return ""
        return "pass" if self.ratio is not None and self.ratio >= self.must else "FAIL"


class Results:
    """Those of a directory: parts that are run again replace what they had found."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        self.document: dict[str, Any] = {"machine": {}, "limits": {}, "cells": [], "notes": {}, "errors": {}}
        if self.path.is_file():
            self.document |= json.loads(self.path.read_text())

    @property
    def cells(self) -> list[Cell]:
        """All, in the order of their parts."""
        return [Cell(**cell) for cell in self.document["cells"]]

    def begin(self, part: str) -> None:
        """Forgets what an earlier run of this part has found."""
        self.document["cells"] = [cell for cell in self.document["cells"] if cell["part"] != part]
        self.document["errors"].pop(part, None)
        self.document["machine"] = describe() | describe_gpu()
        self.write()

    def add(self, cell: Cell) -> None:
        """Keeps the cell, and prints it."""
        self.document["cells"].append(asdict(cell))
        self.write()
        print(line(cell), flush=True)

    def note(self, part: str, **values: Any) -> None:
        """Keeps what is no cell."""
        self.document["notes"][part] = self.document["notes"].get(part, {}) | values
        self.write()

    @contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """One failure must not hide the rest: it is kept, printed, and the part goes on."""
        try:
            yield
        except Exception as error:
            text = f"{what}: {type(error).__name__}: {error}"
            print(f"{part}: {text}\n{traceback.format_exc()}", flush=True)
            self.document["errors"].setdefault(part, []).append(text[:2000])
            self.write()

    def write(self) -> None:
        """Beside, then renamed."""
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.document, indent=1, default=str) + "\n")
        os.replace(beside, self.path)

    def table(self) -> str:
        """One line a cell, and what went wrong."""
        machine = self.document["machine"]
        lines = [f"{machine.get('gpu')}, driver {machine.get('driver')}, commit {machine.get('commit')}"]
        lines += [f"{name} {value:.4g}" for name, value in self.document["limits"].items()]
        lines += ["", HEAD, *map(line, self.cells)]
        lines += [f"error in {part}: {text}" for part, texts in self.document["errors"].items() for text in texts]
        return "\n".join(lines) + "\n"

    def failed(self, parts: Collection[str]) -> bool:
        """Whether a cell of these parts that must reach something does not, or could not be measured."""
        wrong = {*self.document["errors"], *(cell.part for cell in self.cells if cell.verdict == "FAIL")}
        return not wrong.isdisjoint(parts)


HEAD = f"{'':64}{'measured':>12} {'unit':10}{'against':>12}  {'':24}{'ratio':>7}{'must':>7}{'goal':>7}"


def line(cell: Cell) -> str:
    """Of the table."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        f"{cell.part + ' ' + cell.name:64}{cell.value:12.5g} {cell.unit:10}{number(cell.against, '.5g'):>12}  "
        f"{cell.rival:24}{number(cell.ratio, '.3f'):>7}{number(cell.must, '.2f'):>7}{number(cell.goal, '.2f'):>7} "
        f"{cell.verdict}"
    )


def describe_gpu() -> dict[str, Any]:
    """GPU, driver and versions; what cannot be asked is left out."""
    asked = {"gpu": "name", "driver": "driver_version", "gpu_memory": "memory.total", "power_limit": "power.limit"}
    asked |= {"sm_clock": "clocks.sm", "memory_clock": "clocks.mem", "temperature": "temperature.gpu"}
    found: dict[str, Any] = {}
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        found = dict(zip(asked, map(str.strip, answer.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        found["gpu"] = f"unknown: {error}"
    for name in ("torch", "triton"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    if carried := os.environ.get("ENGINERY_COMMIT"):
        found["commit"] = carried
    return found
