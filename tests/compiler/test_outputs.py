"""Where an engine is written: nothing is left by a build that fails, and nothing that was there is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import CompileError
from enginery.engines.manifest import MANIFEST, read_manifest

from .building import compile_to, contents, refused


def test_an_output_that_exists_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(CompileError, match=r"exists|is no engine"):
            compile_to(checkpoint, tmp_path / "out", force=force)
    assert contents(tmp_path / "out") == {"diary.txt": b"dear"}


def test_force_replaces_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    compile_to(checkpoint, tmp_path / "out", precision="int8")
    compile_to(checkpoint, tmp_path / "out", precision="fp32", force=True)
    assert read_manifest(tmp_path / "out").precision == "fp32"


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter(range(100))

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) > 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2], offset)  # as a disk does that has room for half

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(CompileError, "the disk is full: the engine needs", checkpoint, tmp_path)


def test_a_killed_build_leaves_nothing_that_looks_like_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    """Killed outright in the middle of writing weights; the next build cleans up and succeeds."""
    program = (
        "import os, signal, sys\n"
        "from enginery.compiler import build as b\n"
        "write = b.write_weights\n"
        "def die(*arguments):\n"
        "    write(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "b.write_weights = die\n"
        "with b.prepare(b.BuildRequest(sys.argv[1], b.Path(sys.argv[2]), target='cpu-avx2')) as p: b.build(p)\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(MANIFEST))
    read_manifest(compile_to(checkpoint, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("spelling", ["{}/missing/../engine", "{}/./new/deep/engine/", "{}/a b/é 模型"])
def test_an_output_may_be_spelled_in_any_way(spelling: str, checkpoint: Path, tmp_path: Path) -> None:
    output = compile_to(checkpoint, Path(spelling.format(tmp_path)))
    assert read_manifest(output).model.architecture == "llama"


def test_force_replaces_the_directory_that_one_stands_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compile_to(checkpoint, tmp_path / "engine"))
    compile_to(checkpoint, Path(), precision="bf16", force=True)
    monkeypatch.chdir(tmp_path)
    assert read_manifest(tmp_path / "engine").precision == "bf16"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_what_came_to_the_output_during_a_build_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"

    def interfere(count: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "mine").touch()

    with (
        prepare(BuildRequest(str(checkpoint), output, target="cpu-avx2")) as prepared,
        pytest.raises(CompileError, match="exists"),
    ):
        build(prepared, interfere)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["engine", "engine/mine"]


@pytest.mark.parametrize("name", ["n" * 300, "n" * 250])
def test_a_name_too_long_for_the_disk_is_one_message(name: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot be written"):
        compile_to(checkpoint, tmp_path / name)
    with pytest.raises(CompileError, match="--save-graph"):
        compile_to(checkpoint, tmp_path / "engine", save_graph=tmp_path / ("n" * 300))


@pytest.mark.parametrize("name", ["engine", "engine/graph", "x/../engine/graph"])
def test_a_graph_within_the_engine_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"--save-graph .*: lies within the engine, .*Choose a directory beside it"):
        compile_to(checkpoint, tmp_path / "engine", save_graph=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_build_that_another_is_making_is_left_to_it(checkpoint: Path, tmp_path: Path) -> None:
    with prepare(BuildRequest(str(checkpoint), tmp_path / "out", target="cpu-avx2")) as prepared:

        def interfere(count: int) -> None:
            with pytest.raises(CompileError, match="another build is writing it now"):
                compile_to(checkpoint, tmp_path / "out")

        build(prepared, interfere)
    read_manifest(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_build_left_goes(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.building"
    (partial / "directory").mkdir(parents=True)
    (partial / "directory" / "file").touch()
    (partial / "leftover").touch()
    engine = compile_to(checkpoint, tmp_path / "out")
    assert {path.name for path in engine.iterdir()} == {MANIFEST, *read_manifest(engine).files}


def test_a_link_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "engine")
    for name, to in (("link", engine), ("dangling", tmp_path / "nothing")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(CompileError, match="exists"):
            compile_to(checkpoint, tmp_path / name)
        with pytest.raises(CompileError, match="is no engine"):
            compile_to(checkpoint, tmp_path / name, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(CompileError, match="is no engine"):
        compile_to(checkpoint, tmp_path / "file", force=True)
    read_manifest(engine)


def test_a_disk_too_small_is_told_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    monkeypatch.setattr("enginery.compiler.build.write_weights", None)
    refused(CompileError, "the disk is full: the engine needs", checkpoint, tmp_path)


def test_an_output_that_exists_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_to(checkpoint, tmp_path / "engine")
    monkeypatch.setattr("enginery.compiler.build.write_weights", None)
    with pytest.raises(CompileError, match=r"exists\. Choose another directory"):
        compile_to(checkpoint, tmp_path / "engine")
