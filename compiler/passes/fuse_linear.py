"""Makes products with their epilogues one operator.

Requires Gemm (transB) and Linear nodes. Ensures that every Gemm is an enginery.Linear(a, weight, bias, residual), that
an Add of a residual stream to its only reader is its epilogue, and that a soft-cap after it is its attribute.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, dimensions, make_node
from ..graph.rewrite import is_op, only_user, replace, sweep
from .fold_constants import scalar_of
from .options import Options


def fuse_linear(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    for node in list(g.graph):
        if is_op(node, "Gemm"):
            _linear(g.graph, node, options)
    sweep(g.graph)


def _linear(graph: ir.Graph, gemm: ir.Node, options: Options) -> None:
    a, weight, *rest = gemm.inputs
    bias = rest[0] if rest else None
    old, last, residual, softcap = [gemm], gemm, None, 0.0
    user = only_user(gemm.outputs[0])
    if user is not None and is_op(user, "Add") and options.world_size == 1:
        residual = next(value for value in user.inputs if value is not gemm.outputs[0])
        old, last = [gemm, user], user
    elif user is not None and is_op(user, "Div"):
        tanh = only_user(user.outputs[0])
        multiply = only_user(tanh.outputs[0]) if tanh is not None else None
        assert tanh is not None, "a soft-cap is Div, Tanh, Mul"
        assert multiply is not None, "a soft-cap is Div, Tanh, Mul"
        softcap = scalar_of(user.inputs[1]) or 0.0
        old, last = [gemm, user, tanh, multiply], multiply
    attributes = {"activation": "none", "softcap": softcap}
    output = (dimensions(last.outputs[0]), ir.DataType.FLOAT)
    new = make_node("Linear", [a, weight, bias, residual], [output], gemm.name or "linear", DOMAIN, attributes)
    replace(graph, old, [new], {last.outputs[0]: new.outputs[0]})
