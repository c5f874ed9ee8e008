"""Checks the graph between passes: our own mistakes, found where they are made."""

from __future__ import annotations

import onnx_ir as ir


def verify(graph: ir.Graph) -> None:
    """Raises AssertionError unless every value is made before it is read, named once, and of known shape."""
    made = set(graph.inputs) | set(graph.initializers.values())
    names = [value.name for value in made]
    for node in graph:
        for value in node.inputs:
            assert value is None or value in made, f"{node.name}: reads {value.name} before it is made"
        for value in node.outputs:
            assert value.shape is not None, f"{node.name}: output {value.name} has no shape"
            assert value.type is not None, f"{node.name}: output {value.name} has no type"
            made.add(value)
            names.append(value.name)
    for value in graph.outputs:
        assert value in made, f"output {value.name} is never made"
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) != len(names) else set()
    assert not twice, f"names stand for two values: {sorted(map(str, twice))[:5]}"
