"""From the plan of a CUDA target to what the core executes: launches checked at their largest, memory decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ..engines.defaults import step_limits
from ..engines.errors import EngineFormatError, faults
from ..engines.expressions import Expression, evaluate
from ..engines.plan import (
    Buffer,
    Instruction,
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
from .cubin import cubin_faults
from .files import EngineFiles
from .gpus import Gpu, choose_gpu_blocks, runs_on
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


def prepare_cuda_core(
    files: EngineFiles, ranks: list[Rank], target: Target, config: EngineConfig, gpus: list[Gpu]
) -> CoreSettings:
    """Decides sizes and checks every launch against them. gpus: of each rank. Raises EngineryError."""
    max_model_len = choose_max_model_len(files.manifest, config)
    check_baked_in(files.manifest, config)
    plan = ranks[0].plan
    max_blocks = -(-max_model_len // plan.state_groups[0].block_size)
    limits = step_limits(config.batched_tokens(target), config.sequences(target), max_blocks)
    for index, rank in enumerate(ranks):
        where = files.of_rank("plan", index)
        weight_bytes = {name: placed.tensor.num_bytes for name, placed in rank.weights.placed.items()}
        check_bounds(rank.plan, limits, weight_bytes, where)
        check_launches(rank.plan, target, limits, where)
        check_work(rank, limits)
    check_ranks([rank.plan for rank in ranks])
    shape = StateShape(plan.state_groups, 1, config.batched_tokens(target))
    beside = [rank.weights.size + _activations(rank.plan, limits) for rank in ranks]
    num_blocks = choose_gpu_blocks(shape, max_model_len, target, config, gpus, beside)
    kernels = {kernel.name: kernel for rank in ranks for kernel in rank.plan.kernels}
    places = {name: index for index, name in enumerate(kernels)}
    spec = {
        "ranks": [
            rank_spec(rank, limits) | _entry_points(rank, places) | {"gpu": gpu.number}
            for rank, gpu in zip(ranks, gpus, strict=True)
        ],
        **step_spec(files.manifest, plan, num_blocks, config, limits),
        "cuda": {
            "arch": target.arch,
            "shared_bytes": target.shared_bytes,
            "tile_tokens": plan.tile_tokens,
            "max_blocks": max_blocks,
            "max_edits": limits["edits"],
            "kernels": [_kernel_spec(files, kernel) for kernel in kernels.values()],
        },
    }
    loop = loop_config(plan, max_model_len, target, config)
    return CoreSettings(spec, loop, max_model_len, gpus[0].executor)


def check_ranks(plans: list[Plan]) -> None:
    """Raises EngineFormatError where ranks would not meet, or not mean the same: one would wait for ever."""
    first, reasons = plans[0], []
    kernels = {kernel.name: kernel for kernel in first.kernels}
    for plan in plans[1:]:
        if (plan.tile_tokens, plan.draws) != (first.tile_tokens, first.draws):
            reasons.append(f"the plans of rank {first.rank} and rank {plan.rank} differ in how steps are cut or drawn")
        if [_meeting(launch) for launch in _meetings(plan)] != [_meeting(launch) for launch in _meetings(first)]:
            reasons.append(f"the plans of rank {first.rank} and rank {plan.rank} differ in when they read each other")
        if _shared_sizes(plan) != _shared_sizes(first):
            reasons.append(
                f"the plans of rank {first.rank} and rank {plan.rank} differ in what they read of each other"
            )
        for kernel in plan.kernels:
            if kernels.setdefault(kernel.name, kernel) != kernel:
                reasons.append(f"the plans differ in kernel {kernel.name}")
    if reasons:
        raise faults(EngineFormatError, "The engine contradicts itself; build it again", reasons[:20])


def _meetings(plan: Plan) -> list[Launch]:
    """The launches that touch other ranks' memory, in order."""
    launches = [each for each in plan.instructions if isinstance(each, Launch)]
    return [launch for launch in launches if any(item.kind == "peers" for item in launch.operands.values())]


def _meeting(launch: Launch) -> object:
    """What all ranks' launches of a meeting have in common."""
    peers = {name: item for name, item in launch.operands.items() if item.kind == "peers"}
    return launch.kernel, launch.guard, launch.grid, launch.collective, peers


def _shared_sizes(plan: Plan) -> dict[str, Expression]:
    names = {item.name for launch in _meetings(plan) for item in launch.operands.values() if item.kind == "peers"}
    return {buffer.name: buffer.bytes for buffer in plan.buffers if buffer.name in names}


def check_launches(plan: Plan, target: Target, limits: dict[str, int], where: str) -> None:
    """Raises EngineFormatError with all that no GPU of `target` could do, in the largest step of each launch."""
    reasons = [reason for kernel in plan.kernels for reason in _kernel_faults(kernel, target)]
    regions = -1
    for index, launch in enumerate(plan.instructions):
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
    if not runs_on(kernel.arch, target.arch):
        yield f"kernel {kernel.name} is for compute capability {kernel.arch}"
    if kernel.pdl and target.arch < _LEAST_PDL_ARCH:
        yield f"kernel {kernel.name} is launched before its predecessor ends, which needs compute capability 9.0"
    if kernel.shared_bytes > target.shared_bytes:
        yield f"kernel {kernel.name} wants {kernel.shared_bytes} bytes of shared memory of {target.shared_bytes}"


