"""Saving a stage of the graph for people: ONNX for Netron, its text, weights left where they are."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from .builder import GraphBuilder, LazyWeight
from .evaluate import IR_VERSION


def save_stage(g: GraphBuilder, directory: Path, name: str) -> None:
    """Writes NAME.onnx, weights as inputs so that no data is read, and NAME.txt, one node a line."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.txt").write_text("\n".join(_line(node) for node in g.graph) + "\n")
    model = ir.to_proto(ir.Model(_without_weights(g.graph), ir_version=IR_VERSION, producer_name="enginery"))
    onnx.save(model, str(directory / f"{name}.onnx"))


def _without_weights(graph: ir.Graph) -> ir.Graph:
    copy = graph.clone()
    for name, value in list(copy.initializers.items()):
        if isinstance(value.const_value, LazyWeight):
            del copy.initializers[name]
            value.const_value = None
            copy.inputs.append(value)
    return copy


def _line(node: ir.Node) -> str:
    inputs = ", ".join("-" if value is None else str(value.name) for value in node.inputs)
    outputs = ", ".join(f"{value.name}{value.shape}" for value in node.outputs)
    attributes = ", ".join(f"{a.name}={a.value!r}" for a in node.attributes.values())
    return f"{outputs} = {node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else "")
