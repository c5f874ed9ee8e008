"""Gives every product the precision that was asked for.

Requires fused RmsNorm, Linear, Embedding and WriteKv nodes. Ensures that each Linear reads activations of the
precision's type, from a Quantize in front of the first Linear that reads them, that weights are marked with their
own precision, the head's with its, and caches with theirs. fp32 changes nothing but the marks.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, dimensions, make_node
from ..graph.rewrite import is_ours, users
from .layer_precision import product_of, require_matches
from .options import Options

_TYPES = {
    "f32": ir.DataType.FLOAT,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
_SCALED = ("int8", "fp8")


def quantize(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    activation = options.precision.activation
    require_matches(g, options)
    for node in list(g.graph):
        if is_ours(node, "WriteKv"):
            node.attributes["kv_dtype"] = ir.AttrString("kv_dtype", options.kv_dtype)
        elif is_ours(node, "Linear"):
            weight = product_of(g.graph, node).weight(options)
            node.attributes["precision"] = ir.AttrString("precision", weight)
            if activation != "f32":
                _quantize_input(g.graph, node, activation)
        elif is_ours(node, "Embedding"):
            tied = [user for user in users(node.inputs[1]) if is_ours(user, "Linear")] if node.inputs[1] else []
            # Rows cannot be read of codes: the table is then one of its own, of the precision's heads.
            table = options.precision.head if tied else options.precision.table
            node.attributes["precision"] = ir.AttrString("precision", table)


def _quantize_input(graph: ir.Graph, linear: ir.Node, activation: str) -> None:
    x = linear.inputs[0]
    assert x is not None
    source = x.producer()
    if source is None or not is_ours(source, "Quantize"):
        source = _quantized(graph, x, linear, activation)
    linear.replace_input_with(0, source.outputs[0])
    if activation in _SCALED:
        linear.resize_inputs(5)
        linear.replace_input_with(4, source.outputs[1])


def _quantized(graph: ir.Graph, x: ir.Value, linear: ir.Node, activation: str) -> ir.Node:
    """The node that quantizes `x`, made in front of `linear` if there is none."""
    found = next((user for user in users(x) if is_ours(user, "Quantize")), None)
    if found is not None:
        return found
    outputs: list[tuple[list[int | str], ir.DataType]] = [(dimensions(x), _TYPES[activation])]
    if activation in _SCALED:
        outputs.append(([dimensions(x)[0]], ir.DataType.FLOAT))
    node = make_node("Quantize", [x], outputs, f"{x.name}.{activation}", DOMAIN, {"precision": activation})
    graph.insert_before(linear, node)
    return node
