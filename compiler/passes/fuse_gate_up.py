"""Makes the gated MLP's first half one operator.

Requires Mul(activation(Gemm(h, gate)), Gemm(h, up)). Ensures that each is one enginery.Linear(h, gate over up, bias)
with `activation` silu_gated or gelu_tanh_gated: [M, hidden] -> [M, intermediate].
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, dimensions, make_node, register_weight, weight_of
from ..graph.rewrite import input_of, is_op, named, producer, replace, scope_of, sweep
from .options import Options

_KINDS = {"Swish": "silu_gated", "Gelu": "gelu_tanh_gated"}


def fuse_gate_up(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    for multiply in list(g.graph):
        if not is_op(multiply, "Mul") or multiply.inputs[0] is None:
            continue
        activation = multiply.inputs[0].producer()
        if activation is None or activation.op_type not in _KINDS:
            continue
        gate, up = producer(activation.inputs[0], "Gemm"), producer(multiply.inputs[1], "Gemm")
        if gate is None or up is None or gate.inputs[0] is not up.inputs[0]:
            continue
        name = named(scope_of(multiply), "gate_up")
        inputs = [gate.inputs[0], stacked(g.graph, [gate, up], 1, f"{name}.weight")]
        if len(gate.inputs) > 2:
            inputs.append(stacked(g.graph, [gate, up], 2, f"{name}.bias"))
        output = (dimensions(multiply.outputs[0]), ir.DataType.FLOAT)
        new = make_node("Linear", inputs, [output], name, DOMAIN, {"activation": _KINDS[activation.op_type]})
        replace(g.graph, [gate, activation, up, multiply], [new], {multiply.outputs[0]: new.outputs[0]})
    sweep(g.graph)


def stacked(graph: ir.Graph, nodes: list[ir.Node], index: int, name: str) -> ir.Value:
    """A new weight: the inputs number `index` of `nodes`, one below the other."""
    weights = [weight_of(input_of(node, index)) for node in nodes]
    whole = weights[0]
    for weight in weights[1:]:
        whole = weight.below(whole)
    return register_weight(graph, name, whole)
