"""What was measured, run by run, in one file that is replaced at once: who is stopped goes on where he was."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..roofs import Limits


@dataclass(frozen=True)
class Run:
    """One engine's turn at one group of cells.

    values    by cell; failures: why a cell has none
    before, after  the machine's limits, probed right before and right after
    others    share of the processors that was busy with something else meanwhile
    """

    engine: str
    version: str
    group: str
    round: int
    values: dict[str, float]
    before: Limits
    after: Limits
    others: float
    failures: dict[str, str] = field(default_factory=dict)
    when: str = ""

    @property
    def limits(self) -> Limits:
        """A limit is what the machine can do at most: a neighbour who slows one probe down must not flatter anybody."""
        return {name: max(self.before[name], self.after[name]) for name in self.before}

    def unquiet(self, share: float, drift: float) -> str:
        """Why the run does not count as quiet; nothing where it does."""
        if self.others > share:
            return f"others used {self.others:.0%} of the processors"
        for name, limit in self.limits.items():
            if min(self.before[name], self.after[name]) < (1 - drift) * limit:
                return f"{name} was {self.before[name]:g} before and {self.after[name]:g} after"
        return ""


class Results:
    """The runs of one model and one class of precision."""

    def __init__(self, path: Path) -> None:
        self.path = path
        document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.runs = [Run(**run) for run in document.get("runs", [])]
        self.missing: dict[str, str] = document.get("missing", {})
        self.header: dict[str, Any] = document.get("header", {})

    def add(self, run: Run) -> None:
        """Keeps the run in the place of an earlier one at the same turn."""
        self.runs = [other for other in self.runs if _turn(other) != _turn(run)] + [run]
        self.write()

    def find(self, engine: str, version: str, group: str, number: int) -> Run | None:
        """What this version of an engine did in its turn."""
        for run in self.runs:
            if _turn(run) == (engine, group, number) and run.version == version:
                return run
        return None

    def values(self, engine: str, cell: str) -> list[float]:
        """One of each round that has one."""
        return [run.values[cell] for run in self.runs if run.engine == engine and cell in run.values]

    def median(self, engine: str, cell: str) -> float | None:
        """Over the rounds."""
        values = self.values(engine, cell)
        return statistics.median(values) if values else None

    def failure(self, engine: str, cell: str) -> str | None:
        """Why a cell has no value."""
        for run in reversed(self.runs):
            if run.engine == engine and cell in run.failures:
                return run.failures[cell]
        return None

    def engines(self) -> list[str]:
        """In the order in which they ran first."""
        return list(dict.fromkeys(run.engine for run in sorted(self.runs, key=lambda run: run.round)))

    def write(self) -> None:
        """Beside, then renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {"header": self.header, "missing": self.missing, "runs": [asdict(run) for run in self.runs]}
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(beside, self.path)


def _turn(run: Run) -> tuple[str, str, int]:
    return run.engine, run.group, run.round
