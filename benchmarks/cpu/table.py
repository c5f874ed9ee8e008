"""The table: a row for each cell, with value, ratio to the best rival, and fraction of the roof."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .engines import CLASSES, ENGINES, OURS
from .results import Results, Run
from .scenarios import Cell, cells_of

# A run is quiet where others used at most this share of the processors, and no limit drifted by more than this.
QUIET, DRIFT = 0.05, 0.10


@dataclass(frozen=True)
class Row:
    """One cell of the table. values: medians by engine; roof: the median of those of our runs, or of all."""

    cell: Cell
    values: dict[str, float]
    roof: float | None
    fractions: dict[str, float]

    @property
    def best_rival(self) -> str | None:
        """The rival to be compared with."""
        rivals = {name: value for name, value in self.values.items() if name != OURS}
        if not rivals:
            return None
        return (max if self.cell.is_rate else min)(rivals, key=rivals.__getitem__)

    @property
    def ratio(self) -> float | None:
        """How many times better we are than the best rival."""
        if self.best_rival is None or OURS not in self.values:
            return None
        return self.cell.ratio(self.values[OURS], self.values[self.best_rival])

    @property
    def holds(self) -> bool | None:
        """Whether what must hold does; None where it cannot be said."""
        if self.ratio is None:
            return None
        enough = self.cell.roof_must is not None and self.fractions.get(OURS, 0.0) >= self.cell.roof_must
        return self.ratio >= self.cell.must or enough


def rows_of(results: Results, groups: list[str], shape: dict[str, Any], precision: str) -> list[Row]:
    """Of all cells that anybody has a value of. precision: whose roof holds for the class."""
    rows = []
    for cell in cells_of(groups):
        values = {name: value for name in results.engines() if (value := results.median(name, cell.name)) is not None}
        shares: dict[str, list[float]] = {}
        roofs: dict[str, list[float]] = {}
        for run in results.runs:
            roof = cell.roof(shape, precision, run.limits)
            if roof is not None and cell.name in run.values:
                shares.setdefault(run.engine, []).append(run.values[cell.name] / roof)
                roofs.setdefault(run.engine, []).append(roof)
        of_roof = roofs.get(OURS) or [roof for several in roofs.values() for roof in several]
        fractions = {name: statistics.median(several) for name, several in shares.items()}
        rows.append(Row(cell, values, statistics.median(of_roof) if of_roof else None, fractions))
    return rows


def write_table(results: Results, groups: list[str], shape: dict[str, Any], name: str, precision_class: str) -> str:
    """Markdown: the table, then how it came about."""
    rows = rows_of(results, groups, shape, CLASSES[precision_class])
    names = [engine.name for engine in ENGINES if engine.name in results.engines() and engine.name != OURS]
    head = ["", "unit", OURS, "ratio", "of roof", "holds", *names, "roof"]
    lines = [f"## {name}, {precision_class}", ""]
    lines += [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        if row.values:
            lines.append(_line(_texts(row, results, names)))
    lines += ["", *_notes(results, groups, precision_class)]
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> float:
    """Half of the range, as a share of the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def _texts(row: Row, results: Results, names: list[str]) -> list[str]:
    def text(engine: str) -> str:
        if engine not in row.values:
            return "failed" if results.failure(engine, row.cell.name) else ""
        plain = number(row.values[engine])
        return f"**{plain}**" if engine == row.best_rival else plain

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}×"
    share = f"{row.fractions[OURS]:.0%}" if OURS in row.fractions else ""
    holds = {None: "", True: "yes", False: "no"}[row.holds]
    roof = "" if row.roof is None else number(row.roof)
    return [row.cell.name, row.cell.unit, text(OURS), ratio, share, holds, *map(text, names), roof]


def _notes(results: Results, groups: list[str], precision_class: str) -> list[str]:
    header, runs = results.header, [run for run in results.runs if run.group in groups]
    rounds = max((run.round for run in runs), default=-1) + 1
    notes = [
        f"Medians of up to {rounds} rounds, all engines in turn; bold is the best rival, ratio what we are to it "
        "(more is better), roof what the machine could do by its limits probed right before and after our runs.",
        f"Machine: {header.get('machine', {}).get('cpu')}, {header.get('threads')} threads; enginery "
        f"{_versions(results, OURS)}; by {', '.join(f'`{command}`' for command in header.get('commands', []))}.",
        "Versions: "
        + ", ".join(f"{name} {_versions(results, name)}" for name in results.engines() if name != OURS)
        + ".",
        "Limits, over all runs: " + "; ".join(_range(name, runs) for name in _limit_names(runs)) + ".",
    ]
    if spreads := _spreads(results, groups):
        notes.append(f"Range of our single rounds, half of it as a share of the median: {spreads}.")
    loud = [(run, why) for run in runs if (why := run.unquiet(QUIET, DRIFT))]
    if loud:
        told = "; ".join(f"{run.engine} {run.group} round {run.round + 1}: {why}" for run, why in loud[:12])
        more = f"; and {len(loud) - 12} more" if len(loud) > 12 else ""
        notes.append(f"Not quiet: {len(loud)} of {len(runs)} runs ({told}{more}).")
    libraries = [engine.name for engine in ENGINES if engine.server == "library" and engine.name in results.engines()]
    if any(run.group == "server" for run in runs):
        notes += [f"{name} brings no server: its clients call its library, without HTTP." for name in libraries]
    notes += [f"{name}: {why}." for name, why in results.missing.items()]
    notes += [f"{name}, failed: {why}." for name, why in _failures(results, groups)]
    return [f"- {note}" for note in notes]


def _failures(results: Results, groups: list[str]) -> list[tuple[str, str]]:
    """Each reason once for each engine, with the cells that it cost."""
    told: dict[tuple[str, str], list[str]] = {}
    for engine in results.engines():
        for cell in cells_of(groups):
            if results.median(engine, cell.name) is None and (why := results.failure(engine, cell.name)):
                told.setdefault((engine, why), []).append(cell.name)
    return [(f"{engine} {', '.join(cells)}", why) for (engine, why), cells in told.items()]


def _spreads(results: Results, groups: list[str]) -> str:
    several = {cell.name: results.values(OURS, cell.name) for cell in cells_of(groups)}
    return ", ".join(f"{name} ±{spread(values):.0%}" for name, values in several.items() if len(values) > 1)


def _versions(results: Results, engine: str) -> str:
    return " and ".join(dict.fromkeys(run.version for run in results.runs if run.engine == engine))


def _limit_names(runs: list[Run]) -> list[str]:
    return [name for name in (runs[0].before if runs else {}) if name != "threads"]


def _range(name: str, runs: list[Run]) -> str:
    values = [probe[name] for run in runs for probe in (run.before, run.after)]
    return f"{name} {min(values):g} to {max(values):g}"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"
