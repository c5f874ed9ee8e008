"""A GPU of NumPy arrays: runs whole plans launch by launch, through Triton's interpreter.

Memory is poisoned before every step, so that what nobody has written shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from enginery.engines.expressions import evaluate
from enginery.engines.plan import Launch, Operand, Plan, plan_arena
from enginery.engines.weights import read_weights_header
from enginery.plugins.launches import Kernel
from numpy.typing import NDArray

from .accesses import Accesses
from .interpreter import run_kernel


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence, of which `known` are computed already. blocks: of each state group.

    is_padding: as the runtime fills a step up: nothing of it is kept.
    """

    token_ids: list[int]
    known: int
    prompt_length: int
    blocks: list[int]
    is_padding: bool = False


class Address:
    """Somewhere in a NumPy array of bytes, with the type that a kernel reads there."""

    def __init__(self, array: NDArray[Any], offset: int, kind: str) -> None:
        assert array.flags.c_contiguous
        self.array, self.dtype, self._address = array, kind.removeprefix("*"), array.ctypes.data + offset

    def data_ptr(self) -> int:
        """The address."""
        return self._address


class Device:
    """Holds the memory of one rank. num_blocks: of each state group."""

    def __init__(
        self, plan: Plan, kernels: tuple[Kernel, ...], weights: Path, limits: dict[str, int], num_blocks: int
    ) -> None:
        self.plan, self.limits = plan, limits
        self._kernels = {kernel.name: kernel for kernel in kernels}
        self._weights = np.fromfile(weights, np.uint8)
        self._placed = read_weights_header(weights).placed
        self._arena_plan = plan_arena(plan, limits)
        self._arena = np.zeros(self._arena_plan.arena_bytes, np.uint8)
        # Caches of 8 bits are zero at load, since their NaNs would be multiplied; others need no such care.
        self._state = [
            np.full(num_blocks * group.block_bytes, 0xFF if group.dtype == "bf16" else 0, np.uint8)
            for group in plan.state_groups
        ]
        self._block_size = plan.state_groups[0].block_size
        self.ranks = [self]
        self._accesses = Accesses(
            plan, self._arena_plan, {name: placed.tensor.num_bytes for name, placed in self._placed.items()}
        )

    def step(self, pieces: list[Piece], rows: list[int]) -> NDArray[np.float32]:
        """Logits [rows, vocab] of a step; rows are indices of its packed tokens."""
        (found,) = step_of_ranks([self], pieces, rows)
        return found

    def collectives(self, pieces: list[Piece], rows: list[int]) -> Iterator[Launch]:
        """Runs a step. Yields launches as they meet other ranks': before they read, and after it if they meet twice."""
        self._poison()
        inputs, variables = self._inputs(pieces, rows)
        self._variables = variables
        self._accesses.begin_step(inputs["slots"], inputs["block_table"])
        for launch in self.plan.forward:
            assert isinstance(launch, Launch)
            if all(part.low <= variables[part.variable] <= part.high for part in launch.guard):
                meetings = dict(self._kernels[launch.kernel].constants).get("MEETINGS", 0)
                if meetings:
                    yield launch
                self._launch(launch, inputs, variables)
                if meetings == 2:
                    yield launch
        self._accesses.end_step(len(rows))

    def logits(self, num_rows: int) -> NDArray[np.float32]:
        """[rows, vocab] of the step that has ended."""
        logits = self.plan.logits
        start = self._arena_plan.offsets[logits.buffer]
        data = self._arena[start : start + num_rows * logits.stride * 4].view(np.float32)
        return data.reshape(num_rows, logits.stride)[:, : logits.columns].copy()

    def draw(self, inputs: dict[str, NDArray[Any]], asked: dict[str, int]) -> dict[str, NDArray[Any]]:
        """What `sample` leaves for the rows of the step that has ended, by the names of `Draws`: u8 [rows, bytes].

        inputs: the step inputs of `sample`; asked: its variables, but for the number of rows.
        """
        assert self.plan.draws is not None
        variables = {**self._variables, **asked}
        for launch in self.plan.sample:
            if all(part.low <= variables[part.variable] <= part.high for part in launch.guard):
                self._launch(launch, inputs, variables)
        bytes_of_row = self.plan.draws.bytes_of_row()
        return {
            name: self._view(name)[: variables["rows"] * size].reshape(variables["rows"], size).copy()
            for name, size in bytes_of_row.items()
        }

    def _poison(self) -> None:
        kept = {
            buffer.name: self._view(buffer.name).copy() for buffer in self.plan.buffers if buffer.kept or buffer.zeroed
        }
        self._arena[:] = 0xFF
        for name, content in kept.items():
            self._view(name)[:] = content

    def _check_zeroed(self) -> None:
        for buffer in self.plan.buffers:
            assert not buffer.zeroed or not self._view(buffer.name).any(), f"a launch leaves {buffer.name} behind"

    def _view(self, name: str) -> NDArray[np.uint8]:
        start = self._arena_plan.offsets[name]
        return self._arena[start : start + self._arena_plan.sizes[name]]

    def _inputs(self, pieces: list[Piece], rows: list[int]) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
        token_ids, positions, lengths, sequences, slots, decodes, tiles = [], [], [], [], [], [], []
        for index, piece in enumerate(pieces):
            first = len(token_ids)
            if len(piece.token_ids) == 1:
                decodes.append(first)
            else:
                for start in range(0, len(piece.token_ids), self.plan.tile_tokens):
                    tiles.append((first + start, min(self.plan.tile_tokens, len(piece.token_ids) - start)))
            for offset, token in enumerate(piece.token_ids):
                position = piece.known + offset
                token_ids.append(token)
                positions.append(position)
                lengths.append(piece.prompt_length)
                sequences.append(index)
                block = piece.blocks[position // self._block_size]
                slots.append(-1 if piece.is_padding else block * self._block_size + position % self._block_size)
        table = np.full((len(pieces), self.limits["max_blocks"]), -1, np.int32)
        for index, piece in enumerate(pieces):
            table[index, : len(piece.blocks)] = piece.blocks
        inputs = {
            "token_ids": token_ids,
            "positions": positions,
            "prompt_lengths": lengths,
            "token_sequence": sequences,
            "rows": rows,
            "decode_tokens": decodes or [0],
            "tiles": tiles or [(0, 0)],
        }
        arrays: dict[str, NDArray[Any]] = {name: np.array(values, np.int32) for name, values in inputs.items()}
        arrays |= {"slots": np.array(slots, np.int64), "block_table": table}
        variables = {
            "tokens": len(token_ids),
            "rows": len(rows),
            "sequences": len(pieces),
            "decodes": len(decodes),
            "tiles": len(tiles),
            "max_blocks": self.limits["max_blocks"],
        }
        return arrays, variables

    def _launch(self, launch: Launch, inputs: dict[str, NDArray[Any]], variables: dict[str, int]) -> None:
        kernel = self._kernels[launch.kernel]
        grid = tuple(evaluate(size, variables) for size in launch.grid)
        arguments: dict[str, Any] = {}
        for name, kind in kernel.parameters:
            item = launch.arguments[name]
            if isinstance(item, Operand):
                arguments[name] = self._address(item, kind, inputs)
            else:
                arguments[name] = item.value if kind == "fp32" else evaluate(item.value, variables)  # type: ignore[arg-type]
        declared = self._accesses.begin_launch(launch, variables, [rank._accesses for rank in self.ranks])
        self._accesses.end_launch(launch, run_kernel(kernel, grid, arguments, declared))
        self._check_zeroed()

    def _address(self, operand: Operand, kind: str, inputs: dict[str, NDArray[Any]]) -> Address:
        if operand.kind == "peers":
            found = [rank._arena.ctypes.data + rank._arena_plan.offsets[operand.name] for rank in self.ranks]
            return Address(np.array(found, np.int64) + operand.offset, 0, kind)
        if operand.kind == "buffer":
            return Address(self._arena, self._arena_plan.offsets[operand.name] + operand.offset, kind)
        if operand.kind == "weight":
            return Address(self._weights, self._placed[operand.name].offset + operand.offset, kind)
        if operand.kind == "input":
            return Address(inputs[operand.name], 0, kind)
        names = [group.name for group in self.plan.state_groups]
        group = self.plan.state_groups[names.index(operand.name)]
        layer_bytes = group.block_bytes // group.layers
        return Address(self._state[names.index(operand.name)], operand.layer * layer_bytes, kind)


def step_of_ranks(devices: list[Device], pieces: list[Piece], rows: list[int]) -> list[NDArray[np.float32]]:
    """Each device's logits [rows, vocab] of a step, which they run in turns from one collective to the next: those that
    come first write what is behind it before the last has read what was before it.
    """
    for device in devices:
        device.ranks = sorted(devices, key=lambda each: each.plan.rank)
    for launches in zip(*(device.collectives(pieces, rows) for device in devices), strict=True):
        assert len({launch.kernel for launch in launches}) == 1, launches
    return [device.logits(len(rows)) for device in devices]
