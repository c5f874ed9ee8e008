"""Small steps that passes are made of: looking at neighbours, putting one node in another's place, sweeping up."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .builder import DOMAIN


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """True for a node of this type, standard or enginery's."""
    return node is not None and node.op_type == op_type


def is_ours(node: ir.Node | None, op_type: str) -> bool:
    """True for a node of this type in the domain `enginery`."""
    return is_op(node, op_type) and node is not None and node.domain == DOMAIN


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    assert value is not None, f"{node.name}: input {index} is missing"
    return value


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, each once, in no particular order."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, if there is just one and the graph does not give it out."""
    found = users(value)
    return found[0] if len(found) == 1 and not value.is_graph_output() else None


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of this type that makes `value`, or None."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type) else None


def replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], values: dict[ir.Value, ir.Value]) -> None:
    """Puts `new` after the last of `old`; users of each key of `values` read its value instead; `old` goes.

    A value that the graph gives out keeps its name.
    """
    last = old[-1]
    graph.insert_after(last, list(new))
    outputs = list(graph.outputs)
    for before, after in values.items():
        name = before.name
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        if before in outputs:
            before.name, after.name = None, name
    for node in reversed(list(old)):
        if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def sweep(graph: ir.Graph) -> None:
    """Removes nodes whose outputs nobody reads, and initializers that no node reads."""
    for node in reversed(list(graph)):
        if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def scope_of(node: ir.Node) -> str:
    """The node's name without its last part: "layers.3" of "layers.3.q_proj", also on rows."""
    return (node.name or "").removesuffix(".rows").rpartition(".")[0]


def named(scope: str, name: str) -> str:
    """`name` within `scope`."""
    return f"{scope}.{name}" if scope else name
