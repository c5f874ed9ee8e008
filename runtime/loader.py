"""From an engine's files to what the core executes: all checked, memory decided, plain data at the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.defaults import SHARED_SCRATCH_BYTES, THREAD_SCRATCH_BYTES, step_limits
from ..engines.errors import CapacityError, EngineFormatError, EngineryError, TargetError, faults
from ..engines.expressions import evaluate
from ..engines.manifest import Manifest
from ..engines.plan import Call, Operand, Plan, StateGroup, check_bounds, guarded_limits, plan_arena
from ..engines.plan_format import decode_plan
from ..engines.precisions import PRECISIONS
from ..engines.sizes import format_bytes
from ..engines.targets import TARGETS, Target, best_target, missing_features
from ..engines.weights import WeightsFile, read_weights_header
from .capacity import StateShape, available_memory, choose_blocks
from .config import EngineConfig
from .files import EngineFiles

# No model's activations are larger than this and so much for each token of a step; a plan that says so is no plan.
_MOST_ACTIVATION_BYTES = 1 << 30
_MOST_ACTIVATION_BYTES_PER_TOKEN = 2 << 20
# Nor does a step of this many tokens touch more than these bytes, and its weights more often than that. A plan costs
# what it says, and a small file can say much.
_ORDINARY_STEP = 128
_MOST_STEP_BYTES = 4 << 30
_MOST_USES_OF_WEIGHTS = 16


@dataclass(frozen=True)
class Rank:
    """What one rank executes, checked as far as the files alone allow."""

    plan: Plan
    weights: WeightsFile
    weights_path: Path


@dataclass(frozen=True)
class CoreSettings:
    """The arguments of Core, and what was decided on the way."""

    spec: dict[str, Any]
    config: dict[str, Any]
    max_model_len: int
    executor: str = "cpu"


def check_target(files: EngineFiles, features: list[str]) -> Target:
    """The engine's target. Raises TargetError where it is for a CPU that has more than these features."""
    manifest = files.manifest
    target = TARGETS.get(manifest.target)
    if target is None:
        raise TargetError(
            f"{files.directory} was built for {manifest.target}, which this runtime does not run; it runs "
            f"{', '.join(TARGETS)}.\n{_rebuild(files)}"
        )
    if missing := missing_features(target, features):
        try:
            found = best_target(features).name
        except TargetError:
            found = "none of the CPU targets"
        raise TargetError(
            f"{files.directory} was built for {target.name}; this machine is {found} (it lacks "
            f"{', '.join(missing)}).\n{_rebuild(files)}"
        )
    return target


def _rebuild(files: EngineFiles) -> str:
    manifest = files.manifest
    precision = "int8" if manifest.precision == "fp8" else manifest.precision
    command = ["build-engine", manifest.model.source, "--target", "cpu", "--precision", precision]
    if manifest.tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(manifest.tensor_parallel_size)]
    usual = PRECISIONS.get(manifest.precision)
    if usual is not None and manifest.kv_cache_dtype not in (usual.kv_cache, "fp8"):
        command += ["--kv-cache-dtype", manifest.kv_cache_dtype]
    command += [word for layer in manifest.layer_precisions for word in ("--layer-precision", layer)]
    command += ["--calibration", "FILE"] if manifest.calibration else []
    groups = " (and with the --group-size and --zero-points that this one has)" if precision == "int4" else ""
    return f"Build one for it: {shlex.join([*command, '-o', f'{files.directory.name}-cpu'])}{groups}"


def read_ranks(files: EngineFiles) -> list[Rank]:
    """Plan and weights header of every rank. Raises EngineFormatError."""
    manifest = files.manifest
    ranks = []
    for index in range(manifest.tensor_parallel_size):
        name = files.of_rank("plan", index)
        data = files.read(name)
        assert data is not None
        plan = decode_plan(data, name)
        weights_path = files.path(files.of_rank("weights", index))
        ranks.append(Rank(plan, read_weights_header(weights_path), weights_path))
    _check_agreement(manifest, [rank.plan for rank in ranks])
    for rank in ranks:
        _check_instructions(manifest, rank.plan)
    return ranks


