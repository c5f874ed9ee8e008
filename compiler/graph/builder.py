"""Building the graph: ONNX through onnx-ir, standard operators where ONNX has them, the domain `enginery` beyond.

Activations are packed [tokens, columns]; weights are lazy initializers in their checkpoint's [N, K]. Symbolic
dimensions are tokens, rows (the positions whose logits are wanted), sequences and blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..checkpoint.weights import Weight

OPSET = 24
DOMAIN = "enginery"
DOMAIN_VERSION = 1

Dimension = int | str


class LazyWeight(ir.LazyTensor):
    """An initializer that is slices of the checkpoint until it is written."""

    def __init__(self, name: str, weight: Weight) -> None:
        self.weight = weight
        super().__init__(
            lambda: ir.Tensor(weight.numpy(), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(weight.shape),
            name=name,
        )


def weight_of(value: ir.Value) -> Weight:
    """The lazy weight behind an initializer; it must be one."""
    tensor = value.const_value
    assert isinstance(tensor, LazyWeight), f"{value.name} is no weight"
    return tensor.weight


class GraphBuilder:
    """Appends nodes to a graph. Methods are named as the operations of a paper, and return values."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION}, name=name)
        self._scope: list[str] = []
        self._weights: dict[Weight, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._names: set[str] = set()

    # -- values ---------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[Dimension], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Makes `value` a graph output called `name`."""
        value.name = name
        self.graph.outputs.append(value)

    def weight(self, weight: Weight, name: str | None = None) -> ir.Value:
        """The initializer of `weight`; equal weights (tied embeddings) are one initializer."""
        if weight not in self._weights:
            name = name or weight.parts[0].tensor
            if name in self.graph.initializers:
                name = f"{name}.{len(self.graph.initializers)}"
            self._weights[weight] = register_weight(self.graph, name, weight)
        return self._weights[weight]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small initializer, shared by name."""
        if name not in self._constants:
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside carry `name` in their own names."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Dimension],
        name: str = "",
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        """Appends a node with one output of `shape`."""
        return self.multi(op_type, inputs, [(shape, dtype)], name, domain, **attributes)[0]

    def multi(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[Sequence[Dimension], ir.DataType]],
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Appends a node with several outputs."""
        full = ".".join([*self._scope, name or op_type.lower()])
        assert full not in self._names, f"two nodes are called {full}"
        self._names.add(full)
        node = make_node(op_type, inputs, outputs, full, domain, attributes)
        self.graph.append(node)
        return list(node.outputs)

    # -- operations -----------------------------------------------------------------------------------------------

    def linear(self, x: ir.Value, weight: Weight, bias: Weight | None = None, name: str = "") -> ir.Value:
        """x · weightᵀ + bias: [M, K] -> [M, N]."""
        inputs = [x, self.weight(weight)] + ([self.weight(bias)] if bias is not None else [])
        return self.op("Gemm", inputs, [rows_of(x), weight.num_rows], name or "linear", transB=1)

    def rms_norm(self, x: ir.Value, weight: ir.Value | Weight, epsilon: float, name: str = "norm") -> ir.Value:
        """x / sqrt(mean(x²) + epsilon) · weight over the last axis (Zhang and Sennrich, 2019)."""
        scale = self.weight(weight) if isinstance(weight, Weight) else weight
        return self.op("RMSNormalization", [x, scale], list(dimensions(x)), name, axis=-1, epsilon=epsilon)

    def head_norm(self, x: ir.Value, weight: ir.Value | Weight, epsilon: float, head_dim: int, name: str) -> ir.Value:
        """RMS norm of every head of [tokens, heads · head_dim] by itself."""
        columns = columns_of(x)
        heads = self._reshape(x, [columns // head_dim, head_dim], f"{name}.split")
        return self._reshape(self.rms_norm(heads, weight, epsilon, name), [columns], f"{name}.merge")

    def _reshape(self, x: ir.Value, columns: list[int], name: str) -> ir.Value:
        constant = self.constant("shape." + ".".join(map(str, columns)), np.array([-1, *columns], np.int64))
        return self.op("Reshape", [x, constant], [rows_of(x), *columns], name)

    def rotate(
        self, x: ir.Value, table: tuple[ir.Value, ir.Value], num_heads: int, rotary_dim: int, name: str
    ) -> ir.Value:
        """Rotary embedding of the first `rotary_dim` elements of each head of [tokens, heads · head_dim]."""
        axis = self.constant("axis.0", np.array([0], np.int64))
        batched = [
            self.op("Unsqueeze", [value, axis], [1, *dimensions(value)], f"{name}.batch.{part}")
            for part, value in zip(("x", "cos", "sin"), (x, *table), strict=True)
        ]
        shape = [1, *dimensions(x)]
        rotated = self.op("RotaryEmbedding", batched, shape, name, num_heads=num_heads, rotary_embedding_dim=rotary_dim)
        return self.op("Squeeze", [rotated, axis], dimensions(x), f"{name}.unbatch")

    def add(self, a: ir.Value, b: ir.Value, name: str = "add") -> ir.Value:
        """a + b."""
        return self.op("Add", [a, b], dimensions(a), name)

    def multiply(self, a: ir.Value, b: ir.Value, name: str = "multiply") -> ir.Value:
        """a · b, element by element."""
        return self.op("Mul", [a, b], dimensions(a), name)

    def scalar(self, value: float) -> ir.Value:
        """A float32 constant."""
        return self.constant(f"scalar.{value!r}", np.array(value, np.float32))

    def activate(self, x: ir.Value, kind: str) -> ir.Value:
        """SiLU or the tanh form of GELU."""
        if kind == "silu":
            return self.op("Swish", [x], dimensions(x), "silu")
        return self.op("Gelu", [x], dimensions(x), "gelu", approximate="tanh")

    def softcap(self, x: ir.Value, cap: float) -> ir.Value:
        """cap · tanh(x / cap)."""
        inner = self.op("Div", [x, self.scalar(cap)], dimensions(x), "softcap.divide")
        return self.multiply(self.op("Tanh", [inner], dimensions(x), "softcap.tanh"), self.scalar(cap), "softcap")

    def gather(self, x: ir.Value, indices: ir.Value, name: str) -> ir.Value:
        """Rows of x."""
        return self.op(
            "Gather", [x, indices], [rows_of(indices), *dimensions(x)[1:]], name, dtype=x.dtype or ir.DataType.FLOAT
        )


def register_weight(graph: ir.Graph, name: str, weight: Weight) -> ir.Value:
    """A new lazy initializer of `graph`."""
    tensor = LazyWeight(name, weight)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[tuple[Sequence[Dimension], ir.DataType]],
    name: str,
    domain: str = "",
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """A node whose outputs have the given shapes and types, named after it."""
    node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=len(outputs), name=name)
    for index, (value, (shape, dtype)) in enumerate(zip(node.outputs, outputs, strict=True)):
        value.name = name if index == 0 else f"{name}.{index}"
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    return node


def dimensions(value: ir.Value) -> list[Dimension]:
    """The shape of `value`, symbolic dimensions as text."""
    assert value.shape is not None, f"{value.name} has no shape"
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]


def rows_of(value: ir.Value) -> Dimension:
    """The first dimension: "tokens" or "rows" for activations."""
    return dimensions(value)[0]


def columns_of(value: ir.Value) -> int:
    """The last dimension, which is known."""
    last = dimensions(value)[-1]
    assert isinstance(last, int), f"{value.name} has no fixed columns"
    return last


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value
