"""Ranks on several GPUs of the driver that has none (fake_cuda.cpp): contexts, peer access, and what may be missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .cuda_engines import build_shell
from .test_cuda_driver import BREAK, COMPILER, GENERATE, Launch, compile_fake, run

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shell("llama", tmp_path_factory.mktemp("engine"), precision="bf16", tensor_parallel_size=2)


def generate(fake: Path, engine: Path, log: Path, count: int, **knobs: Any) -> list[str]:
    """The driver's log of a prompt and its answer."""
    assert json.loads(run(GENERATE, fake, engine, {"LOG": log, "COUNT": count}, **knobs)) == [[0] * 5]
    return log.read_text().splitlines()


def test_ranks_on_two_gpus_reach_each_other(fake: Path, ranks: Path, tmp_path: Path) -> None:
    lines = generate(fake, ranks, tmp_path / "log", 3, gpus=[2, 0])
    assert sorted(line for line in lines if line.startswith("peer")) == ["peer 0 reaches 2", "peer 2 reaches 0"]
    assert lines[-1] == "free 0"


def test_ranks_on_one_gpu_need_not(fake: Path, ranks: Path, tmp_path: Path) -> None:
    lines = generate(fake, ranks, tmp_path / "log", 1, gpus=[0, 0])
    assert not [line for line in lines if line.startswith("peer")]
    # Both read the same addresses of the same two buffers, their own number apart.
    launches = [Launch.of(line) for line in lines if line.startswith("launch all_reduce")]
    assert launches
    first, second = ([each for each in launches if each.arguments[-4] == rank] for rank in ("0", "1"))
    assert len(first) == len(second) == len(launches) / 2
    assert [each.arguments[0] for each in first] == [each.arguments[0] for each in second]
    assert len({each.arguments[0] for each in launches}) == 2
    assert lines[-1] == "free 0"


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one gpu": ({"COUNT": 1}, {}, "It has 2 ranks (--tensor-parallel-size), each for a GPU of its own; the NVIDIA"),
    "no such gpu": ({"COUNT": 2}, {"gpus": [0, 2]}, "There is no GPU 2: the NVIDIA driver shows 2, counted from 0."),
    "a gpu too many": ({"COUNT": 2}, {"gpus": [0]}, "gpus names 1; "),
    "no way": ({"COUNT": 2, "PEERS": 0}, {}, "GPU 0 cannot read the memory of GPU 1, which ranks of one engine must"),
    "a way that fails": ({"COUNT": 2, "PEERS": 2}, {}, "cuCtxEnablePeerAccess says CUDA_ERROR_FAKE (1)"),
    "small": (
        {"COUNT": 1, "MEMORY": 560 << 20},
        {"gpus": [0, 0]},
        "Fake GPU has 587 MB, of which others hold 0 bytes;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_with_their_remedy(fake: Path, ranks: Path, fault: str) -> None:
    settings, knobs, message = FAULTS[fault]
    refusal = run(GENERATE, fake, ranks, settings, **knobs)
    assert "Error: " in refusal
    assert message in refusal
    assert "--gpus" in refusal or "--gpu-memory-utilization" in refusal


def test_the_rank_that_did_not_come_is_told(fake: Path, ranks: Path) -> None:
    first, second = run(BREAK, fake, ranks, {"COUNT": 2}).splitlines()
    assert "Rank 0 of 2, on GPU 0: The GPU failed: cuEventSynchronize says" in first
    assert "has not come" not in first
    assert "restart the server" in second
    first, _ = run(BREAK, fake, ranks, {"COUNT": 2, "LATE": 1}).splitlines()
    assert "Rank 0 of 2, on GPU 0: The GPU failed: " in first
    assert "Rank 1, on GPU 1, has not come to the end of the step." in first
    first, _ = run(BREAK, fake, ranks, {"COUNT": 2, "LATE": 0}).splitlines()
    assert "Rank 1 of 2, on GPU 1: The GPU failed: " in first
    assert "Rank 0, on GPU 0, has not come to the end of the step." in first
