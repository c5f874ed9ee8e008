"""enginery calibrate, build-engine --calibration and --calibrate: from a text to an engine that knows of it."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from enginery.compiler.calibration import command
from enginery.compiler.calibration.command import calibrate
from enginery.compiler.cli import build_engine
from enginery.engines.manifest import MANIFEST, hash_file, read_manifest

from ...tiny import make_checkpoint
from ..building import compile_to, contents, refused


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """The commands are made for a process of their own: they handle signals, and stop collecting."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()
    gc.enable()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate, [str(argument) for argument in arguments])


def build(*arguments: object) -> Result:
    return CliRunner().invoke(build_engine, [str(argument) for argument in arguments])


def test_tells_what_it_made_and_how_far_it_is(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 1100)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'c'}: 1100 tokens, " in result.stdout
    assert result.stderr.splitlines()[-1] == "calibrate: 100 % of 1,100 tokens"


def test_is_a_command_of_enginery(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """By an entry point of the installed package: what serves does not know what compiles."""
    enginery = [sys.executable, "-c", "from enginery.runtime.cli import enginery; enginery()"]
    listed = subprocess.run([*enginery, "--help"], capture_output=True, text=True, timeout=60)
    assert [line.split()[0] for line in listed.stdout.splitlines()[-3:]] == ["inspect", "layer-errors", "verify"]
    arguments = ["calibrate", checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", "100"]
    made = subprocess.run([*enginery, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "c").exists()
    wrong = subprocess.run([*enginery, "calibrat"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "There are: calibrate, inspect, layer-errors, verify." in wrong.stderr


def test_what_cannot_be_is_refused_in_one_message(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    short = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 5000)
    assert "wanted 5000 tokens, got 2000. Give a longer text, or calibrate with 2000 tokens" in short.stderr
    taken = run(checkpoint, "--text", text, "-o", tmp_path / "there")
    assert "exists. Choose another file, or replace it with --force." in taken.stderr
    directory = run(checkpoint, "--text", text, "-o", tmp_path, "--force")
    assert "is a directory" in directory.stderr
    missing = run(tmp_path / "none", "--text", text, "-o", tmp_path / "c")
    assert "CheckpointError" in missing.stderr
    other = run(checkpoint, "--text", text, "-o", tmp_path / "there", "--force")
    assert "is no calibration file, so --force does not replace it" in other.stderr
    for place in (tmp_path / "there" / "c", tmp_path / ("c" * 250)):  # told before the text is looked for
        assert "cannot be written" in run(checkpoint, "--text", tmp_path / "none", "-o", place).stderr
    assert {result.exit_code for result in (short, taken, directory, missing, other)} == {2}
    assert (tmp_path / "there").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_force_replaces_a_calibration_file(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    first = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 50)
    assert (first.exit_code, "little text" in first.stderr) == (0, True)
    second = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 1500, "--force")
    assert (second.exit_code, "little text" in second.stderr) == (0, False)
    assert f"{tmp_path / 'c'}: 1500 tokens" in second.stdout


def test_what_came_meanwhile_is_not_replaced(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.Progress, "advance", lambda self, count: (tmp_path / "c").write_text("mine"))
    result = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 100)
    assert (result.exit_code, "exists" in result.stderr) == (2, True)
    assert (tmp_path / "c").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_token_beyond_the_vocabulary_is_refused(text: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    make_checkpoint("llama-odd-sizes", tmp_path / "small")
    assert config["vocab_size"] > 257
    tokenizer = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 2 * index for token, index in vocabulary.items()}
    tokenizer["added_tokens"] = []
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = run(tmp_path / "small", "--text", text, "-o", tmp_path / "c", "--tokens", 1000)
    assert result.exit_code == 2
    assert "config.json a vocab_size of 257" in result.stderr


def test_an_interrupt_leaves_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(count: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command.Progress, "advance", lambda self, count: interrupted(count))
    result = run(checkpoint, "--text", text, "-o", tmp_path / "c", "--tokens", 100)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_with_what_an_engine_was_calibrated(
    checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    plain = compile_to(checkpoint, tmp_path / "plain", precision="int8")
    engine = compile_to(checkpoint, tmp_path / "engine", precision="int8", calibration=calibration)
    assert read_manifest(plain).calibration == ""
    assert read_manifest(engine).calibration == hash_file(calibration, "calibration", "safetensors").sha256
    first, second = contents(plain), contents(engine)
    assert {name for name in first if first[name] != second[name]} >= {MANIFEST, "weights.rank0.safetensors"}


def test_the_same_calibration_makes_the_same_bytes(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    first = compile_to(checkpoint, tmp_path / "a", calibration=calibration, num_threads=1)
    second = compile_to(checkpoint, tmp_path / "b", calibration=calibration, num_threads=3)
    assert contents(first) == contents(second)


def test_ranks_and_gpus_are_calibrated_too(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    for target in ("cpu-avx512-vnni", "cuda-sm90"):
        plan = build(
            checkpoint, "--plan", "--target", target, "--tensor-parallel-size", 2, "--calibration", calibration
        )
        assert plan.exit_code == 0, plan.output
    compile_to(checkpoint, tmp_path / "e", tensor_parallel_size=2, calibration=calibration)


def test_calibrating_while_building_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("Once upon a time, there was a little engine. " * 800)
    common = ("--target", "cpu-avx2")
    assert run(checkpoint, "--text", long, "-o", tmp_path / "c").exit_code == 0
    assert build(checkpoint, "-o", tmp_path / "a", *common, "--calibration", tmp_path / "c").exit_code == 0
    both = build(checkpoint, "-o", tmp_path / "b", *common, "--calibrate", long)
    assert both.exit_code == 0, both.output
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    taken = build(checkpoint, "-o", tmp_path / "b", *common, "--calibrate", tmp_path / "none")
    assert "exists" in taken.stderr  # told before the text is looked for


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--layer-precision", "foo=int4"), "foo"),
        (("--kv-cache-dtype", "fp8"), "is not there for cpu-avx2"),
        (("--tensor-parallel-size", "5"), "5"),
        (("-o", "/proc/none/e"), "/proc/none/e: cannot be written"),
    ],
)
def test_a_build_that_cannot_be_is_told_before_the_text_is_looked_for(
    options: tuple[str, str], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    common = ("--target", "cpu-avx2", "--calibrate", tmp_path / "none")
    result = build(checkpoint, "-o", tmp_path / "e", *common, *options)
    assert (result.exit_code, reason in result.stderr) == (2, True), result.stderr
    assert "none: cannot be read" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_go_together_are_refused(checkpoint: Path, calibration: Path, text: Path) -> None:
    two = build(checkpoint, "-o", "e", "--calibration", calibration, "--calibrate", text)
    assert "--calibrate does not go with --calibration: either" in two.output
    plan = build(checkpoint, "--plan", "--calibrate", text)
    assert "--calibrate does not go with --plan" in plan.output
    assert (two.exit_code, plan.exit_code) == (2, 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_quantized_is_not_calibrated(
    precision: str, checkpoint: Path, calibration: Path, text: Path, tmp_path: Path
) -> None:
    from enginery.engines.errors import CompileError

    reason = f"of no use to {precision}, only to int8 and int4. Leave it out"
    refused(CompileError, reason, checkpoint, tmp_path, precision=precision, calibration=calibration)
    both = build(checkpoint, "-o", tmp_path / "e", "--precision", precision, "--calibrate", text)
    assert (both.exit_code, reason in both.stderr) == (2, True)
