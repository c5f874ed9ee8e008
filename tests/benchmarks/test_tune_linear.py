"""What the measured times of linear's variants make of its table, and that a variant can be measured at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tune() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tune_linear
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return tune_linear


def test_one_variant_for_all_but_those_who_gain(tune: Any) -> None:
    a, b = tune.Variant(2, False, True), tune.Variant(4, True, False)
    found = {(1024, 256): {a: 1.0, b: 1.01}, (1024, 2048): {a: 1.1, b: 1.0}, (tune.ANY, 256): {a: 0.9, b: 1.2}}
    entries = tune.chosen("isa", "layout", 4, found)
    assert [(entry.most_columns, entry.most_panels, entry.variant) for entry in entries] == [
        (1024, 256, a),
        (1024, 2048, b),
        (tune.ANY, tune.ANY, a),
    ]
    assert [tune.first(entries, *key) for key in found] == [a, b, a]


def test_what_was_not_measured_has_the_usual_variant(tune: Any) -> None:
    a, b = tune.Variant(2, False, True), tune.Variant(4, True, False)
    found = {(1024, 256): {a: 1.0, b: 1.1}, (1024, tune.ANY): {a: 1.0, b: 1.3}, (tune.ANY, 256): {a: 1.2, b: 1.0}}
    entries = tune.chosen("isa", "layout", 4, found)
    assert tune.first(entries, tune.ANY, tune.ANY) == a


def test_writing_replaces_what_was_measured_before(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "tuning.h"
    table.write_text(tune.TABLE.read_text())
    monkeypatch.setattr(tune, "TABLE", table)
    kept = [line for line in table.read_text().splitlines() if '"f32' in line]
    variant = tune.Variant(3, True, True)
    tune.write(
        [tune.Entry("avx512_vnni_bf16", "int8_k4n16", rows, tune.ANY, tune.ANY, variant) for rows in (1, tune.ANY)]
    )
    lines = [line for line in table.read_text().splitlines() if '"avx512_vnni_bf16", "int8_k4n16"' in line]
    assert lines == [
        '    {"avx512_vnni_bf16", "int8_k4n16", 1, kAnyNumber, kAnyNumber, {3, true, true}},',
        '    {"avx512_vnni_bf16", "int8_k4n16", kAnyNumber, kAnyNumber, kAnyNumber, {3, true, true}},',
    ]
    assert [line for line in table.read_text().splitlines() if '"f32' in line] == kept


@pytest.mark.parametrize("layout", ["f32_k1n16", "bf16_k2n16", "int8_k4n16", "int4_k8n16g32"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_layout_can_be_measured(tune: Any, layout: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "COLD_BYTES", 1 << 16)
    times = tune.relative_times(tune.best_isa(), layout, 2, 64, 96, gated, turns=1)
    assert len(times) == (6 if gated else 14)
    assert all(time > 0 for time in times.values())
