"""Makes constants part of what they are applied to.

Requires nothing. Ensures that no Add of a weight and a scalar is left (Gemma's 1 + weight becomes a lazy weight with
the constant in it), and that a scaled embedding is one enginery.Embedding.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, LazyWeight, dimensions, make_node, register_weight, weight_of
from ..graph.rewrite import input_of, is_op, only_user, replace, sweep
from .options import Options


def fold_constants(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    for node in list(g.graph):
        if is_op(node, "Add") and _is_weight(node.inputs[0]) and scalar_of(node.inputs[1]) is not None:
            weight, constant = input_of(node, 0), scalar_of(node.inputs[1]) or 0.0
            folded = register_weight(g.graph, f"{weight.name}.plus", weight_of(weight).plus(constant))
            replace(g.graph, [node], [], {node.outputs[0]: folded})
    for node in list(g.graph):
        if is_op(node, "Gather") and _is_weight(node.inputs[0]):
            _embedding(g.graph, node)
    sweep(g.graph)


def scalar_of(value: ir.Value | None) -> float | None:
    """The number behind a scalar constant, or None."""
    tensor = value.const_value if value is not None else None
    if tensor is None or isinstance(tensor, LazyWeight) or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, LazyWeight)


def _embedding(graph: ir.Graph, gather: ir.Node) -> None:
    """Gather(table, ids) [· scalar] -> Embedding(ids, table)."""
    table, ids = gather.inputs
    user = only_user(gather.outputs[0])
    scale = scalar_of(user.inputs[1]) if user is not None and is_op(user, "Mul") else None
    last = user if user is not None and scale is not None else gather
    new = make_node(
        "Embedding",
        [ids, table],
        [(dimensions(gather.outputs[0]), ir.DataType.FLOAT)],
        "embed_tokens",
        DOMAIN,
        {"scale": 1.0 if scale is None else scale, "vocab_start": 0},
    )
    old = [gather] if last is gather else [gather, last]
    values = {last.outputs[0]: new.outputs[0]}
    replace(graph, old, [new], values)
