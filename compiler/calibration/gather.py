"""Gathers the statistics of the input of every product, by running the model over a text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...engines.errors import CheckpointError
from ...engines.precisions import PRECISIONS
from ...engines.targets import TARGETS
from ..checkpoint.tensors import Checkpoint
from ..graph.builder import columns_of, weight_of
from ..graph.rewrite import input_of, is_ours
from ..models import build_graph
from ..models.config import Config
from ..passes import run_passes
from ..passes.options import Options
from .evaluate import Array, Batch, evaluate_batch
from .statistics import Statistics

# Of one evaluation: activations take memory with it.
_BATCH_TOKENS = 4096


def gather_statistics(
    checkpoint: Checkpoint,
    config: Config,
    sequences: list[list[int]],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Statistics]:
    """Of the input of every product, over sequences of token ids; `progress` is told of tokens.

    Raises CheckpointError where the model computes what is not finite.
    """
    graph = fused_graph(checkpoint, config)
    readers = _first_readers(graph)
    tokens = sum(map(len, sequences))
    found = {value: Statistics.of(columns_of(value), tensors, tokens) for value, (_, tensors) in readers.items()}

    def observe(node: ir.Node, x: Array) -> None:
        value = input_of(node, 0)
        if value in readers and node is readers[value][0]:
            found[value].add(x)

    # A number that overflows is found at the end.
    with np.errstate(over="ignore", invalid="ignore"):
        for batch in _batches(sequences):
            evaluate_batch(graph, batch, observe)
            progress(len(batch.token_ids))
    damaged = [entry.tensors[0] for entry in found.values() if not entry.finite]
    if damaged:
        raise CheckpointError(
            f"{checkpoint.directory}: the input of {damaged[0]} is not finite on this text, wanted finite numbers. "
            f"The checkpoint is damaged: download it again, or export it again."
        )
    return list(found.values())


def fused_graph(checkpoint: Checkpoint, config: Config) -> ir.Graph:
    """The model after all that passes do to it but quantization."""
    g = build_graph(config, checkpoint)
    run_passes(g, Options(TARGETS["cpu-avx2"], PRECISIONS["fp32"], "f32"))
    return g.graph


def _first_readers(graph: ir.Graph) -> dict[ir.Value, tuple[ir.Node, list[str]]]:
    """Of each activation that products read, the first of these, and the tensors that are multiplied by it.

    A tensor has one activation, even where two products have a part of it each, of all tokens and of the sampled ones.
    """
    readers: dict[ir.Value, tuple[ir.Node, list[str]]] = {}
    known: set[str] = set()
    for node in graph:
        if not is_ours(node, "Linear"):
            continue
        tensors = dict.fromkeys(part.tensor for part in weight_of(input_of(node, 1)).parts)
        if new := [tensor for tensor in tensors if tensor not in known]:
            known.update(new)
            readers.setdefault(input_of(node, 0), (node, []))[1].extend(new)
    return readers


def _batches(sequences: list[list[int]]) -> list[Batch]:
    """Sequences together, as many as `_BATCH_TOKENS` hold, but one at least."""
    groups: list[list[list[int]]] = [[]]
    for sequence in sequences:
        if groups[-1] and sum(map(len, groups[-1])) + len(sequence) > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(sequence)
    return [Batch(np.concatenate(group), tuple(map(len, group))) for group in groups]
