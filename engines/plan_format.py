"""The plan as msgpack: written the same for the same plan, read believing nothing (FORMAT.md)."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import msgpack

from .errors import EngineFormatError
from .expressions import VARIABLES, check_expression
from .fields import LARGEST, Fields, describe
from .plan import (
    Attribute,
    Buffer,
    Call,
    Collective,
    Draws,
    Instruction,
    KernelImage,
    Launch,
    Logits,
    Operand,
    Plan,
    PrefixKey,
    Range,
    StateGroup,
    Value,
)

PLAN_VERSION = 0
LARGEST_PLAN_BYTES = 16 << 20
# A hundred layers have a thousand calls, and each some variants.
MOST_CALLS = 1 << 14
MOST_KERNELS = 1 << 11
STEP_INPUTS = (
    "token_ids",
    "positions",
    "token_sequence",
    "prompt_lengths",
    "rows",
    "slots",
    "block_table",
    "decode_tokens",
    "tiles",
    # What each row is drawn by, and what changes of logits the step brings.
    *("temperature", "top_k", "top_p", "min_p", "seed", "num_generated"),
    *("edit_slots", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("edited_slots", "edited_tokens", "edited_counts", "edited_biases"),
)
BUFFER_DTYPES = ("f32", "bf16", "fp8", "i8", "u8", "i32")
STATE_DTYPES = ("f32", "bf16", "fp8", "i8")
_PARAMETERS = ("pointer", "i32", "fp32")
_OPERANDS = ("buffer", "weight", "input", "state")


def encode_plan(plan: Plan) -> bytes:
    """The plan as msgpack; the same plan gives the same bytes."""
    entry_points: dict[str, Any] = {
        "forward": {
            "outputs": {"logits": asdict(plan.logits)},
            "instructions": [_encode(instruction) for instruction in plan.forward],
        }
    }
    if plan.draws is not None:
        entry_points["sample"] = {
            "outputs": {"draws": asdict(plan.draws)},
            "instructions": [_encode(launch) for launch in plan.sample],
        }
    document = {
        "version": PLAN_VERSION,
        "rank": plan.rank,
        "world_size": plan.world_size,
        "step_inputs": list(plan.step_inputs),
        "prefix_key": asdict(plan.prefix_key),
        "state_groups": [asdict(group) for group in plan.state_groups],
        "buffers": [asdict(buffer) for buffer in plan.buffers],
        "kernels": [asdict(kernel) for kernel in plan.kernels],
        "tile_tokens": plan.tile_tokens,
        "entry_points": entry_points,
    }
    return bytes(msgpack.packb(document))


def _encode(instruction: Instruction) -> dict[str, Any]:
    if isinstance(instruction, Launch):
        return _encode_launch(instruction)
    call = instruction
    return {
        "kind": "call",
        "op": call.op,
        "version": call.version,
        "region": call.region,
        "guard": [[guard.variable, guard.low, guard.high] for guard in call.guard],
        "operands": {name: asdict(operand) for name, operand in call.operands.items()},
        "attributes": call.attributes,
    }


def _encode_launch(launch: Launch) -> dict[str, Any]:
    collective = {} if launch.collective is None else {"collective": asdict(launch.collective)}
    return {
        "kind": "launch",
        "kernel": launch.kernel,
        "region": launch.region,
        "guard": [[guard.variable, guard.low, guard.high] for guard in launch.guard],
        "grid": list(launch.grid),
        "arguments": {
            name: asdict(item) if isinstance(item, Operand) else {"kind": "value", **asdict(item)}
            for name, item in launch.arguments.items()
        },
        **collective,
    }


def decode_plan(data: bytes, where: str) -> Plan:
    """Reads a plan. Raises EngineFormatError naming the field that is not as FORMAT.md says."""
    if len(data) > LARGEST_PLAN_BYTES:
        raise EngineFormatError(f"{where}: a plan of {len(data)} bytes; at most {LARGEST_PLAN_BYTES} are allowed.")
    try:
        document = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise EngineFormatError(
            f"{where}: not a msgpack map: {str(error)[:200]}. Copy or build the engine again."
        ) from None
    top = Fields.of(document, where)
    if (version := top.integer("version")) > PLAN_VERSION:
        raise EngineFormatError(
            f"{where}: plan version {version} is newer than {PLAN_VERSION}, the newest this runtime reads. "
            f"Upgrade enginery, or build the engine with this release."
        )
    top.only(
        "version",
        "rank",
        "world_size",
        "step_inputs",
        "prefix_key",
        "state_groups",
        "buffers",
        "kernels",
        "tile_tokens",
        "entry_points",
    )
    entry_points = top.map("entry_points").only("forward", "sample")
    forward = entry_points.map("forward").only("outputs", "instructions")
    sample, draws = _read_sample(entry_points) if "sample" in entry_points.values else ((), None)
    world_size = top.integer("world_size", 1, 1024)
    prefix_key = top.map("prefix_key").only("threshold", "exact")
    plan = Plan(
        rank=top.integer("rank", 0, world_size - 1),
        world_size=world_size,
        step_inputs=tuple(top.items("step_inputs", _read_step_input)),
        prefix_key=PrefixKey(prefix_key.integer("threshold"), prefix_key.boolean("exact")),
        state_groups=tuple(top.items("state_groups", _read_group, most=64)),
        buffers=tuple(top.items("buffers", _read_buffer)),
        forward=tuple(forward.items("instructions", _read_instruction, most=MOST_CALLS)),
        logits=_read_logits(forward.map("outputs").only("logits").map("logits")),
        kernels=tuple(top.items("kernels", _read_kernel, most=MOST_KERNELS)),
        tile_tokens=top.integer("tile_tokens", 0, 1 << 16),
        sample=sample,
        draws=draws,
    )
    _require_unique([buffer.name for buffer in plan.buffers], f"{where}.buffers")
    _require_unique([group.name for group in plan.state_groups], f"{where}.state_groups")
    _require_unique([kernel.name for kernel in plan.kernels], f"{where}.kernels")
    _check_launches(plan, where)
    return plan


def _check_launches(plan: Plan, where: str) -> None:
    """Every launch names a kernel that is there and gives it what it takes."""
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    for index, launch in enumerate(plan.instructions):
        if not isinstance(launch, Launch):
            continue
        place = f"{where}: instruction {index}"
        if (kernel := kernels.get(launch.kernel)) is None:
            raise EngineFormatError(f"{place}: kernel {launch.kernel!r} is not among the plan's kernels.")
        given = tuple(item.dtype if isinstance(item, Value) else "pointer" for item in launch.arguments.values())
        if given != kernel.parameters:
            raise EngineFormatError(
                f"{place}: kernel {kernel.name!r} takes ({', '.join(kernel.parameters)}), the plan gives "
                f"({', '.join(given)}). The plan is damaged: build the engine again."
            )
        if launch.collective is not None:
            _check_collective(launch, launch.collective, f"{place}.collective")


def _check_collective(launch: Launch, collective: Collective, where: str) -> None:
    """It says of which arguments what a library must know."""
    again = "The plan is damaged: build the engine again."
    part, total = (launch.operands.get(name) for name in (collective.part, collective.sum))
    if part is None or (part.kind, part.access) != ("peers", "r"):
        raise EngineFormatError(
            f"{where}: argument {collective.part!r} is no part of every rank's that is read. {again}"
        )
    if total is None or (total.kind, total.access) != ("buffer", "w"):
        raise EngineFormatError(f"{where}: argument {collective.sum!r} is no buffer that is written. {again}")
    if part.extent != total.extent:
        raise EngineFormatError(f"{where}: the sum is not as large as a part. {again}")


def _require_unique(names: list[str], where: str) -> None:
    if len(set(names)) != len(names):
        raise EngineFormatError(f"{where}: two entries have the same name.")


def _read_step_input(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in STEP_INPUTS:
        raise EngineFormatError(
            f"{where}: step input {describe(value)} is not known; this runtime provides {', '.join(STEP_INPUTS)}. "
            f"Upgrade enginery."
        )
    return value


def _read_group(value: object, where: str) -> StateGroup:
    group = Fields.of(value, where).only(*(item.name for item in fields(StateGroup)))
    kind = group.text("kind", ("full", "window"))
    return StateGroup(
        name=group.text("name"),
        kind=kind,
        window=group.integer("window", 1 if kind == "window" else 0, LARGEST if kind == "window" else 0),
        layers=group.integer("layers", 1, 1 << 16),
        block_size=group.integer("block_size", 16, 1024),
        block_bytes=group.integer("block_bytes", 1, 1 << 40),
        num_kv_heads=group.integer("num_kv_heads", 1, 1 << 16),
        head_dim=group.integer("head_dim", 1, 1 << 16),
        dtype=group.text("dtype", STATE_DTYPES),
    )


def _read_buffer(value: object, where: str) -> Buffer:
    buffer = Fields.of(value, where).only(*(item.name for item in fields(Buffer)))
    return Buffer(
        name=buffer.text("name"),
        dtype=buffer.text("dtype", BUFFER_DTYPES),
        bytes=check_expression(buffer.get("bytes"), f"{where}.bytes"),
        slot=buffer.integer("slot", 0, 1 << 16),
        per_thread=buffer.boolean("per_thread"),
        zeroed=buffer.boolean("zeroed"),
        kept=buffer.boolean("kept"),
    )


def _read_logits(logits: Fields) -> Logits:
    logits.only("buffer", "columns", "stride")
    return Logits(logits.text("buffer"), logits.integer("columns", 1, 1 << 31), logits.integer("stride", 1, 1 << 31))


def _read_sample(entry_points: Fields) -> tuple[tuple[Launch, ...], Draws]:
    sample = entry_points.map("sample").only("outputs", "instructions")
    draws = sample.map("outputs").only("draws").map("draws").only(*(item.name for item in fields(Draws)))
    read = Draws(
        token=draws.text("token"),
        logprob=draws.text("logprob"),
        rank=draws.text("rank"),
        top_tokens=draws.text("top_tokens"),
        top_logprobs=draws.text("top_logprobs"),
        top=draws.integer("top", 1, 1 << 10),
        edit_slots=draws.integer("edit_slots", 1, 1 << 16),
    )
    return tuple(sample.items("instructions", _read_drawing, most=MOST_CALLS)), read


def _read_drawing(value: object, where: str) -> Launch:
    launch = Fields.of(value, where)
    launch.text("kind", ("launch",))
    return _read_launch(launch)


def _read_instruction(value: object, where: str) -> Instruction:
    instruction = Fields.of(value, where)
    kind = instruction.text("kind", ("call", "launch"))
    return _read_call(instruction) if kind == "call" else _read_launch(instruction)


def _read_kernel(value: object, where: str) -> KernelImage:
    kernel = Fields.of(value, where).only(*(item.name for item in fields(KernelImage)))
    return KernelImage(
        name=kernel.text("name"),
        file=kernel.text("file"),
        symbol=kernel.text("symbol"),
        role=kernel.text("role"),
        arch=kernel.integer("arch", 1, 1 << 12),
        num_warps=kernel.integer("num_warps", 1, 32),
        shared_bytes=kernel.integer("shared_bytes", 0, 1 << 20),
        registers=kernel.integer("registers", 0, 1 << 10),
        spill_bytes=kernel.integer("spill_bytes", 0, 1 << 20),
        instruction=kernel.text("instruction"),
        parameters=tuple(kernel.items("parameters", _read_parameter, most=128)),
        hidden=kernel.integer("hidden", 0, 8),
        pdl=kernel.boolean("pdl"),
    )


def _read_parameter(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in _PARAMETERS:
        raise EngineFormatError(f"{where}: wanted one of {', '.join(_PARAMETERS)}, got {describe(value)}.")
    return value


def _read_launch(launch: Fields) -> Launch:
    launch.only("kind", "kernel", "region", "guard", "grid", "arguments", "collective")
    grid = launch.items("grid", check_expression, most=3)
    if len(grid) != 3:
        raise EngineFormatError(f"{launch.where}.grid: wanted three expressions, got {len(grid)}.")
    arguments = launch.map("arguments")
    return Launch(
        kernel=launch.text("kernel"),
        region=launch.integer("region", 0, 1 << 24),
        grid=(grid[0], grid[1], grid[2]),
        arguments={name: _read_argument(arguments.map(name)) for name in arguments.values},
        guard=tuple(launch.items("guard", _read_range, most=8)),
        collective=_read_collective(launch.map("collective")) if "collective" in launch.values else None,
    )


def _read_collective(collective: Fields) -> Collective:
    collective.only(*(item.name for item in fields(Collective)))
    return Collective(
        op=collective.text("op", ("all_reduce",)),
        part=collective.text("part"),
        sum=collective.text("sum"),
        dtype=collective.text("dtype", ("bf16",)),
    )


def _read_argument(argument: Fields) -> Operand | Value:
    if argument.get("kind") != "value":
        return _read_operand(argument, (*_OPERANDS, "peers"))
    argument.only("kind", "dtype", "value")
    dtype, value = argument.text("dtype", ("i32", "fp32")), argument.get("value")
    if dtype == "i32":
        return Value(dtype, check_expression(value, f"{argument.where}.value"))
    if not isinstance(value, float) or not math.isfinite(value):
        raise EngineFormatError(f"{argument.where}.value: wanted a number with a point, got {describe(value)}.")
    return Value(dtype, value)


def _read_call(call: Fields) -> Call:
    call.only("kind", "op", "version", "region", "guard", "operands", "attributes")
    operands, attributes = call.map("operands"), call.map("attributes")
    return Call(
        op=call.text("op"),
        version=call.integer("version"),
        region=call.integer("region", 0, 1 << 24),
        operands={name: _read_operand(operands.map(name), _OPERANDS) for name in operands.values},
        attributes={
            name: _read_attribute(item, f"{attributes.where}.{name}") for name, item in attributes.values.items()
        },
        guard=tuple(call.items("guard", _read_range, most=8)),
    )


def _read_operand(operand: Fields, kinds: tuple[str, ...]) -> Operand:
    operand.only(*(item.name for item in fields(Operand)))
    return Operand(
        kind=operand.text("kind", kinds),
        name=operand.text("name"),
        offset=operand.integer("offset"),
        extent=check_expression(operand.get("extent"), f"{operand.where}.extent"),
        access=operand.text("access", ("r", "w", "rw")),
        layer=operand.integer("layer", -1, 1 << 16),
    )


def _read_attribute(value: object, where: str) -> Attribute:
    if isinstance(value, (bool, str, float)) or (isinstance(value, int) and abs(value) <= LARGEST):
        return value
    raise EngineFormatError(f"{where}: wanted a number, text or boolean, got {describe(value)}.")


def _read_range(value: object, where: str) -> Range:
    if (
        isinstance(value, list)
        and len(value) == 3
        and value[0] in VARIABLES
        and all(isinstance(bound, int) and not isinstance(bound, bool) and 0 <= bound <= LARGEST for bound in value[1:])
    ):
        return Range(value[0], value[1], value[2])
    raise EngineFormatError(f"{where}: wanted [variable, low, high], got {describe(value)}.")
