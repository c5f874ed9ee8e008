"""Limits of a transformer on a GPU, from its shape and from what the GPU was measured to do: each with its reason.

A shape is what config.json says (checkpoints.py). Bandwidth is that of a copy, reads and writes counted.
"""

from __future__ import annotations

from typing import Any

BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
Shape = dict[str, Any]


def layer_macs(shape: Shape) -> int:
    """Multiply-adds of one token in the products of all layers: as many as their weights have elements."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query, key = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (query + 2 * key) + query * hidden + 3 * hidden * inner
    return int(layer * shape["num_hidden_layers"])


def head_macs(shape: Shape) -> int:
    """Of one row of logits."""
    return int(shape["vocab_size"] * shape["hidden_size"])


def cache_bytes(shape: Shape, kv_cache_dtype: str) -> int:
    """Keys and values of one token. The scales of 8-bit types are ours, not the task's: they do not count."""
    elements = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(elements * BYTES[kv_cache_dtype])


def decode_bytes(shape: Shape, precision: str, kv_cache_dtype: str, batch: int, context: float) -> float:
    """A step reads every weight once, however many sequences there are, and the whole cache of each of them."""
    weights = (layer_macs(shape) + head_macs(shape)) * BYTES[precision]
    return weights + batch * context * cache_bytes(shape, kv_cache_dtype)


def decode_seconds(
    shape: Shape, precision: str, kv_cache_dtype: str, batch: int, context: float, limits: dict[str, float]
) -> float:
    """Of a step: batches of up to some hundred sequences wait for memory, not for arithmetic."""
    return decode_bytes(shape, precision, kv_cache_dtype, batch, context) / limits["copy_bytes_per_s"]


def attention_flops(shape: Shape, tokens: int) -> float:
    """Of a causal prompt: two products over half of all pairs of positions, of every head."""
    elements = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"]
    return 4.0 * elements * tokens * (tokens + 1) / 2


def prefill_seconds(shape: Shape, precision: str, tokens: int, limits: dict[str, float]) -> float:
    """Of one prompt: each operator's operations at the measured peak of its own type, one after the other. Attention
    multiplies in bf16 whatever the weights are; the head sees one row.
    """
    products = 2.0 * (layer_macs(shape) * tokens + head_macs(shape))
    return products / limits[f"{precision}_flops"] + attention_flops(shape, tokens) / limits["bf16_flops"]


def serve_seconds(
    shape: Shape,
    precision: str,
    kv_cache_dtype: str,
    requests: int,
    prompt: int,
    output: int,
    limits: dict[str, float],
) -> float:
    """Of so many requests at once: all prompts, then `output` steps of all sequences at their mean context."""
    prefill = requests * prefill_seconds(shape, precision, prompt, limits)
    return prefill + output * decode_seconds(shape, precision, kv_cache_dtype, requests, prompt + output / 2, limits)


def prefill_attention_flops(num_heads: int, head_dim: int, tokens: int) -> float:
    """Of one layer, causal."""
    return 4.0 * num_heads * head_dim * tokens * (tokens + 1) / 2
