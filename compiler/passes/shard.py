"""Cuts the graph for one rank of tensor parallelism (Shoeybi et al., Megatron-LM, 2019).

Requires fused Linear, WriteKv, PagedAttention and Embedding nodes, without residual epilogues. Ensures that q, k, v,
gate and up hold this rank's output channels, o and down its inputs, followed by an AllReduce; that embeddings and the
head hold this rank's part of the vocabulary, followed by an AllReduce and an AllGather. With one rank nothing changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...engines.errors import CompileError, faults
from ...engines.layouts import padded_rows
from ..checkpoint.weights import Weight
from ..graph.builder import (
    DOMAIN,
    GraphBuilder,
    attribute,
    columns_of,
    dimensions,
    make_node,
    register_weight,
    rows_of,
    weight_of,
)
from ..graph.rewrite import input_of, is_ours, sweep, users
from ..models.config import Config
from .options import Options


def check_divisible(config: Config, world_size: int) -> None:
    """Raises CompileError naming what does not divide by `world_size`, and the degrees that would do."""
    sizes = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    reasons = [
        f"{name} = {size} is not a multiple of {world_size}" for name, size in sizes.items() if size % world_size
    ]
    if reasons:
        degrees = [d for d in range(1, config.num_kv_heads + 1) if all(size % d == 0 for size in sizes.values())]
        possible = ", ".join(map(str, degrees))
        raise faults(CompileError, f"--tensor-parallel-size {world_size} (possible here: {possible})", reasons)


def vocab_starts(vocab_size: int, world_size: int) -> list[int]:
    """First row of the vocabulary of each rank, and its end: in panels of 16, as evenly as they go."""
    panels = padded_rows(vocab_size) // 16
    return [min(panels * rank // world_size * 16, vocab_size) for rank in range(world_size)] + [vocab_size]


def shard(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    if options.world_size == 1:
        return
    cutter = _Cutter(g, options.rank, options.world_size)
    for node in list(g.graph):
        if is_ours(node, "Embedding"):
            cutter.embedding(node)
        elif is_ours(node, "PagedAttention") or is_ours(node, "WriteKv"):
            cutter.heads(node)
        elif is_ours(node, "Linear"):
            cutter.linear(node)
    sweep(g.graph)


class _Cutter:
    def __init__(self, g: GraphBuilder, rank: int, world_size: int) -> None:
        self.g, self.rank, self.world_size = g, rank, world_size

    def embedding(self, node: ir.Node) -> None:
        """This rank's rows of the table; others give zero, and the sum over ranks is the embedding."""
        table = node.inputs[1]
        assert table is not None
        weight = weight_of(table)
        starts = vocab_starts(weight.num_rows, self.world_size)
        node.replace_input_with(
            1, self._weight(f"{table.name}.{self.rank}", weight.take_rows(*starts[self.rank : self.rank + 2]))
        )
        node.attributes["vocab_start"] = ir.AttrInt64("vocab_start", starts[self.rank])
        self._reduce(node)

    def heads(self, node: ir.Node) -> None:
        """This rank's share of the heads."""
        for name in ("num_heads", "num_kv_heads"):
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, attribute(node, name) // self.world_size)
        if is_ours(node, "PagedAttention"):
            self._narrow(node.outputs[0])
            return
        for value in (*node.inputs[2:4], *node.outputs):
            assert value is not None
            shape = dimensions(value)
            shape[2] = int(shape[2]) // self.world_size
            value.shape = ir.Shape(shape)

    def linear(self, node: ir.Node) -> None:
        """By output channels, by inputs, or by vocabulary, as its place in the layer says."""
        reader = users(node.outputs[0])
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node.outputs[0].is_graph_output():
            self._vocabulary(node)
        elif is_ours(source, "PagedAttention") or _is_gated(source):
            self._by_inputs(node)
        elif _is_gated(node):
            weight = weight_of(input_of(node, 1))
            self._by_outputs(node, [weight.num_rows // 2] * 2)
            self._narrow(node.outputs[0])
        else:
            split = next((user for user in reader if user.op_type == "Split"), None)
            sizes = (
                [columns_of(value) for value in split.outputs] if split is not None else [columns_of(node.outputs[0])]
            )
            self._by_outputs(node, sizes)
            self._narrow(node.outputs[0])
            if split is not None:
                self._split(split)

    def _by_outputs(self, node: ir.Node, sizes: list[int]) -> None:
        for index in (1, 2):
            if index < len(node.inputs) and node.inputs[index] is not None:
                value = input_of(node, index)
                node.replace_input_with(
                    index, self._weight(f"{value.name}.{self.rank}", self._share(weight_of(value), sizes))
                )

    def _share(self, weight: Weight, sizes: list[int]) -> Weight:
        """This rank's part of each block of rows."""
        start, pieces = 0, []
        for size in sizes:
            share = size // self.world_size
            pieces.append(weight.take_rows(start + self.rank * share, start + (self.rank + 1) * share))
            start += size
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = piece.below(whole)
        return whole

    def _by_inputs(self, node: ir.Node) -> None:
        """A share of the sum; rank 0 alone adds the bias."""
        value = input_of(node, 1)
        weight = weight_of(value)
        share = weight.num_columns // self.world_size
        columns = weight.take_columns(self.rank * share, (self.rank + 1) * share)
        node.replace_input_with(1, self._weight(f"{value.name}.{self.rank}", columns))
        if self.rank and node.inputs[2] is not None:
            node.replace_input_with(2, None)
        self._reduce(node)

    def _vocabulary(self, node: ir.Node) -> None:
        """This rank's part of the logits, then all of them."""
        value, output = input_of(node, 1), node.outputs[0]
        weight = weight_of(value)
        starts = vocab_starts(weight.num_rows, self.world_size)
        node.replace_input_with(
            1, self._weight(f"{value.name}.{self.rank}", weight.take_rows(*starts[self.rank : self.rank + 2]))
        )
        full = (dimensions(output), ir.DataType.FLOAT)
        attributes = {"starts": starts, "rank": self.rank}
        gather = make_node("AllGather", [output], [full], f"{node.name}.all_gather", DOMAIN, attributes)
        output.shape = ir.Shape([rows_of(output), starts[self.rank + 1] - starts[self.rank]])
        self._follow(node, gather)

    def _reduce(self, node: ir.Node) -> None:
        output = node.outputs[0]
        shape = (dimensions(output), ir.DataType.FLOAT)
        attributes = {"rank": self.rank}
        self._follow(node, make_node("AllReduce", [output], [shape], f"{node.name}.all_reduce", DOMAIN, attributes))

    def _follow(self, node: ir.Node, collective: ir.Node) -> None:
        """Puts `collective` behind `node`: its readers, and the graph, read the collective's output."""
        output, result, name = node.outputs[0], collective.outputs[0], node.outputs[0].name
        readers = [(use.node, use.idx) for use in output.uses() if use.node is not collective]
        given_out = output.is_graph_output()
        self.g.graph.insert_after(node, collective)
        for reader, index in readers:
            reader.replace_input_with(index, result)
        if given_out:
            outputs = self.g.graph.outputs
            outputs[list(outputs).index(output)] = result
            output.name, result.name = f"{name}.part", name

    def _narrow(self, value: ir.Value) -> None:
        value.shape = ir.Shape([rows_of(value), columns_of(value) // self.world_size])

    def _split(self, split: ir.Node) -> None:
        sizes = [columns_of(value) // self.world_size for value in split.outputs]
        for value in split.outputs:
            self._narrow(value)
        name = "split." + ".".join(map(str, sizes)) + ".part"
        split.replace_input_with(1, self.g.constant(name, np.array(sizes, np.int64)))

    def _weight(self, name: str, weight: Weight) -> ir.Value:
        """A weight of this rank; one that two nodes share (a tied head) is made once."""
        if name in self.g.graph.initializers:
            return self.g.graph.initializers[name]
        return register_weight(self.g.graph, name, weight)


def _is_gated(node: ir.Node | None) -> bool:
    return node is not None and is_ours(node, "Linear") and attribute(node, "activation") != "none"
