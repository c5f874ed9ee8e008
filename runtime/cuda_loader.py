"""From the plan of a CUDA target to what the core executes: launches checked at their largest, memory decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..engines.defaults import step_limits
from ..engines.errors import CapacityError, EngineFormatError, TargetError, faults
from ..engines.expressions import Expression, evaluate
from ..engines.plan import (
    Buffer,
    KernelImage,
    Launch,
    Operand,
    Plan,
    Value,
    check_bounds,
    guarded_limits,
    plan_arena,
)
from ..engines.sizes import format_bytes
from ..engines.targets import Target
from .capacity import StateShape
from .config import EngineConfig
from .files import EngineFiles
from .loader import (
    CoreSettings,
    Places,
    Rank,
    check_baked_in,
    check_work,
    choose_max_model_len,
    loop_config,
    rank_spec,
    step_spec,
)

_MOST_GRID = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)
_MOST_I32 = (1 << 31) - 1
# Which kernels are promised of every pointer.
_ALIGNMENT = 16
_MOST_ACTIVATION_BYTES = 4 << 30
_MOST_ACTIVATION_BYTES_PER_TOKEN = 4 << 20
_LEAST_PDL_ARCH = 90
# What the driver takes beside what is asked of it: for kernels, and for the graphs of decoding steps.
_DRIVER_BYTES = 512 << 20
# The null device writes down every token of its state, in the host's memory.
_NULL_SEQUENCES = 4


@dataclass(frozen=True)
class Gpu:
    """Where an engine will run. arch: compute capability, 90 is 9.0. executor: "cuda", or "cuda-null"."""

    name: str
    arch: int
    free_bytes: int
    total_bytes: int
    executor: str = "cuda"


def null_gpu(target: Target) -> Gpu:
    """The null device, which no model is too large for: it checks plans of `target`, and computes nothing."""
    return Gpu("null device", target.arch, 1 << 50, 1 << 50, "cuda-null")


def find_gpu(files: EngineFiles, target: Target) -> Gpu:
    """The machine's GPU. Raises TargetError where there is none, or none that runs `target`."""
    from ._core import cuda_gpu

    manifest = files.manifest
    remedy = f"Run it on a machine with {_known_as(target)}, or build one for this machine: build-engine "
    remedy += f"{manifest.model.source} --precision {manifest.precision} --target "
    try:
        found = cuda_gpu()
    except TargetError as error:
        remedy = remedy.replace("--precision fp8", "--precision int8")  # no CPU has fp8
        raise TargetError(f"{files.directory} was built for {target.name}. {error}\n{remedy}cpu -o DIR") from None
    if not _runs_on(target.arch, found["arch"]):
        raise TargetError(
            f"{files.directory} was built for {target.name}; this machine's {found['name']} has compute capability "
            f"{found['arch'] // 10}.{found['arch'] % 10}.\n{remedy}cuda-sm{found['arch']} -o DIR"
        )
    return Gpu(found["name"], found["arch"], found["free_bytes"], found["total_bytes"])


