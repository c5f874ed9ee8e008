"""Building engines in tests: what their files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.compiler.cli import build_engine
from enginery.engines.errors import EngineryError


def compile_to(model: Path, output: Path, **options: Any) -> Path:
    with prepare(BuildRequest(str(model), output, **({"target": "cpu-avx2"} | options))) as prepared:
        return build(prepared)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def refused(kind: type[EngineryError], reason: str, model: Path, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(kind, match=reason):
        compile_to(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_engine, [str(argument) for argument in arguments])
