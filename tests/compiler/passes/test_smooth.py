"""Smoothing changes what is quantized, and no result of exact arithmetic: the same bits, of every architecture."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate
from enginery.compiler.calibration.file import read_calibration
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.checkpoint.weights import Part, Weight
from enginery.compiler.graph.builder import GraphBuilder, weight_of
from enginery.compiler.graph.evaluate import evaluate, evaluate_ranks, whole_prompt_inputs
from enginery.compiler.graph.rewrite import input_of, is_ours
from enginery.compiler.models import build_graph, read_config
from enginery.compiler.passes import run_passes
from enginery.compiler.passes.options import Options
from enginery.engines.precisions import find_precision
from enginery.engines.targets import TARGETS
from safetensors.numpy import load_file, save_file

from ...tiny import make_checkpoint

PROMPT = [int(token) for token in np.random.default_rng(3).integers(3, 250, 61)]
AVX2 = TARGETS["cpu-avx2"]
FP32, INT8 = (Options(AVX2, find_precision(name, AVX2), "f32") for name in ("fp32", "int8"))


def rescale(directory: Path, scales: dict[str, Any]) -> None:
    """Multiplies rows and columns of tensors: name -> (index, factor)."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    for name, (index, factor) in scales.items():
        tensors[name][index] *= np.float32(factor)
    save_file(tensors, path, metadata={"format": "pt"})


def add_outliers(directory: Path, layers: int = 3) -> None:
    """Some channels of the norms a hundred times as large, the columns that read them as much smaller."""
    scales: dict[str, Any] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm, names in (("input", "self_attn.q self_attn.k self_attn.v"), ("post_attention", "mlp.gate mlp.up")):
            scales[f"{prefix}.{norm}_layernorm.weight"] = ([3, 17], 100)
            scales |= {f"{prefix}.{name}_proj.weight": (np.s_[:, [3, 17]], 0.01) for name in names.split()}
    rescale(directory, scales)


@contextmanager
def graphs(directory: Path, tmp_path: Path, *wanted: Options) -> Iterator[list[GraphBuilder]]:
    """The model after all passes, with a calibration where `options` have none, without where they say so."""
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 600))))
    file = calibrate(CalibrationRequest(str(directory), text, tmp_path / "calibration", 500))
    with open_checkpoint(directory) as checkpoint:
        found, made = read_calibration(file, checkpoint), []
        for options in wanted:
            g = build_graph(read_config(directory), checkpoint)
            run_passes(g, replace(options, calibration=found))
            made.append(g)
        yield made


def plain_graph(directory: Path, options: Options) -> Any:
    with open_checkpoint(directory) as checkpoint:
        g = build_graph(read_config(directory), checkpoint)
        run_passes(g, options)
        return run(g)


def run(g: GraphBuilder) -> Any:
    return evaluate(g.graph, whole_prompt_inputs(g.graph, PROMPT))["logits"]


def smoothed(g: GraphBuilder) -> dict[str, bool]:
    """Of each product, whether its columns have factors that are not all 1."""
    products = {node.name or "": weight_of(input_of(node, 1)) for node in g.graph if is_ours(node, "Linear")}
    return {
        name: weight.column_factors is not None and bool((weight.column_factors.values != 1).any())
        for name, weight in products.items()
    }


@pytest.mark.parametrize(
    "case", ["llama", "llama-biases", "llama-tied-llama3", "qwen2", "qwen3", "phi3", "gemma3_text-softcap"]
)
def test_exact_results_stay_the_same_bits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(case, tmp_path)
    module = importlib.import_module("enginery.compiler.passes.smooth")
    monkeypatch.setattr(module, "_WORTH_IT", np.inf)  # without outliers too
    with graphs(tmp_path, tmp_path, FP32) as (g,):
        np.testing.assert_array_equal(run(g), plain_graph(tmp_path, FP32))
        assert any(smoothed(g).values())


