"""What collectives of a GPU plan share: the buffers whose parts ranks read from each other, and when they meet.

A domain's collectives, those of tokens and those of rows, all run in a step or none do. In each domain buffers and
halves of flags are used in turn, the first of each first, and where their number is odd the last one meets twice: so
that, wherever a step ends, everybody has read and the next one may begin (plugins/all_reduce/triton_meeting.py). A
library may do any of them that says so: its sum is a meeting, too, to which all come after what they had launched
before it, and after which nobody reads the part; flags stay as they are, cleared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import onnx_ir as ir

from ...engines.expressions import Expression
from ...engines.layouts import GPU_PADDING, round_up
from ...engines.plan import Buffer, Operand
from ...plugins.all_reduce.meeting import Meeting, flags_bytes
from ..graph.builder import attribute, columns_of, rows_of
from ..graph.rewrite import is_ours, users
from ..passes.options import Options
from .lowering import ELEMENT_BYTES, View
from .scratch import widest

_FLAGS = "collective.flags"


def is_part(value: ir.Value, op_type: str = "") -> bool:
    """Whether `value` is this rank's part for a collective (of this type, if one is given)."""
    return any(is_collective(user, op_type) and user.inputs[0] is value for user in users(value))


def is_collective(node: ir.Node, op_type: str = "") -> bool:
    """Whether ranks meet in `node`."""
    return any(is_ours(node, each) for each in ("AllReduce", "AllGather") if op_type in ("", each))


def _part_bytes(node: ir.Node, dtype: str) -> Expression:
    """Of the rank whose part is the largest."""
    columns = columns_of(node.outputs[0])
    if is_ours(node, "AllGather"):
        columns = max(end - start for start, end in itertools.pairwise(attribute(node, "starts")))
    return ["*", str(rows_of(node.outputs[0])), round_up(columns, GPU_PADDING) * ELEMENT_BYTES[dtype]]


@dataclass
class Collectives:
    """Those of one rank's graph."""

    options: Options
    nodes: list[ir.Node]
    _sizes: dict[str, list[Expression]] = field(default_factory=dict)

    @staticmethod
    def of(graph: ir.Graph, options: Options) -> Collectives:
        """In the order in which they run."""
        nodes = [node for node in graph if is_collective(node)]
        domains = [rows_of(node.outputs[0]) for node in nodes]
        assert domains == sorted(domains, key=("tokens", "rows").index), "collectives of rows are a step's last"
        return Collectives(options, nodes)

    def exchange(self, part: ir.Value, dtype: str) -> str:
        """The buffer for a rank's part; all ranks have it, as large as the rank with most columns needs it."""
        (node,) = users(part)
        name, size = f"collective.exchange{self._place(node)[0] % 2}", _part_bytes(node, dtype)
        sizes = self._sizes.setdefault(name, [])
        if size not in sizes:
            sizes.append(size)
        return name

    def meeting(self, node: ir.Node) -> Meeting:
        """How the ranks meet for `node`."""
        index, count = self._place(node)
        is_last = index == count - 1
        return Meeting(self.options.rank, self.options.world_size, index % 2, is_last and count % 2 == 1)

    def operands(self, node: ir.Node, part: View) -> dict[str, Operand | None]:
        """The memory of all ranks that `node` touches. part: that of this rank which others read."""
        size = flags_bytes(self.options.world_size)
        return {
            "parts": Operand("peers", part.buffer, 0, _part_bytes(node, part.dtype), "r"),
            "flags": Operand("buffer", _FLAGS, 0, size, "rw"),
            "signals": Operand("peers", _FLAGS, 0, size, "w"),
        }

    def buffers(self) -> list[Buffer]:
        """The flags, and what is exchanged."""
        if not self._sizes:
            return []
        exchanges = [Buffer(name, "bf16", widest(sizes), 0) for name, sizes in sorted(self._sizes.items())]
        return [*exchanges, Buffer(_FLAGS, "i32", flags_bytes(self.options.world_size), 0, zeroed=True)]

    def _place(self, node: ir.Node) -> tuple[int, int]:
        """Its number among those of its domain, and how many those are."""
        domain = [each for each in self.nodes if rows_of(each.outputs[0]) == rows_of(node.outputs[0])]
        return domain.index(node), len(domain)
