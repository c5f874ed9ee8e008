"""What quantizing its weights costs each product, on the text that a calibration has seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import CheckpointError
from ...engines.precisions import find_precision
from ...engines.targets import TARGETS
from ...plugins.linear.layouts import quantize_int8
from ...plugins.linear.quantize_int4 import BLOCK, Feedback, dequantize_int4, find_feedback, quantize_gptq
from ..checkpoint.source import find_checkpoint
from ..checkpoint.tensors import open_checkpoint
from ..checkpoint.weights import Weight
from ..graph.builder import weight_of
from ..graph.rewrite import input_of
from ..models import build_graph, read_config
from ..passes import run_passes
from ..passes.layer_precision import HEAD, Product, products
from ..passes.options import Options
from .file import read_calibration

Floats = NDArray[np.float32]

_ROWS = 1024
# Of the median: above that a product stands out.
_STANDS_OUT = 2.0


@dataclass(frozen=True)
class LayerError:
    """Of a product, called as `--layer-precision` calls it.

    int8, int4: sqrt(E|(Q - W) x|² / E|W x|²), Q what the weights W are in that precision, over the inputs x that the
    calibration has seen; it knows E[x xᵀ] in blocks of 128 columns, and takes blocks for independent. Of weights alone:
    that activations are rounded too is not in it.
    """

    names: tuple[str, ...]
    num_parameters: int
    int8: float
    int4: float


def layer_errors(
    model: str,
    calibration: Path,
    group_size: int = 0,
    zero_points: bool = False,
    num_threads: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> list[LayerError]:
    """Of every product of a checkpoint, as a build of int4 with this calibration would have it.

    `progress` is told of products. Raises CheckpointError or CompileError.
    """
    target = TARGETS["cpu-avx2"]
    precision = find_precision("int4", target, group_size, zero_points)
    source = find_checkpoint(model)
    config = read_config(source.directory)
    with open_checkpoint(source.directory) as checkpoint, ThreadPoolExecutor(num_threads) as pool:
        known = read_calibration(calibration, checkpoint)
        g = build_graph(config, checkpoint)
        run_passes(g, Options(target, precision, "bf16", calibration=known))
        codes = precision.codes
        group, symmetric = int(codes.partition("g")[2]), not codes.startswith("u")

        def measure(product: Product) -> LayerError:
            weight = weight_of(input_of(product.node, 1))
            moments = known.moments(weight)
            feedback = find_feedback(known.likely_moments(weight))
            parts = pool.map(
                lambda start: _squares(weight, start, moments, feedback, group, symmetric), _starts(weight)
            )
            output, *errors = np.sum(list(parts), axis=0)
            int8, int4 = (float(np.sqrt(error / output)) if output > 0 else 0.0 for error in errors)
            progress(1)
            return LayerError(product.names, weight.num_rows * weight.num_columns, int8, int4)

        return [measure(product) for product in products(g.graph)]


def count_products(model: str) -> int:
    """How many `layer_errors` will tell its progress of. Raises CheckpointError."""
    source = find_checkpoint(model)
    with open_checkpoint(source.directory) as checkpoint:
        g = build_graph(read_config(source.directory), checkpoint)
        target = TARGETS["cpu-avx2"]
        run_passes(g, Options(target, find_precision("fp32", target), "f32"))
        return len(products(g.graph))


def that_stand_out(errors: list[LayerError]) -> list[LayerError]:
    """Those that int4 costs more than twice the median, the worst first. Not the head, which is in int8 anyhow."""
    layers = [each for each in errors if each.names != (HEAD,)]
    median = statistics.median(each.int4 for each in layers or errors)
    return sorted((each for each in layers if each.int4 > _STANDS_OUT * median), key=lambda each: -each.int4)


def _starts(weight: Weight) -> range:
    return range(0, weight.num_rows, _ROWS)


def _squares(
    weight: Weight, start: int, moments: Floats, feedback: Feedback, group: int, symmetric: bool
) -> tuple[float, float, float]:
    """Of some rows, together: E|w x|², and that of their errors in int8 and int4."""
    w = weight.values(start, min(start + _ROWS, weight.num_rows))
    if not np.isfinite(w).all():
        raise CheckpointError(
            f"{weight.checkpoint.directory}: {weight.parts[0].tensor} holds what is no finite number. "
            f"The checkpoint is damaged: download it again, or export it again."
        )
    quantized, scales = quantize_int8(w)
    rounded = quantized.astype(np.float32) * scales[:, None]
    coded = dequantize_int4(*quantize_gptq(w, group, symmetric, feedback), group)
    return _mean_square(w, moments), _mean_square(rounded - w, moments), _mean_square(coded - w, moments)


def _mean_square(w: Floats, moments: Floats) -> float:
    """[N, K] -> the sum of wᵀ E[x xᵀ] w over rows and blocks."""
    total = 0.0
    for block, begin in enumerate(range(0, w.shape[1], BLOCK)):
        part = w[:, begin : begin + BLOCK].astype(np.float64)
        size = part.shape[1]
        total += float(np.sum((part @ moments[block, :size, :size]) * part))
    return total
