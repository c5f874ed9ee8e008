"""Precisions: how weights, activations and the KV cache of an engine are held."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CompileError


@dataclass(frozen=True)
class Precision:
    """One scheme.

    name          as the manifest spells it
    weight_layout  of the linear layers
    row_layout    of tables that are read row by row (embeddings without a tied head)
    activation    dtype that a linear layer reads: "f32", "bf16" or "int8" (per token, dynamic)
    kv_cache      what `--kv-cache-dtype auto` means
    """

    name: str
    weight_layout: str
    row_layout: str
    activation: str
    kv_cache: str


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "f32_k1n16.v0", "rows_f32.v0", "f32", "fp32"),
    "bf16": Precision("bf16", "bf16_k2n16.v0", "rows_bf16.v0", "bf16", "bf16"),
    "int8": Precision("int8", "int8_k4n16.v0", "rows_bf16.v0", "int8", "bf16"),
}

# As users spell them -> as plans do.
KV_CACHE_DTYPES: dict[str, str] = {"fp32": "f32", "bf16": "bf16", "int8": "i8"}


def find_precision(name: str) -> Precision:
    """The precision called `name`. Raises CompileError."""
    if name not in PRECISIONS:
        raise CompileError(
            f"precision {name!r} is not implemented for CPU targets. Known are: {', '.join(PRECISIONS)}."
        )
    return PRECISIONS[name]


def find_kv_cache_dtype(name: str, precision: Precision) -> str:
    """`name` or, for "auto", the precision's own. Raises CompileError."""
    resolved = precision.kv_cache if name == "auto" else name
    if resolved not in KV_CACHE_DTYPES:
        known = ", ".join(["auto", *KV_CACHE_DTYPES])
        raise CompileError(f"KV cache dtype {name!r} is not implemented for CPU targets. Known are: {known}.")
    return resolved
