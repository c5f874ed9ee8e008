"""Takes outliers out of the activations that are quantized (Xiao et al., SmoothQuant, 2022).

Requires fused RmsNorm and Linear nodes; without a calibration nothing changes. Ensures that the channels of what a norm
or a gated product gives to products alone are divided by factors, and the columns that read them multiplied: the norm's
weight, or the rows of up, take the division. Factors are powers of two, so that float32 results stay the same bits, and
they are 1 where none is expected to make the error less. They are computed when weights are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..checkpoint.weights import Factors, Weight
from ..graph.builder import GraphBuilder, LazyWeight, attribute, register_weight, weight_of
from ..graph.rewrite import input_of, is_ours, users
from .layer_precision import product_of
from .options import Options

if TYPE_CHECKING:
    from ..calibration.file import Calibration

Floats = NDArray[np.float32]

# How much of an outlier moves from the activation to the weight: SmoothQuant's α, of which the best one is taken.
_STRENGTHS = (0.5, 0.25, 0.75)
# No factor leaves 2^±this; what is less than 2^±that does not stand out.
_MOST_BITS, _LEAST_BITS = 12, 2
_CHUNK_ELEMENTS = 1 << 20


def smooth(g: GraphBuilder, options: Options) -> None:
    """See the module."""
    calibration = options.calibration
    if calibration is None:
        return
    calibration.require([weight_of(input_of(node, 1)) for node in g.graph if is_ours(node, "Linear")])
    for node in list(g.graph):
        if is_ours(node, "RmsNorm") and node.inputs[3] is not None:
            _smooth(g.graph, node, options, (3,))
        elif is_ours(node, "Linear") and attribute(node, "activation") != "none":
            _smooth(g.graph, node, options, (1, 2))


def _smooth(graph: ir.Graph, node: ir.Node, options: Options, divided: tuple[int, ...]) -> None:
    """`divided`: the inputs of `node` whose last rows, as many as there are channels, take the division."""
    readers = users(node.outputs[0])
    if not readers or not all(_reads_alone(reader, node.outputs[0]) for reader in readers):
        return
    weights = [weight_of(input_of(reader, 1)) for reader in readers]
    assert options.calibration is not None
    factors = Factors(partial(_choose, options.calibration, _group_of(graph, options, readers[0]), weights))
    for index in divided:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None:
            rows = Factors(partial(_last_rows, weight_of(value).num_rows, factors))
            _multiply(graph, node, index, weight_of(value).times(rows=rows))
    for reader, weight in zip(readers, weights, strict=True):
        _multiply(graph, reader, 1, weight.times(columns=factors))


def _group_of(graph: ir.Graph, options: Options, reader: ir.Node) -> int:
    """How many weights of a row share a scale; 0: all."""
    return int(product_of(graph, reader).weight(options).partition("g")[2] or 0)


def _reads_alone(reader: ir.Node, value: ir.Value) -> bool:
    """True for a product with a weight of its own: a tied head's is the embedding's too."""
    return is_ours(reader, "Linear") and reader.inputs[0] is value and len(users(input_of(reader, 1))) == 1


def _multiply(graph: ir.Graph, node: ir.Node, index: int, weight: Weight) -> None:
    """Makes `weight` the node's input; under its old name if nobody else reads it."""
    value = input_of(node, index)
    if len(users(value)) == 1:
        value.const_value = LazyWeight(value.name or "", weight)
    else:
        node.replace_input_with(index, register_weight(graph, f"{node.name}.smoothed.{index}", weight))


def _last_rows(num_rows: int, factors: Factors) -> Floats:
    """1 / factors for the last rows, 1 for those before."""
    out = np.ones(num_rows, np.float32)
    out[num_rows - len(factors.values) :] = 1 / factors.values
    return out


def _choose(calibration: Calibration, group: int, weights: Sequence[Weight]) -> Floats:
    """[K]: what the columns of `weights`, which read one activation, are multiplied by."""
    absmax, squares = calibration.absmax(weights[0]), calibration.mean_squares(weights[0])
    largest = np.max([np.abs(chunk).max(axis=0) for weight in weights for chunk in _chunks(weight)], axis=0)
    exponents = [_exponents(absmax, largest, strength) for strength in _STRENGTHS]
    # Those that move only what stands out, too: groups of four bits suffer from what moves within them.
    exponents += [np.where(np.abs(each) < _LEAST_BITS, 0, each) for each in exponents]
    tried = [np.ldexp(np.float32(1), each) for each in (np.zeros(len(absmax), np.int32), *exponents)]
    errors = [_expected_error(weights, factors, absmax, squares, group) for factors in tried]
    best: Floats = tried[int(np.argmin(errors))]
    return best


def _exponents(absmax: Floats, largest: Floats, strength: float) -> NDArray[np.int32]:
    """log2 of absmax^α / largest^(1 - α), rounded, in the middle 0; 0 where a channel is dead."""
    exponents = np.zeros(len(absmax), np.int32)
    alive = (absmax > 0) & (largest > 0)
    if alive.any():
        bits = strength * np.log2(absmax[alive]) - (1 - strength) * np.log2(largest[alive])
        exponents[alive] = np.clip(np.rint(bits - np.median(bits)), -_MOST_BITS, _MOST_BITS)
    return exponents


def _expected_error(weights: Sequence[Weight], factors: Floats, absmax: Floats, squares: Floats, group: int) -> float:
    """Of all outputs together, squared, in units of a step of int8 squared / 12.

    Activations err by their largest channel over all the products that read them, weights by the largest of a row, or
    sixteen times as much by the largest of a group.
    """
    activation = float(np.max(absmax / factors)) ** 2
    size, coarseness = _grouped_columns((squares / factors**2).astype(np.float64)[None], group).sum(axis=2), 1.0
    if group:
        coarseness = (127 / 8) ** 2
    total = 0.0
    for weight in weights:
        for chunk in _chunks(weight):
            wide = np.abs(chunk * factors).astype(np.float64)
            step = _grouped_columns(wide, group).max(axis=2)
            total += activation * float(np.sum(wide**2)) + coarseness * float(np.sum(step**2 * size))
    return total


def _grouped_columns(x: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """[rows, K] -> [rows, groups, columns], zeros behind the last; group 0: a row is one."""
    group = group or x.shape[1]
    return np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)


def _chunks(weight: Weight) -> Iterator[Floats]:
    step = max(_CHUNK_ELEMENTS // weight.num_columns, 1)
    for start in range(0, weight.num_rows, step):
        yield weight.values(start, min(start + step, weight.num_rows))