def _check_instructions(manifest: Manifest, plan: Plan) -> None:
    """A CPU target's plan calls, and asks only for what a step on a CPU has; a CUDA target's plan launches."""
    target = TARGETS.get(manifest.target)
    if target is None or target.is_cuda:
        return
    for index, instruction in enumerate(plan.instructions):
        if not isinstance(instruction, Call):
            raise EngineFormatError(
                f"instruction {index}: launches {instruction.kernel}, which {target.name} cannot. Build it again."
            )
        if unknown := {guard.variable for guard in instruction.guard} - {"tokens", "rows", "sequences"}:
            raise EngineFormatError(f"instruction {index}: guards {', '.join(unknown)}, which {target.name} has not.")


def _check_agreement(manifest: Manifest, plans: list[Plan]) -> None:
    reasons = []
    for index, plan in enumerate(plans):
        if (plan.rank, plan.world_size) != (index, len(plans)):
            reasons.append(
                f"the plan of rank {index} of {len(plans)} says that it is rank {plan.rank} of {plan.world_size}"
            )
        if plan.state_groups != plans[0].state_groups or plan.prefix_key != plans[0].prefix_key:
            reasons.append(f"the plans of rank 0 and rank {index} differ in their state")
    if plans[0].logits.columns != manifest.model.vocab_size:
        reasons.append(
            f"the manifest says a vocabulary of {manifest.model.vocab_size}, the plan makes "
            f"{plans[0].logits.columns} logits"
        )
    if not plans[0].state_groups:
        reasons.append("the plan has no state group")
    # Calls check the state that they use; what nobody uses nobody would check.
    used = {op.name for call in plans[0].forward for op in call.operands.values() if op.kind == "state"}
    reasons += [f"no call uses state group {group.name!r}" for group in plans[0].state_groups if group.name not in used]
    if reasons:
        raise faults(EngineFormatError, "The engine contradicts itself; build it again", reasons)


