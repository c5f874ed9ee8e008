"""Large sums by NCCL, on a driver and a library without a GPU (fake_cuda.cpp, fake_nccl.cpp): which launches it does,
with what, and what happens where it is missing, old, or fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.plan import Launch, Plan, Value
from enginery.engines.plan_format import decode_plan
from enginery.engines.targets import TARGETS
from enginery.plugins.all_reduce import cuda as all_reduce
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import open_engine
from enginery.runtime.gpus import Gpu
from enginery.runtime.loader import read_ranks
from enginery.runtime.prepare import prepare_core

from .cuda_engines import build_shell
from .test_cuda_driver import COMPILER, HERE, ROOT, _includes, compile_fake, run
from .test_cuda_driver import Launch as Kernel

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}")

PROMPT = 70
GENERATE = f"""
import enginery
with enginery.Engine.load(sys.argv[1], max_num_seqs=4, num_threads=1, **json.loads(sys.argv[2])) as engine:
    print(engine.stats()["sums_by"])
    params = enginery.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    print(engine.generate([[5] * {PROMPT}], params)[0].outputs[0].token_ids)
"""
# Two sequences that decode: as a graph that is captured when they first ask for logprobs.
DECODE = """
import enginery
with enginery.Engine.load(sys.argv[1], max_num_seqs=4, num_threads=1) as engine:
    params = enginery.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2)
    print([output.outputs[0].token_ids for output in engine.generate([[5], [6]], params)])
"""
BREAK = """
import enginery
with enginery.Engine.load(sys.argv[1], max_num_seqs=4, num_threads=1) as engine:
    os.environ.update(json.loads(sys.argv[2]))
    for prompt in ([5] * 70, [5]):
        try:
            engine.generate([prompt])
        except enginery.EngineryError as error:
            print(error)
"""


def compile_library(directory: Path, *options: str) -> Path:
    """The driver's directory, with the library beside it."""
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{ROOT}", *options, str(HERE / "fake_nccl.cpp")]
    subprocess.run([*command, "-o", str(directory / "libnccl.so.2")], check=True)
    return directory


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(compile_fake(tmp_path_factory.mktemp("fake")))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, whose kernels alone sum one row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_reduce, "_LIBRARY_BYTES", 1)
        return build_shell("llama", tmp_path_factory.mktemp("engine"), precision="bf16", tensor_parallel_size=2)


def plan_of(engine: Path) -> Plan:
    return decode_plan((engine / "plan.rank0.msgpack").read_bytes(), "plan")


def collectives_of(engine: Path, domain: str) -> list[Launch]:
    """The launches that a library may do, of tokens or rows."""
    launches = [each for each in plan_of(engine).forward if isinstance(each, Launch) and each.collective is not None]
    return [each for each in launches if each.arguments["count"] == Value("i32", domain)]


@dataclass
class Sum:
    """A line of the log."""

    rank: int
    gpu: int
    count: int
    stream: int
    part: int
    sum: int

    @staticmethod
    def of(line: str) -> Sum:
        found = re.fullmatch(r"nccl rank (\d+) gpu (\d+) sums (\d+) stream (\d+) from (\d+) to (\d+)", line)
        assert found is not None, line
        return Sum(*map(int, found.groups()))


def offsets_of(engine: Path) -> dict[str, int]:
    """Of buffers in the arena, where the scripts above load the engine."""
    files, found = open_engine(engine), [Gpu("Fake GPU", 90, 4 << 30, 4 << 30, number) for number in (0, 1)]
    made = prepare_core(files, read_ranks(files), TARGETS["cuda-sm90"], EngineConfig(max_num_seqs=4), found)
    return {buffer["name"]: buffer["offset"] for buffer in made.spec["ranks"][0]["buffers"]}


def environment(log: Path, **more: Any) -> dict[str, Any]:
    return {"LOG": log, "COUNT": 2, **more}