def _launch_faults(launch: Launch, plan: Plan, limits: dict[str, int]) -> Iterator[str]:
    largest = guarded_limits(launch, limits)
    if any(guard.high < guard.low or largest[guard.variable] < guard.low for guard in launch.guard):
        return  # no step reaches it
    zeroed = {buffer.name for buffer in plan.buffers if buffer.zeroed}
    for axis, (size, most) in enumerate(zip(launch.grid, _MOST_GRID, strict=True)):
        if not 1 <= (count := evaluate(size, largest)) <= most:
            yield f"axis {axis} of the grid is {count}, wanted 1 to {most}"
    for name, item in launch.arguments.items():
        if isinstance(item, Operand):
            if item.kind in ("input", "weight") and item.access != "r":
                yield f"argument {name} writes {item.kind} {item.name!r}"
            if item.kind == "peers" and item.access != "r" and item.name not in zeroed:
                yield f"argument {name} writes other ranks' buffer {item.name!r}, which they may be using"
            of_group = item.kind == "input" and item.name in ("slots", "block_table")
            if of_group and not 0 <= item.layer < len(plan.state_groups):
                yield f"argument {name} is of state group {item.layer}, which is not there"
            if item.offset % _ALIGNMENT:
                yield f"argument {name} is not on {_ALIGNMENT} bytes"
        elif item.dtype == "i32" and evaluate(_expression(item), largest) > _MOST_I32:
            yield f"argument {name} may exceed an i32"


def _buffer_faults(plan: Plan, limits: dict[str, int]) -> Iterator[str]:
    """What lives from step to step must be nobody else's memory."""
    slots: dict[int, list[Buffer]] = {}
    shared = _shared_sizes(plan)
    for buffer in plan.buffers:
        slots.setdefault(buffer.slot, []).append(buffer)
        if buffer.per_thread:
            yield f"buffer {buffer.name!r} is of threads, which a GPU has not"
    for buffers in slots.values():
        if len(buffers) > 1 and (
            lasting := [each for each in buffers if each.zeroed or each.kept or each.name in shared]
        ):
            yield f"buffer {lasting[0].name!r} lives from step to step, but shares memory"
    arena = plan_arena(plan, limits).arena_bytes
    most = _MOST_ACTIVATION_BYTES + limits["tokens"] * _MOST_ACTIVATION_BYTES_PER_TOKEN
    if arena > most:
        yield f"activations take more than the {format_bytes(most)} that any model needs for {limits['tokens']} tokens"


def _activations(plan: Plan, limits: dict[str, int]) -> int:
    """Bytes of buffers and step inputs."""
    groups = len(plan.state_groups)
    inputs = limits["tokens"] * (4 * 5 + 8 + 8 * groups) + (limits["sequences"] + 1) * limits["max_blocks"] * 4 * groups
    inputs += limits["rows"] * 4 * 11 + limits["edits"] * 4 * 4
    return plan_arena(plan, limits).arena_bytes + inputs


def _kernel_spec(files: EngineFiles, kernel: KernelImage) -> dict[str, Any]:
    """KernelSpec (csrc/launch.h), with its machine code."""
    entry, cubin = files.manifest.files.get(kernel.file), files.read(kernel.file)
    if cubin is None or entry is None or entry.role != "kernels":
        raise EngineFormatError(
            f"{files.directory}: kernel {kernel.name} is in {kernel.file!r}, which is no file of kernels of this "
            f"engine. Copy or build the engine again."
        )
    if found := list(cubin_faults(cubin, kernel)):
        where = f"{files.directory}: kernel {kernel.name} in {kernel.file!r}"
        raise faults(EngineFormatError, f"{where}: not its machine code; build the engine again", found)
    return {
        "name": kernel.name,
        "symbol": kernel.symbol,
        "cubin": cubin,
        "num_warps": kernel.num_warps,
        "shared_bytes": kernel.shared_bytes,
        "parameters": list(kernel.parameters),
        "hidden": kernel.hidden,
        "pdl": kernel.pdl,
    }


def _launch_specs(rank: Rank, instructions: Iterable[Instruction], kernels: dict[str, int]) -> Iterator[dict[str, Any]]:
    """LaunchSpecs (csrc/launch.h), in order. kernels: places of all ranks' kernels."""
    places = Places.of(rank)
    for launch in instructions:
        if isinstance(launch, Launch):
            yield {
                "kernel": kernels[launch.kernel],
                "region": launch.region,
                "grid": list(launch.grid),
                "guard": [[guard.variable, guard.low, guard.high] for guard in launch.guard],
                "arguments": [_argument_spec(name, item, places) for name, item in launch.arguments.items()],
                **_collective_spec(launch),
            }


def _collective_spec(launch: Launch) -> dict[str, Any]:
    """Of LaunchSpec, where there is one: the places of its arguments. All that it can be is a sum of bf16."""
    if launch.collective is None:
        return {}
    names = list(launch.arguments)
    return {"sums": {"part": names.index(launch.collective.part), "sum": names.index(launch.collective.sum)}}


def _entry_points(rank: Rank, kernels: dict[str, int]) -> dict[str, Any]:
    """Of RankSpec (csrc/executor.h), what only CUDA targets have."""
    plan = rank.plan
    places = {buffer.name: index for index, buffer in enumerate(plan.buffers)}
    entry_points: dict[str, Any] = {
        "launches": list(_launch_specs(rank, plan.forward, kernels)),
        "sample": list(_launch_specs(rank, plan.sample, kernels)),
    }
    if plan.draws is not None:
        draws = asdict(plan.draws)
        entry_points["draws"] = {name: places.get(value, value) for name, value in draws.items()}
    return entry_points


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
