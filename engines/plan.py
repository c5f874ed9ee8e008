"""The plan of one rank: buffers, state groups and entry points (FORMAT.md).

The compiler writes it, the runtime reads it (plan_format.py). `check_bounds` checks that for the largest step the
runtime will make no operand reaches outside its buffer, tensor or state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import EngineFormatError
from .expressions import Expression, evaluate
from .layouts import round_up

# Of buffers that a rank has once, and of those that every thread has.
ALIGNMENT = 256
_THREAD_ALIGNMENT = 64

Attribute = int | float | str | bool


@dataclass(frozen=True)
class Range:
    """A guard: low <= variable <= high."""

    variable: str
    low: int
    high: int


@dataclass(frozen=True)
class Operand:
    """A range of bytes that an instruction touches. kind: buffer, weight, input, state or peers; access: r, w or rw.

    peers: of a launch, the buffer `name` of every rank. What is given is a table i64 [world_size] in order of ranks, of
    the addresses of that buffer's byte `offset`, and `extent` bytes are touched on each.
    """

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

    @property
    def label(self) -> str:
        """For messages."""
        return self.op


@dataclass(frozen=True)
class Value:
    """A number that a kernel takes by value: an i32 made of the step's variables, or an fp32."""

    dtype: str
    value: Expression | float


@dataclass(frozen=True)
class Collective:
    """What a launch does and nothing beside it, so that a library may do it in its place.

    op          all_reduce: the sum of all ranks' parts
    part, sum   names of arguments: peers that are read, and a buffer that is written, both of one extent
    dtype       bf16
    """

    op: str
    part: str
    sum: str
    dtype: str


@dataclass(frozen=True)
class Launch:
    """A kernel of the engine, run on the device when every range of its guard holds, in order of the plan.

    arguments   by the kernel's names, in its order
    region      no two launches have the same: each sees what those before it wrote
    collective  what a library may do in place of the kernel
    """

    kernel: str
    region: int
    grid: tuple[Expression, Expression, Expression]
    arguments: dict[str, Operand | Value]
    guard: tuple[Range, ...] = ()
    collective: Collective | None = None

    @property
    def operands(self) -> dict[str, Operand]:
        """The arguments that are memory."""
        return {name: item for name, item in self.arguments.items() if isinstance(item, Operand)}

    @property
    def label(self) -> str:
        """For messages."""
        return self.kernel


Instruction = Call | Launch


@dataclass(frozen=True)
class KernelImage:
    """Machine code of one kernel and what launching it takes.

    file, symbol  the cubin among the engine's files, and the function in it
    role          "gemm", "attention", ... (plugins/launches.py)
    parameters    "pointer", "i32" or "fp32" of each argument; `hidden` null pointers follow
    pdl           may start before its predecessor has ended: it waits itself
    instruction   the tensor-core instruction that it uses, empty for none
    """

    name: str
    file: str
    symbol: str
    role: str
    arch: int
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    instruction: str
    parameters: tuple[str, ...]
    hidden: int = 0
    pdl: bool = False


@dataclass(frozen=True)
class Buffer:
    """Memory of a step. Buffers of one slot share bytes: the compiler knows that they never live together.

    zeroed  it is zero when the engine has been loaded, and every launch leaves it so
    kept    it lives from step to step
    """

    name: str
    dtype: str
    bytes: Expression
    slot: int
    per_thread: bool = False
    zeroed: bool = False
    kept: bool = False


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
class Draws:
    """Where `sample` leaves what it draws for each row, by the names of buffers.

    token         i32 [rows], which the next step may read; -1 where logits are not finite, -2 where all are masked
    logprob       f32 [rows], of the unmodified distribution
    rank          i32 [rows], from 1: there
    top_tokens    i32 [rows, top], the likeliest in order; top_logprobs f32 [rows, top]
    edit_slots    sequences whose logits can be changed first at the same time
    """

    token: str
    logprob: str
    rank: str
    top_tokens: str
    top_logprobs: str
    top: int
    edit_slots: int

    def bytes_of_row(self) -> dict[str, int]:
        """Of each buffer."""
        one = {self.token: 4, self.logprob: 4, self.rank: 4}
        return one | {self.top_tokens: 4 * self.top, self.top_logprobs: 4 * self.top}


@dataclass(frozen=True)
class PrefixKey:
    """What prefix sharing must know of a prompt's length: nothing (threshold 0), if it is above, or its very value."""

    threshold: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Plan:
    """What one rank executes.

    tile_tokens    the most tokens of an attention tile, 0 where the plan wants no tiles
    sample, draws  how tokens are drawn from the logits, and where they are then; nothing, where the host draws
    """

    rank: int
    world_size: int
    step_inputs: tuple[str, ...]
    state_groups: tuple[StateGroup, ...]
    buffers: tuple[Buffer, ...]
    forward: tuple[Instruction, ...]
    logits: Logits
    prefix_key: PrefixKey = field(default_factory=PrefixKey)
    kernels: tuple[KernelImage, ...] = ()
    tile_tokens: int = 0
    sample: tuple[Launch, ...] = ()
    draws: Draws | None = None

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Of all entry points, in the order in which a step runs them."""
        return (*self.forward, *self.sample)


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
        position += round_up(slot_bytes[slot], ALIGNMENT)
    offsets = {buffer.name: 0 if buffer.per_thread else starts[buffer.slot] for buffer in plan.buffers}
    per_thread = sum(round_up(sizes[b.name], _THREAD_ALIGNMENT) for b in plan.buffers if b.per_thread)
    return ArenaPlan(offsets, sizes, position, per_thread)


def guarded_limits(instruction: Instruction, limits: Mapping[str, int]) -> dict[str, int]:
    """The largest values of the variables under which `instruction` runs."""
    largest = dict(limits)
    for guard in instruction.guard:
        largest[guard.variable] = min(largest[guard.variable], guard.high)
    return largest


def check_bounds(plan: Plan, limits: Mapping[str, int], weight_bytes: Mapping[str, int], where: str) -> None:
    """Raises EngineFormatError where an operand names what is not there or reaches outside of it.

    limits        largest values of a step's variables
    weight_bytes  of each tensor of this rank's weights file
    """
    sizes = plan_arena(plan, limits).sizes
    groups = {group.name: group for group in plan.state_groups}
    for index, instruction in enumerate(plan.instructions):
        largest = guarded_limits(instruction, limits)
        for name, operand in instruction.operands.items():
            place = f"{where}: instruction {index} ({instruction.label}), operand {name}"
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
            size = (weight_bytes if operand.kind == "weight" else sizes).get(operand.name)
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
    for name, row_bytes in plan.draws.bytes_of_row().items() if plan.draws is not None else ():
        if sizes.get(name, -1) < limits["rows"] * row_bytes:
            raise EngineFormatError(f"{where}: what is drawn does not fit the buffer {name!r}.")