def test_ranks_join_sum_and_leave(fake: Path, engine: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(GENERATE, fake, engine, environment(log)).splitlines() == ["NCCL 2.27.3", "[0, 0, 0]"]
    lines = log.read_text().splitlines()
    assert sorted(line for line in lines if "joins" in line) == [f"nccl rank {i} gpu {i} joins 2" for i in (0, 1)]
    assert sorted(line for line in lines if "leaves" in line) == [f"nccl rank {i} gpu {i} leaves" for i in (0, 1)]
    assert lines[-1] == "free 0"

    # The prompt's sums of 70 tokens, by each rank in the order of the plan, in memory of its own; no kernel's.
    wanted = collectives_of(engine, "tokens")
    assert len(wanted) > 2
    sums = [Sum.of(line) for line in lines if " sums " in line]
    assert len(sums) == 2 * len(wanted)
    offsets = offsets_of(engine)
    for rank in (0, 1):
        own = [each for each in sums if each.rank == rank]
        assert {(each.gpu, each.count, each.stream) for each in own} == {(rank, PROMPT * 128, rank + 1)}
        names = [(each.operands["parts"].name, each.operands["out"].name) for each in wanted]
        apart = [(each.part - own[0].part, each.sum - own[0].part) for each in own]
        first = offsets[names[0][0]]
        assert apart == [(offsets[part] - first, offsets[total] - first) for part, total in names]
    # A kernel's table of parts begins with the address on rank 0, of which the log has half the bits.
    parts = {each.part & 0xFFFFFFFF for each in sums if each.rank == 0}
    launches = [Kernel.of(line) for line in lines if line.startswith(("launch all_reduce", "launch all_gather"))]
    assert parts == {int(launch.arguments[0].removeprefix("*")) for launch in launches}


def test_graphs_hold_kernels(fake: Path, engine: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(DECODE, fake, engine, environment(log)).strip() == "[[0, 0, 0], [0, 0, 0]]"
    lines = log.read_text().splitlines()
    last = max(index for index, line in enumerate(lines) if " joins " in line)
    assert any(line.startswith("graph") for line in lines[last:])
    assert any(line.startswith("replay") for line in lines[last:])


def kernels_alone(fake: Path, engine: Path, log: Path, **changes: Any) -> str:
    """What sums, where it is not the library."""
    settings, knobs = environment(log, **changes.pop("settings", {})), changes
    told, tokens = run(GENERATE, fake, engine, settings, **knobs).splitlines()
    assert tokens == "[0, 0, 0]"
    lines = log.read_text().splitlines()
    assert not any(line.startswith("nccl") for line in lines)
    counts = [line for line in lines if line.startswith("launch all_reduce")]
    assert len(counts) >= 2 * len(collectives_of(engine, "tokens"))
    return told


def test_no_library(engine: Path, tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libnccl.so.2')"]).returncode == 0:
        pytest.skip("this machine has NCCL")
    alone = tmp_path / "driver"
    alone.mkdir()
    told = kernels_alone(compile_fake(alone), engine, tmp_path / "log")
    assert told.startswith("kernels, as libnccl.so.2: cannot open shared object file")


def test_ranks_that_share_a_gpu(fake: Path, engine: Path, tmp_path: Path) -> None:
    assert kernels_alone(fake, engine, tmp_path / "log", gpus=[1, 1]) == "kernels, as ranks share a GPU"


def test_an_old_library(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = compile_library(compile_fake(tmp_path), "-DFAKE_NCCL_IS_OLD")
    told = kernels_alone(old, engine, tmp_path / "log")
    assert told == "kernels, as libnccl.so.2 is too old: it has no ncclAllReduce"
    compile_library(tmp_path)
    monkeypatch.setenv("FAKE_NCCL_VERSION", "2804")
    told = kernels_alone(old, engine, tmp_path / "log")
    assert told == "kernels, as libnccl.so.2 is too old: 2.8.4, wanted 2.18.0 or newer"


def test_one_rank_has_nothing_to_sum(fake: Path, tmp_path: Path) -> None:
    alone = build_shell("llama", tmp_path, precision="bf16")
    log = tmp_path / "log"
    assert run(GENERATE, fake, alone, environment(log)).splitlines() == ["", "[0, 0, 0]"]
    assert "nccl" not in log.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_cannot_join(
    fake: Path, engine: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_NCCL_INIT", str(rank))
    refusal = run(GENERATE, fake, engine, environment(log)).strip()
    assert refusal == (
        f"EngineryError: Rank {rank} of 2, on GPU {rank} cannot use NCCL 2.27.3: ncclCommInitRank says a fake error "
        f"(1): as the fake library says. NCCL_DEBUG=WARN tells more; without libnccl.so.2 kernels do its work."
    )
    lines = log.read_text().splitlines()
    assert f"nccl rank {1 - rank} gpu {1 - rank} leaves" in lines
    assert lines[-1] == "free 0"


def test_a_sum_that_fails_ends_the_service(fake: Path, engine: Path, tmp_path: Path) -> None:
    """The other rank's sum, which waits for it, ends too."""
    log = tmp_path / "log"
    first, second = run(BREAK, fake, engine, environment(log), FAKE_NCCL_SUM="1").splitlines()
    assert "Rank 1 of 2, on GPU 1 cannot use NCCL 2.27.3: ncclAllReduce says a fake error (1)" in first
    assert "restart the server" in second
    lines = log.read_text().splitlines()
    assert any("rank 0" in line and " sums " in line for line in lines)
    assert "waits in vain" not in lines
    assert sorted(line for line in lines if "leaves" in line) == [f"nccl rank {i} gpu {i} leaves" for i in (0, 1)]
    assert lines[-1] == "free 0"


def test_a_gpu_that_fails_is_heard_before_those_that_wait_for_it(fake: Path, engine: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    faults = {"FAKE_CUDA_SYNCHRONIZE": "700", "FAKE_CUDA_LATE": "0"}
    first, second = run(BREAK, fake, engine, environment(log), **faults).splitlines()
    assert "Rank 1 of 2, on GPU 1: The GPU failed: cuEventSynchronize says" in first
    assert "Rank 0, on GPU 0, has not come to the end of the step." in first
    assert "restart the server" in second
    # Both leave before anybody waits for the first rank.
    lines = log.read_text().splitlines()
    left = [index for index, line in enumerate(lines) if line.endswith("leaves")]
    assert len(left) == 2
    assert "waits in vain" not in lines[: left[1]]


def _nccl_includes() -> list[Path]:
    """Where NVIDIA's nccl.h may be: installed, or of its wheels."""
    candidates = [Path("/usr/include"), Path("/usr/local/include"), Path("/usr/local/cuda/include")]
    spec = find_spec("nvidia")
    candidates += [Path(root) / "nccl/include" for root in (spec.submodule_search_locations if spec else None) or ()]
    return [candidate for candidate in candidates if (candidate / "nccl.h").is_file()]


def test_declarations_are_those_of_nccl_h() -> None:
    toolkits = [include for include in _includes() if (include / "nv/target").is_file()]
    found = _nccl_includes()
    if not toolkits or not found:
        pytest.skip("no nccl.h or no cuda_fp16.h here: pip install nvidia-nccl-cu13 nvidia-cuda-runtime brings both")
    for include in found:
        command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{ROOT}", "-isystem", str(include)]
        subprocess.run([*command, "-isystem", str(toolkits[0]), str(HERE / "nccl_abi.cpp")], check=True)
