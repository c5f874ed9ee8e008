"""The CUDA driver's side of the runtime, on a driver without a GPU (fake_cuda.cpp), each run in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.expressions import evaluate
from enginery.engines.plan import Launch as PlannedLaunch
from enginery.engines.plan_format import decode_plan
from enginery.engines.weights import read_weights_header

from .cuda_engines import build_shell, make_step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}")

GENERATE = """
import enginery
with enginery.Engine.load(sys.argv[1], max_num_seqs=4, num_threads=1, **json.loads(sys.argv[2])) as engine:
    params = enginery.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    print(json.dumps([output.outputs[0].token_ids for output in engine.generate([[5] * 70], params)]))
"""
BREAK = """
import enginery
with enginery.Engine.load(sys.argv[1], max_num_seqs=4, num_threads=1) as engine:
    os.environ["FAKE_CUDA_SYNCHRONIZE"] = "700"
    for prompt in "ab":
        try:
            engine.generate(prompt)
        except enginery.EngineryError as error:
            print(error)
"""
# As if other processes had taken memory since it was asked how much there is.
CROWD = """
import enginery
from pathlib import Path
from enginery.runtime.config import EngineConfig
from enginery.runtime.engine import load_engine
from enginery.runtime.gpus import Gpu
load_engine(Path(sys.argv[1]), EngineConfig(), [Gpu("Fake GPU", 90, 1 << 36, 1 << 36)])
"""
# Steps without a loop. far: where all weights but the first lie, if not where they did.
STEPS = """
import numpy as np
from pathlib import Path
from enginery.engines.targets import TARGETS
from enginery.runtime import _core
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import open_engine
from enginery.runtime.gpus import Gpu
from enginery.runtime.loader import read_ranks
from enginery.runtime.prepare import prepare_core
files = open_engine(Path(sys.argv[1]))
config = EngineConfig(max_num_seqs=4, kv_cache_memory_bytes=1 << 20)
spec = prepare_core(files, read_ranks(files), TARGETS["cuda-sm90"], config, [Gpu("Fake", 90, 1 << 32, 1 << 32)]).spec
rank, given = spec["ranks"][0], json.loads(sys.argv[2])
if far := given.get("far"):
    rank["weights_path"], rank["weights_file_bytes"] = far["path"], rank["weights_file_bytes"] + far["shift"]
    for weight in rank["weights"]:
        weight["offset"] += far["shift"] * (weight["offset"] > far["first"])
array = lambda values, kind=np.int32: np.array(values, kind)
for step in given["steps"]:
    group = step.pop("groups")[0]
    step |= {name: array(values) for name, values in step.items() if isinstance(values, list)}
    step["groups"] = [{"block_table": array(group["block_table"]), "slots": array(group["slots"], np.int64)}]
_core.run_forward(spec, given["steps"], "cuda")
"""
SCRIPT = """
import json, os, sys
try:
{}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def compile_fake(directory: Path, *options: str) -> Path:
    library = directory / "libcuda.so.1"
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{ROOT}", *options, str(HERE / "fake_cuda.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return directory


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shell("llama", tmp_path_factory.mktemp("engine"), precision="fp8")


@pytest.fixture(scope="module")
def old_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shell("llama", tmp_path_factory.mktemp("engine"), "a100", precision="int8")


