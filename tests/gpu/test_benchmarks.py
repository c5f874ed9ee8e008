"""What the GPU's benchmarks compute from what they measure, without a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from enginery.engines.plan import Launch
from enginery.engines.plan_format import decode_plan
from enginery.engines.targets import TARGETS
from enginery.plugins.linear import cuda
from enginery.plugins.linear.cuda import Linear, Tile, linear_launches

from benchmarks.gpu import engine, engines, gemm, roofs, tune, tuning_table
from benchmarks.gpu.results import Cell, Results
from benchmarks.gpu.timeline import FIRST_KERNEL, Span, Timeline

from ..runtime.cuda_engines import build_shell

LIMITS = {"copy_bytes_per_s": 4.3e12, "bf16_flops": 790e12, "fp8_flops": 1400e12}
SHAPE = engines.shape_of("llama-3.1-8b")


def test_roofs_are_those_of_the_arithmetic() -> None:
    """Llama-3.1-8B on an H200, counted by hand."""
    assert roofs.decode_bytes(SHAPE, "fp8", "fp8", 1, 1024) == pytest.approx(7.57e9, rel=1e-3)
    assert roofs.decode_seconds(SHAPE, "fp8", "fp8", 1, 1024, LIMITS) == pytest.approx(1.76e-3, rel=1e-2)
    assert roofs.decode_seconds(SHAPE, "fp8", "fp8", 64, 1024, LIMITS) == pytest.approx(2.74e-3, rel=1e-2)
    assert roofs.attention_flops(SHAPE, 8192) == pytest.approx(17.6e12, rel=1e-2)
    assert roofs.prefill_seconds(SHAPE, "bf16", 8192, LIMITS) == pytest.approx(167e-3, rel=1e-2)
    assert roofs.prefill_seconds(SHAPE, "fp8", 8192, LIMITS) == pytest.approx(104e-3, rel=1e-2)
    seconds = roofs.serve_seconds(SHAPE, "fp8", "fp8", 128, 1024, 256, LIMITS)
    assert 128 * 256 / seconds == pytest.approx(13.8e3, rel=1e-2)


def test_gaps_of_a_timeline() -> None:
    """Two steps: 10 of 100 between them, and 5 + 5 inside; kernels that overlap are busy once."""
    first = [Span(FIRST_KERNEL, 0, 20), Span("gemm", 25, 45)]
    second = [Span(FIRST_KERNEL, 55, 75), Span("gemm", 70, 90), Span("gemm", 95, 100)]
    timeline = Timeline.of([*reversed(second), *first, Span("prefill", -9, -1)])
    assert (timeline.num_steps, timeline.num_kernels) == (2, 5)
    assert timeline.between_share == pytest.approx(0.10)
    assert timeline.inside_share == pytest.approx(0.10)
    assert timeline.busy_seconds == pytest.approx(80)
    assert timeline.seconds_by_kernel() == {"gemm": 45, FIRST_KERNEL: 40}
    with pytest.raises(ValueError, match="wanted 3"):
        timeline.last_steps(3)


def test_steps_begin_with_the_kernel_that_timelines_are_cut_at(tmp_path: Path) -> None:
    plan = decode_plan((build_shell("llama", tmp_path) / "plan.rank0.msgpack").read_bytes(), "plan")
    symbols = {kernel.name: kernel.symbol for kernel in plan.kernels}
    names = [symbols[launch.kernel] for launch in plan.forward if isinstance(launch, Launch)]
    assert names[0] == FIRST_KERNEL
    assert names.count(FIRST_KERNEL) == 1


def test_results_are_kept_as_they_come(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.begin("gemm")
    results.add(Cell("gemm", "old", 1, "us"))
    results.begin("gemm")
    results.add(Cell("gemm", "a", 2.0, "us", 3.0, "torch", 1.5, 1.2))
    with results.attempt("gemm", "b"):
        raise RuntimeError("no kernel")
    results.add(Cell("gemm", "c", 2.0, "us", 1.0, "torch", 0.5, 1.0))
    again = Results(tmp_path)
    assert [(cell.name, cell.verdict) for cell in again.cells] == [("a", "pass"), ("c", "FAIL")]
    assert "error in gemm: b: RuntimeError: no kernel" in again.table()
    assert again.failed(["gemm"])
    assert not again.failed(["engine"])
    again.begin("gemm")
    assert not again.failed(["gemm"])


def test_a_result_that_must_reach_something_fails_where_there_is_none() -> None:
    assert Cell("engine", "x", 1.0, "us", ratio=float("nan"), must=0.5).verdict == "FAIL"
    assert Cell("engine", "x", 1.0, "us", must=0.5).verdict == "FAIL"
    assert Cell("engine", "x", 1.0, "us", ratio=0.4).verdict == ""


def test_the_worst_product_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    gemm.judge(results, "fp8", [2.0, 0.5])
    assert [(cell.ratio, cell.verdict) for cell in results.cells] == [(pytest.approx(1.0), "pass"), (0.5, "FAIL")]


@pytest.mark.parametrize("path", [tuning_table.LINEAR, tuning_table.ATTENTION], ids=lambda path: path.parent.name)
def test_tables_are_written_as_they_are(path: Path) -> None:
    table = tuning_table.read(path)
    assert tuning_table.render(table) == path.read_text()
    assert tuning_table.render({key: table[key] for key in reversed(table)}) == path.read_text()


def test_the_table_of_tiles_is_written_as_it_is() -> None:
    table = tuning_table.read(tuning_table.LINEAR)
    assert all(tuning_table.as_entry(Tile(**tile)) == tile for tiles in table.values() for tile in tiles)
    shuffled = {key: table[key] for key in reversed(table)} | {"fp8/sm90/4096x4096": table["fp8"]}
    assert list(json.loads(tuning_table.render(shuffled))) == [
        key for known in table for key in ([known, "fp8/sm90/4096x4096"] if known == "fp8/sm90" else [known])
    ]


@pytest.fixture
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "target", lambda: TARGETS["cuda-sm90"])


@pytest.mark.usefixtures("_h200")
def test_better_tiles_are_what_plans_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = tune.ranges(SHAPE, "fp8")
    assert len({(each.key, each.tile.most) for each in ranges}) == len(ranges)
    of = next(each for each in ranges if each.name == "o" and each.tile.most == 64)
    (better,) = {
        tile
        for tile in tune.shapes_of(of.tile, "fp8")
        if (tile.columns, tile.depth, tile.stages) == (64, 256, 4) and tile.warps == 4
    }
    merged = tune.merge(
        tuning_table.read(tuning_table.LINEAR), {of: (better, 2.0, 1.0), ranges[0]: (ranges[0].tile, 1.0, 1.0)}
    )
    assert set(merged) - set(tuning_table.read(tuning_table.LINEAR)) == {"fp8/sm90/4096x4096"}
    table = {
        key: tuple(Tile(**tile) for tile in tiles) for key, tiles in json.loads(tuning_table.render(merged)).items()
    }
    monkeypatch.setattr(cuda, "_table", lambda: table)
    linear = Linear(4096, 4096, "fp8", residual=True, prologue="quantize")
    (launch,) = [each for each in linear_launches(linear, 90, 132) if each.guard[0].high == 64]
    assert launch.kernel == of.launch(better).kernel
    assert dict(launch.kernel.constants)["DEPTH"] == 256


@pytest.mark.usefixtures("_h200")
def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its candidates are those of the table before, though the table has changed; another change begins anew."""
    monkeypatch.setattr(tuning_table, "LINEAR", Path(shutil.copy(tuning_table.LINEAR, tmp_path / "table.json")))
    monkeypatch.setattr(cuda, "_table", cuda._table)
    out = tmp_path / "out"
    out.mkdir()
    tune.begin_with(out)
    before = tune.ranges(SHAPE, "fp8")
    better = replace(before[0].tile, stages=3)
    tune.write(out, {before[0]: (better, 2.0, 1.0)})
    assert before[0].key in json.loads(tuning_table.LINEAR.read_text())
    tune.begin_with(out)
    assert tune.ranges(SHAPE, "fp8") == before
    changed = tuning_table.read(tuning_table.LINEAR)
    changed["fp8/sm90"][0]["stages"] = 5
    tuning_table.LINEAR.write_text(tuning_table.render(changed))
    tune.begin_with(out)
    after = tune.ranges(SHAPE, "fp8")
    assert (after[0].tile.stages, after[1].tile.stages) == (3, 5)


