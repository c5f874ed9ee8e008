"""Every architecture's graph, at every stage, gives transformers' logits; so do two ranks together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.graph.builder import GraphBuilder
from enginery.compiler.graph.evaluate import evaluate, evaluate_ranks, whole_prompt_inputs
from enginery.compiler.models import build_graph, read_config
from enginery.compiler.passes import run_passes
from enginery.compiler.passes.options import Options
from enginery.engines.precisions import find_precision
from enginery.engines.targets import TARGETS
from transformers.models.gemma3 import modeling_gemma3

from ..tiny import CASES, logits, make_checkpoint

PROMPT = [int(token) for token in np.random.default_rng(3).integers(3, 250, 61)]
AVX2 = TARGETS["cpu-avx2"]
FP32 = Options(AVX2, find_precision("fp32", AVX2), "f32")


def relative_error(got: Any, wanted: Any) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def stage_errors(case: str, directory: Path) -> dict[str, float]:
    """Of each stage of the graph, against transformers."""
    wanted = logits(make_checkpoint(case, directory), PROMPT)
    config = read_config(directory)
    errors: dict[str, float] = {}

    def observe(stage: str, g: GraphBuilder) -> None:
        rows = None if stage in ("model", "select_rows", "quantize") else 5
        got = evaluate(g.graph, whole_prompt_inputs(g.graph, PROMPT, rows))["logits"]
        errors[stage] = relative_error(got, wanted[-len(got) :])

    with open_checkpoint(directory) as checkpoint:
        run_passes(build_graph(config, checkpoint), FP32, observe)
    return errors


@pytest.mark.parametrize("case", CASES)
def test_every_stage_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    errors = stage_errors(case, tmp_path)
    assert len(errors) == 12
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("target", ["cpu-avx2", "cuda-sm90"])
@pytest.mark.parametrize("case", ["llama-biases", "llama-tied-llama3", "qwen2", "qwen3", "phi3", "gemma3_text-softcap"])
def test_two_ranks_give_the_logits_of_one(case: str, target: str, tmp_path: Path) -> None:
    wanted = logits(make_checkpoint(case, tmp_path), PROMPT)
    config = read_config(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        graphs = []
        for rank in range(2):
            g = build_graph(config, checkpoint)
            run_passes(g, Options(TARGETS[target], FP32.precision, "f32", rank, 2))
            graphs.append(g.graph)
        outputs = evaluate_ranks(graphs, [whole_prompt_inputs(graph, PROMPT) for graph in graphs])
    assert [relative_error(output["logits"], wanted) < 2e-5 for output in outputs] == [True, True]


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.1), ("int8", 0.2)])
def test_lower_precisions_stay_near(precision: str, bound: float, tmp_path: Path) -> None:
    wanted = logits(make_checkpoint("llama", tmp_path), PROMPT)
    with open_checkpoint(tmp_path) as checkpoint:
        g = build_graph(read_config(tmp_path), checkpoint)
        run_passes(g, Options(FP32.target, find_precision(precision, AVX2), "bf16"))
        got = evaluate(g.graph, whole_prompt_inputs(g.graph, PROMPT))["logits"]
    assert 1e-4 < relative_error(got, wanted) < bound


@pytest.mark.parametrize("case", ["llama", "phi3", "qwen3", "gemma3_text-softcap"])
def test_every_norm_has_the_epsilon_of_the_config(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = CASES[case]
    monkeypatch.setitem(CASES, case, (kind, changes | {"rms_norm_eps": 0.3}))
    assert max(stage_errors(case, tmp_path).values()) < 2e-5


def test_attention_is_soft_capped_where_the_config_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Gemma 3 has the cap in its attention, but does not pass the config's on."""
    case = "gemma3_text-softcap"
    kind, changes = CASES[case]
    assert max(stage_errors(case, tmp_path / "uncapped").values()) < 2e-5
    monkeypatch.setitem(CASES, case, (kind, changes | {"attn_logit_softcapping": 1.5}))
    assert max(stage_errors(case, tmp_path / "ignored").values()) > 1e-2
    capped = partial(modeling_gemma3.eager_attention_forward, softcap=1.5)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
    assert max(stage_errors(case, tmp_path / "capped").values()) < 2e-5
