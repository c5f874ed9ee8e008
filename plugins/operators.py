"""The operators of the domain `enginery` as the graph has them, for ONNX's reference evaluator.

Each is its plugin's NumPy reference behind ONNX's calling convention. What a precision does to numbers happens here as
in the kernels: weights and activations are rounded or quantized, then multiplied exactly.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from .all_gather.reference import all_gather
from .all_reduce.reference import all_reduce
from .attention.reference import attention
from .embedding.reference import embedding
from .kv_write.reference import kv_write
from .linear.layouts import quantize_int8
from .linear.reference import linear
from .rms_norm.reference import quantize_rows, rms_norm
from .rotary_table.reference import rotary_table

Array = NDArray[Any]


class Exchange:
    """Where ranks that are evaluated in threads of their own meet: each sets `Exchange.current.ranks` to it."""

    current: ClassVar[Any] = threading.local()

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._parts: list[Array | None] = [None] * world_size

    def share(self, rank: int, part: Array) -> list[Array]:
        """Gives this rank's array and returns those of all."""
        self._parts[rank] = part
        self._barrier.wait()
        parts = [array for array in self._parts if array is not None]
        self._barrier.wait()
        return parts


class _Operator(OpRun):
    op_domain = "enginery"


class Embedding(_Operator):
    """(ids [tokens], table [vocab, hidden]) -> [tokens, hidden]."""

    def _run(
        self, ids: Array, table: Array, scale: Any = 1.0, vocab_start: Any = 0, precision: Any = "f32"
    ) -> tuple[Array]:
        return (embedding(ids, _weight(table, precision), scale=scale, vocab_start=vocab_start),)


class RotaryTable(_Operator):
    """(positions, prompt_lengths, frequencies, long_frequencies?) -> cos, sin [tokens, rot_dim / 2]."""

    def _run(self, positions: Array, lengths: Array, short: Array, long: Array | None = None, **attributes: Any) -> Any:
        return rotary_table(positions, lengths, short, long, **attributes)


class RmsNorm(_Operator):
    """(x, delta?, post_weight?, weight) -> out, sum."""

    def _run(self, x: Array, delta: Array, post: Array, weight: Array, eps: Any = 0.0) -> Any:
        out, total = rms_norm(x, delta, post, weight, eps=eps)
        return (out, total)[: len(self.onnx_node.output)]


class Quantize(_Operator):
    """(x) -> x as bf16, or as int8 with a scale for each row."""

    def _run(self, x: Array, precision: Any = "int8") -> Any:
        return quantize_rows(x) if precision == "int8" else (_round_bf16(x),)


class Linear(_Operator):
    """(a, weight, bias?, residual?, a_scale?) -> out."""

    def _run(
        self,
        a: Array,
        weight: Array,
        bias: Array | None = None,
        residual: Array | None = None,
        a_scale: Array | None = None,
        activation: Any = "none",
        softcap: Any = 0.0,
        precision: Any = "f32",
    ) -> tuple[Array]:
        x = a.astype(np.float32) if a_scale is None else a.astype(np.float32) * a_scale[:, None]
        weight = _weight(weight, precision)
        if activation == "none":
            return (linear(x, weight, bias, residual, softcap=softcap),)
        half = len(weight) // 2
        biases = (None, None) if bias is None else (bias[:half], bias[half:])
        return (
            linear(
                x, weight[:half], biases[0], residual, up_weight=weight[half:], up_bias=biases[1], activation=activation
            ),
        )


class WriteKv(_Operator):
    """(k, v, k_cache, v_cache, slots, cos?, sin?, k_norm?) -> the caches [blocks, block_size, heads, head_dim]."""

    def _run(
        self,
        k: Array,
        v: Array,
        keys: Array,
        values: Array,
        slots: Array,
        cos: Array | None = None,
        sin: Array | None = None,
        k_norm: Array | None = None,
        layer: Any = 0,
        window: Any = 0,
        head_dim: Any = 0,
        rot_dim: Any = 0,
        eps: Any = 0.0,
        kv_dtype: Any = "f32",
    ) -> Any:
        return kv_write(
            k, v, keys, values, slots, cos, sin, k_norm, head_dim=head_dim, rot_dim=rot_dim, eps=eps, kv_dtype=kv_dtype
        )


class PagedAttention(_Operator):
    """(q, k_cache, v_cache, block_table, positions, token_sequence, cos?, sin?, q_norm?) -> [M, heads · head_dim]."""

    def _run(
        self,
        q: Array,
        keys: Array,
        values: Array,
        block_table: Array,
        positions: Array,
        token_sequence: Array,
        cos: Array | None = None,
        sin: Array | None = None,
        q_norm: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array]:
        return (attention(q, keys, values, block_table, positions, token_sequence, cos, sin, q_norm, **attributes),)


class AllReduce(_Operator):
    """(x, residual?) -> the sum over ranks, + residual. The evaluator runs ranks together (graph/evaluate.py)."""

    def _run(self, x: Array, residual: Array | None = None, rank: Any = 0) -> tuple[Array]:
        return (all_reduce(Exchange.current.ranks.share(rank, x), residual),)


class AllGather(_Operator):
    """(x) -> the columns of all ranks side by side."""

    def _run(self, x: Array, rank: Any = 0, starts: Any = ()) -> tuple[Array]:
        return (all_gather(Exchange.current.ranks.share(rank, x)),)


OPERATORS: list[type[OpRun]] = [
    Embedding,
    RotaryTable,
    RmsNorm,
    Quantize,
    Linear,
    WriteKv,
    PagedAttention,
    AllReduce,
    AllGather,
]


def _weight(weight: Array, precision: str) -> Array:
    """The weight as an engine of this precision has it, widened to float32."""
    if precision == "int8":
        values, scale = quantize_int8(weight)
        return values.astype(np.float32) * scale[:, None]
    return _round_bf16(weight).astype(np.float32) if precision == "bf16" else weight


def _round_bf16(x: Array) -> Array:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16)
