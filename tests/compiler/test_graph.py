"""The graph's builder and verifier find our own mistakes where they are made."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from enginery.compiler.graph.builder import GraphBuilder, make_node
from enginery.compiler.graph.verify import verify


def small() -> tuple[GraphBuilder, ir.Value]:
    """y = x + x."""
    g = GraphBuilder("small")
    x = g.input("x", ["tokens", 4])
    g.output(g.add(x, x), "y")
    return g, x


def test_a_sound_graph_is_sound() -> None:
    verify(small()[0].graph)


def test_two_nodes_of_one_name_are_refused() -> None:
    g, x = small()
    with pytest.raises(AssertionError, match="two nodes are called add"):
        g.add(x, x)


def test_two_values_of_one_name_are_refused() -> None:
    g, x = small()
    g.op("Swish", [x], ["tokens", 4], "silu").name = "x"
    with pytest.raises(AssertionError, match="names stand for two values"):
        verify(g.graph)


def test_a_value_that_is_read_before_it_is_made_is_refused() -> None:
    g, x = small()
    late = make_node("Swish", [x], [(["tokens", 4], ir.DataType.FLOAT)], "late")
    g.op("Swish", [late.outputs[0]], ["tokens", 4], "early")
    g.graph.append(late)
    with pytest.raises(AssertionError, match="early: reads late before it is made"):
        verify(g.graph)


def test_an_output_that_nobody_makes_is_refused() -> None:
    g, x = small()
    g.output(make_node("Swish", [x], [(["tokens", 4], ir.DataType.FLOAT)], "elsewhere").outputs[0], "z")
    with pytest.raises(AssertionError, match="output z is never made"):
        verify(g.graph)
