"""Which variant of `linear` is the fastest on this machine, by layout, ISA, rows and size of the weight.

    python benchmarks/tune_linear.py [--isa avx512-vnni-bf16] [--layouts int8_k4n16 …] [--write] [--json FILE]

Weights come from memory each time, all variants in turn, so that a machine whose speed changes changes it for all. A
variant's time is relative to the median of all in the same turn, and the median of these counts. Nothing else may run
meanwhile: small items, which suit disturbed cores, would win. A machine of few cores tells more: with many,
products of small weights are cut as finely as can be anyhow. --write puts what was found into
plugins/linear/tuning.h, in the place of what that ISA and these layouts had there; variants change no result.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from enginery.engines.layouts import LAYOUTS
from enginery.runtime import _core
from machine import ROOT, save
from numpy.typing import NDArray

TABLE = ROOT / "plugins" / "linear" / "tuning.h"
ISAS = ("avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-vnni-bf16")
LAYOUTS_MEASURED = ("f32_k1n16", "bf16_k2n16", "int8_k4n16", "int4_k8n16g32")
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
ANY = "kAnyNumber"
# By the most columns and panels of their weight: [n, k] of a product, and whether it is gated.
SHAPES: dict[tuple[int | str, int | str], tuple[int, int, bool]] = {
    (1024, 256): (1152, 896, False),
    (1024, 2048): (4864, 896, True),
    (1024, ANY): (49152, 896, False),
    (4096, 256): (2048, 2048, False),
    (4096, 2048): (8192, 2048, True),
    (4096, ANY): (49152, 2048, False),
    (ANY, 256): (2048, 8192, False),
    (ANY, 2048): (8192, 5120, True),
}
# Twice an L3 cache and more, so that no weight is there when its turn comes again.
COLD_BYTES = 96 << 20
TURNS = 15
# After which a product has had enough turns, if it has had a fifth of them.
ENOUGH_SECONDS = 3.0
# What another variant of a class must gain to have an entry of its own.
WORTH_IT = 0.98


@dataclass(frozen=True)
class Variant:
    """As in tuning.h."""

    units: int
    apart: bool
    ahead: bool

    @property
    def name(self) -> str:
        """Units, a where they lie apart, p where the next ones are fetched."""
        return f"{self.units}{'a' if self.apart else '-'}{'p' if self.ahead else '-'}"


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    isa: str
    layout: str
    most_rows: int | str
    most_columns: int | str
    most_panels: int | str
    variant: Variant

    def line(self) -> str:
        """In C++."""
        limits = ", ".join(str(limit) for limit in (self.most_rows, self.most_columns, self.most_panels))
        units, apart, ahead = astuple(self.variant)
        return f'    {{"{self.isa}", "{self.layout}", {limits}, {{{units}, {apart}, {ahead}}}}},'.replace(
            "True", "true"
        ).replace("False", "false")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=ISAS, default=best_isa())
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS_MEASURED, default=LAYOUTS_MEASURED)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.write and set(arguments.rows) < set(ROWS):
        parser.error("--write replaces all that a layout has: it wants all --rows")
    entries: list[Entry] = []
    times: list[dict[str, Any]] = []
    for layout, rows in product(arguments.layouts, sorted(arguments.rows)):
        found: dict[tuple[int | str, int | str], dict[Variant, float]] = {}
        for (columns, panels), (n, k, gated) in SHAPES.items():
            found[columns, panels] = relative_times(arguments.isa, layout, rows, n, k, gated, arguments.turns)
            ranking = sorted(found[columns, panels].items(), key=lambda item: item[1])
            ranked = {variant.name: round(time, 3) for variant, time in ranking}
            times.append({"layout": layout, "rows": rows, "n": n, "k": k, "gated": gated, "times": ranked})
            best = ", ".join(f"{name} {time:.3f}" for name, time in ranked.items())
            print(f"{layout} {rows:3} rows {n:6} x {k:5}{' gated' if gated else '':6}: {best}", flush=True)
        most_rows = ANY if rows == max(arguments.rows) else rows
        entries += chosen(arguments.isa.replace("-", "_"), re.sub(r"g\d+$", "", layout), most_rows, found)
    for entry in entries:
        print(entry.line())
    if arguments.write:
        write(entries)
    save(arguments.json, {"isa": arguments.isa, "threads": num_threads(), "products": times})


def best_isa() -> str:
    """Of this machine."""
    features = set(_core.cpu_features())
    if "avx512bf16" in features:
        return "avx512-vnni-bf16"
    if "avx512bw" in features:
        return "avx512-vnni" if "avx512vnni" in features else "avx512"
    return "avx2-vnni" if "avxvnni" in features else "avx2"


def num_threads() -> int:
    """As many as engines take."""
    return min(256, len(os.sched_getaffinity(0)))


def relative_times(isa: str, layout: str, rows: int, n: int, k: int, gated: bool, turns: int) -> dict[Variant, float]:
    """Of each variant: its time over the median of all in the same turn, the median of all turns."""
    weight_rows = (2 if gated else 1) * -(-n // 16) * 16
    weight_bytes = LAYOUTS[f"{layout}.v0"].num_bytes(weight_rows, k)
    copies = max(1, (COLD_BYTES if rows < 64 else COLD_BYTES // 4) // weight_bytes)
    arrays = [operands(layout, rows, n, k, weight_rows)]
    arrays += [arrays[0] | {"weight": arrays[0]["weight"].copy()} for _ in range(copies - 1)]
    variants = [
        Variant(units, apart, ahead)
        for units, apart, ahead in product((1, 2) if gated else (1, 2, 3, 4), (False, True), (False, True))
        if units > 1 or not apart
    ]
    calls = {variant: [call(isa, layout, n, k, gated, variant)] * copies for variant in variants}
    ratios: dict[Variant, list[float]] = {variant: [] for variant in variants}
    started = time.monotonic()
    for turn in range(turns):
        if turn >= turns / 5 and time.monotonic() - started > ENOUGH_SECONDS:
            break
        random.shuffle(variants)
        seconds = {
            variant: _core.run_calls(isa, calls[variant], arrays, {"num_tokens": rows}, num_threads())
            for variant in variants
        }
        usual = statistics.median(seconds.values())
        for variant, value in seconds.items():
            ratios[variant].append(value / usual)
    return {variant: statistics.median(values) for variant, values in ratios.items()}


def call(isa: str, layout: str, n: int, k: int, gated: bool, variant: Variant) -> dict[str, Any]:
    """The call of a product."""
    types = {"f32": "f32", "bf16": "bf16", "int4": "i8", "int8": "u8" if "vnni" in isa else "i8"}
    layouts, buffers = {"weight": f"{layout}.v0"}, {"a": types[layout.split("_")[0]], "out": "f32"}
    if layout.startswith("int"):
        buffers["a_scale"] = "f32"
    if layout.startswith("int8"):
        layouts |= {"weight_scale": "scale_f32.v0", "weight_sum": "sum_i32.v0"}
    if layout.startswith("int4"):
        layouts["weight_scale"] = "scale_f16_n16.v0"
        buffers["a_sums"] = "i32"
    operands_ = {name: {"kind": "weight", "layout": value} for name, value in layouts.items()}
    operands_ |= {name: {"kind": "buffer", "layout": value} for name, value in buffers.items()}
    attributes: dict[str, Any] = {"n": n, "k": k, "domain": "tokens", "softcap": 0.0}
    attributes["activation"] = "silu_gated" if gated else "none"
    attributes |= {name: int(value) for name, value in asdict(variant).items()}
    return {"op": "linear", "version": 0, "attributes": attributes, "operands": operands_}


def operands(layout: str, rows: int, n: int, k: int, weight_rows: int) -> dict[str, NDArray[Any]]:
    """Arrays of what `call` names: codes are random, all else is one."""
    stride = -(-k // 64) * 64
    arrays: dict[str, NDArray[Any]] = {"out": np.zeros((rows, -(-n // 64) * 64), np.float32)}
    if layout.startswith("f32"):
        return arrays | {
            "a": np.ones((rows, stride), np.float32),
            "weight": np.ones(weight_rows * stride, np.float32),
        }
    if layout.startswith("bf16"):
        one = np.uint16(0x3F80)
        return arrays | {"a": np.full((rows, stride), one), "weight": np.full(weight_rows * stride, one)}
    arrays |= {"a": np.ones((rows, stride), np.int8), "a_scale": np.ones(rows, np.float32)}
    weight_bytes = LAYOUTS[f"{layout}.v0"].num_bytes(weight_rows, k)
    arrays["weight"] = np.random.default_rng(0).integers(0, 128, weight_bytes, np.uint8)
    if "int4" not in layout:
        ones = {"weight_scale": np.ones(weight_rows, np.float32), "weight_sum": np.ones(weight_rows, np.int32)}
        return arrays | ones
    groups = LAYOUTS[f"{layout}.v0"].num_groups(k)
    scales = np.ones((weight_rows // 16, groups, 16), np.float16)
    return arrays | {"weight_scale": scales, "a_sums": np.ones((rows, stride // 32), np.int32)}


def chosen(
    isa: str, layout: str, most_rows: int | str, found: dict[tuple[int | str, int | str], dict[Variant, float]]
) -> list[Entry]:
    """One variant for all, the best on the whole; and those of classes that gain by another."""
    common = set.intersection(*(set(times) for times in found.values()))
    best = {key: min(times.values()) for key, times in found.items()}

    def loss(variant: Variant) -> float:
        return sum(times[variant] / best[key] for key, times in found.items())

    usual = min(common, key=loss)
    entries = [Entry(isa, layout, most_rows, ANY, ANY, usual)]
    for key, times in reversed(found.items()):
        variant = min(times, key=lambda v: times[v])
        entries.insert(
            0, Entry(isa, layout, most_rows, *key, variant if times[variant] < WORTH_IT * times[usual] else usual)
        )
    for entry in list(entries):
        rest = [other for other in entries if other is not entry]
        if all(first(rest, *key) == first(entries, *key) for key in (*found, (ANY, ANY))):
            entries = rest
    return entries


def first(entries: list[Entry], columns: int | str, panels: int | str) -> Variant | None:
    """What the runtime takes for a weight of such a class: of the first entry that is for as much."""

    def holds(most: int | str, wanted: int | str) -> bool:
        return most == ANY or (wanted != ANY and int(wanted) <= int(most))

    suiting = (e.variant for e in entries if holds(e.most_columns, columns) and holds(e.most_panels, panels))
    return next(suiting, None)


def write(entries: list[Entry]) -> None:
    """Replaces the lines of the same ISA and layouts."""
    text = TABLE.read_text()
    begin = text.index("kTuned[] = {\n") + len("kTuned[] = {\n")
    end = text.index("};", begin)
    replaced = {(entry.isa, entry.layout) for entry in entries}
    kept = [
        line
        for line in text[begin:end].splitlines()
        if not any(f'"{isa}", "{layout}"' in line for isa, layout in replaced)
    ]
    # By ISA and layout; within one, the order in which they are looked through stays.
    lines = sorted([*kept, *(entry.line() for entry in entries)], key=lambda line: line.split(", ")[:2])
    TABLE.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:])
    if (clang_format := shutil.which("clang-format")) is not None:
        subprocess.run([clang_format, "-i", str(TABLE)], check=True)


if __name__ == "__main__":
    main()
