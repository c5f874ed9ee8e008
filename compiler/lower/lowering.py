"""What the lowerings of all targets share: a walk over the graph that gives buffers, tensors and instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from ...engines.errors import CompileError
from ...engines.expressions import Expression
from ...engines.plan import Buffer, Instruction, Logits, Operand, Plan
from ..graph.builder import GraphBuilder, columns_of
from ..models.config import Config
from ..passes.options import Options
from .memory import assign_slots
from .state import prefix_key, state_groups
from .tensors import TensorJobs

ELEMENT_BYTES = {"f32": 4, "bf16": 2, "fp8": 1, "i8": 1, "u8": 1}
# Above every count that a guard may name.
UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class View:
    """Columns [offset, offset + columns) of a buffer, rows `stride` elements apart.

    scale, sums: the buffers of its rows' scales and of the sums of each 32 of its values
    """

    buffer: str
    rows: str
    columns: int
    stride: int
    dtype: str
    offset: int = 0
    scale: str = ""
    sums: str = ""

    @property
    def extent(self) -> Expression:
        """Bytes of all rows."""
        return ["*", self.rows, self.stride * ELEMENT_BYTES[self.dtype]]


@dataclass
class Lowering:
    """Lowers each node of the graph by the method that is called as its operator is."""

    g: GraphBuilder
    config: Config
    options: Options
    jobs: TensorJobs
    buffers: dict[str, Buffer] = field(default_factory=dict)
    views: dict[ir.Value, View] = field(default_factory=dict)

    def walk(self) -> None:
        """Raises CompileError for an operator that the target has no kernel for."""
        for node in self.g.graph:
            if node.outputs[0] in self.views:
                continue
            method = getattr(self, f"_{node.op_type}", None)
            if method is None:
                raise CompileError(
                    f"node {node.name!r}: {self.options.target.name} has no kernel for {node.op_type}, and no pass "
                    f"makes another operator of it. Models are written in what compiler/models/layers.py offers."
                )
            method(node)

    def logits(self) -> View:
        """What the walk has left."""
        return self.views[next(value for value in self.g.graph.outputs if value.name == "logits")]

    def plan(self, instructions: Sequence[Instruction], buffers: list[Buffer], tile_tokens: int = 0) -> Plan:
        """The plan of what the walk has made; buffers get their slots here."""
        view = self.logits()
        operands = [operand for each in instructions for operand in each.operands.values()]
        names = {operand.name for operand in operands if operand.kind == "input"}
        # Peers may still read what is theirs to read when this rank's next step has begun.
        kept = {view.buffer, *(operand.name for operand in operands if operand.kind == "peers")}
        kept |= {buffer.name for buffer in buffers if buffer.zeroed or buffer.kept}
        return Plan(
            rank=self.options.rank,
            world_size=self.options.world_size,
            step_inputs=tuple(sorted(names)),
            state_groups=state_groups(self.config, self.options),
            buffers=tuple(assign_slots(buffers, instructions, kept)),
            forward=tuple(instructions),
            logits=Logits(view.buffer, self.config.vocab_size, view.stride),
            prefix_key=prefix_key(self.config),
            tile_tokens=tile_tokens,
        )

    def _view(self, value: ir.Value | None) -> View:
        assert value is not None
        return self.views[value]

    def _at(self, view: View, access: str) -> Operand:
        return Operand("buffer", view.buffer, 0, view.extent, access)

    def _scale(self, view: View, access: str) -> Operand | None:
        return Operand("buffer", view.scale, 0, ["*", view.rows, 4], access) if view.scale else None

    def _weight(self, name: str) -> Operand:
        return Operand("weight", name, 0, self.jobs.bytes_of(name), "r")

    def _vector(self, value: ir.Value | None) -> Operand | None:
        return None if value is None else self._weight(self.jobs.vector(value))

    def _beside(self, name: str) -> Operand | None:
        """The scales or sums beside a matrix, if its layout has them."""
        return self._weight(name) if self.jobs.has(name) else None

    def _Split(self, node: ir.Node) -> None:
        """No instruction: the outputs are columns of the input."""
        whole, offset = self._view(node.inputs[0]), 0
        for value in node.outputs:
            columns = columns_of(value)
            self.views[value] = View(whole.buffer, whole.rows, columns, whole.stride, whole.dtype, offset)
            offset += columns
