"""The plan of one rank: buffers, state groups and entry points (FORMAT.md).

The compiler writes it, the runtime reads it. Reading checks form; `check_bounds` checks that for the largest step the
runtime will make no operand reaches outside its buffer, tensor or state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import msgpack

from .errors import EngineFormatError
from .expressions import VARIABLES, Expression, check_expression, evaluate
from .fields import LARGEST, Fields, describe

PLAN_VERSION = 0
LARGEST_PLAN_BYTES = 16 << 20
# A hundred layers have a thousand calls, and each some variants.
MOST_CALLS = 1 << 14
STEP_INPUTS = ("token_ids", "positions", "token_sequence", "prompt_lengths", "rows", "slots", "block_table")
BUFFER_DTYPES = ("f32", "bf16", "i8", "u8", "i32")
STATE_DTYPES = ("f32", "bf16", "i8")
ALIGNMENT = 64

Attribute = int | float | str | bool


@dataclass(frozen=True)
class Range:
    """A guard: low <= variable <= high."""

    variable: str
    low: int
    high: int


@dataclass(frozen=True)
class Operand:
    """A range of bytes that a call touches. kind: buffer, weight, input or state; access: r, w or rw."""

    kind: str
    name: str
    offset: int = 0
    extent: Expression = 0
    access: str = "r"
    layer: int = -1


@dataclass(frozen=True)
class Call:
    """A versioned operation of the host, run when every range of its guard holds."""

    op: str
    version: int
    region: int
    operands: dict[str, Operand]
    attributes: dict[str, Attribute]
    guard: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """Memory of a step. Buffers of one slot share bytes: the compiler knows that they never live together."""

    name: str
    dtype: str
    bytes: Expression
    slot: int
    per_thread: bool = False


@dataclass(frozen=True)
class StateGroup:
    """Layers that keep the same kind of state. block_bytes: one block over all its layers, on this rank."""

    name: str
    kind: str
    window: int
    layers: int
    block_size: int
    block_bytes: int
    num_kv_heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class Logits:
    """Where `forward` leaves its logits: f32 [rows, stride], the first `columns` of each row."""

    buffer: str
    columns: int
    stride: int


@dataclass(frozen=True)
class PrefixKey:
    """What prefix sharing must know of a prompt's length: nothing (threshold 0), if it is above, or its very value."""

    threshold: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Plan:
    """What one rank executes."""

    rank: int
    world_size: int
    step_inputs: tuple[str, ...]
    state_groups: tuple[StateGroup, ...]
    buffers: tuple[Buffer, ...]
    forward: tuple[Call, ...]
    logits: Logits
    prefix_key: PrefixKey = field(default_factory=PrefixKey)


@dataclass(frozen=True)
class ArenaPlan:
    """Where each shared buffer lies for given limits. per_thread: bytes of those that every thread has."""

    offsets: dict[str, int]
    sizes: dict[str, int]
    arena_bytes: int
    per_thread_bytes: int


