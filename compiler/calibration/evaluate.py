"""Evaluates a fused graph in float32 with BLAS, many sequences at once: what calibration sees of a model.

ONNX's reference evaluator (graph/evaluate.py) is the oracle, for tiny models. This one reads a weight when its node is
reached and forgets it behind it, forgets activations that nobody reads any more, and computes attention by sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...plugins.kv_write.reference import prepare_heads
from ...plugins.rms_norm.reference import rms_norm
from ...plugins.rotary_table.reference import rotary_table
from ..checkpoint.weights import Weight
from ..graph.builder import LazyWeight, attribute, weight_of
from ..graph.rewrite import input_of, users

Array = NDArray[Any]
# Told of a product and its input [tokens, K].
Observer = Callable[[ir.Node, Array], None]


@dataclass(frozen=True)
class Batch:
    """Sequences one after the other. token_ids [tokens]; lengths: of each sequence."""

    token_ids: Array
    lengths: tuple[int, ...]

    @property
    def positions(self) -> Array:
        """Of each token in its sequence."""
        return np.concatenate([np.arange(length) for length in self.lengths])

    @property
    def prompt_lengths(self) -> Array:
        """Of each token, that of its sequence."""
        return np.repeat(self.lengths, self.lengths)


def evaluate_batch(graph: ir.Graph, batch: Batch, observe: Observer) -> Array | None:
    """Runs the fused float32 graph of one rank; every token is a row. Shows the input of every product to `observe`.

    Returns the last product, [tokens, vocab], if it has 2³⁰ elements at most; else nobody computes it.
    """
    return _Evaluation(graph, batch, observe).run()


class _Evaluation:
    def __init__(self, graph: ir.Graph, batch: Batch, observe: Observer) -> None:
        self.graph, self.batch, self.observe = graph, batch, observe
        self.values: dict[ir.Value, Any] = {}
        self.logits: Array | None = None

    def run(self) -> Array | None:
        given = {"positions": self.batch.positions, "prompt_lengths": self.batch.prompt_lengths}
        given |= {"token_ids": self.batch.token_ids}
        self.values = {value: given[value.name] for value in self.graph.inputs if value.name in given}
        left = {node: index for index, node in enumerate(self.graph)}
        last = {
            value: max((left[user] for user in users(value)), default=-1) for node in left for value in node.outputs
        }
        for node, index in left.items():
            outputs = getattr(self, f"_{node.op_type}")(node)
            self.values.update(zip(node.outputs, outputs, strict=False))
            for value in {*node.inputs, *node.outputs}:
                if value is not None and value in last and last[value] <= index:
                    self.values.pop(value, None)
        return self.logits

    def _read(self, value: ir.Value | None) -> Any:
        """Activations, or a weight that is read for this moment."""
        if value is None:
            return None
        if value in self.values:
            return self.values[value]
        if isinstance(value.const_value, LazyWeight):
            return weight_of(value).numpy()
        assert value.const_value is not None, f"{value.name} is neither computed nor constant"
        return value.const_value.numpy()

    # -- one method for each operator of the graph ----------------------------------------------------------------

    def _Embedding(self, node: ir.Node) -> Sequence[Array]:
        ids = self._read(node.inputs[0])
        return [_rows(weight_of(input_of(node, 1)), ids) * np.float32(attribute(node, "scale", 1.0))]

    def _RotaryTable(self, node: ir.Node) -> Sequence[Array]:
        attributes = {name: attribute(node, name) for name in node.attributes}
        return rotary_table(*map(self._read, node.inputs), **attributes)

    def _RmsNorm(self, node: ir.Node) -> Sequence[Array]:
        return rms_norm(*map(self._read, node.inputs), eps=attribute(node, "eps"))

    def _Gather(self, node: ir.Node) -> Sequence[Array]:
        return [self._read_if_known(node.inputs[0])]  # every token is a row

    def _Split(self, node: ir.Node) -> Sequence[Array]:
        ends = np.cumsum(self._read(node.inputs[1]))[:-1]
        return np.split(self._read(node.inputs[0]), ends, axis=1)

    def _Linear(self, node: ir.Node) -> Sequence[Array]:
        x = self._read(node.inputs[0])
        self.observe(node, x)
        weight, last = weight_of(input_of(node, 1)), node.outputs[0].is_graph_output()
        if last and len(x) * weight.num_rows > 1 << 30:
            return []
        bias, residual = (self._read(value) for value in (*node.inputs[2:4], None, None)[:2])
        out = x @ weight.numpy().T
        if bias is not None:
            out += bias
        if attribute(node, "activation") != "none":
            gate, up = np.split(out, 2, axis=1)
            out = _ACTIVATIONS[attribute(node, "activation")](gate) * up
        if softcap := attribute(node, "softcap", 0.0):
            out = np.float32(softcap) * np.tanh(out / np.float32(softcap))
        if residual is not None:
            out += residual
        if last:
            self.logits = out
        return [out]

    def _WriteKv(self, node: ir.Node) -> Sequence[Array]:
        """Not into a cache: the heads themselves, [tokens, kv heads, head_dim]."""
        k, v, _keys, _values, _slots, *rotary = map(self._read_if_known, node.inputs)
        return [_heads(node, k, rotary), v.reshape(len(v), -1, attribute(node, "head_dim"))]

    def _PagedAttention(self, node: ir.Node) -> Sequence[Array]:
        q, keys, values, _blocks, _positions, _sequence, *rotary = map(self._read_if_known, node.inputs)
        heads = _heads(node, q, rotary)
        out, start = [], 0
        for length in self.batch.lengths:
            span = slice(start, start + length)
            out.append(_attend(node, heads[span], keys[span], values[span]))
            start += length
        return [np.concatenate(out)]

    def _read_if_known(self, value: ir.Value | None) -> Any:
        """None for caches and block tables, which are not there."""
        return None if value is not None and value.is_graph_input() and value not in self.values else self._read(value)


def _heads(node: ir.Node, x: Array, rotary: list[Any]) -> Array:
    cos, sin, norm = (*rotary, None, None, None)[:3]
    rot_dim, eps = attribute(node, "rot_dim", 0), attribute(node, "eps", 0.0)
    return prepare_heads(x, attribute(node, "head_dim"), cos, sin, norm, rot_dim=rot_dim, eps=eps)


def _attend(node: ir.Node, q: Array, k: Array, v: Array) -> Array:
    """Causal attention of one sequence: [T, heads, d] over [T, kv heads, d] -> [T, heads · d]."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, window = k.shape[1], attribute(node, "window", 0)
    scaled = q * np.float32(attribute(node, "scale"))
    grouped = scaled.reshape(tokens, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # [kv heads, group, T, d]
    scores = grouped @ k.transpose(1, 2, 0)[:, None]
    if softcap := attribute(node, "softcap", 0.0):
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (behind >= 0) & (behind < window if window else True)
    scores += np.where(seen, np.float32(0), np.float32(-np.inf))
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    out = weights @ v.transpose(1, 0, 2)[:, None] / weights.sum(axis=-1, keepdims=True)
    return np.ascontiguousarray(out.transpose(2, 0, 1, 3)).reshape(tokens, num_heads * head_dim)


def _rows(weight: Weight, ids: Array) -> Array:
    """Rows `ids` of a table, each read once."""
    distinct, places = np.unique(ids, return_inverse=True)
    return np.concatenate([weight.values(int(row), int(row) + 1) for row in distinct])[places]


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        out: Array = x / (1 + np.exp(-x))
    return out


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    out: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


_ACTIVATIONS = {"silu_gated": _silu, "gelu_tanh_gated": _gelu_tanh}
