"""What the loader decides for a GPU, and the plans and GPUs that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.defaults import step_limits
from enginery.engines.errors import CapacityError, EngineFormatError, EngineryError
from enginery.engines.plan import Call, Launch, Operand, Plan, Range, Value
from enginery.engines.targets import TARGETS
from enginery.runtime.config import EngineConfig
from enginery.runtime.cuda_loader import check_launches
from enginery.runtime.engine import load_engine
from enginery.runtime.files import open_engine
from enginery.runtime.gpus import Gpu, null_gpus
from enginery.runtime.loader import CoreSettings, Rank, read_ranks
from enginery.runtime.prepare import prepare_core
from enginery.runtime.verify import verify_engine

from .cuda_engines import build_shell

TARGET = TARGETS["cuda-sm90"]
LIMITS = step_limits(8192, 256, 4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shell("gemma3_text", tmp_path_factory.mktemp("engine"), precision="fp8")


@pytest.fixture(scope="module")
def rank(engine: Path) -> Rank:
    return read_ranks(open_engine(engine))[0]


def settings(engine: Path, gpu: Gpu | None = None, **knobs: Any) -> CoreSettings:
    files = open_engine(engine)
    ranks = read_ranks(files)
    return prepare_core(files, ranks, TARGET, EngineConfig(**knobs), [gpu] * len(ranks) if gpu is not None else None)


def test_defaults_are_those_of_a_gpu(engine: Path) -> None:
    made = settings(engine)
    assert (made.spec["max_tokens"], made.spec["max_rows"], made.spec["max_sequences"]) == (8192, 256, 256)
    assert (made.config["max_num_batched_tokens"], made.config["max_num_seqs"]) == (8192, 256)
    assert (made.spec["cuda"]["max_blocks"], made.spec["cuda"]["tile_tokens"]) == (4, 128)
    assert settings(engine, max_model_len=65).spec["cuda"]["max_blocks"] == 2
    given = settings(engine, max_num_seqs=3, max_num_batched_tokens=64)
    assert (given.spec["max_tokens"], given.spec["max_sequences"]) == (64, 3)


def state_bytes(made: CoreSettings) -> int:
    return sum(n * group["block_bytes"] for n, group in zip(made.spec["num_blocks"], made.spec["groups"], strict=True))


def test_the_cache_takes_what_the_share_of_the_gpu_leaves(engine: Path) -> None:
    def taken(free: int, **knobs: Any) -> int:
        return state_bytes(settings(engine, Gpu("a GPU", 90, free, 4 << 30), max_num_seqs=4, **knobs))

    alone = taken(4 << 30)
    assert 2.5 * (1 << 30) < alone < 0.9 * (4 << 30)
    assert abs(alone - taken(3 << 30) - (1 << 30)) < 1 << 20  # others hold 1 GiB
    assert abs(alone - taken(4 << 30, gpu_memory_utilization=0.8) - 0.1 * (4 << 30)) < 1 << 20
    assert taken(4 << 30, kv_cache_memory_bytes="1MiB") <= 1 << 20


@pytest.mark.parametrize(
    ("free", "knobs", "message"),
    [
        (1 << 29, {}, r"a GPU has 537 MB, of which others hold 0 bytes; .* one sequence of 256 tokens needs"),
        (8 << 30, {"gpu_memory_utilization": 0.01}, r"larger --gpu-memory-utilization \(now 0.01\)"),
        (8 << 30, {"kv_cache_memory_bytes": 1 << 40}, "Give less with --kv-cache-memory-bytes"),
        (8 << 30, {"kv_cache_memory_bytes": 90_000}, r"--max-model-len \d+ or less"),
    ],
)
def test_too_little_memory(engine: Path, free: int, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        settings(engine, Gpu("a GPU", 90, free, free), **knobs)


def with_launch(change: Callable[[Launch], Launch | Call]) -> Callable[[Plan], Plan]:
    """Changes the embedding."""

    def apply(plan: Plan) -> Plan:
        forward = [
            change(each) if isinstance(each, Launch) and each.kernel.startswith("embedding_") else each
            for each in plan.forward
        ]
        return replace(plan, forward=tuple(forward))

    return apply


def with_argument(name: str, **changes: Any) -> Callable[[Plan], Plan]:
    def change(launch: Launch) -> Launch:
        item = launch.arguments[name]
        return replace(launch, arguments=launch.arguments | {name: replace(item, **changes)})

    return with_launch(change)


def with_value(value: Value) -> Callable[[Plan], Plan]:
    return with_launch(lambda launch: replace(launch, arguments=launch.arguments | {"count": value}))


def with_kernels(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, kernels=tuple(replace(kernel, **changes) for kernel in plan.kernels))


def with_buffers(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, buffers=tuple(replace(buffer, **changes) for buffer in plan.buffers))


def with_input(plan: Plan) -> Plan:
    return with_launch(
        lambda launch: replace(launch, arguments=launch.arguments | {"slots": Operand("input", "slots", layer=9)})
    )(plan)


UNSOUND: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "a call": (
        with_launch(lambda launch: Call("copy", 0, launch.region, {}, {})),
        "calls copy, which cuda-sm90 has not",
    ),
    "no order": (with_launch(lambda launch: replace(launch, region=0)), "region 0 comes after 1: they have no order"),
    "an empty grid": (with_launch(lambda launch: replace(launch, grid=(1, 0, 1))), "axis 1 of the grid is 0"),
    "a huge grid": (
        with_launch(lambda launch: replace(launch, grid=(1, ["*", "tokens", 8], 1))),
        "axis 1 of the grid is 65536, wanted 1 to 65535",
    ),
    "a weight written": (with_argument("table", access="w"), "argument table writes weight 'model.embed"),
    "peers written": (
        with_argument("out", kind="peers"),
        "argument out writes other ranks' buffer 'embed_tokens', which they may be using",
    ),
    "what peers read is shared": (
        lambda plan: with_buffers(slot=0)(with_argument("out", kind="peers", access="r")(plan)),
        "buffer 'embed_tokens' lives from step to step, but shares memory",
    ),
    "an input written": (with_argument("token_ids", access="rw"), "argument token_ids writes input 'token_ids'"),
    "a crooked address": (with_argument("out", offset=8), "argument out is not on 16 bytes"),
    "a huge count": (with_value(Value("i32", ["*", "tokens", 1 << 20])), "argument count may exceed an i32"),
    "a group too many": (with_input, "argument slots is of state group 9, which is not there"),
    "another GPU's kernels": (with_kernels(arch=100), "is for compute capability 100"),
    "a kernel too early": (with_kernels(arch=80, pdl=True), "is launched before its predecessor ends"),
    "greedy kernels": (with_kernels(shared_bytes=1 << 20), "wants 1048576 bytes of shared memory of 232448"),
    "counters that are shared": (with_buffers(slot=0, zeroed=True), "lives from step to step, but shares memory"),
    "what is kept is shared": (
        with_buffers(slot=0, kept=True, zeroed=False),
        "lives from step to step, but shares memory",
    ),
    "a call that draws": (
        lambda plan: replace(plan, sample=(*plan.sample, Call("copy", 0, 1 << 20, {}, {}))),
        "calls copy, which cuda-sm90 has not",
    ),
    "draws without order": (
        lambda plan: replace(plan, sample=plan.sample[::-1]),
        r"\(sample_scan_\w+\): region \d+ comes after \d+: they have no order",
    ),
    "buffers of threads": (with_buffers(per_thread=True), "is of threads, which a GPU has not"),
    "huge buffers": (with_buffers(bytes=["*", "tokens", 1 << 30]), "activations take more than"),
    "a crooked layer": (
        lambda plan: replace(
            plan, state_groups=tuple(replace(group, block_bytes=group.block_bytes + 16) for group in plan.state_groups)
        ),
        "layers do not share",
    ),
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_a_plan_that_no_gpu_could_run(rank: Rank, fault: str) -> None:
    change, message = UNSOUND[fault]
    check_launches(rank.plan, TARGET, LIMITS, "plan")
    target = TARGETS["cuda-sm80"] if fault == "a kernel too early" else TARGET
    with pytest.raises(EngineFormatError, match=f"(?s)not a plan for {target.name}; build the engine again.*{message}"):
        check_launches(change(rank.plan), target, LIMITS, "plan")


def test_what_no_step_reaches_may_be_anything(rank: Rank) -> None:
    """Tuning has kernels for more rows than a step may have."""
    unreached = with_launch(
        lambda launch: replace(launch, grid=(0, 0, 0), guard=(Range("tokens", 9000, 1 << 40),))  # type: ignore[arg-type]
    )
    check_launches(unreached(rank.plan), TARGET, LIMITS, "plan")


def test_a_kernel_whose_file_is_not_there(engine: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = json.loads((copied / "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.startswith("embedding_"))
    del manifest["files"][name]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineFormatError, match="which is no file of kernels of this engine"):
        settings(copied)


def test_the_null_device_serves_and_verifies(engine: Path, tmp_path: Path) -> None:
    config = EngineConfig(kv_cache_memory_bytes=1 << 20)
    with load_engine(engine, config, null_gpus(TARGET)) as loaded:
        assert len(loaded.generate([[5, 6, 7]])[0].outputs[0].token_ids) > 0
    assert all(result.passed for result in verify_engine(engine))
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    next(copied.glob("embedding_*")).write_bytes(b"\x7fELF")
    assert [result.name for result in verify_engine(copied) if result.passed is False] == ["files"]


def test_an_engine_for_a_gpu_needs_one(engine: Path) -> None:
    with pytest.raises(EngineryError):
        load_engine(engine, EngineConfig(gpu_memory_utilization=1e-9))