def run(script: str, library: Path, engine: Path, settings: dict[str, Any] | None = None, **knobs: Any) -> str:
    """What the script prints, with settings of the fake driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    environment |= {f"FAKE_CUDA_{name}": str(value) for name, value in (settings or {}).items()}
    body = "".join(f"    {line}\n" for line in script.strip().splitlines())
    command = [sys.executable, "-c", SCRIPT.format(body), str(engine), json.dumps(knobs)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


@dataclass
class Launch:
    """A line of the log."""

    function: str
    grid: tuple[int, ...]
    block: int
    shared: int
    pdl: bool
    arguments: list[str]

    @staticmethod
    def of(line: str) -> Launch:
        words, arguments = line.split(" arguments ")
        fields = words.split()
        grid, block, shared = fields[3:6], fields[7], fields[9]
        return Launch(
            fields[1],
            tuple(map(int, grid)),
            int(block),
            int(shared),
            fields[10:] == ["attribute", "6=1"],
            arguments.split(),
        )


def test_a_request_from_load_to_close(fake: Path, llama: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert json.loads(run(GENERATE, fake, llama, {"LOG": log})) == [[0] * 5]  # logits of zeros
    lines = log.read_text().splitlines()
    plan = decode_plan((llama / "plan.rank0.msgpack").read_bytes(), "plan")
    weights = llama / "weights.rank0.safetensors"

    # Graphs for 1, 2 and 4 sequences whose rows are all likeliest or some drawn; the prompt as launches; then replays.
    launches = [Launch.of(line) for line in lines if line.startswith("launch")]
    (embedding,) = [launch for launch in launches if launch.function == "embedding"]
    assert embedding.grid == (70, 1, 1)
    placed = read_weights_header(weights).placed
    table = next(placed[name] for name in placed if "embed_tokens" in name and "scale" not in name)
    first = int.from_bytes(weights.read_bytes()[table.offset : table.offset + 4], "little")
    assert (embedding.arguments[0], embedding.arguments[2]) == ("*5", f"*{first}")
    graphs = [line.split()[1] for line in lines if line.startswith("graph")]
    assert len(graphs) == 6
    assert [line for line in lines if line.startswith("replay")] == [f"replay {graphs[0]}"] * 4

    kernels = {kernel.symbol: kernel for kernel in plan.kernels}
    for launch in launches:
        kernel = kernels[launch.function]
        assert launch.block % 32 == 0
        assert launch.pdl
        assert launch.shared == kernel.shared_bytes
        assert launch.arguments[-2:] == ["0", "0"]
        assert all(argument.startswith("*") for argument in _pointers(launch))

    copies = [line for line in lines if line.startswith("to_host")]
    assert copies == ["to_host 4"] * 5  # a token each
    assert sum(line == "unload" for line in lines) == len(plan.kernels)
    assert lines[-1] == "free 0"


def test_large_weights_come_in_pieces(fake: Path, llama: Path, tmp_path: Path) -> None:
    shift, path = 70 << 20, tmp_path / "weights"
    weights = (llama / "weights.rank0.safetensors").read_bytes()
    placed = read_weights_header(llama / "weights.rank0.safetensors").placed
    first, second = sorted(item.offset for item in placed.values())[:2]
    with path.open("wb") as file:
        file.write(weights[:second])
        file.seek(second + shift)
        file.write(weights[second:])
    log = tmp_path / "log"
    far = {"path": str(path), "shift": shift, "first": first}
    assert run(STEPS, fake, llama, {"LOG": log}, far=far, steps=[as_lists(make_step([(0, 3)], []))]) == ""
    launches = [Launch.of(line) for line in log.read_text().splitlines() if line.startswith("launch")]
    (embedding,) = [launch for launch in launches if launch.function == "embedding"]
    table = next(placed[name] for name in placed if "embed_tokens" in name and "scale" not in name)
    assert embedding.arguments[2] == f"*{int.from_bytes(weights[table.offset : table.offset + 4], 'little')}"


def as_lists(step: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    (group,) = step["groups"]
    groups = [{name: values.tolist() for name, values in group.items()}]
    return {name: values.tolist() if hasattr(values, "tolist") else values for name, values in step.items()} | {
        "groups": groups
    }


# Sequences of a step as make_step has them, its rows, and the variables of decodes and tiles that it must have.
FORMS: list[tuple[list[tuple[int, int]], list[int], int, int]] = [
    ([(0, 3)], [2], 0, 1),
    ([(0, 70), (0, 5), (9, 1)], [69, 74, 75], 1, 2),
    ([(0, 150), (3, 1)], [150], 1, 2),
    ([(0, 90)], [], 0, 1),
    ([(0, 180)], list(range(4)), 0, 2),
]


def test_every_step_makes_the_launches_of_the_plan(fake: Path, llama: Path, tmp_path: Path) -> None:
    plan = decode_plan((llama / "plan.rank0.msgpack").read_bytes(), "plan")
    symbols = {kernel.name: kernel.symbol for kernel in plan.kernels}

    def wanted(variables: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
        launches = []
        for launch in plan.forward:
            assert isinstance(launch, PlannedLaunch)
            grid = tuple(evaluate(size, variables) for size in launch.grid)
            if all(part.low <= variables[part.variable] <= part.high for part in launch.guard) and all(grid):
                launches.append((symbols[launch.kernel], grid))
        return launches

    unused = dict.fromkeys(("drawn", "edited", "ranked", "listed", "edits"), 0)
    log = tmp_path / "log"
    decode = make_step([(3, 1), (4, 1), (5, 1)], [0, 1, 2])
    steps = [*(make_step(lengths, rows) for lengths, rows, _, _ in FORMS), decode]
    assert run(STEPS, fake, llama, {"LOG": log}, steps=[as_lists(step) for step in steps]) == ""
    expected = []
    for lengths, rows, decodes, tiles in FORMS:
        counts = {"tokens": sum(new for _, new in lengths), "rows": len(rows), "sequences": len(lengths)}
        expected += wanted(counts | {"decodes": decodes, "tiles": tiles, "max_blocks": 4} | unused)
    lines = log.read_text().splitlines()
    got = [Launch.of(line) for line in lines if line.startswith("launch")]
    assert [(launch.function, launch.grid) for launch in got] == expected
    # Three sequences are padded to four; nothing is drawn where the logits are asked for.
    padded = dict.fromkeys(("tokens", "rows", "sequences", "decodes"), 4) | {"tiles": 0, "max_blocks": 4} | unused
    assert [line for line in lines if line.startswith("graph")][-1] == f"graph {len(wanted(padded))}"


def _line(lines: list[str], word: str) -> str:
    return next(line for line in lines if line.startswith(word))


def _pointers(launch: Launch) -> list[str]:
    counts = {"rotary_table": 1, "gemm": 1, "gemm_small": 1, "store": 1, "decode": 2, "prefill": 1}
    return launch.arguments[: -2 - counts.get(launch.function, 0)]


def test_older_machine_code_runs_on_newer_gpus_of_its_kind(fake: Path, old_gpu: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for arch in (80, 86):
        assert json.loads(run(GENERATE, fake, old_gpu, {"ARCH": arch, "LOG": log})) == [[0] * 5]
        assert "attribute" not in log.read_text()
    refusal = run(GENERATE, fake, old_gpu, {"ARCH": 90})
    assert refusal.startswith("TargetError: ")
    assert "was built for cuda-sm80; this machine's Fake GPU has compute capability 9.0." in refusal


FAULTS = {
    "another gpu": ({"ARCH": 100}, {}, "has compute capability 10.0", "--target cuda-sm100 -o DIR"),
    "no gpu": ({"COUNT": 0}, {}, "The NVIDIA driver shows no GPU to this process.", "--target cpu -o DIR"),
    "no gpu at all": ({"INIT": 100, "COUNT": 0}, {}, "The NVIDIA driver shows no GPU", "docker run --gpus all"),
    "broken": ({"INIT": 803}, {}, "does not start: cuInit says CUDA_ERROR_FAKE (803)", "nvidia-smi"),
    "old": ({"VERSION": 11080}, {}, "is too old: it knows CUDA up to 11.8.", "driver 550 (CUDA 12.4) or newer"),
    "small": ({"MEMORY": 300 << 20}, {}, "Fake GPU has 315 MB", "--gpu-memory-utilization (now 0.9)"),
    "greedy": ({}, {"kv_cache_memory_bytes": "5GiB"}, "The KV cache is to have 5.37 GB", "--kv-cache-memory-bytes"),
    "ranks": ({}, {"tensor_parallel_size": 2}, "baked into the engine as 1", "build-engine"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_with_their_remedy(fake: Path, llama: Path, fault: str) -> None:
    settings, knobs, message, remedy = FAULTS[fault]
    refusal = run(GENERATE, fake, llama, settings, **knobs)
    assert "Error: " in refusal
    assert message in refusal
    assert remedy in refusal


def test_a_driver_without_a_function(llama: Path, tmp_path: Path) -> None:
    old = compile_fake(tmp_path, "-DFAKE_CUDA_IS_OLD")
    assert "The NVIDIA driver is too old: it has no cuFuncLoad. Install NVIDIA's driver 550" in run(
        GENERATE, old, llama
    )


@cache
def has_driver() -> bool:
    return subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"]).returncode == 0


def test_no_driver(llama: Path, tmp_path: Path) -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    refusal = run(GENERATE, tmp_path, llama)
    assert refusal.startswith(f"TargetError: {llama} was built for cuda-sm90. No NVIDIA driver was found: libcuda.so.1")
    assert "Run it on a machine with compute capability 9.0 (h100, h200)" in refusal


def test_memory_that_others_have_taken_meanwhile(fake: Path, llama: Path) -> None:
    refusal = run(CROWD, fake, llama)
    assert refusal.startswith("CapacityError: The GPU has no memory for the state of sequences: 57.07 GiB are needed")
    assert "are free. Give a smaller --gpu-memory-utilization" in refusal


def test_a_gpu_that_fails_ends_the_service(fake: Path, llama: Path) -> None:
    first, second = run(BREAK, fake, llama).splitlines()
    assert "The GPU failed: cuEventSynchronize says CUDA_ERROR_FAKE (700): as the fake driver says." in first
    assert "restart the server" in second


def test_machine_code_must_take_what_the_plan_gives(fake: Path, llama: Path, tmp_path: Path) -> None:
    """A kernel in another's place is refused by the sizes of its parameters."""
    engine = Path(shutil.copytree(llama, tmp_path / "engine"))
    manifest = json.loads((engine / "manifest.json").read_text())
    embedding, rotary = (next(engine.glob(f"{name}*.cubin")) for name in ("embedding_", "rotary_"))
    code = rotary.read_bytes().replace(b"rotary_table ", b"embedding ")
    embedding.write_bytes(code)
    from enginery.engines.manifest import hash_file

    entry = hash_file(embedding, "kernels", "cubin")
    manifest["files"][embedding.name] |= {"size": entry.size, "sha256": entry.sha256, "chunks": list(entry.chunks)}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    refusal = run(GENERATE, fake, engine)
    assert refusal.startswith("EngineFormatError: Kernel embedding_")
    assert "takes arguments of 8, 8, 8, 8, 4, 8, 8 bytes; the plan gives some of 8, 8, 8, 8, 8" in refusal


def _includes() -> list[Path]:
    """Where NVIDIA's cuda.h may be: of a toolkit, of its wheels, of Triton's."""
    candidates = [Path("/usr/local/cuda/include"), *sorted(Path("/usr/local").glob("cuda-*/include"))]
    wheels = {"nvidia": ("cuda_runtime/include", "cu13/include"), "triton": ("backends/nvidia/include",)}
    for package, folders in wheels.items():
        spec = find_spec(package)
        for root in (spec.submodule_search_locations if spec is not None else None) or ():
            candidates += [Path(root) / folder for folder in folders]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    return [candidate for candidate in candidates if (candidate / "cuda.h").is_file()]


def test_declarations_are_those_of_cuda_h() -> None:
    includes = _includes()
    if not includes:
        pytest.skip("no cuda.h here: pip install nvidia-cuda-runtime brings one")
    for include in includes:
        command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{ROOT}", "-isystem", str(include)]
        subprocess.run([*command, str(HERE / "cuda_abi.cpp")], check=True)
