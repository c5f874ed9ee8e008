"""Chooses the tiles of products for a model's shapes on this GPU, and writes them into plugins/linear/tuning.json.

Every range of rows that the table has for a type is searched by itself, in two rounds: what a tile is, then (of the two
best) how K is split, how tiles follow each other and how much is prefetched. Candidates that spill, that want more
shared memory than there is, that do not use the tensor cores of their type or that compute something else are left out.
What was measured is kept: a search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from enginery.engines.fields import LARGEST
from enginery.engines.plan import KernelImage, Range
from enginery.plugins.launches import Kernel, Launch
from enginery.plugins.linear import cuda
from enginery.plugins.linear.cuda import Linear, Tile

from tests.gpu.launcher import bind_launches, compiled, prepare, target
from tests.gpu.products import Product

from . import tuning_table
from .results import Results
from .roofs import Shape
from .timing import copies, graph_seconds

PART = "tune"
_LEAST_GAIN = 1.02
_AT_ONCE = 256
_BEFORE, _AFTER = "tuning.before.json", "tuning.json"
_TYPES = {"bf16": 2, "fp8": 1, "int8": 1}
# Sums in the registers of one thread, beside which there is room for all else.
_MOST_SUMS = 128
_SAME = {"bf16": 1e-2, "fp8": 3e-2, "int8": 1e-2}


@dataclass(frozen=True)
class RowRange:
    """A product for the numbers of rows of one tile. rows: those at which it is measured."""

    name: str
    linear: Linear
    tile: Tile
    first: int
    rows: tuple[int, ...]

    @property
    def key(self) -> str:
        """In the table."""
        padded = -(-self.linear.k // cuda.PADDING) * cuda.PADDING
        return f"{self.linear.dtype}/sm{target().arch}/{self.linear.weight_rows}x{padded}"

    def launch(self, tile: Tile) -> Launch:
        """As a plan would have it with this tile."""
        guard = Range(self.linear.domain, self.first, self.tile.most or LARGEST)
        return cuda._launch(self.linear, tile, guard, target().arch, target().num_sms)


def run(results: Results, shape: Shape, dtype: str, directory: Path, deadline_s: float) -> None:
    """Both rounds, as far as they come before the deadline; after each the table and a report of old against new."""
    results.begin(PART)
    begin_with(directory)
    search = Search(directory / f"tuning.measured.{dtype}.json", time.monotonic() + deadline_s)
    wanted = ranges(shape, dtype)
    for number, candidates in enumerate((search.first_round, search.second_round), 1):
        todo = {of: candidates(of) for of in wanted}
        kernels = {of.launch(tile).kernel: None for of in wanted for tile in todo[of]}
        print(f"{PART}: round {number}, {len(kernels)} kernels, {sum(map(len, todo.values()))} tiles", flush=True)
        compile_in_parts(list(kernels), search)
        for of in wanted:
            with results.attempt(PART, f"{of.name} up to {of.tile.most}"):
                search.measure(of, todo[of])
                if best := search.best(of):
                    print(report_line(of, *best), flush=True)
            torch.cuda.empty_cache()
        write(directory, {of: best for of in wanted if (best := search.best(of))})
    if search.is_over():
        print(f"{PART}: the time was over; another run goes on from here", flush=True)


def begin_with(directory: Path) -> None:
    """The table as it was before the search, also where an earlier run has changed it and was stopped."""
    before, after, now = directory / _BEFORE, directory / _AFTER, tuning_table.LINEAR.read_text()
    if not before.is_file() or not after.is_file() or after.read_text() != now:
        before.write_text(now)
    table = {key: tuple(Tile(**tile) for tile in tiles) for key, tiles in tuning_table.read(before).items()}
    cuda._table = lambda: table  # type: ignore[assignment]


def compile_in_parts(kernels: list[Kernel], search: Search) -> None:
    """All at once, or a stopped search would have waited for the compiler alone; until the deadline."""
    for first in range(0, len(kernels), _AT_ONCE):
        if not search.is_over():
            prepare(kernels[first : first + _AT_ONCE])


def ranges(shape: Shape, dtype: str) -> list[RowRange]:
    """Of the model's products as its plans have them, those first that most time is spent in."""
    heads, kv_heads, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    linears = {
        "gate_up": Linear(inner, hidden, dtype, activation="silu_gated", prologue="norm", eps=1e-5),
        "down": Linear(hidden, inner, dtype, residual=True, prologue="quantize"),
        "qkv": Linear((heads + 2 * kv_heads) * size, hidden, dtype, prologue="norm", eps=1e-5),
        "o": Linear(hidden, heads * size, dtype, residual=True, prologue="quantize"),
        "head": Linear(vocab, hidden, dtype, domain="rows", out_dtype="f32", prologue="norm", eps=1e-5),
    }
    found = []
    for name, linear in linears.items():
        first = 1
        for tile in cuda._tiles(linear, target().arch):
            if name != "head" or (tile.most or LARGEST) <= 256:
                found.append(RowRange(name, linear, tile, first, measured_rows(first, tile.most)))
            first = (tile.most or 0) + 1
    importance = (1, 64, None, 16, 128, 4, 512, 256)
    return sorted(found, key=lambda each: importance.index(each.tile.most) if each.tile.most in importance else 99)


