"""The plans of GPU engines, executed launch by launch: transformers' logits, in whatever steps they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.write import write_weights
from numpy.typing import NDArray

from ..tiny import logits, make_checkpoint
from .device import Device, Piece

LIMITS = {"tokens": 160, "rows": 8, "sequences": 8, "decodes": 8, "tiles": 16, "max_blocks": 4}
PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 250, 75)]


def make_device(case: str, directory: Path, precision: str, kv_cache_dtype: str = "auto") -> tuple[Device, Any]:
    """A device with the engine of a tiny checkpoint, and transformers' model."""
    model = make_checkpoint(case, directory / "model")
    request = BuildRequest(
        str(directory / "model"), None, target="h100", precision=precision, kv_cache_dtype=kv_cache_dtype
    )
    with prepare(request) as prepared:
        rank = prepared.ranks[0]
        write_weights(directory / "weights", rank.jobs, 0, 1, lambda count: None)
    return Device(rank.plan, rank.kernels, directory / "weights", LIMITS, num_blocks=8), model


def error(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# What a type may cost against transformers in float32, in models as sensitive as random ones are.
BOUND = {"auto": 0.03, "bf16": 0.03, "int8": 0.06, "fp8": 0.2}


@pytest.mark.parametrize(
    ("case", "precision", "kv_cache_dtype"),
    [
        ("llama", "bf16", "auto"),
        ("gemma3_text-softcap", "fp8", "fp8"),
        pytest.param("llama-biases", "fp8", "int8", marks=pytest.mark.heavy),
        pytest.param("qwen3", "fp8", "bf16", marks=pytest.mark.heavy),
        pytest.param("qwen2", "int8", "int8", marks=pytest.mark.heavy),
        pytest.param("mistral-window", "bf16", "fp8", marks=pytest.mark.heavy),
        pytest.param("phi3-longrope", "bf16", "int8", marks=pytest.mark.heavy),
        pytest.param("llama-odd-sizes", "int8", "auto", marks=pytest.mark.heavy),
    ],
)
def test_steps_of_any_form_give_the_logits_of_transformers(
    case: str, precision: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    device, model = make_device(case, tmp_path, precision, kv_cache_dtype)
    bound, wanted, blocks = max(BOUND[precision], BOUND[kv_cache_dtype]), logits(model, PROMPT), [5, 2]
    whole = device.step([Piece(PROMPT[:70], 0, 70, blocks)], [69])
    assert error(whole[0], wanted[69]) < bound
    # One more token, in a step with the beginning of another sequence.
    both = device.step([Piece(PROMPT[70:71], 70, 70, blocks), Piece(PROMPT[:9], 0, 9, [7])], [0, 9])
    assert error(both[0], wanted[70]) < bound
    assert error(both[1], logits(model, PROMPT[:9])[8]) < bound
    alone = device.step([Piece(PROMPT[71:72], 71, 70, blocks)], [0])
    assert error(alone[0], wanted[71]) < bound
