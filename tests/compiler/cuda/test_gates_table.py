"""What the command of the gates says, of kernels that nobody compiles here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.plan import KernelImage

from . import gates


def make_image(**changes: Any) -> KernelImage:
    facts = {"registers": 100, "shared_bytes": 1024, "spill_bytes": 0, "instruction": "QGMMA"} | changes
    parameters, role = ("pointer",), "gemm"
    return KernelImage(
        "linear_gemm_1", "", "gemm", role, arch=90, num_warps=4, parameters=parameters, hidden=2, pdl=True, **facts
    )


def run(made: KernelImage, words: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code, with a table that has the usual kernel for every build."""
    table = {build.name: {"linear_gemm_1": gates.row(make_image())} for build in gates.builds()}
    path.write_text(json.dumps(table))
    monkeypatch.setattr(gates, "TABLE", path)
    monkeypatch.setattr(gates, "images", lambda build: [made])
    monkeypatch.setattr(sys, "argv", ["gates", *words])
    with pytest.raises(SystemExit) as ended:
        gates.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({}, 0, "every gate holds"),
        ({"registers": 101}, 1, "linear_gemm_1: {'registers': 100"),
        ({"spill_bytes": 8}, 1, "linear_gemm_1 for cuda-sm90 fp8 fp8: spills 8 bytes"),
        ({"instruction": "HMMA"}, 1, "multiplies by HMMA, wanted QGMMA"),
    ],
)
def test_the_command_says_what_differs(
    changes: dict[str, Any],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(make_image(**changes), ["sm90", "fp8 fp8"], tmp_path / "table", monkeypatch) == code
    assert message in capsys.readouterr().out


def test_words_that_name_no_build_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every gate would seem to hold."""
    refusal = run(make_image(), ["attention"], tmp_path / "table", monkeypatch)
    assert str(refusal).startswith("no build has attention in its name: cuda-sm80 bf16 bf16;")


def test_an_update_changes_what_is_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(make_image(registers=90), ["sm90 fp8", "--update"], tmp_path / "table", monkeypatch) == 0
    table = json.loads((tmp_path / "table").read_text())
    changed = {name for name, rows in table.items() if rows["linear_gemm_1"]["registers"] == 90}
    assert changed == {"cuda-sm90 fp8 fp8", "cuda-sm90 fp8 fp8 batch-invariant"}
    assert len(table) == len(list(gates.builds()))
