"""Makes head norms and rotary embeddings part of the operators that read their results.

Requires RotaryEmbedding between Unsqueeze and Squeeze, with or without a norm of each head before it, in front of every
WriteKv key and PagedAttention query. Ensures that both take the unrotated values, cos, sin and the norm's weight:
WriteKv(k, v, k_cache, v_cache, slots, cos, sin, k_norm?) and PagedAttention(q, keys, values, block_table, positions,
token_sequence, cos, sin, q_norm?).
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import GraphBuilder, attribute, make_node
from ..graph.rewrite import input_of, is_ours, producer, replace, sweep
from .options import Options


def fuse_attention(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    for node in list(g.graph):
        if is_ours(node, "WriteKv") or is_ours(node, "PagedAttention"):
            _absorb(g.graph, node)
    sweep(g.graph)


def _absorb(graph: ir.Graph, node: ir.Node) -> None:
    squeeze = producer(node.inputs[0], "Squeeze")
    rotary = producer(squeeze.inputs[0], "RotaryEmbedding") if squeeze is not None else None
    assert rotary is not None, f"{node.name}: its first input is not rotated"
    x, cos, sin = (_unbatched(value) for value in rotary.inputs[:3])
    attributes = {name: attribute(node, name) for name in node.attributes}
    attributes["rot_dim"] = attribute(rotary, "rotary_embedding_dim")
    norm_weight, attributes["eps"] = None, 0.0
    if (outer := producer(x, "Reshape")) is not None:
        norm = producer(outer.inputs[0], "RMSNormalization")
        inner = producer(norm.inputs[0], "Reshape") if norm is not None else None
        assert norm is not None, f"{node.name}: its input is reshaped, but not normed"
        assert inner is not None, f"{node.name}: its norm is not of heads"
        x, norm_weight, attributes["eps"] = input_of(inner, 0), norm.inputs[1], attribute(norm, "epsilon")
    outputs = [([*value.shape] if value.shape else [], value.dtype or ir.DataType.FLOAT) for value in node.outputs]
    new = make_node(
        node.op_type, [x, *node.inputs[1:], cos, sin, norm_weight], outputs, node.name or "", node.domain, attributes
    )
    replace(graph, [node], [new], dict(zip(node.outputs, new.outputs, strict=True)))


def _unbatched(value: ir.Value | None) -> ir.Value:
    unsqueeze = producer(value, "Unsqueeze")
    assert unsqueeze is not None, "rotary embeddings are batched"
    return input_of(unsqueeze, 0)
