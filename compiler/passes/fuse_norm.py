"""Makes a norm, and the residual addition before it, one operator.

Requires RMSNormalization and Add nodes on the residual stream. Ensures that each norm is an enginery.RmsNorm(x, delta?,
post_weight?, weight) -> (out, sum?): sum = x + delta, where delta is first normalised with post_weight if that is given
(Gemma's norms after a block), and out is the norm of sum.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import DOMAIN, GraphBuilder, attribute, dimensions, make_node
from ..graph.rewrite import is_op, only_user, producer, replace, sweep
from .options import Options


def fuse_norm(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    for node in list(g.graph):
        if is_op(node, "RMSNormalization") and not _is_post_norm(node):
            _fuse(g.graph, node)
    left = [node.name for node in g.graph if is_op(node, "RMSNormalization")]
    assert not left, f"norms are left: {left}"
    sweep(g.graph)


def _is_post_norm(norm: ir.Node) -> bool:
    """True for a norm whose result is only added to the residual stream."""
    user = only_user(norm.outputs[0])
    return user is not None and is_op(user, "Add")


def _fuse(graph: ir.Graph, norm: ir.Node) -> None:
    x, weight = norm.inputs
    assert x is not None
    attributes = {"eps": attribute(norm, "epsilon")}
    shape = (dimensions(norm.outputs[0]), ir.DataType.FLOAT)
    add = producer(x, "Add")
    if add is None:
        new = make_node("RmsNorm", [x, None, None, weight], [shape], norm.name or "norm", DOMAIN, attributes)
        replace(graph, [norm], [new], {norm.outputs[0]: new.outputs[0]})
        return
    stream, delta, post_weight, old = add.inputs[0], add.inputs[1], None, [add, norm]
    post = producer(delta, "RMSNormalization")
    if post is not None:
        delta, post_weight = post.inputs[0], post.inputs[1]
        assert attribute(post, "epsilon") == attributes["eps"], "norms of a model have one epsilon"
        old = [post, add, norm]
    new = make_node(
        "RmsNorm", [stream, delta, post_weight, weight], [shape, shape], norm.name or "norm", DOMAIN, attributes
    )
    new.outputs[1].name = x.name
    x.name = None
    graph.insert_before(add, new)
    x.replace_all_uses_with(new.outputs[1])
    norm.outputs[0].replace_all_uses_with(new.outputs[0])
    for node in reversed(old):
        graph.remove(node, safe=True)
