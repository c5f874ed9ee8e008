"""Lets only the sampled rows pass what comes after the last layer's keys and values.

Requires the model's graph: one Gather(x, rows) before the head. Ensures that no node computes for all tokens what only
the rows need: Gathers have moved up through row-wise operators to the last values that other nodes need whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..graph.builder import GraphBuilder, attribute, dimensions, make_node
from ..graph.rewrite import input_of, is_op, producer, sweep
from .options import Options

# Which inputs of a row-wise operator have a row for each token; the others are the same for all.
_ROW_INPUTS: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "Mul": (0, 1),
    "RMSNormalization": (0,),
    "Gemm": (0,),
    "Swish": (0,),
    "Gelu": (0,),
    "Reshape": (0,),
    "PagedAttention": (0, 4, 5),
}


def select_rows(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    rows = next((value for value in g.graph.inputs if value.name == "rows"), None)
    assert rows is not None, "the graph has no input `rows`"
    mover = _Mover(g.graph, rows)
    start = [node for node in g.graph if is_op(node, "Gather") and node.inputs[1] is rows]
    for gather in start:
        source = gather.inputs[0]
        assert source is not None
        selected = mover.select(source)
        if selected is not gather.outputs[0]:
            gather.outputs[0].replace_all_uses_with(selected)
    g.graph.sort()
    sweep(g.graph)


class _Mover:
    """Remembers what has been selected already, so that each value is gathered or computed on rows once."""

    def __init__(self, graph: ir.Graph, rows: ir.Value) -> None:
        self.graph, self.rows = graph, rows
        self.needed_whole = _makers([value for value in graph.outputs if value.name != "logits"])
        self.done: dict[ir.Value, ir.Value] = {}

    def select(self, value: ir.Value) -> ir.Value:
        """`value` for the sampled rows only."""
        if value not in self.done:
            self.done[value] = self._select(value)
        return self.done[value]

    def _select(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        if node is not None and is_op(node, "Squeeze"):
            return self._rotate(node)
        if node is None or node.op_type not in _ROW_INPUTS or not self._worth(node):
            return self._gather(value)
        indices = _ROW_INPUTS[node.op_type]
        inputs = [
            self.select(value) if index in indices and value is not None and _has_rows(value) else value
            for index, value in enumerate(node.inputs)
        ]
        return self._copy(node, inputs)

    def _worth(self, node: ir.Node) -> bool:
        """Rows alone are worth it unless the node runs for all tokens anyway; a norm is cheap, and spares a gather."""
        return is_op(node, "RMSNormalization") or node not in self.needed_whole

    def _rotate(self, squeeze: ir.Node) -> ir.Value:
        """Squeeze(RotaryEmbedding(Unsqueeze(x), Unsqueeze(cos), Unsqueeze(sin)))."""
        rotary = producer(squeeze.inputs[0], "RotaryEmbedding")
        assert rotary is not None, "only rotary embeddings are batched"
        batched = []
        for unsqueezed in rotary.inputs:
            unsqueeze = producer(unsqueezed, "Unsqueeze")
            assert unsqueeze is not None, "rotary embeddings are batched"
            batched.append(
                self._copy(unsqueeze, [self.select(input_of(unsqueeze, 0)), unsqueeze.inputs[1]], batched=True)
            )
        rotated = self._copy(rotary, batched, batched=True)
        return self._copy(squeeze, [rotated, squeeze.inputs[1]])

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None], batched: bool = False) -> ir.Value:
        shape = dimensions(node.outputs[0])
        shape[1 if batched else 0] = "rows"
        attributes = {name: attribute(node, name) for name in node.attributes}
        output = (shape, node.outputs[0].dtype or ir.DataType.FLOAT)
        new = make_node(node.op_type, inputs, [output], f"{node.name}.rows", node.domain, attributes)
        self.graph.append(new)
        return new.outputs[0]

    def _gather(self, value: ir.Value) -> ir.Value:
        output = (["rows", *dimensions(value)[1:]], value.dtype or ir.DataType.FLOAT)
        new = make_node("Gather", [value, self.rows], [output], f"{value.name}.rows")
        self.graph.append(new)
        return new.outputs[0]


def _makers(values: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that take part in making `values`."""
    makers: set[ir.Node] = set()
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is not None and node not in makers:
            makers.add(node)
            pending += [value.producer() for value in node.inputs if value is not None]
    return makers


def _has_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and dimensions(value)[0] == "tokens"
