"""What the launches of a plan declare, against what their programs touch.

Of each launch: a byte that is touched lies within the operand that is declared for the pointer, and that within its
buffer or tensor; only what is declared `w` or `rw` is stored; what is `w`, or scratch, is read only where the launch
has stored it before (but launches of `sample` read what those before have left in scratch). What is declared `r` of a
buffer has been stored whole, under the buffer's own name, by launches before: so the runtime's null device may take a
declared store for done, and no buffer is read whose bytes another of its slot has since. Of state, exactly the slots of
the step's tokens are stored, and blocks of its tables read, or block 0, which kernels read in place of none. Inside of
a launch there are no races (races.py).

Of programmatic dependent launch (why a graph has no hazards between launches): a program that has waited follows its
whole predecessor, and as every program of that has waited, too, all launches before. Until then it may read weights
alone, which nothing stores. So launches are in order wherever it counts, as their regions say: those that share
scratch, counters or a slot's bytes, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from enginery.engines.expressions import evaluate
from enginery.engines.plan import ArenaPlan, Launch, Operand, Plan, StateGroup
from numpy.typing import NDArray

from .traces import Argument, Declared, Trace

_ELEMENT_BYTES = {"bf16": 2, "fp8": 1, "i8": 1}


class Accesses:
    """The launches of a rank, step after step. Raises AssertionError for what a plan or a kernel does wrong."""

    def __init__(self, plan: Plan, arena: ArenaPlan, weight_bytes: Mapping[str, int]) -> None:
        self._groups = {group.name: group for group in plan.state_groups}
        self._numbers = {buffer.name: number for number, buffer in enumerate(plan.buffers, 1)}
        self._zeroed = {buffer.name for buffer in plan.buffers if buffer.zeroed}
        self._sampling = {launch.kernel for launch in plan.sample}
        self._kept = {buffer.name for buffer in plan.buffers if buffer.kept}
        self._arena, self._weight_bytes, self._logits = arena, weight_bytes, plan.logits
        # Of each byte of the arena the buffer whose content it holds.
        self._owners = np.zeros(arena.arena_bytes, np.int16)

    def begin_step(self, slots: NDArray[Any], blocks: NDArray[Any]) -> None:
        """slots of the tokens, -1 for none; the step's block tables."""
        self._slots, self._blocks = slots[slots >= 0], {0, *blocks[blocks >= 0].tolist()}
        self._owners[:] = 0
        for name in self._zeroed | self._kept:
            self._bytes_of(name)[:] = self._numbers[name]

    def begin_launch(
        self, launch: Launch, variables: Mapping[str, int], ranks: Sequence[Accesses]
    ) -> dict[str, Declared]:
        """What its pointers may touch. ranks: of all, this one among them."""
        declared = {}
        self._check_overlaps(launch, variables)
        for name, operand in launch.operands.items():
            place = f"{launch.kernel}, {name}"
            if operand.kind in ("weight", "input"):
                assert operand.access == "r", f"{place}: a {operand.kind} is declared {operand.access!r}"
            if operand.kind in ("state", "input"):
                declared[name] = Declared(None, operand.access)
                continue
            extent = self._extent(operand, variables)
            size = (self._weight_bytes if operand.kind == "weight" else self._arena.sizes)[operand.name]
            is_inside = 0 <= operand.offset <= operand.offset + extent <= size
            assert is_inside, f"{place}: {extent} bytes from {operand.offset} on of {operand.name!r}, which has {size}"
            declared[name] = Declared(extent, operand.access, peers=operand.kind == "peers")
            if operand.access == "r" and operand.kind in ("buffer", "peers"):
                for rank in ranks if operand.kind == "peers" else [self]:
                    rank._check_is_stored(operand, extent, place)
        return declared

    def end_launch(self, launch: Launch, trace: Trace) -> None:
        """What its programs have touched."""
        early = {name for name in trace.early if launch.operands[name].kind != "weight"}
        assert not early, f"{launch.kernel} reads {early} before it waits for the launch before it"
        for name, operand in launch.operands.items():
            argument = trace.arguments[name]
            place = f"{launch.kernel}, {name}"
            if operand.kind == "state":
                self._check_state_reads(argument, operand, place)
            elif operand.kind == "buffer" and operand.access != "r":
                start = self._arena.offsets[operand.name] + operand.offset
                owners = self._owners[start : start + argument.end]
                self._check_brought(launch, operand, argument, owners, place)
                owners[argument.written()] = self._numbers[operand.name]
        for group, layer, arguments in self._stored_state(launch, trace):
            self._check_state_writes(group, layer, arguments, launch.kernel)

    def end_step(self, rows: int) -> None:
        """The logits of so many rows are there."""
        bytes_of_rows = self._bytes_of(self._logits.buffer)[: rows * self._logits.stride * 4]
        assert (bytes_of_rows == self._numbers[self._logits.buffer]).all(), "logits that no launch has stored"

    def _bytes_of(self, name: str) -> NDArray[np.int16]:
        start = self._arena.offsets[name]
        return self._owners[start : start + self._arena.sizes[name]]

    def _extent(self, operand: Operand, variables: Mapping[str, int]) -> int:
        """Of what is kept from step to step the whole: where it is touched does not depend on this step's size."""
        if operand.name in self._kept:
            return self._arena.sizes[operand.name] - operand.offset
        return evaluate(operand.extent, variables)

    def _check_is_stored(self, operand: Operand, extent: int, place: str) -> None:
        owners = self._bytes_of(operand.name)[operand.offset : operand.offset + extent]
        missing = np.count_nonzero(owners != self._numbers[operand.name])
        assert not missing, (
            f"{place}: {missing} of {owners.size} bytes that it declares to read of {operand.name!r} are not stored in "
            f"this step, or another buffer's since"
        )

    def _check_overlaps(self, launch: Launch, variables: Mapping[str, int]) -> None:
        """What a launch stores has no other name in it, under which it might be read or stored."""
        ranges = []
        for name, operand in launch.operands.items():
            if operand.kind == "buffer":
                start = self._arena.offsets[operand.name] + operand.offset
                ranges.append((start, start + self._extent(operand, variables), name, operand.access))
        for begin, end, name, access in ranges:
            for first, last, other, _ in ranges:
                overlaps = name != other and access != "r" and first < end and begin < last
                assert not overlaps, f"{launch.kernel}: {name}, which it stores, and {other} share bytes"

    def _check_brought(
        self, launch: Launch, operand: Operand, argument: Argument, owners: NDArray[np.int16], place: str
    ) -> None:
        """What it reads without having stored it. Launches of `sample` alone leave each other something in scratch."""
        if operand.name in self._zeroed | self._kept:
            return
        is_left = operand.access == "rw" and launch.kernel in self._sampling
        for elements in argument.touched.brought:
            found = is_left and (owners[elements * argument.width] == self._numbers[operand.name]).all()
            assert found, f"{place}: reads what it has not stored; it is declared {operand.access!r}"

    def _check_state_reads(self, argument: Argument, operand: Operand, place: str) -> None:
        group = self._groups[operand.name]
        for _, _, _, elements in argument.touched.reads:
            places = elements * argument.width
            blocks, layers = places // group.block_bytes, places % group.block_bytes // _layer_bytes(group)
            assert (layers == operand.layer).all(), f"{place}: reads another layer than {operand.layer}"
            foreign = set(np.unique(blocks).tolist()) - self._blocks
            assert not foreign, f"{place}: reads blocks {foreign}, which are in no block table"

    def _stored_state(self, launch: Launch, trace: Trace) -> Iterator[tuple[StateGroup, int, list[Argument]]]:
        """State group, layer and pointers of the state that a launch declares to store."""
        states = {(o.name, o.layer) for o in launch.operands.values() if o.kind == "state" and o.access != "r"}
        for name, layer in states:
            pointers = [
                key for key, o in launch.operands.items() if (o.kind, o.name, o.layer) == ("state", name, layer)
            ]
            yield self._groups[name], layer, [trace.arguments[key] for key in pointers]

    def _check_state_writes(self, group: StateGroup, layer: int, arguments: list[Argument], kernel: str) -> None:
        """All bytes of the step's slots are stored in this layer, and no others."""
        stored = np.logical_or.reduce([argument.written() for argument in arguments])
        blocks = stored.reshape(-1, group.layers, _layer_bytes(group))
        is_slot = np.zeros((len(blocks), group.block_size), bool)
        is_slot.reshape(-1)[self._slots] = True
        wanted = np.zeros_like(blocks)
        wanted[:, layer] = is_slot[:, _token_of_byte(group)]
        more, less = np.count_nonzero(blocks & ~wanted), np.count_nonzero(wanted & ~blocks)
        assert not more, f"{kernel}: stores {more} bytes of state that are not of the step's slots"
        assert not less, f"{kernel}: leaves {less} bytes of the step's slots as they were"


def _layer_bytes(group: StateGroup) -> int:
    return group.block_bytes // group.layers


def _token_of_byte(group: StateGroup) -> NDArray[Any]:
    """Of each byte of a layer in a block the token, 0 … block_size - 1, that it belongs to (plugins/README.md)."""
    tokens = np.arange(group.block_size)
    rows = np.repeat(tokens, group.head_dim * _ELEMENT_BYTES[group.dtype])
    if group.dtype == "bf16":
        head = [rows, rows]
    else:  # values turned, then scales of two bytes
        scales = np.repeat(tokens, 2)
        head = [rows, np.tile(tokens, group.head_dim), scales, scales]
    return np.tile(np.concatenate(head), group.num_kv_heads)
