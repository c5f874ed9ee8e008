"""What a machine with given limits could do at most: the slower of reading what must be read and of computing.

limits are those of machine.probe; a shape is what config.json says (checkpoints.py). Multiply-adds are at the peak of
the type that the precision multiplies in, those of attention at bf16's; weights are read once a step, and so is the
cache.
"""

from __future__ import annotations

from typing import Any

Limits = dict[str, Any]

# int4: groups of 32 with a 2-byte scale each.
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
# Of a key's or value's element; int8 has a 2-byte scale for each head.
CACHE_BYTES = {"bf16": (2.0, 0.0), "int8": (1.0, 2.0)}
_PEAKS = {"fp32": "fp32_gflops", "bf16": "bf16_gflops", "int8": "int8_gops", "int4": "int8_gops"}


def weights(shape: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds of one token in the layers, and in the head."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = shape.get("head_dim", hidden // shape["num_attention_heads"])
    query, key = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    layer = hidden * (query + 2 * key) + query * hidden + 3 * hidden * inner
    return layer * shape["num_hidden_layers"], shape["vocab_size"] * hidden


def attention(shape: dict[str, Any], context: float, cache: str = "bf16") -> tuple[float, float]:
    """Multiply-adds of one query token over `context` keys, and the bytes of their cache."""
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    layers = shape["num_hidden_layers"]
    macs = 2 * layers * shape["num_attention_heads"] * head_dim * context
    element, scale = CACHE_BYTES[cache]
    return macs, 2 * layers * shape["num_key_value_heads"] * (head_dim * element + scale) * context


def prefill_seconds(shape: dict[str, Any], precision: str, length: int, limits: Limits) -> float:
    """Of one prompt: every layer's products for all tokens, the head for one."""
    layers, head = weights(shape)
    macs, _ = attention(shape, length / 2)
    read = (layers + head) * BYTES[precision] / (limits["dram_gb_per_s"] * 1e9)
    peak, attention_peak = _peaks(precision, limits)
    return max(read, 2 * (layers * length + head) / peak + 2 * macs * length / attention_peak)


def decode_seconds(
    shape: dict[str, Any], precision: str, batch: int, context: float, limits: Limits, cache_type: str = "bf16"
) -> float:
    """Of one step: it reads all weights and every sequence's cache once."""
    layers, head = weights(shape)
    macs, cache = attention(shape, context, cache_type)
    read = ((layers + head) * BYTES[precision] + batch * cache) / (limits["dram_gb_per_s"] * 1e9)
    peak, attention_peak = _peaks(precision, limits)
    return max(read, batch * (2 * (layers + head) / peak + 2 * macs / attention_peak))


def prefill_roof(shape: dict[str, Any], precision: str, length: int, limits: Limits) -> float:
    """Tokens/s of one prompt."""
    return length / prefill_seconds(shape, precision, length, limits)


def decode_roof(
    shape: dict[str, Any], precision: str, batch: int, context: float, limits: Limits, cache_type: str = "bf16"
) -> float:
    """Tokens/s of all sequences."""
    return batch / decode_seconds(shape, precision, batch, context, limits, cache_type)


def serve_roof(shape: dict[str, Any], precision: str, clients: int, prompt: int, output: int, limits: Limits) -> float:
    """Output tokens/s of clients that ask again when answered: all prompts, then steps of all sequences."""
    prefill = clients * prefill_seconds(shape, precision, prompt, limits)
    decode = output * decode_seconds(shape, precision, clients, prompt + output / 2, limits)
    return clients * output / (prefill + decode)


def _peaks(precision: str, limits: Limits) -> tuple[float, float]:
    fp32 = limits["fp32_gflops"]
    return limits.get(_PEAKS[precision], fp32) * 1e9, limits.get("bf16_gflops", fp32) * 1e9