@pytest.mark.usefixtures("_h200")
def test_the_better_half_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that depend on the tile alone: fewer stages and further prefetch are better, some are not usable."""
    of = tune.ranges(SHAPE, "fp8")[0]

    class Operands:
        def __init__(self, *_: object) -> None: ...

        def seconds(self, tile: Tile) -> float | None:
            return None if tile.warps == 8 else tile.stages + 1 / tile.prefetch + (tile.columns == 64)

    monkeypatch.setattr(tune, "Operands", Operands)
    monkeypatch.setattr(tune, "usable_kernels", lambda kernels, dtype: kernels[:-1])
    for _ in range(2):
        search = tune.Search(tmp_path / "known.json", float("inf"))
        for candidates in (search.first_round, search.second_round):
            search.measure(of, candidates(of))
    found = search.best(of)
    assert found is not None
    tile, old, new = found
    assert (tile.stages, tile.columns, tile.warps, tile.prefetch) == (3, 128, 4, 1024)
    assert new < old == pytest.approx(of.tile.stages + 1 / of.tile.prefetch + 1)
    over = tune.Search(tmp_path / "none.json", float("-inf"))
    over.measure(of, over.first_round(of))
    assert over.best(of) is None


@pytest.mark.usefixtures("_h200")
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
def test_candidates_fit_and_differ(dtype: str) -> None:
    for of in tune.ranges(SHAPE, dtype):
        tiles = [*tune.shapes_of(of.tile, dtype), *tune.refinements(of.tile)]
        assert 8 <= len(set(tiles)) == len(tiles) <= 64
        assert all(tile.most == of.tile.most and tile.small == of.tile.small for tile in tiles)
        assert all(of.first <= rows <= (of.tile.most or rows) for rows in of.rows)


def test_judged_steps_are_those_of_the_issue() -> None:
    assert set(engine.MUST) == {f"decode b{batch}" for batch in engine.BATCHES}
