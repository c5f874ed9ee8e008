"""What `build-engine --plan` tells before anything is read is what the runtime then maps and allocates."""

from __future__ import annotations

import re
from pathlib import Path

import enginery
import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.defaults import SHARED_SCRATCH_BYTES, THREAD_SCRATCH_BYTES

from ..tiny import make_checkpoint

KERNEL_HEADER = Path(__file__).resolve().parents[2] / "plugins" / "kernel.h"


@pytest.mark.parametrize(("case", "precision"), [("qwen3", "int8"), ("gemma3_text", "fp32"), ("llama-biases", "bf16")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_is_what_the_runtime_takes(case: str, precision: str, ranks: int, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path / "model")
    request = BuildRequest(
        str(tmp_path / "model"), tmp_path / "engine", precision=precision, tensor_parallel_size=ranks
    )
    with prepare(request) as prepared:
        planned = prepared.memory(num_threads=2)
        engine = build(prepared)
    budget = planned.sequence_bytes(256) * 3
    with enginery.Engine.load(engine, num_threads=2 * ranks, kv_cache_memory_bytes=budget) as loaded:
        memory = loaded.stats()["memory"]
    assert memory["weights"] == pytest.approx(planned.weights, rel=0.02)
    assert memory["activations"] == pytest.approx(planned.activations, rel=0.02)
    assert 0.8 * budget < memory["state"] <= budget


def test_scratch_is_what_the_kernels_have() -> None:
    text = KERNEL_HEADER.read_text()
    sizes = dict(re.findall(r"k(\w+)ScratchBytes = int64_t\{1\} << (\d+);", text))
    assert 1 << int(sizes["Thread"]) == THREAD_SCRATCH_BYTES
    assert 1 << int(sizes["Shared"]) == SHARED_SCRATCH_BYTES