def _runs_on(built: int, found: int) -> bool:
    """Machine code for 8.x runs on every later 8.x; from 9.0 on it is made for one architecture alone."""
    return built == found or (built // 10 == found // 10 == 8 and built <= found)


def _known_as(target: Target) -> str:
    return f"compute capability {target.arch // 10}.{target.arch % 10} ({', '.join(target.gpus)})"


def prepare_cuda_core(
    files: EngineFiles, ranks: list[Rank], target: Target, config: EngineConfig, gpu: Gpu
) -> CoreSettings:
    """Decides sizes and checks every launch against them. Raises EngineryError."""
    max_model_len = choose_max_model_len(files.manifest, config)
    check_baked_in(files.manifest, config)
    if len(ranks) > 1:
        raise TargetError(
            f"{files.directory} was built for {len(ranks)} GPUs; on CUDA this runtime serves with one. Build it with "
            f"--tensor-parallel-size 1."
        )
    (rank,) = ranks
    plan, where = rank.plan, files.of_rank("plan", 0)
    max_blocks = -(-max_model_len // plan.state_groups[0].block_size)
    limits = step_limits(config.batched_tokens(target), config.sequences(target), max_blocks)
    weight_bytes = {name: placed.tensor.num_bytes for name, placed in rank.weights.placed.items()}
    check_bounds(plan, limits, weight_bytes, where)
    check_launches(plan, target, limits, where)
    check_work(rank, limits)
    shape = StateShape(plan.state_groups, 1, config.batched_tokens(target))
    beside = rank.weights.size + _activations(plan, limits)
    spec = {
        "ranks": [rank_spec(rank, limits) | {"launches": list(_launch_specs(rank))}],
        **step_spec(
            files.manifest, plan, _choose_blocks(shape, max_model_len, target, config, gpu, beside), config, limits
        ),
        "cuda": {
            "arch": target.arch,
            "shared_bytes": target.shared_bytes,
            "tile_tokens": plan.tile_tokens,
            "max_blocks": max_blocks,
            "kernels": [_kernel_spec(files, kernel) for kernel in plan.kernels],
        },
    }
    loop = loop_config(plan, max_model_len, target, config)
    return CoreSettings(spec, loop, max_model_len, gpu.executor)


def check_launches(plan: Plan, target: Target, limits: dict[str, int], where: str) -> None:
    """Raises EngineFormatError with all that no GPU of `target` could do, in the largest step of each launch."""
    reasons = [reason for kernel in plan.kernels for reason in _kernel_faults(kernel, target)]
    regions = -1
    for index, launch in enumerate(plan.forward):
        if not isinstance(launch, Launch):
            reasons.append(f"instruction {index} calls {launch.label}, which {target.name} has not")
            continue
        place = f"instruction {index} ({launch.label})"
        if launch.region <= regions:
            reasons.append(f"{place}: region {launch.region} comes after {regions}: they have no order")
        regions = max(regions, launch.region)
        reasons += [f"{place}: {reason}" for reason in _launch_faults(launch, plan, limits)]
    reasons += _buffer_faults(plan, limits)
    reasons += [
        f"a block of state group {group.name!r} has {group.block_bytes} bytes, which {group.layers} layers do not share"
        for group in plan.state_groups
        if group.block_bytes % (group.layers * _ALIGNMENT)
    ]
    if reasons:
        raise faults(EngineFormatError, f"{where}: not a plan for {target.name}; build the engine again", reasons[:20])


def _kernel_faults(kernel: KernelImage, target: Target) -> Iterator[str]:
    if not _runs_on(kernel.arch, target.arch):
        yield f"kernel {kernel.name} is for compute capability {kernel.arch}"
    if kernel.pdl and target.arch < _LEAST_PDL_ARCH:
        yield f"kernel {kernel.name} is launched before its predecessor ends, which needs compute capability 9.0"
    if kernel.shared_bytes > target.shared_bytes:
        yield f"kernel {kernel.name} wants {kernel.shared_bytes} bytes of shared memory of {target.shared_bytes}"


def _launch_faults(launch: Launch, plan: Plan, limits: dict[str, int]) -> Iterator[str]:
    largest = guarded_limits(launch, limits)
    if any(guard.high < guard.low or largest[guard.variable] < guard.low for guard in launch.guard):
        return  # no step reaches it
    for axis, (size, most) in enumerate(zip(launch.grid, _MOST_GRID, strict=True)):
        if not 1 <= (count := evaluate(size, largest)) <= most:
            yield f"axis {axis} of the grid is {count}, wanted 1 to {most}"
    for name, item in launch.arguments.items():
        if isinstance(item, Operand):
            if item.kind in ("input", "weight") and item.access != "r":
                yield f"argument {name} writes {item.kind} {item.name!r}"
            of_group = item.kind == "input" and item.name in ("slots", "block_table")
            if of_group and not 0 <= item.layer < len(plan.state_groups):
                yield f"argument {name} is of state group {item.layer}, which is not there"
            if item.offset % _ALIGNMENT:
                yield f"argument {name} is not on {_ALIGNMENT} bytes"
        elif item.dtype == "i32" and evaluate(_expression(item), largest) > _MOST_I32:
            yield f"argument {name} may exceed an i32"


def _buffer_faults(plan: Plan, limits: dict[str, int]) -> Iterator[str]:
    """Counters that launches leave at zero must be nobody else's memory."""
    slots: dict[int, list[Buffer]] = {}
    for buffer in plan.buffers:
        slots.setdefault(buffer.slot, []).append(buffer)
        if buffer.per_thread:
            yield f"buffer {buffer.name!r} is of threads, which a GPU has not"
    for buffers in slots.values():
        if len(buffers) > 1 and (zeroed := next((buffer for buffer in buffers if buffer.zeroed), None)):
            yield f"buffer {zeroed.name!r} must stay zero, but shares memory"
    arena = plan_arena(plan, limits).arena_bytes
    most = _MOST_ACTIVATION_BYTES + limits["tokens"] * _MOST_ACTIVATION_BYTES_PER_TOKEN
    if arena > most:
        yield f"activations take more than the {format_bytes(most)} that any model needs for {limits['tokens']} tokens"


def _activations(plan: Plan, limits: dict[str, int]) -> int:
    """Bytes of buffers and step inputs."""
    groups = len(plan.state_groups)
    inputs = limits["tokens"] * (4 * 5 + 8 + 8 * groups) + (limits["sequences"] + 1) * limits["max_blocks"] * 4 * groups
    return plan_arena(plan, limits).arena_bytes + inputs


def _choose_blocks(
    shape: StateShape, max_model_len: int, target: Target, config: EngineConfig, gpu: Gpu, beside: int
) -> list[int]:
    """Blocks of each state group; beside: bytes of all else. Raises CapacityError where not one sequence fits."""
    needed = shape.sequence_bytes(max_model_len)
    taken = gpu.total_bytes - gpu.free_bytes
    room = int(gpu.total_bytes * config.gpu_share) - taken - beside - _DRIVER_BYTES
    if gpu.executor == "cuda-null":
        room = _NULL_SEQUENCES * needed
    budget = room if config.kv_cache_bytes is None else config.kv_cache_bytes
    if config.kv_cache_bytes is not None and budget + beside > gpu.free_bytes:
        raise CapacityError(
            f"The KV cache is to have {format_bytes(budget)}, weights and activations take {format_bytes(beside)}; "
            f"{format_bytes(gpu.free_bytes)} of {gpu.name} are free. Give less with --kv-cache-memory-bytes."
        )
    if needed > budget:
        longest = shape.longest_sequence(max(budget, 0), max_model_len)
        shorter = f", or run it with --max-model-len {longest} or less" if longest else ""
        raise CapacityError(
            f"{gpu.name} has {format_bytes(gpu.total_bytes)}, of which others hold {format_bytes(taken)}; weights and "
            f"activations take {format_bytes(beside)}. That leaves {format_bytes(max(budget, 0))} for the KV cache; "
            f"one sequence of {max_model_len} tokens needs {format_bytes(needed)}. Give it a larger "
            f"--gpu-memory-utilization (now {config.gpu_share}) or a smaller --max-num-batched-tokens{shorter}."
        )
    return shape.largest(budget, config.sequences(target), max_model_len)


def _kernel_spec(files: EngineFiles, kernel: KernelImage) -> dict[str, Any]:
    """KernelSpec (csrc/launch.h), with its machine code."""
    entry = files.manifest.files.get(kernel.file)
    if entry is None or entry.role != "kernels":
        raise EngineFormatError(
            f"{files.directory}: kernel {kernel.name} is in {kernel.file!r}, which is no file of kernels of this "
            f"engine. Copy or build the engine again."
        )
    return {
        "name": kernel.name,
        "symbol": kernel.symbol,
        "cubin": files.read(kernel.file),
        "num_warps": kernel.num_warps,
        "shared_bytes": kernel.shared_bytes,
        "parameters": list(kernel.parameters),
        "hidden": kernel.hidden,
        "pdl": kernel.pdl,
    }


def _launch_specs(rank: Rank) -> Iterator[dict[str, Any]]:
    """LaunchSpecs (csrc/launch.h), in order."""
    places = Places.of(rank)
    kernels = {kernel.name: index for index, kernel in enumerate(rank.plan.kernels)}
    for launch in rank.plan.forward:
        if isinstance(launch, Launch):
            yield {
                "kernel": kernels[launch.kernel],
                "region": launch.region,
                "grid": list(launch.grid),
                "guard": [[guard.variable, guard.low, guard.high] for guard in launch.guard],
                "arguments": [_argument_spec(name, item, places) for name, item in launch.arguments.items()],
            }


def _argument_spec(name: str, item: Operand | Value, places: Places) -> dict[str, Any]:
    if isinstance(item, Value):
        return {"name": name, "parameter": item.dtype, "value": item.value}
    return {
        "name": name,
        "parameter": "pointer",
        "kind": item.kind,
        # Of an input its state group, if it has one.
        "index": item.layer if item.kind == "input" else places.index(item),
        "target": item.name,
        "offset": item.offset,
        "extent": item.extent,
        "access": item.access,
        "layer": item.layer,
    }


def _expression(item: Value) -> Expression:
    assert not isinstance(item.value, float)
    return item.value
