"""Executes a graph at any stage with ONNX's reference evaluator: the oracle of passes and kernels. For tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ...plugins.operators import OPERATORS, Exchange
from .builder import dimensions

Arrays = Mapping[str, NDArray[Any]]
IR_VERSION = 11


def evaluate(graph: ir.Graph, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """The graph's outputs by name for `inputs` by name: those of a step, and the caches."""
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    evaluator = ReferenceEvaluator(proto, new_ops=list(OPERATORS))
    names = [value.name or "" for value in graph.outputs]
    wanted = {value.name for value in graph.inputs}
    return dict(zip(names, evaluator.run(None, {k: v for k, v in inputs.items() if k in wanted}), strict=True))


def evaluate_ranks(graphs: Sequence[ir.Graph], inputs: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
    """The outputs of every rank of a sharded graph, evaluated together."""
    exchange = Exchange(len(graphs))

    def run(rank: int) -> dict[str, NDArray[Any]]:
        Exchange.current.ranks = exchange
        return evaluate(graphs[rank], inputs[rank])

    with ThreadPoolExecutor(len(graphs)) as pool:
        return list(pool.map(run, range(len(graphs))))


def whole_prompt_inputs(
    graph: ir.Graph, token_ids: list[int], num_rows: int | None = None, block_size: int = 32
) -> dict[str, NDArray[Any]]:
    """A step that computes one whole sequence in fresh caches, the last `num_rows` tokens (all by default) as rows."""
    count = len(token_ids)
    blocks = -(-count // block_size)
    inputs: dict[str, NDArray[Any]] = {
        "token_ids": np.array(token_ids),
        "positions": np.arange(count),
        "token_sequence": np.zeros(count, np.int64),
        "prompt_lengths": np.full(count, count),
        "rows": np.arange(count - (count if num_rows is None else num_rows), count),
    }
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith("slots."):
            inputs[name] = np.arange(count)
        elif name.startswith("block_table."):
            inputs[name] = np.arange(blocks)[None]
        elif "_cache." in name:
            shape = [blocks, block_size, *(int(d) for d in dimensions(value)[2:])]
            inputs[name] = np.zeros(shape, np.float32)
    return inputs