def plan_arena(plan: Plan, limits: Mapping[str, int]) -> ArenaPlan:
    """Sizes and places of the buffers for the largest step: limits are the largest tokens, rows and sequences."""
    sizes = {buffer.name: evaluate(buffer.bytes, limits) for buffer in plan.buffers}
    slot_bytes: dict[int, int] = {}
    for buffer in plan.buffers:
        if not buffer.per_thread:
            slot_bytes[buffer.slot] = max(slot_bytes.get(buffer.slot, 0), sizes[buffer.name])
    starts, position = {}, 0
    for slot in sorted(slot_bytes):
        starts[slot] = position
        position += -(-slot_bytes[slot] // ALIGNMENT) * ALIGNMENT
    offsets = {buffer.name: 0 if buffer.per_thread else starts[buffer.slot] for buffer in plan.buffers}
    per_thread = sum(-(-sizes[b.name] // ALIGNMENT) * ALIGNMENT for b in plan.buffers if b.per_thread)
    return ArenaPlan(offsets, sizes, position, per_thread)


def guarded_limits(call: Call, limits: Mapping[str, int]) -> dict[str, int]:
    """The largest values of the variables under which `call` runs."""
    largest = dict(limits)
    for guard in call.guard:
        largest[guard.variable] = min(largest[guard.variable], guard.high)
    return largest


def check_bounds(plan: Plan, limits: Mapping[str, int], weight_bytes: Mapping[str, int], where: str) -> None:
    """Raises EngineFormatError where an operand names what is not there or reaches outside of it.

    limits        largest tokens, rows and sequences of a step
    weight_bytes  of each tensor of this rank's weights file
    """
    sizes = plan_arena(plan, limits).sizes
    groups = {group.name: group for group in plan.state_groups}
    for index, call in enumerate(plan.forward):
        largest = guarded_limits(call, limits)
        for name, operand in call.operands.items():
            place = f"{where}: call {index} ({call.op}), operand {name}"
            if operand.kind == "input":
                if operand.name not in plan.step_inputs:
                    raise EngineFormatError(f"{place}: step input {operand.name!r} is not declared by the plan.")
                continue
            if operand.kind == "state":
                group = groups.get(operand.name)
                if group is None or not 0 <= operand.layer < group.layers:
                    raise EngineFormatError(
                        f"{place}: layer {operand.layer} of state group {operand.name!r} does not exist."
                    )
                continue
            size = (sizes if operand.kind == "buffer" else weight_bytes).get(operand.name)
            if size is None:
                raise EngineFormatError(f"{place}: {operand.kind} {operand.name!r} does not exist.")
            end = operand.offset + evaluate(operand.extent, largest)
            if end > size:
                raise EngineFormatError(
                    f"{place}: reaches byte {end} of {operand.kind} {operand.name!r}, which has {size}. "
                    f"The plan is damaged: build the engine again."
                )
    rows_bytes = limits["rows"] * plan.logits.stride * 4
    if sizes.get(plan.logits.buffer, -1) < rows_bytes or plan.logits.columns > plan.logits.stride:
        raise EngineFormatError(f"{where}: logits do not fit the buffer {plan.logits.buffer!r}.")


def encode_plan(plan: Plan) -> bytes:
    """The plan as msgpack; the same plan gives the same bytes."""
    document = {
        "version": PLAN_VERSION,
        "rank": plan.rank,
        "world_size": plan.world_size,
        "step_inputs": list(plan.step_inputs),
        "prefix_key": asdict(plan.prefix_key),
        "state_groups": [asdict(group) for group in plan.state_groups],
        "buffers": [asdict(buffer) for buffer in plan.buffers],
        "entry_points": {
            "forward": {
                "outputs": {"logits": asdict(plan.logits)},
                "instructions": [_encode_call(call) for call in plan.forward],
            }
        },
    }
    return bytes(msgpack.packb(document))


def _encode_call(call: Call) -> dict[str, Any]:
    return {
        "kind": "call",
        "op": call.op,
        "version": call.version,
        "region": call.region,
        "guard": [[guard.variable, guard.low, guard.high] for guard in call.guard],
        "operands": {name: asdict(operand) for name, operand in call.operands.items()},
        "attributes": call.attributes,
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
    top.only("version", "rank", "world_size", "step_inputs", "prefix_key", "state_groups", "buffers", "entry_points")
    forward = top.map("entry_points").only("forward").map("forward").only("outputs", "instructions")
    world_size = top.integer("world_size", 1, 1024)
    prefix_key = top.map("prefix_key").only("threshold", "exact")
    plan = Plan(
        rank=top.integer("rank", 0, world_size - 1),
        world_size=world_size,
        step_inputs=tuple(top.items("step_inputs", _read_step_input)),
        prefix_key=PrefixKey(prefix_key.integer("threshold"), prefix_key.boolean("exact")),
        state_groups=tuple(top.items("state_groups", _read_group, most=64)),
        buffers=tuple(top.items("buffers", _read_buffer)),
        forward=tuple(forward.items("instructions", _read_call, most=MOST_CALLS)),
        logits=_read_logits(forward.map("outputs").only("logits").map("logits")),
    )
    _require_unique([buffer.name for buffer in plan.buffers], f"{where}.buffers")
    _require_unique([group.name for group in plan.state_groups], f"{where}.state_groups")
    return plan


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
    )


def _read_logits(logits: Fields) -> Logits:
    logits.only("buffer", "columns", "stride")
    return Logits(logits.text("buffer"), logits.integer("columns", 1, 1 << 31), logits.integer("stride", 1, 1 << 31))


def _read_call(value: object, where: str) -> Call:
    call = Fields.of(value, where)
    call.text("kind", ("call",))
    call.only("kind", "op", "version", "region", "guard", "operands", "attributes")
    operands, attributes = call.map("operands"), call.map("attributes")
    return Call(
        op=call.text("op"),
        version=call.integer("version"),
        region=call.integer("region", 0, 1 << 24),
        operands={name: _read_operand(operands.map(name)) for name in operands.values},
        attributes={
            name: _read_attribute(item, f"{attributes.where}.{name}") for name, item in attributes.values.items()
        },
        guard=tuple(call.items("guard", _read_range, most=8)),
    )


def _read_operand(operand: Fields) -> Operand:
    operand.only(*(item.name for item in fields(Operand)))
    return Operand(
        kind=operand.text("kind", ("buffer", "weight", "input", "state")),
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
