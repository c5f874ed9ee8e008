"""Makes the residual addition behind an all-reduce its epilogue, for targets whose all-reduce adds one.

Requires RmsNorm nodes that add. Ensures that where one adds the result of an AllReduce as it is, which nobody else
reads, the AllReduce does: (x, residual) -> x of all ranks + residual, and the norm alone is left. A product can then
take the norm over, too (compiler/lower/cuda.py).
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, attribute, dimensions, make_node
from ..graph.rewrite import is_ours, only_user, replace
from .options import Options


def fuse_all_reduce(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    if not options.target.is_cuda:
        return
    for node in list(g.graph):
        if is_ours(node, "AllReduce"):
            norm = only_user(node.outputs[0])
            if norm is not None and is_ours(norm, "RmsNorm") and _adds(norm, node.outputs[0]):
                _fuse(g.graph, node, norm)


def _adds(norm: ir.Node, delta: ir.Value) -> bool:
    return norm.inputs[1] is delta and norm.inputs[2] is None


def _fuse(graph: ir.Graph, reduce: ir.Node, norm: ir.Node) -> None:
    stream, _, _, weight = norm.inputs
    shape = (dimensions(norm.outputs[0]), ir.DataType.FLOAT)
    attributes = {"rank": attribute(reduce, "rank")}
    total = make_node("AllReduce", [reduce.inputs[0], stream], [shape], reduce.name or "", DOMAIN, attributes)
    attributes = {"eps": attribute(norm, "eps")}
    alone = make_node("RmsNorm", [total.outputs[0], None, None, weight], [shape], norm.name or "", DOMAIN, attributes)
    name = norm.outputs[1].name
    values = {norm.outputs[0]: alone.outputs[0], norm.outputs[1]: total.outputs[0]}
    replace(graph, [reduce, norm], [total, alone], values)
    total.outputs[0].name = name
