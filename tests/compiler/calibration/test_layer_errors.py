"""enginery layer-errors: what quantizing costs each product, and what to build with."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate
from enginery.compiler.calibration.errors_command import layer_errors as command
from enginery.compiler.calibration.evaluate import Batch, evaluate_batch
from enginery.compiler.calibration.gather import fused_graph
from enginery.compiler.calibration.layer_errors import layer_errors
from enginery.compiler.calibration.text import read_sequences
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.graph.builder import weight_of
from enginery.compiler.graph.rewrite import input_of
from enginery.compiler.models import read_config
from enginery.compiler.passes.layer_precision import product_of
from enginery.engines.errors import CheckpointError, CompileError
from safetensors.numpy import load_file, save_file

from ...tiny import make_checkpoint
from ..building import compile_to


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is made for a process of its own: it handles signals."""
    monkeypatch.setattr("signal.signal", lambda *_: None)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def changed(checkpoint: Path, directory: Path, name: str, change: object) -> Path:
    """The checkpoint with another weight."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name].copy())  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_errors_are_those_of_the_outputs(checkpoint: Path, text: Path, calibration: Path) -> None:
    """Against products of the very inputs: rows of the tiny model fit a block, in which all is known. Of products that
    calibration leaves as they are; elsewhere it moves factors between activations and weights.
    """
    found = {each.names: each for each in layer_errors(str(checkpoint), calibration)}
    config, wanted = read_config(checkpoint), {}
    sequences, _ = read_sequences(text, checkpoint, 1000, min(512, config.max_model_len))

    def observe(node: object, x: np.ndarray) -> None:
        weight = weight_of(input_of(node, 1)).numpy()  # type: ignore[arg-type]
        names = product_of(graph, node).names  # type: ignore[arg-type]
        if "o_proj" not in names[0]:
            return
        scale = np.abs(weight).max(1, keepdims=True) / 127
        rounded = np.rint(weight / scale) * scale
        error, output = ((x @ matrix.T).astype(np.float64) for matrix in (rounded - weight, weight))
        wanted[names] = np.sqrt(np.sum(error**2) / np.sum(output**2))

    with open_checkpoint(checkpoint) as opened:
        graph = fused_graph(opened, config)
        tokens = np.concatenate(sequences)
        evaluate_batch(graph, Batch(tokens, tuple(map(len, sequences))), observe)
    assert len(wanted) == 3
    for names, error in wanted.items():
        assert found[names].int8 == pytest.approx(error, rel=1e-3), names
    assert all(0 < each.int8 < each.int4 < 0.5 for each in found.values())


def test_what_can_be_held_exactly_costs_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def steps(weight: np.ndarray) -> np.ndarray:
        codes = np.random.default_rng(0).integers(-7, 8, weight.shape)
        codes[:, ::32] = -8
        return (codes / 64).astype(weight.dtype)

    model = changed(checkpoint, tmp_path / "model", name, steps)
    known = calibrate(CalibrationRequest(str(model), text, tmp_path / "c", 500))
    error = next(each for each in layer_errors(str(model), known) if each.names == (name.removesuffix(".weight"),))
    assert error.int4 == 0
    assert error.int8 > 0


def test_what_stands_out_is_named_and_can_be_built_with(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Weights of which some in each group are far larger than the others, though what they read is as much smaller."""

    def larger(weight: np.ndarray) -> np.ndarray:
        weight[:, ::8] *= 64
        return weight

    def smaller(values: np.ndarray) -> np.ndarray:
        values[::8] /= 64
        return values

    attention = "model.layers.0.self_attn"
    model = changed(checkpoint, tmp_path / "0", f"{attention}.o_proj.weight", larger)
    for number, kind in enumerate(("weight", "bias"), 1):
        model = changed(model, tmp_path / f"{number}", f"{attention}.v_proj.{kind}", smaller)
    known = calibrate(CalibrationRequest(str(model), text, tmp_path / "c", 500))
    document = json.loads(run(model, "--calibration", known, "--json", "--threads", 1).stdout)
    told = run(model, "--calibration", known, "--threads", 2)
    advice = document["build_with"]
    assert "model.layers.0.self_attn.o_proj=int8" in advice
    assert shlex.join(advice) in told.stdout
    worst = max(document["products"], key=lambda each: each["int4"])
    assert told.stdout.splitlines()[1].startswith(worst["names"][0])
    options = {"precision": "int4", "layer_precisions": tuple(advice[1::2]), "calibration": known}
    built = compile_to(model, tmp_path / "engine", **options)
    assert (built / "manifest.json").exists()


def test_finer_groups_cost_less(checkpoint: Path, calibration: Path) -> None:
    def total(**options: object) -> float:
        return sum(each.int4 for each in layer_errors(str(checkpoint), calibration, **options))  # type: ignore[arg-type]

    assert total(zero_points=True) < total() < total(group_size=128)


def test_another_checkpoints_calibration_is_refused(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    model = changed(checkpoint, tmp_path / "model", "model.norm.weight", lambda weight: replace_first(weight))
    result = run(model, "--calibration", calibration)
    assert result.exit_code == 2
    assert "CompileError" in result.stderr
    with pytest.raises(CompileError):
        layer_errors(str(model), calibration)


def replace_first(weight: np.ndarray) -> np.ndarray:
    weight[0] += 1
    return weight


def test_a_weight_that_is_not_finite_is_told(tmp_path: Path, text: Path) -> None:
    """Though the calibration knows nothing of it: a row of the embedding, which is the head's too."""
    make_checkpoint("llama-tied-llama3", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][2] = np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    known = calibrate(CalibrationRequest(str(tmp_path), text, tmp_path / "c", 500))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds what is no finite number"):
        layer_errors(str(tmp_path), known)
