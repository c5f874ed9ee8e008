"""What the search for tiles and splits of attention makes of what it measures, without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from enginery.engines.targets import TARGETS
from enginery.plugins.attention import cuda
from enginery.plugins.attention.cuda import Split, Tiles, attention_launches
from enginery.plugins.launches import Kernel

from benchmarks.gpu import engines, tune_attention, tuning_table
from benchmarks.gpu.results import Results

from .paged import make_operator

SHAPE = engines.shape_of("llama-3.1-8b")
OPERATOR = make_operator(tune_attention.heads_of(SHAPE), "fp8")
FASTEST = {"decode": Tiles(0, 128, 8, 4), "splits": Split(64, 8, 256), "prefill": Tiles(64, 128, 4, 3)}
KEYS = {what: cuda.tuning_keys(what, OPERATOR, 90)[0] for what in FASTEST}


def is_fastest(what: str) -> bool:
    """Whether launches have the fastest entry just now."""
    return tuning_table.as_entry(FASTEST[what]) in cuda._entries(what, OPERATOR, 90)


class Gpu:
    """None: times and results depend on the table alone."""

    gain, wrong = 0.7, ""

    def seconds(self, scene: Any, layers: int) -> float:
        asked = ("prefill",) if scene.contexts[0][1] > 1 else ("decode", "splits")
        return float(4.0 * self.gain ** sum(map(is_fastest, asked)))

    def scene(self, kv_dtype: str, heads: Any, contexts: Any, layers: int) -> Any:
        def run() -> torch.Tensor:
            return torch.full((2, 2), 1.5 if self.wrong and is_fastest(self.wrong) else 1.0)

        return SimpleNamespace(contexts=contexts, run=run)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """With a copy of the table."""
    gpu = Gpu()
    monkeypatch.setattr(tune_attention, "ATTENTION", Path(shutil.copy(tuning_table.ATTENTION, tmp_path / "table.json")))
    monkeypatch.setattr(tune_attention, "target", lambda: TARGETS["cuda-sm90"])
    monkeypatch.setattr(tune_attention, "usable", lambda question, *_: list(question.choices))
    monkeypatch.setattr(tune_attention, "Scene", gpu.scene)
    monkeypatch.setattr(tune_attention, "seconds", gpu.seconds)
    return gpu


def search(directory: Path, deadline_s: float = 600.0) -> tuple[tuning_table.Table, Results]:
    """What the table holds then, and the results."""
    results = Results(directory)
    tune_attention.run(results, SHAPE, "fp8", directory, deadline_s)
    return tuning_table.read(tune_attention.ATTENTION), results


@pytest.mark.usefixtures("gpu")
def test_better_entries_are_what_plans_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For heads of this shape on this architecture with a cache of this type; all else is as it was."""
    before = {
        (arch, kind): attention_launches(make_operator(tune_attention.heads_of(SHAPE), kind), arch, "tokens", False)
        for arch in (80, 90)
        for kind in ("bf16", "fp8")
    }
    usual = tuning_table.read(tuning_table.ATTENTION)
    table, results = search(tmp_path)
    assert not results.document["errors"]
    assert tuning_table.read(tmp_path / "tuning.attention.json") == table
    assert set(table) - set(usual) == set(KEYS.values())
    assert {key: table[key] for key in usual} == usual
    assert table[KEYS["decode"]] == [tuning_table.as_entry(FASTEST["decode"])]
    assert [new for new, old in zip(table[KEYS["splits"]], usual["splits"], strict=True) if new != old] == [
        tuning_table.as_entry(FASTEST["splits"])
    ]
    ratios = [cell.ratio for cell in results.cells if cell.ratio != 1.0]
    assert ratios == [pytest.approx(1 / 0.7)] * 3
    monkeypatch.setattr(cuda, "_table", lambda: table)
    for (arch, kind), old in before.items():
        launches = attention_launches(make_operator(tune_attention.heads_of(SHAPE), kind), arch, "tokens", False)
        assert (launches == old) == ((arch, kind) != (90, "fp8"))
    tuned = attention_launches(OPERATOR, 90, "tokens", False)
    assert {(each.kernel.num_warps, each.kernel.num_stages) for each in tuned} == {(8, 4), (4, 3)}
    # Of 33 to 64 pairs, with 8 KV heads: 5 to 8 sequences.
    (split,) = [each for each in tuned if (each.guard[0].low, each.guard[0].high) == (5, 8)]
    assert (split.grid[2], split.values["least_tiles"]) == (8, 2)


def test_what_computes_something_else_is_left_out(gpu: Gpu, tmp_path: Path) -> None:
    gpu.wrong = "prefill"
    table, _ = search(tmp_path)
    assert KEYS["prefill"] not in table
    assert KEYS["decode"] in table


def test_what_is_hardly_faster_is_left_out(gpu: Gpu, tmp_path: Path) -> None:
    gpu.gain = 0.99
    assert search(tmp_path)[0] == tuning_table.read(tuning_table.ATTENTION)


@pytest.mark.usefixtures("gpu")
def test_without_time_nothing_changes(tmp_path: Path) -> None:
    table, results = search(tmp_path, deadline_s=-1.0)
    assert table == tuning_table.read(tuning_table.ATTENTION)
    assert not results.cells


@pytest.mark.parametrize("fault", ["spills", "memory", "instruction", "refused"])
def test_tiles_must_do_for_heads_of_every_kind(fault: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code that is wrong only where scores have a soft-cap."""

    def is_wrong(kernel: Kernel) -> bool:
        return bool(dict(kernel.constants)["SOFTCAP"]) and kernel.num_warps == 4

    def compiled(kernel: Kernel) -> Any:
        wrong = fault if is_wrong(kernel) else ""
        image = SimpleNamespace(spill_bytes=0, shared_bytes=1 << 17, instruction="HGMMA")
        image.spill_bytes += 8 * (wrong == "spills")
        image.shared_bytes <<= wrong == "memory"
        image.instruction = "HMMA" if wrong == "instruction" else image.instruction
        return SimpleNamespace(image=image)

    monkeypatch.undo()
    monkeypatch.setattr(tune_attention, "target", lambda: TARGETS["cuda-sm90"])
    monkeypatch.setattr(tune_attention, "compiled", compiled)
    refused = (lambda kernels: [each for each in kernels if is_wrong(each)]) if fault == "refused" else (lambda _: [])
    monkeypatch.setattr(tune_attention, "prepare", refused)
    question = next(each for each in tune_attention.questions(OPERATOR) if each.what == "prefill")
    found = tune_attention.usable(question, [OPERATOR], tuning_table.read(tuning_table.ATTENTION))
    assert found[0] == question.choices[0]
    assert set(found) == {each for each in question.choices if isinstance(each, Tiles) and each.num_warps == 8}


@pytest.mark.usefixtures("gpu")
def test_choices_differ_and_begin_with_the_tables_own() -> None:
    asked = list(tune_attention.questions(OPERATOR))
    assert [each.what for each in asked] == ["decode", *["splits"] * 7, "prefill"]
    for question in asked:
        entries = cuda._entries(question.what, OPERATOR, 90)
        assert tuning_table.as_entry(question.choices[0]) == entries[question.place]
        assert 12 <= len(set(question.choices)) == len(question.choices) <= 49
        if question.what == "splits":
            bounds = {each.pairs for each in question.choices if isinstance(each, Split)}
            assert bounds == {entries[question.place]["pairs"]}
    batches = [len(each.scenes[0]) for each in asked if each.what == "splits"]
    assert batches == [4, 8, 16, 32, 64, 128, 256]
