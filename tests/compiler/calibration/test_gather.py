"""Statistics are those of transformers' own activations, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enginery.compiler.calibration import gather
from enginery.compiler.calibration.gather import gather_statistics
from enginery.compiler.calibration.statistics import Statistics
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.models import read_config
from enginery.engines.errors import CheckpointError
from safetensors.numpy import load_file, save_file

from ...tiny import make_checkpoint

SEQUENCES = [[int(token) for token in np.random.default_rng(n).integers(3, 250, n)] for n in (61, 60, 30)]


def statistics_of(directory: Path) -> list[Statistics]:
    with open_checkpoint(directory) as checkpoint:
        return gather_statistics(checkpoint, read_config(directory), SEQUENCES)


def hooked(model: Any) -> dict[str, Any]:
    """The input of every linear layer [tokens, K], by its weight's name."""
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs: seen.setdefault(f"{name}.weight", []).append(inputs[0].flatten(0, -2).numpy())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(torch.tensor([sequence]))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("case", ["llama", "llama-wide-heads", "qwen3", "phi3", "gemma3_text"])
def test_statistics_are_those_of_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_BATCH_TOKENS", 122)  # two batches
    wanted = hooked(make_checkpoint(case, tmp_path))
    if "lm_head.weight" in wanted and read_config(tmp_path).tied:
        wanted["model.embed_tokens.weight"] = wanted.pop("lm_head.weight")
    found = statistics_of(tmp_path)
    assert sorted(name for entry in found for name in entry.tensors) == sorted(wanted)
    for entry in found:
        for name in entry.tensors:
            x = wanted[name]
            np.testing.assert_allclose(entry.absmax, np.abs(x).max(axis=0), rtol=1e-4, atol=1e-5, err_msg=name)
            moments = x.T.astype(np.float64) @ x / len(x)
            for index, block in enumerate(entry.moments):
                part = moments[index * 128 : index * 128 + 128, index * 128 : index * 128 + 128]
                size = len(part)
                np.testing.assert_allclose(block[:size, :size], part, rtol=1e-4, atol=1e-4 * moments.max())
                assert not block[size:].any()
                assert not block[:, size:].any()


def test_what_reads_one_activation_shares_its_statistics(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    shared = [[name.rpartition("layers.0.")[2] for name in entry.tensors] for entry in statistics_of(tmp_path)]
    assert shared[0] == [f"self_attn.{name}_proj.weight" for name in "qkv"]
    assert shared[2] == [f"mlp.{name}_proj.weight" for name in ("gate", "up")]


def test_batches_hold_at_least_one_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    whole = statistics_of(tmp_path)
    monkeypatch.setattr(gather, "_BATCH_TOKENS", 7)
    for one, other in zip(whole, statistics_of(tmp_path), strict=True):
        np.testing.assert_allclose(one.moments, other.moments, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.absmax, other.absmax, rtol=1e-4, atol=1e-5)


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(1e30)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the input of model\.layers\.1\.mlp\.down_proj\.weight is not finite"):
        statistics_of(tmp_path)