def prepare_cpu_core(files: EngineFiles, ranks: list[Rank], target: Target, config: EngineConfig) -> CoreSettings:
    """Decides sizes and checks every operand against them. Raises EngineryError."""
    max_model_len = choose_max_model_len(files.manifest, config)
    check_baked_in(files.manifest, config)
    if config.gpu_memory_utilization is not None:
        raise EngineryError(
            f"gpu_memory_utilization is for GPUs; {files.directory} was built for {target.name}. Leave "
            f"--gpu-memory-utilization out; the memory for the state of sequences is --kv-cache-memory-bytes."
        )
    if config.gpus is not None:
        raise EngineryError(f"gpus is for GPUs; {files.directory} was built for {target.name}. Leave --gpus out.")
    max_num_seqs, max_num_batched_tokens = config.sequences(target), config.batched_tokens(target)
    max_blocks = -(-max_model_len // ranks[0].plan.state_groups[0].block_size)
    limits = step_limits(max_num_batched_tokens, max_num_seqs, max_blocks)
    for index, rank in enumerate(ranks):
        weight_bytes = {name: placed.tensor.num_bytes for name, placed in rank.weights.placed.items()}
        check_bounds(rank.plan, limits, weight_bytes, files.of_rank("plan", index))
        check_work(rank, limits)
    activations = sum(_check_activations(rank.plan, limits, config.num_threads or 1) for rank in ranks)
    plan = ranks[0].plan
    shape = StateShape(plan.state_groups, len(ranks), max_num_batched_tokens)
    num_blocks = choose_blocks(shape, max_model_len, max_num_seqs, config.kv_cache_bytes, activations)
    spec = {
        "isa": target.isa,
        "ranks": [rank_spec(rank, limits) for rank in ranks],
        **step_spec(files.manifest, plan, num_blocks, config, limits),
    }
    return CoreSettings(spec, loop_config(plan, max_model_len, target, config), max_model_len)


def step_spec(
    manifest: Manifest, plan: Plan, num_blocks: list[int], config: EngineConfig, limits: dict[str, int]
) -> dict[str, Any]:
    """What ExecutorSpec (csrc/executor.h) has beside ranks and what is of a target alone."""
    return {
        "groups": [group_spec(group) for group in plan.state_groups],
        "num_blocks": num_blocks,
        "vocab_size": manifest.model.vocab_size,
        "num_threads": config.num_threads or 0,
        "weight_pages": config.weight_pages,
        "max_tokens": limits["tokens"],
        "max_rows": limits["rows"],
        "max_sequences": limits["sequences"],
    }


def loop_config(plan: Plan, max_model_len: int, target: Target, config: EngineConfig) -> dict[str, Any]:
    """LoopConfig (csrc/loop.h)."""
    return {
        "max_model_len": max_model_len,
        "max_num_seqs": config.sequences(target),
        "max_num_batched_tokens": config.batched_tokens(target),
        "mixed_prompt_tokens": config.mixed_prompt_tokens(target),
        "enable_prefix_caching": config.enable_prefix_caching,
        "capacity_scheduler_policy": config.capacity_scheduler_policy,
        "rope_threshold": min(plan.prefix_key.threshold, (1 << 31) - 1),
        "rope_exact": plan.prefix_key.exact,
    }


def choose_max_model_len(manifest: Manifest, config: EngineConfig) -> int:
    """Tokens of the longest sequence. Raises EngineryError where the model allows fewer than are asked for."""
    most = manifest.model.max_model_len
    if config.max_model_len is not None and config.max_model_len > most:
        raise EngineryError(
            f"max_model_len {config.max_model_len}: this model was made for at most {most} tokens. "
            f"Leave --max-model-len out, or give a smaller one."
        )
    return config.max_model_len or min(manifest.default_max_model_len, most)


def check_baked_in(manifest: Manifest, config: EngineConfig) -> None:
    """Raises EngineryError where a knob contradicts what was decided when the engine was built."""
    for knob, given, built in (
        ("tensor_parallel_size", config.tensor_parallel_size, manifest.tensor_parallel_size),
        ("kv_cache_dtype", config.kv_cache_dtype, manifest.kv_cache_dtype),
    ):
        if given not in (None, "auto", built):
            option = "--" + knob.replace("_", "-")
            raise EngineryError(
                f"{knob} is baked into the engine as {built}; {given} was asked for. Leave {option} out, or build "
                f"another engine: build-engine {manifest.model.source} {option} {given} -o DIR"
            )


def _check_activations(plan: Plan, limits: dict[str, int], num_threads: int) -> int:
    """Bytes of the rank's buffers and scratch. Raises CapacityError where they are absurd, or more than is free."""
    arena = plan_arena(plan, limits)
    scratch = num_threads * (arena.per_thread_bytes + THREAD_SCRATCH_BYTES) + SHARED_SCRATCH_BYTES
    most = _MOST_ACTIVATION_BYTES + limits["tokens"] * _MOST_ACTIVATION_BYTES_PER_TOKEN
    free = available_memory()
    if (needed := arena.arena_bytes + arena.per_thread_bytes) > most:
        size = format_bytes(needed) if needed < 1 << 60 else "an absurd amount"
        raise CapacityError(
            f"The plan wants {size} for activations, of which no step of {limits['tokens']} tokens needs more than "
            f"{format_bytes(most)}. The engine is damaged: build it again."
        )
    if arena.arena_bytes + scratch > free:
        raise CapacityError(
            f"Activations need {format_bytes(arena.arena_bytes + scratch)} for steps of {limits['tokens']} tokens and "
            f"{limits['rows']} sequences on {num_threads} threads; {format_bytes(free)} are free. Give a smaller "
            f"--max-num-batched-tokens, --max-num-seqs or --num-threads."
        )
    return arena.arena_bytes + scratch


def check_work(rank: Rank, limits: dict[str, int]) -> None:
    """Raises EngineFormatError where a step would touch more memory than any model's."""
    step = {variable: min(largest, _ORDINARY_STEP) for variable, largest in limits.items()}
    touched = sum(
        evaluate(operand.extent, guarded_limits(call, step))
        for call in rank.plan.forward
        for operand in call.operands.values()
        if operand.kind in ("buffer", "weight", "peers")
    )
    most = _MOST_STEP_BYTES + _MOST_USES_OF_WEIGHTS * rank.weights.size
    if touched > most:
        raise EngineFormatError(
            f"The plan touches {format_bytes(touched)} in a step of {step['tokens']} tokens; with weights of "
            f"{format_bytes(rank.weights.size)} at most {format_bytes(most)} are believed. Build the engine again."
        )


def group_spec(group: StateGroup) -> dict[str, Any]:
    """A state group as StateGroupSpec (csrc/executor.h)."""
    return {
        "name": group.name,
        "kind": group.kind,
        "window": group.window,
        "num_layers": group.layers,
        "block_size": group.block_size,
        "block_bytes": group.block_bytes,
        "num_kv_heads": group.num_kv_heads,
        "head_dim": group.head_dim,
        "dtype": group.dtype,
    }


@dataclass(frozen=True)
class Places:
    """Where names of a plan stand in the core's lists, and the layouts of what they name."""

    buffers: dict[str, int]
    weights: dict[str, int]
    groups: dict[str, int]
    layouts: dict[tuple[str, str], str]

    @staticmethod
    def of(rank: Rank) -> Places:
        """Of this rank."""
        layouts = {("buffer", buffer.name): buffer.dtype for buffer in rank.plan.buffers}
        layouts |= {("weight", name): placed.tensor.layout for name, placed in rank.weights.placed.items()}
        return Places(
            {buffer.name: index for index, buffer in enumerate(rank.plan.buffers)},
            {name: index for index, name in enumerate(rank.weights.placed)},
            {group.name: index for index, group in enumerate(rank.plan.state_groups)},
            layouts,
        )

    def index(self, operand: Operand) -> int:
        """Place of what an operand names in the list of its kind; 0 for inputs, which have none."""
        lists = {"buffer": self.buffers, "peers": self.buffers, "weight": self.weights, "state": self.groups}
        return lists[operand.kind][operand.name] if operand.kind in lists else 0


def rank_spec(rank: Rank, limits: dict[str, int]) -> dict[str, Any]:
    """A rank as RankSpec (csrc/executor.h); launches are not in it."""
    arena, places = plan_arena(rank.plan, limits), Places.of(rank)
    return {
        "weights_path": str(rank.weights_path),
        "weights_file_bytes": rank.weights.size,
        "weights": [
            {
                "name": name,
                "layout": placed.tensor.layout,
                "offset": placed.offset,
                "bytes": placed.tensor.num_bytes,
            }
            for name, placed in rank.weights.placed.items()
        ],
        "buffers": [
            {
                "name": buffer.name,
                "bytes": arena.sizes[buffer.name],
                "offset": arena.offsets[buffer.name],
                "per_thread": buffer.per_thread,
                "zeroed": buffer.zeroed,
                "kept": buffer.kept,
            }
            for buffer in rank.plan.buffers
        ],
        "arena_bytes": arena.arena_bytes,
        "forward": [
            _call_spec(call, places, guarded_limits(call, limits))
            for call in rank.plan.forward
            if isinstance(call, Call)
        ],
        "logits_buffer": places.buffers[rank.plan.logits.buffer],
        "logits_stride": rank.plan.logits.stride,
    }


def _call_spec(call: Call, places: Places, largest: dict[str, int]) -> dict[str, Any]:
    return {
        "op": call.op,
        "version": call.version,
        "region": call.region,
        "operands": {
            name: {
                "kind": operand.kind,
                "index": places.index(operand),
                "name": operand.name,
                "layout": places.layouts.get((operand.kind, operand.name), ""),
                "offset": operand.offset,
                "bytes": evaluate(operand.extent, largest),
                "layer": operand.layer,
            }
            for name, operand in call.operands.items()
        },
        "attributes": call.attributes,
        "guard": [[guard.variable, guard.low, guard.high] for guard in call.guard],
        "max_tokens": largest["tokens"],
        "max_rows": largest["rows"],
        "max_sequences": largest["sequences"],
    }
