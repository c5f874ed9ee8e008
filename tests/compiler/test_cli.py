"""The command build-engine: every option reaches the engine, and every end of a build is told with its exit code."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from enginery.compiler import command
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.cli import build_engine
from enginery.engines.manifest import read_manifest
from enginery.engines.weights import read_weights_header

from ..tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama", directory)
    return directory


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """The command is made for a process of its own: it handles a signal, and stops collecting."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()
    gc.enable()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_engine, [str(argument) for argument in arguments])


def test_every_option_reaches_the_engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[BuildRequest] = []

    def spy(request: BuildRequest) -> Any:
        requests.append(request)
        return prepare(request)

    monkeypatch.setattr("enginery.compiler.build.prepare", spy)
    options = "--target cpu-avx512 --precision bf16 --kv-cache-dtype int8 --max-model-len 100 --tensor-parallel-size 2"
    result = run(checkpoint, "-o", tmp_path / "engine", *options.split(), "--threads", 3, "--batch-invariant")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.target, manifest.precision, manifest.kv_cache_dtype) == ("cpu-avx512", "bf16", "int8")
    assert (manifest.default_max_model_len, manifest.tensor_parallel_size) == (100, 2)
    assert (requests[0].num_threads, requests[0].batch_invariant) == (3, True)
    assert f"{tmp_path / 'engine'}: llama bf16 for cpu-avx512, " in result.output


@pytest.mark.parametrize(
    ("options", "layout"),
    [("", "int4_k8n16g32.v0"), ("--group-size 128", "int4_k8n16g128.v0"), ("--zero-points", "uint4_k8n16g32.v0")],
)
def test_weights_of_four_bits_have_the_groups_that_were_asked_for(
    options: str, layout: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, "-o", tmp_path / "engine", "--target", "cpu", "--precision", "int4", *options.split())
    assert result.exit_code == 0, result.output
    placed = read_weights_header(tmp_path / "engine" / "weights.rank0.safetensors").placed
    layouts = {place.tensor.layout for place in placed.values() if "_k" in place.tensor.layout}
    assert layouts == {layout, "int8_k4n16.v0"}
    assert [name for name, place in placed.items() if place.tensor.layout == "int8_k4n16.v0"] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--precision int8 --group-size 64",
            "--group-size belongs to --precision int4; int8 has",
        ),
        ("--precision bf16 --zero-points", "--zero-points belongs to --precision int4"),
        ("--precision int4 --group-size 48", "'48' is not one of '32', '64', '128'"),
        ("--precision int4 --target cuda-sm90", "precision 'int4' is not there for cuda-sm90"),
        (
            "--kv-cache-dtype int4 --target cpu-avx2",
            "KV cache dtype 'int4' is not there for cpu-avx2, which has auto, fp32, bf16, int8.\n",
        ),
    ],
)
def test_groups_are_refused_where_there_are_none(options: str, message: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "-o", tmp_path / "engine", *options.split())
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "engine").exists()


def test_progress_is_told_by_tenths(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "-o", tmp_path / "engine", "--target", "cpu-avx2")
    told = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("weights: ")]
    assert told[-1] == "100"
    assert told == sorted(set(told), key=int)


def test_an_output_is_needed_unless_only_the_plan_is_wanted(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint)
    assert result.exit_code == 2
    assert "Missing option '-o'" in result.output
    assert run(checkpoint, "--plan", "-o", tmp_path / "engine").exit_code == 0
    assert not list(tmp_path.iterdir())


def test_an_engine_is_replaced_only_with_force(checkpoint: Path, tmp_path: Path) -> None:
    build = (checkpoint, "-o", tmp_path / "engine", "--target", "cpu-avx2")
    assert run(*build).exit_code == 0
    refused = run(*build, "--precision", "fp32")
    assert (refused.exit_code, "exists" in refused.output) == (2, True)
    assert run(*build, "--precision", "fp32", "--force").exit_code == 0
    assert read_manifest(tmp_path / "engine").precision == "fp32"


def test_the_plan_is_for_the_memory_that_is_given(checkpoint: Path) -> None:
    plan = (checkpoint, "--plan", "--target", "cpu-avx2", "--precision", "fp32")
    few, many = (run(*plan, "--memory", memory).stdout for memory in ("12MB", "64GiB"))
    assert "In 12.0 MB of memory" in few.replace("12.00", "12.0")
    assert "In 68.72 GB of memory" in many
    counts = [[line.split(" x ")[0].strip() for line in text.splitlines() if " x " in line] for text in (few, many)]
    assert counts[1][:4] == ["1", "4", "16", "64"]
    assert int(counts[0][-1].replace(",", "")) < int(counts[1][-1].replace(",", ""))
    assert "llama, 0.1 M parameters" in many
    assert "cpu-avx2, fp32, KV cache fp32, TP 1" in many


def test_memory_belongs_to_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "-o", tmp_path / "engine", "--memory", "1GiB")
    assert result.exit_code == 2
    assert "UsageError: build-engine: --memory belongs to --plan" in result.output
    assert not (tmp_path / "engine").exists()


def test_too_little_memory_is_told(checkpoint: Path) -> None:
    result = run(checkpoint, "--plan", "--memory", "1MB")
    assert "nothing: weights and activations alone take" in result.output
    refused = run(checkpoint, "--plan", "--memory", "much")
    assert (refused.exit_code, "is no size" in refused.output) == (2, True)


def test_a_signal_ends_a_build_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Sent while weights are written."""
    program = (
        "import os, signal, sys\n"
        "from enginery.compiler import build as b, cli\n"
        "write = b.write_weights\n"
        "def ended(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return write(*arguments)\n"
        "b.write_weights = ended\n"
        "cli.build_engine()\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), "-o", str(tmp_path / "engine")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "Interrupted. Nothing was left behind.")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named_with_the_command(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_REQUIRED", ("onnx", "onnx_moon", "moons"))
    result = run(checkpoint, "--plan")
    assert result.exit_code == 2
    assert result.output == 'build-engine needs onnx_moon, moons: pip install "enginery[compiler]"\n'
