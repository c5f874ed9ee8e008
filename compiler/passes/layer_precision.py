"""Which precision the weights of a product have: the build's, or what `--layer-precision` says of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from ...engines.errors import CompileError, faults
from ...engines.manifest import LONGEST_LAYER_PRECISION, MOST_LAYER_PRECISIONS
from ...engines.precisions import WEIGHTS_OF_INT8, Precision
from ...engines.targets import Target
from ..graph.builder import GraphBuilder, weight_of
from ..graph.rewrite import input_of, is_ours, users
from .options import LayerPrecision, Options

HEAD = "lm_head"
_OPTION = "--layer-precision"
_MOST_NAMES = 8


def parse_layers(texts: Sequence[str], precision: Precision, target: Target) -> tuple[LayerPrecision, ...]:
    """What "PATTERN=PRECISION" says. Raises CompileError with all that is wrong."""
    if texts and (target.is_cuda or precision.name not in WEIGHTS_OF_INT8):
        raise CompileError(
            f"{_OPTION} goes with --precision {' and '.join(WEIGHTS_OF_INT8)} for CPUs, whose products all read "
            f"activations of eight bits; this build is {precision.name} for {target.name}. Leave it out."
        )
    layers, wrong = [], []
    if len(texts) > MOST_LAYER_PRECISIONS:
        wrong.append(f"{len(texts)} are too many; an engine has at most {MOST_LAYER_PRECISIONS}. Use wider patterns")
    for text in texts[:MOST_LAYER_PRECISIONS]:
        pattern, equals, name = text.rpartition("=")
        if len(text) > LONGEST_LAYER_PRECISION or not text.isprintable():
            wrong.append(f"wanted at most {LONGEST_LAYER_PRECISION} printable characters, got {text[:60]!a}")
        elif not equals or not pattern or name not in WEIGHTS_OF_INT8:
            known = " or ".join(WEIGHTS_OF_INT8)
            wrong.append(f"wanted PATTERN={known}, as lm_head=int4 or '*.down_proj=int8', got {text!r}")
        else:
            layers.append(LayerPrecision(pattern, precision.codes if name == "int4" else name))
    if wrong:
        raise faults(CompileError, _OPTION, wrong)
    return tuple(layers)


@dataclass(frozen=True)
class Product:
    """A Linear node. names: as the checkpoint calls the modules that it is made of, or "lm_head"."""

    node: ir.Node
    names: tuple[str, ...]

    def weight(self, options: Options) -> str:
        """How its weights are held. Of modules that are one product the most exact counts, of patterns the last."""
        precision = options.precision
        usual = precision.head if self.names == (HEAD,) else precision.weight
        found = {self._of(name, options.layers, usual) for name in self.names}
        return max(found, key=lambda weight: weight == "int8")

    def overruled(self, options: Options) -> list[str]:
        """What patterns say of one of its modules, and others that are the same product do not let be."""
        weight = self.weight(options)
        return [
            f"{name} has {weight[:4]}, not {said[:4]}: it is one product with "
            f"{', '.join(other.rpartition('.')[2] for other in self.names if other != name)}. Name all of them"
            for name in self.names
            if (said := self._of(name, options.layers, "")) and said != weight
        ]

    def _of(self, name: str, layers: Sequence[LayerPrecision], usual: str) -> str:
        return next((each.weight for each in reversed(layers) if fnmatchcase(name, each.pattern)), usual)


def product_of(graph: ir.Graph, linear: ir.Node) -> Product:
    """The product that `linear` is."""
    if is_head(graph, linear):
        return Product(linear, (HEAD,))
    parts = weight_of(input_of(linear, 1)).parts
    return Product(linear, tuple(dict.fromkeys(part.tensor.removesuffix(".weight") for part in parts)))


def products(graph: ir.Graph) -> list[Product]:
    """All of a fused graph, in its order."""
    return [product_of(graph, node) for node in graph if is_ours(node, "Linear")]


def require_matches(g: GraphBuilder, options: Options) -> None:
    """Raises CompileError for patterns that are no product's, or do not hold for all that they name."""
    layers, found = options.layers, products(g.graph)
    names = [name for product in found for name in product.names]
    wrong = [layer.pattern for layer in layers if not any(fnmatchcase(name, layer.pattern) for name in names)]
    if wrong:
        # One of each kind: layers differ in their numbers alone.
        kinds = {re.sub(r"\.\d+\.", ".*.", name): None for name in names}
        some = ", ".join([*kinds][:_MOST_NAMES]) + (", …" if len(kinds) > _MOST_NAMES else "")
        raise faults(CompileError, _OPTION, [f"{pattern!r} matches no product of {some}" for pattern in wrong])
    if overruled := [reason for product in found for reason in product.overruled(options)]:
        more = [f"and {len(overruled) - _MOST_NAMES} more"] if len(overruled) > _MOST_NAMES else []
        raise faults(CompileError, _OPTION, overruled[:_MOST_NAMES] + more)


def is_head(graph: ir.Graph, linear: ir.Node) -> bool:
    """Whether its output, gathered from all ranks if there are several, is the logits."""
    gathered = [user.outputs[0] for user in users(linear.outputs[0]) if is_ours(user, "AllGather")]
    return any(output in graph.outputs for output in (linear.outputs[0], *gathered))
