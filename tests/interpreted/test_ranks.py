"""Plans of several ranks, executed together: transformers' logits, on every rank the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.write import write_weights
from enginery.plugins.all_reduce import cuda as all_reduce

from ..tiny import logits, make_checkpoint
from .device import Device, Piece, step_of_ranks
from .test_plan import BOUND, LIMITS, PROMPT, error


def make_ranks(case: str, directory: Path, world_size: int, **options: Any) -> tuple[list[Device], Any]:
    """Devices with the ranks of a tiny checkpoint's engine, and transformers' model."""
    model, devices = make_checkpoint(case, directory / "model"), []
    request = BuildRequest(str(directory / "model"), None, tensor_parallel_size=world_size, **options)
    with prepare(request) as prepared:
        for index, rank in enumerate(prepared.ranks):
            weights = directory / f"weights{index}"
            write_weights(weights, rank.jobs, index, 1, lambda count: None)
            devices.append(Device(rank.plan, rank.kernels, weights, LIMITS, num_blocks=8))
    return devices, model


@pytest.mark.parametrize(
    ("case", "world_size", "target", "precision", "kv_cache_dtype"),
    [
        ("llama", 2, "h100", "bf16", "auto"),
        pytest.param("gemma3_text", 2, "h100", "bf16", "auto", marks=pytest.mark.heavy),
        pytest.param("qwen2", 2, "a100", "int8", "int8", marks=pytest.mark.heavy),
        pytest.param("llama-tied-llama3", 2, "b200", "fp8", "fp8", marks=pytest.mark.heavy),
        pytest.param("llama-biases", 2, "h100", "fp8", "bf16", marks=pytest.mark.heavy),
        pytest.param("phi3-partial", 2, "rtx5090", "bf16", "auto", marks=pytest.mark.heavy),
    ],
)
def test_ranks_give_the_logits_of_transformers(
    case: str, world_size: int, target: str, precision: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    options = {"target": target, "precision": precision, "kv_cache_dtype": kv_cache_dtype}
    ranks, model = make_ranks(case, tmp_path, world_size, **options)
    bound, wanted, blocks = max(BOUND[precision], BOUND[kv_cache_dtype]), logits(model, PROMPT), [5, 2]
    steps = [
        ([Piece(PROMPT[:70], 0, 70, blocks)], [69], [wanted[69]]),
        ([Piece(PROMPT[70:71], 70, 70, blocks)], [], []),  # whose logits nobody wants
        ([Piece(PROMPT[71:72], 71, 70, blocks)], [0], [wanted[71]]),
        (
            [Piece(PROMPT[72:73], 72, 70, blocks), Piece(PROMPT[:9], 0, 9, [7])],
            [0, 9],
            [wanted[72], logits(model, PROMPT[:9])[8]],
        ),
    ]
    for index, (pieces, rows, scores) in enumerate(steps):
        order = ranks if index % 2 else ranks[::-1]
        found = step_of_ranks(order, pieces, rows)
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        for row, score in zip(found[0], scores, strict=True):
            assert error(row, score) < bound


def test_sums_that_a_library_may_do_leave_the_residual_to_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce, "_LIBRARY_BYTES", 8 << 8)  # of a row 256 bytes
    ranks, model = make_ranks("llama", tmp_path, 2, target="h100", precision="bf16")
    wanted = logits(model, PROMPT)
    for tokens, known in ((20, 0), (4, 20), (9, 24)):
        piece = Piece(PROMPT[known : known + tokens], known, 33, [5])
        for found in step_of_ranks(ranks, [piece], [tokens - 1]):
            assert error(found[0], wanted[known + tokens - 1]) < BOUND["bf16"]
