"""Takes outliers out of the activations that are quantized (Xiao et al., SmoothQuant, 2022).

Requires fused RmsNorm and Linear nodes; without a calibration nothing changes. Ensures that the channels of what a norm
or a gated product gives to products alone are divided by factors, and the columns that read them multiplied: the norm's
weight, or the rows of up, take the division. Factors are powers of two, so that float32 results stay the same bits, and
they are 1 where none makes the error on the calibration's samples less. They are computed when weights are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...plugins.linear.layouts import quantize_int8
from ...plugins.linear.quantize_int4 import dequantize_int4, quantize_int4
from ..checkpoint.weights import Factors, Weight
from ..graph.builder import GraphBuilder, LazyWeight, attribute, register_weight, weight_of
from ..graph.rewrite import input_of, is_ours, users
from .layer_precision import product_of
from .options import Options

if TYPE_CHECKING:
    from ..calibration.file import Calibration

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# How much of an outlier moves from the activation to the weight: SmoothQuant's α, of which the best one is taken.
_STRENGTHS = (0.5, 0.25, 0.75)
# No factor leaves 2^±this; what is less than 2^±that does not stand out.
_MOST_BITS, _LEAST_BITS = 12, 2
_CHUNK_ELEMENTS = 1 << 20
# The error that factors must leave at most, of that without them: other texts gain less than the samples.
_WORTH_IT = 0.8
# Of a weight, on which factors are tried.
_MOST_ROWS = 256


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
    codes = product_of(graph, readers[0]).weight(options)
    factors = Factors(partial(_choose, options.calibration, codes, weights))
    for index in divided:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None:
            rows = Factors(partial(_last_rows, weight_of(value).num_rows, factors))
            _multiply(graph, node, index, weight_of(value).times(rows=rows))
    for reader, weight in zip(readers, weights, strict=True):
        _multiply(graph, reader, 1, weight.times(columns=factors))


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


def _choose(calibration: Calibration, codes: str, weights: Sequence[Weight]) -> Floats:
    """[K]: what the columns of `weights`, which read one activation, are multiplied by."""
    absmax = calibration.absmax(weights[0])
    largest = np.max([np.abs(chunk).max(axis=0) for weight in weights for chunk in _chunks(weight)], axis=0)
    if not np.isfinite(largest).all():  # as the writing of weights will tell
        return np.ones(len(absmax), np.float32)
    exponents = [_exponents(absmax, largest, strength) for strength in _STRENGTHS]
    # Those that move only what stands out, too: groups of four bits suffer from what moves within them.
    exponents += [np.where(np.abs(each) < _LEAST_BITS, 0, each) for each in exponents]
    tried = [np.ldexp(np.float32(1), each) for each in (np.zeros(len(absmax), np.int32), *exponents)]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is no number, and chosen by nobody
        errors = _errors(weights, tried, calibration.samples(weights[0]), codes)
    errors[0] *= _WORTH_IT
    best: Floats = tried[int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))]
    return best


def _exponents(absmax: Floats, largest: Floats, strength: float) -> NDArray[np.int32]:
    """log2 of absmax^α / largest^(1 - α), rounded, in the middle 0; 0 where a channel is dead."""
    exponents = np.zeros(len(absmax), np.int32)
    alive = (absmax > 0) & (largest > 0)
    if alive.any():
        bits = strength * np.log2(absmax[alive]) - (1 - strength) * np.log2(largest[alive])
        exponents[alive] = np.clip(np.rint(bits - np.median(bits)), -_MOST_BITS, _MOST_BITS)
    return exponents


def _errors(weights: Sequence[Weight], tried: list[Floats], samples: Floats, codes: str) -> Doubles:
    """What each of `tried` costs the samples' outputs: the squared error of all outputs of a token, as a share of their
    squares and the median of these, on average over tokens.

    A share, because a token with huge outputs can bear more; and the median, because one with small ones adds little
    to the residual. In doubles, so that the order in which a library adds decides nothing.
    """
    inputs = [_round(samples / factors, "int8") for factors in tried]
    errors, squares = np.zeros((len(tried), len(samples))), np.zeros(len(samples))
    for weight in weights:
        step = -(-weight.num_rows // _MOST_ROWS)
        for chunk in _chunks(weight):
            rows = chunk[::step]
            exact = samples.astype(np.float64) @ rows.T
            squares += np.sum(exact**2, axis=1)
            for x, factors, error in zip(inputs, tried, errors, strict=True):
                error += np.sum((x @ _round(rows * factors, codes).T - exact) ** 2, axis=1)
    shares = errors / np.maximum(squares + np.median(squares), np.finfo(np.float64).tiny)
    mean: Doubles = shares.mean(axis=1)
    return mean


def _round(x: Floats, codes: str) -> Doubles:
    """Rows as int8 gives them back, or where `codes` have groups as these do."""
    group = int(codes.partition("g")[2] or 0)
    if group:
        rounded = dequantize_int4(*quantize_int4(x, group, not codes.startswith("u")), group)
    else:
        whole, scales = quantize_int8(x)
        rounded = whole.astype(np.float32) * scales[:, None]
    return rounded.astype(np.float64)


def _chunks(weight: Weight) -> Iterator[Floats]:
    step = max(_CHUNK_ELEMENTS // weight.num_columns, 1)
    for start in range(0, weight.num_rows, step):
        yield weight.values(start, min(start + step, weight.num_rows))
