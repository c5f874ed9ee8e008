"""The evaluator with BLAS computes what the models do, sequences together as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from enginery.compiler.calibration.evaluate import Batch, evaluate_batch
from enginery.compiler.calibration.gather import fused_graph
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.models import read_config

from ...tiny import CASES, logits, make_checkpoint

SEQUENCES = [[int(token) for token in np.random.default_rng(n).integers(3, 250, n)] for n in (61, 1, 30)]


def run(directory: Path, sequences: list[list[int]]) -> tuple[Any, dict[str, Any]]:
    """Logits, and the input of every product by its node's name."""
    seen: dict[str, Any] = {}

    def observe(node: ir.Node, x: Any) -> None:
        seen[node.name or ""] = x

    with open_checkpoint(directory) as checkpoint:
        graph = fused_graph(checkpoint, read_config(directory))
        batch = Batch(np.concatenate(sequences), tuple(map(len, sequences)))
        return evaluate_batch(graph, batch, observe), seen


@pytest.mark.parametrize("case", CASES)
def test_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    model = make_checkpoint(case, tmp_path)
    wanted = np.concatenate([logits(model, sequence) for sequence in SEQUENCES])
    got, _ = run(tmp_path, SEQUENCES)
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", ["llama", "mistral-window", "phi3-longrope"])
def test_sequences_together_are_as_alone(case: str, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path)
    together, seen = run(tmp_path, SEQUENCES)
    alone = [run(tmp_path, [sequence]) for sequence in SEQUENCES]
    np.testing.assert_allclose(together, np.concatenate([each for each, _ in alone]), rtol=1e-4, atol=1e-5)
    for name, x in seen.items():
        single = np.concatenate([inputs[name] for _, inputs in alone])
        np.testing.assert_allclose(x, single, rtol=1e-4, atol=1e-5, err_msg=name)
