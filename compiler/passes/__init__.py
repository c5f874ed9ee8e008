"""What happens to the graph between model and lowering, in order. Each pass states what it requires and ensures."""

from __future__ import annotations

from collections.abc import Callable

from ..graph.builder import GraphBuilder
from ..graph.verify import verify
from .fold_constants import fold_constants
from .fuse_all_reduce import fuse_all_reduce
from .fuse_attention import fuse_attention
from .fuse_gate_up import fuse_gate_up
from .fuse_linear import fuse_linear
from .fuse_norm import fuse_norm
from .fuse_qkv import fuse_qkv
from .options import Options
from .quantize import quantize
from .select_rows import select_rows
from .shard import shard
from .smooth import smooth

PASSES: list[Callable[[GraphBuilder, Options], None]] = [
    fold_constants,
    select_rows,
    fuse_gate_up,
    fuse_qkv,
    fuse_linear,
    fuse_attention,
    fuse_norm,
    shard,
    fuse_all_reduce,
    smooth,
    quantize,
]


def run_passes(
    g: GraphBuilder, options: Options, observe: Callable[[str, GraphBuilder], None] = lambda name, graph: None
) -> None:
    """Runs every pass, verifies the graph after each, and shows it to `observe(name, graph)`."""
    verify(g.graph)
    observe("model", g)
    for step in PASSES:
        step(g, options)
        verify(g.graph)
        observe(step.__name__, g)
