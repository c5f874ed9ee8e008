"""Makes one product of those that read the same input.

Requires Gemm nodes with lazy weights. Ensures that no two Gemms read the same activations: their weights stand one
below the other in one Gemm, whose output a Split divides.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.builder import GraphBuilder, columns_of, make_node, rows_of
from ..graph.rewrite import is_op, named, scope_of, sweep
from .fuse_gate_up import stacked
from .options import Options


def fuse_qkv(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in g.graph:
        if is_op(node, "Gemm") and node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    for x, gemms in by_input.items():
        if len(gemms) > 1 and len({len(gemm.inputs) for gemm in gemms}) == 1:
            _merge(g, x, gemms)
    sweep(g.graph)


def _merge(g: GraphBuilder, x: ir.Value, gemms: list[ir.Node]) -> None:
    letters = "".join((gemm.name or "").removesuffix(".rows").rpartition(".")[2].partition("_")[0] for gemm in gemms)
    name = named(scope_of(gemms[0]), letters)
    inputs: list[ir.Value | None] = [x, stacked(g.graph, gemms, 1, f"{name}.weight")]
    if len(gemms[0].inputs) > 2:
        inputs.append(stacked(g.graph, gemms, 2, f"{name}.bias"))
    sizes = [columns_of(gemm.outputs[0]) for gemm in gemms]
    merged = make_node("Gemm", inputs, [([rows_of(x), sum(sizes)], ir.DataType.FLOAT)], name, attributes={"transB": 1})
    constant = g.constant("split." + ".".join(map(str, sizes)), np.array(sizes, np.int64))
    outputs = [([rows_of(x), size], ir.DataType.FLOAT) for size in sizes]
    split = make_node("Split", [merged.outputs[0], constant], outputs, f"{name}.split", attributes={"axis": 1})
    values = {gemm.outputs[0]: output for gemm, output in zip(gemms, split.outputs, strict=True)}
    # What reads q may stand before v: the merged node takes the place of the first.
    graph = g.graph
    graph.insert_before(gemms[0], [merged, split])
    for before, after in values.items():
        before.replace_all_uses_with(after)
    for gemm in gemms:
        graph.remove(gemm, safe=True)