def measured_rows(first: int, most: int | None) -> tuple[int, ...]:
    """Of a range: its end, and its middle where it is wide."""
    if most is None:
        return 2048, 8192
    return (most,) if most <= 16 else tuple(dict.fromkeys(((first + most) // 2, most)))


class Search:
    """What has been measured, by range and kernel: tiles that make the same kernel are one. None: not usable."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path, self._deadline = path, deadline
        self._known: dict[str, float | None] = json.loads(path.read_text()) if path.is_file() else {}

    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self._deadline

    def first_round(self, of: RowRange) -> list[Tile]:
        """The table's tile, and those of other shapes."""
        return [of.tile, *shapes_of(of.tile, of.linear.dtype)]

    def second_round(self, of: RowRange) -> list[Tile]:
        """Refinements of the two best of the first."""
        found = self._found(of, self.first_round(of))
        best = sorted(found, key=lambda tile: found[tile])[:2]
        return [refined for tile in best for refined in refinements(tile)]

    def best(self, of: RowRange) -> tuple[Tile, float, float] | None:
        """The best tile, and the times of the table's and of this one: geometric means over the measured rows."""
        found = self._found(of, [*self.first_round(of), *self.second_round(of)])
        if of.tile not in found:
            return None
        best = min(found, key=lambda tile: (found[tile], json.dumps(tuning_table.as_entry(tile))))
        if found[best] * _LEAST_GAIN > found[of.tile]:
            best = of.tile
        return best, found[of.tile], found[best]

    def measure(self, of: RowRange, tiles: Iterable[Tile]) -> None:
        """Those that are not known yet; none of them if the time is over."""
        missing = {name: tile for tile in tiles if (name := self._name(of, tile)) not in self._known}
        if not missing or self.is_over():
            return
        kernels = {name: of.launch(tile).kernel for name, tile in missing.items()}
        usable = set(usable_kernels(list(kernels.values()), of.linear.dtype))
        sums: dict[str, float | None] = {name: 0.0 if kernel in usable else None for name, kernel in kernels.items()}
        for rows in of.rows:
            operands = Operands(of, rows)
            for name, total in sums.items():
                if total is not None:
                    seconds = operands.seconds(missing[name])
                    sums[name] = None if seconds is None else total + math.log(seconds) / len(of.rows)
        self._known |= {name: None if total is None else math.exp(total) for name, total in sums.items()}
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(self._known, indent=0, sort_keys=True))
        os.replace(beside, self._path)

    def _found(self, of: RowRange, tiles: Iterable[Tile]) -> dict[Tile, float]:
        known = {tile: self._known.get(self._name(of, tile)) for tile in tiles}
        return {tile: seconds for tile, seconds in known.items() if seconds is not None}

    def _name(self, of: RowRange, tile: Tile) -> str:
        return f"{of.key} {of.rows} {of.launch(tile).kernel.name}"


class Operands:
    """A product's, with weights that no cache holds, and what the table's own tile makes of them."""

    def __init__(self, of: RowRange, rows: int) -> None:
        self._of, self._rows = of, rows
        self._product = Product(of.linear, rows)
        del self._product.a, self._product.weight
        weight = self._product.operands["weight"]
        count = copies(weight.numel() * weight.itemsize, most=32)
        self._weights = [weight, *(weight.clone() for _ in range(count - 1))]
        self._wanted: torch.Tensor | None = None

    def seconds(self, tile: Tile) -> float | None:
        """Of one launch; None where it computes something else than the first one that was asked for."""
        scratch: dict[str, torch.Tensor] = {}
        sizes, launch, calls = {self._of.linear.domain: self._rows}, self._of.launch(tile), list[Callable[[], Any]]()
        for weight in self._weights:
            arguments = {**self._product.operands, "weight": weight, "count": self._rows}
            calls += bind_launches([launch], sizes, arguments, scratch)
        out = self._product.operands["out"]
        out.fill_(float("nan"))
        for _ in range(2):
            calls[0]()
        found = out[: self._rows].float()
        if self._wanted is None:
            self._wanted = found
        error = (found - self._wanted).std() / self._wanted.std().clamp_min(1e-30)
        if not bool(error <= _SAME[self._of.linear.dtype]):
            print(f"{PART}: {tile} gives something else at {self._rows} rows of {self._of.key}", flush=True)
            return None
        return graph_seconds(calls, least_s=0.004, repeats=3)


def shapes_of(tile: Tile, dtype: str) -> list[Tile]:
    """The first round's."""
    size = _TYPES[dtype]
    depths = (128 // size, 256 // size)
    areas = [(tile.rows, 64), (tile.rows, 128)] if tile.small else [(64, 128), (64, 256), (128, 128), (128, 256)]
    found = []
    for rows, columns in areas:
        for depth in depths:
            for warps in (4, 8):
                for stages in (3, 4, 5):
                    fits = (rows + columns) * depth * size * stages <= target().shared_bytes
                    if fits and rows * columns <= _MOST_SUMS * 32 * warps:
                        change = {"rows": rows, "columns": columns, "depth": depth, "warps": warps, "stages": stages}
                        found.append(replace(tile, **change))  # type: ignore[arg-type]
    return found


def refinements(tile: Tile) -> list[Tile]:
    """The second round's."""
    found = [replace(tile, prefetch=prefetch) for prefetch in (128, 512, 1024)]
    if tile.small or tile.ctas:
        found += [replace(tile, ctas=ctas, share=share) for ctas in (1, 2, 4, 8) for share in (512, 1024)]
    if not tile.small:
        found += [replace(tile, group=group) for group in (4, 16)]
    return [refined for refined in found if refined != tile]


def usable_kernels(kernels: list[Kernel], dtype: str) -> list[Kernel]:
    """Those that can be compiled, and whose machine code is as it must be."""
    refused = set(prepare(kernels))
    return [kernel for kernel in kernels if kernel not in refused and fault(compiled(kernel).image, dtype) is None]


def fault(image: KernelImage, dtype: str) -> str | None:
    """What the machine code should not be."""
    wanted = {90: {"bf16": "HGMMA", "fp8": "QGMMA", "int8": "IGMMA"}, 100: {"bf16": "UTCHMMA", "fp8": "UTCQMMA"}}
    instruction = wanted.get(image.arch, {"bf16": "HMMA", "fp8": "QMMA", "int8": "IMMA"})[dtype]
    if image.spill_bytes:
        return f"spills {image.spill_bytes} bytes"
    if image.shared_bytes > target().shared_bytes:
        return f"wants {image.shared_bytes} bytes of shared memory"
    return None if image.instruction == instruction else f"multiplies by {image.instruction or 'no tensor core'}"


def report_line(of: RowRange, tile: Tile, old: float, new: float) -> str:
    """Old against new."""
    rows = "/".join(map(str, of.rows))
    text = f"{of.name:8} {of.key:26} rows {rows:10} {old * 1e6:9.2f} -> {new * 1e6:9.2f} us  {old / new:5.2f}x"
    return text if tile == of.tile else f"{text}  {json.dumps(tuning_table.as_entry(tile))}"


def merge(table: tuning_table.Table, best: dict[RowRange, tuple[Tile, float, float]]) -> tuning_table.Table:
    """The table with the tiles that are better; a shape's entry begins as that of its type."""
    merged = {key: [dict(tile) for tile in tiles] for key, tiles in table.items()}
    for of, (tile, _, _) in best.items():
        if tile == of.tile:
            continue
        parts = of.key.split("/")
        origin = next(key for key in (of.key, "/".join(parts[:2]), parts[0]) if key in merged)
        entries = merged.setdefault(of.key, [dict(entry) for entry in merged[origin]])
        place = [entry["most"] for entry in entries].index(of.tile.most)
        entries[place] = tuning_table.as_entry(tile)
    return merged


def write(directory: Path, best: dict[RowRange, tuple[Tile, float, float]]) -> None:
    """The table in the checkout, a copy of it and the report in `directory`."""
    text = tuning_table.write(tuning_table.LINEAR, merge(tuning_table.read(directory / _BEFORE), best))
    (directory / _AFTER).write_text(text, encoding="utf-8")
    lines = [report_line(of, *found) for of, found in best.items()]
    (directory / "tuning.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{PART}: {sum(tile != of.tile for of, (tile, _, _) in best.items())} tiles changed; {tuning_table.LINEAR}")