def test_outliers_cost_int8_nothing(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    exact = plain_graph(tmp_path, FP32)
    usual = np.abs(plain_graph(tmp_path, INT8) - exact).mean()
    add_outliers(tmp_path)
    worse = np.abs(plain_graph(tmp_path, INT8) - exact).mean()
    with graphs(tmp_path, tmp_path, INT8) as (g,):
        better = np.abs(run(g) - exact).mean()
        assert all(smoothed(g)[f"layers.{layer}.{name}"] for layer in (0, 1) for name in ("qkv", "gate_up"))
    assert worse > 4 * usual
    assert better < 1.1 * usual


def test_outliers_of_the_gated_product_go_to_up(tmp_path: Path) -> None:
    make_checkpoint("llama-biases", tmp_path)
    exact = plain_graph(tmp_path, FP32)
    up, down = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj.weight"
    rescale(tmp_path, {f"{up}.weight": ([5], 256), f"{up}.bias": ([5], 256), down: (np.s_[:, 5], 1 / 256)})
    worse = np.abs(plain_graph(tmp_path, INT8) - exact).mean()
    with graphs(tmp_path, tmp_path, INT8, FP32) as (g, same):
        better = np.abs(run(g) - exact).mean()
        np.testing.assert_allclose(run(same), exact, rtol=1e-5, atol=1e-5)
    assert better < 0.7 * worse


@pytest.mark.parametrize("size", [3, 10, 30])
def test_outliers_of_some_tokens_alone_are_not_made_worse(size: float, tmp_path: Path) -> None:
    """Half of the tokens have none: what SiLU lets through."""
    make_checkpoint("llama", tmp_path)
    rescale(tmp_path, {f"model.layers.1.mlp.{name}_proj.weight": ([5], size) for name in ("gate", "up")})
    exact = plain_graph(tmp_path, FP32)
    usual = np.abs(plain_graph(tmp_path, INT8) - exact).mean()
    with graphs(tmp_path, tmp_path, INT8) as (g,):
        assert np.abs(run(g) - exact).mean() < 1.1 * usual


def test_factors_that_overflow_are_not_taken(tmp_path: Path) -> None:
    class Known:
        def absmax(self, weight: Weight) -> Any:
            return np.array([1, 1, 2**20, 1], np.float32)

        def samples(self, weight: Weight) -> Any:
            return np.array([[1, 1, 2**20, 1], [0, 1, 0, 1]], np.float32)

    (tmp_path / "config.json").write_text("{}")
    save_file({"w": np.full((8, 4), 1e38, np.float32)}, tmp_path / "model.safetensors")
    choose: Any = importlib.import_module("enginery.compiler.passes.smooth")._choose
    with open_checkpoint(tmp_path) as checkpoint:
        weight = Weight(checkpoint, (Part("w", (0, 8), (0, 4)),), vector=False)
        assert list(choose(Known(), "int8", [weight])) == [1, 1, 1, 1]


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_dead_channels_stay_as_they_are(case: str, tmp_path: Path) -> None:
    """A norm that lets nothing through a channel, one that lets nothing through, columns that nobody fills."""
    make_checkpoint(case, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    zero = -1 if "gemma" in case else 0
    tensors["model.layers.0.input_layernorm.weight"][7] = zero
    tensors["model.layers.1.input_layernorm.weight"][:] = zero
    for name in "qkv":
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"][:, 9] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    with graphs(tmp_path, tmp_path, FP32) as (g,):
        np.testing.assert_array_equal(run(g), plain_graph(tmp_path, FP32))
        weights = {node.name: weight_of(input_of(node, 1)) for node in g.graph if is_ours(node, "Linear")}
        first, second = (weights[f"layers.{layer}.qkv"].column_factors for layer in (0, 1))
        assert first is not None
        assert second is not None
        assert list(first.values[[7, 9]]) == [1, 1]
        assert (second.values == 1).all()


def test_a_tied_head_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint("llama-tied-llama3", tmp_path)
    with graphs(tmp_path, tmp_path, FP32) as (g,):
        assert not smoothed(g)["lm_head"]


def test_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    make_checkpoint("llama-biases", tmp_path)
    add_outliers(tmp_path)
    wanted = plain_graph(tmp_path, FP32)
    ranks = [replace(FP32, rank=rank, world_size=2) for rank in range(2)]
    with graphs(tmp_path, tmp_path, *ranks) as made:
        inputs = [whole_prompt_inputs(g.graph, PROMPT) for g in made]
        for outputs in evaluate_ranks([g.graph for g in made], inputs):
            np.testing.assert_allclose(outputs["logits"], wanted, rtol=1e-4, atol=1e-4)
        assert all(any(smoothed(g).values()) for g in made)
