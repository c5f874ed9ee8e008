"""Engines for two GPUs on the null device: steps of the real loop, and ranks that contradict each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import CapacityError, EngineFormatError, EngineryError, TargetError
from enginery.engines.plan import Launch, Operand, Plan, Value
from enginery.engines.targets import TARGETS
from enginery.plugins.all_reduce import cuda as all_reduce
from enginery.runtime import _core, gpus
from enginery.runtime.config import EngineConfig
from enginery.runtime.cuda_loader import check_ranks
from enginery.runtime.files import open_engine
from enginery.runtime.gpus import Gpu, find_gpus
from enginery.runtime.inspect import inspect_engine
from enginery.runtime.loader import CoreSettings, read_ranks
from enginery.runtime.prepare import prepare_core
from enginery.runtime.verify import verify_engine

from .cuda_engines import build_shell
from .serving import check_same, random_requests, serve
from .test_cuda_executor import STEPS, Spec, argument, settings

ENGINES = {
    "llama": ("llama", "h100", "fp8", "fp8"),
    "biases": ("qwen2", "a100", "int8", "int8"),
    "two groups, norms behind sums": ("gemma3_text", "b200", "bf16", "fp8"),
}
TARGET = TARGETS["cuda-sm90"]


def build_ranks(case: str, directory: Path, target: str, **options: Any) -> Path:
    return build_shell(case, directory, target, tensor_parallel_size=2, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_ranks("llama", tmp_path_factory.mktemp("engine"), "h100", precision="bf16")


@pytest.mark.parametrize("name", ENGINES)
def test_thousands_of_steps_are_the_steps_of_the_loop(name: str, tmp_path: Path) -> None:
    """Every rank's launches are checked, and the tables that say where the others' buffers lie."""
    case, target, precision, cache = ENGINES[name]
    made = settings(build_ranks(case, tmp_path, target, precision=precision, kv_cache_dtype=cache))
    assert made.executor == "cuda-null"
    assert [rank["gpu"] for rank in made.spec["ranks"]] == [0, 1]
    requests = random_requests(200)
    wanted = serve(made.spec, made.config, "null", requests)
    check_same(serve(made.spec, made.config, "cuda-null", requests), wanted)
    assert wanted.num_tokens > 1000


def test_launches_that_a_library_may_do_are_kernels_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "_LIBRARY_BYTES", 8 << 8)  # of a row 256 bytes
    made = settings(build_ranks("llama", tmp_path, "h100", precision="bf16"))
    assert all(any("sums" in launch for launch in rank["launches"]) for rank in made.spec["ranks"])
    requests = random_requests(40)
    check_same(serve(made.spec, made.config, "cuda-null", requests), serve(made.spec, made.config, "null", requests))


def test_memory_is_that_of_all_ranks(llama: Path) -> None:
    made = settings(llama)
    _, memory = _core.run_forward(made.spec, STEPS, "cuda-null")
    state = sum(n * group["block_bytes"] for n, group in zip(made.spec["num_blocks"], made.spec["groups"], strict=True))
    assert memory["state"] == 2 * state
    arenas = sum(rank["arena_bytes"] for rank in made.spec["ranks"])
    assert memory["activations"] > arenas


def test_kernels_are_shared_and_told(llama: Path) -> None:
    kernels = {kernel["name"]: kernel for kernel in inspect_engine(llama)["kernels"]}
    reduce = [kernel for name, kernel in kernels.items() if name.startswith("all_reduce_")]
    assert {kernel["role"] for kernel in reduce} == {"collective"}
    ranks = [rank.plan for rank in read_ranks(open_engine(llama))]
    launches = sum(launch.kernel.startswith("all_reduce_") for plan in ranks for launch in plan.forward)  # type: ignore[union-attr]
    assert sum(kernel["launches"] for kernel in reduce) == launches
    made = settings(llama)
    assert sorted(kernel["name"] for kernel in made.spec["cuda"]["kernels"]) == sorted(kernels)
    assert all(result.passed is not False for result in verify_engine(llama))


def launches_of(spec: Spec, function: str, rank: int = 0) -> list[dict[str, Any]]:
    names = [kernel["name"] for kernel in spec["cuda"]["kernels"]]
    return [launch for launch in spec["ranks"][rank]["launches"] if function in names[launch["kernel"]]]


def change(name: str, function: str = "all_reduce_", rank: int = 0, **changes: Any) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        for launch in launches_of(spec, function, rank):
            argument(launch, name).update(changes)

    return damage


def point_to(name: str, buffer: str) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        names = [each["name"] for each in spec["ranks"][0]["buffers"]]
        change(name, index=names.index(buffer), target=buffer)(spec)

    return damage


def remove(function: str) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        for launch in launches_of(spec, function):
            spec["ranks"][0]["launches"].remove(launch)

    return damage


def shrink(spec: Spec) -> None:
    """On the second rank a buffer that others read is smaller."""
    buffers = {buffer["name"]: buffer for buffer in spec["ranks"][1]["buffers"]}
    buffers["collective.exchange0"]["bytes"] //= 2


DAMAGED: dict[str, tuple[Callable[[Spec], None], str]] = {
    "a table of another name": (change("parts", target="logits"), "argument parts: points to no table of 'logits'"),
    "nothing at all": (change("parts", extent=0), "argument parts: reaches over 0 bytes"),
    "beyond the buffer": (
        change("parts", extent=["*", "tokens", 1 << 20]),
        r"argument parts: of rank 0 reaches outside of 'collective.exchange0'",
    ),
    "a crooked place": (change("parts", offset=8), "argument parts: of rank 0 points elsewhere"),
    "a part that is not written": (remove("embedding_"), "reads 'collective.exchange0', which is not written in this"),
    "memory that others use": (
        point_to("signals", "collective.exchange0"),
        "argument signals: of rank 0 writes 'collective.exchange0', which that rank may be using",
    ),
    "a second rank alone": (change("parts", rank=1, extent=0), "argument parts: reaches over 0 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_null_device_notices(llama: Path, damage: str) -> None:
    spec = copy.deepcopy(settings(llama).spec)
    apply, message = DAMAGED[damage]
    apply(spec)
    with pytest.raises(EngineryError, match=f"null device: .*({message})"):
        _core.run_forward(spec, STEPS, "cuda-null")


REFUSED: dict[str, tuple[Callable[[Spec], None], str]] = {
    "buffers of two sizes": (shrink, "Ranks share the buffer 'collective.exchange0', which not all of them have"),
    "a buffer that is not there": (change("parts", index=9999), "a buffer that is not there"),
    "no rank": (lambda spec: spec.update(ranks=[]), "A plan of no rank"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_is_refused_at_load(llama: Path, damage: str) -> None:
    spec = copy.deepcopy(settings(llama).spec)
    apply, message = REFUSED[damage]
    apply(spec)
    with pytest.raises(EngineFormatError, match=message):
        _core.run_forward(spec, [], "cuda-null")


Change = Callable[[Launch], Launch]


def with_meetings(edit: Change) -> Callable[[Plan], Plan]:
    """Changes the launches that meet."""

    def apply(plan: Plan) -> Plan:
        forward = [
            edit(each)
            if isinstance(each, Launch) and any(item.kind == "peers" for item in each.operands.values())
            else each
            for each in plan.forward
        ]
        return replace(plan, forward=tuple(forward))

    return apply


def without_the_last(plan: Plan) -> Plan:
    return replace(plan, forward=plan.forward[:-1])


def with_parts(launch: Launch, **changes: Any) -> Launch:
    parts = launch.arguments["parts"]
    assert isinstance(parts, Operand)
    return replace(launch, arguments=launch.arguments | {"parts": replace(parts, **changes)})


CONTRADICTIONS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "a meeting less": (without_the_last, "differ in when they read each other"),
    "another grid": (with_meetings(lambda each: replace(each, grid=(7, 1, 1))), "differ in when they read each other"),
    "other steps": (with_meetings(lambda each: replace(each, guard=())), "differ in when they read each other"),
    "other parts": (with_meetings(lambda each: with_parts(each, extent=128)), "differ in when they read each other"),
    "other sizes": (
        lambda plan: replace(plan, buffers=tuple(replace(buffer, bytes=1 << 20) for buffer in plan.buffers)),
        "differ in what they read of each other",
    ),
    "other machine code": (
        lambda plan: replace(plan, kernels=tuple(replace(kernel, num_warps=1) for kernel in plan.kernels)),
        "differ in kernel",
    ),
    "a library for one": (
        with_meetings(lambda each: replace(each, collective=None)),
        "differ in when they read each other",
    ),
    "other tiles": (lambda plan: replace(plan, tile_tokens=8), "differ in how steps are cut"),
}


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_ranks_that_would_not_meet_are_refused(llama: Path, fault: str) -> None:
    first, second = (rank.plan for rank in read_ranks(open_engine(llama)))
    check_ranks([first, second])
    apply, message = CONTRADICTIONS[fault]
    with pytest.raises(EngineFormatError, match=message):
        check_ranks([first, apply(second)])


def test_ranks_differ_in_their_numbers_alone(llama: Path) -> None:
    """So that kernels are shared."""
    first, second = (rank.plan for rank in read_ranks(open_engine(llama)))
    numbers: list[list[Any]] = [[], []]
    for plan, found in zip((first, second), numbers, strict=True):
        for launch in plan.forward:
            assert isinstance(launch, Launch)
            if isinstance(value := launch.arguments.get("rank"), Value):
                found.append(value.value)
    assert set(numbers[0]) == {0}
    assert set(numbers[1]) == {1}


# -- on which GPUs, and in how much memory ----------------------------------------------------------------------------


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int, arch: int = 90) -> None:
    facts = {"name": "a GPU", "arch": arch, "free_bytes": 4 << 30, "total_bytes": 4 << 30}
    monkeypatch.setattr(_core, "cuda_gpu_count", lambda: count, raising=False)
    monkeypatch.setattr(_core, "cuda_gpu", lambda number: facts)


def numbers(engine: Path, **knobs: Any) -> list[int]:
    return [gpu.number for gpu in find_gpus(open_engine(engine), TARGET, EngineConfig(**knobs))]


def test_each_rank_has_a_gpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 4)
    assert numbers(llama) == [0, 1]
    assert numbers(llama, gpus=(3, 1)) == [3, 1]
    assert numbers(llama, gpus=[0, 0]) == [0, 0]


def test_too_few_gpus(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 1)
    with pytest.raises(TargetError, match=r"It has 2 ranks .* the NVIDIA driver shows 1\. .* --gpus 0,0"):
        numbers(llama)
    assert numbers(llama, gpus=(0, 0)) == [0, 0]
    with pytest.raises(EngineryError, match=r"gpus names 3; .* has 2 ranks, .* --gpus 0,1"):
        numbers(llama, gpus=(0, 0, 0))


def test_a_gpu_of_another_kind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 2, arch=80)
    with pytest.raises(TargetError, match=r"has compute capability 8\.0"):
        numbers(llama)


def placed(engine: Path, found: list[Gpu], **knobs: Any) -> CoreSettings:
    files = open_engine(engine)
    return prepare_core(files, read_ranks(files), TARGET, EngineConfig(max_num_seqs=4, **knobs), found)


def state_bytes(made: CoreSettings) -> int:
    """Of one rank."""
    return sum(n * group["block_bytes"] for n, group in zip(made.spec["num_blocks"], made.spec["groups"], strict=True))


def test_ranks_that_share_a_gpu_share_its_memory(llama: Path) -> None:
    own = [Gpu("a GPU", 90, 4 << 30, 4 << 30, number) for number in (0, 1)]
    alone, shared = state_bytes(placed(llama, own)), state_bytes(placed(llama, [own[0]] * 2))
    assert alone > 2.5 * (1 << 30)
    beside = 0.9 * (4 << 30) - alone
    assert abs(2 * shared - (alone - beside + gpus._DRIVER_BYTES)) < 8 << 20
    # The fuller GPU decides for all.
    full = replace(own[1], free_bytes=2 << 30)
    assert abs(state_bytes(placed(llama, [own[0], full])) - (alone - (2 << 30))) < 4 << 20


def test_the_size_of_the_cache_is_that_of_all_ranks(llama: Path) -> None:
    own = [Gpu("a GPU", 90, 4 << 30, 4 << 30, number) for number in (0, 1)]
    assert 0.9 * (1 << 20) < 2 * state_bytes(placed(llama, own, kv_cache_memory_bytes=1 << 20)) <= 1 << 20
    with pytest.raises(CapacityError, match="Give less with --kv-cache-memory-bytes"):
        placed(llama, [own[0]] * 2, kv_cache_memory_bytes=5 << 30)
    assert state_bytes(placed(llama, own, kv_cache_memory_bytes=5 << 30)) > 2 << 30


def test_a_cpu_engine_has_no_gpus(tmp_path: Path) -> None:
    with pytest.raises(EngineryError, match="gpus must be numbers of GPUs"):
        EngineConfig(gpus=("0",))  # type: ignore[arg-type]
    engine = build_shell("llama", tmp_path, "cpu-avx2", precision="int8")
    files = open_engine(engine)
    with pytest.raises(EngineryError, match=r"Leave --gpus out"):
        prepare_core(files, read_ranks(files), TARGETS["cpu-avx2"], EngineConfig(gpus=(0,)))


def test_logits_are_read_of_the_first_rank(llama: Path) -> None:
    made = settings(llama)
    got, _ = _core.run_forward(made.spec, STEPS, "cuda-null")
    wanted, _ = _core.run_forward(made.spec, STEPS, "null")
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(left, right)
