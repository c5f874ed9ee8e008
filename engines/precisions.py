"""Precisions: how weights, activations and the KV cache of an engine are held."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CompileError
from .targets import TARGETS, Target

# The first architecture with fp8.
_FP8_ARCH = 89
# Triton 3.6 has no int8 tensor cores there.
_NO_INT8_ARCH = 100


@dataclass(frozen=True)
class Precision:
    """One scheme.

    name          as the manifest spells it
    activation    what a linear layer reads: "f32", "bf16", or "int8" or "fp8" (per token, dynamic); its weights too
    table         how tables are held that are read row by row (embeddings without a tied head)
    kv_cache      what `--kv-cache-dtype auto` means
    """

    name: str
    activation: str
    table: str
    kv_cache: str


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "f32", "f32", "fp32"),
    "bf16": Precision("bf16", "bf16", "bf16", "bf16"),
    "fp8": Precision("fp8", "fp8", "bf16", "bf16"),
    "int8": Precision("int8", "int8", "bf16", "bf16"),
}

# As users spell them -> as plans do.
KV_CACHE_DTYPES: dict[str, str] = {"fp32": "f32", "bf16": "bf16", "fp8": "fp8", "int8": "i8"}


def find_precision(name: str, target: Target) -> Precision:
    """The precision called `name`. Raises CompileError where the target does not have it."""
    if name not in PRECISIONS or not _has_precision(target, name):
        raise _refusal("precision", name, target, [known for known in PRECISIONS if _has_precision(target, known)])
    return PRECISIONS[name]


def find_kv_cache_dtype(name: str, precision: Precision, target: Target) -> str:
    """`name` or, for "auto", the precision's own. Raises CompileError where the target does not have it."""
    resolved = precision.kv_cache if name == "auto" else name
    if resolved not in KV_CACHE_DTYPES or not _has_kv_cache(target, resolved):
        known = [known for known in KV_CACHE_DTYPES if _has_kv_cache(target, known)]
        raise _refusal("KV cache dtype", name, target, ["auto", *known])
    return resolved


def _has_precision(target: Target, name: str) -> bool:
    if not target.is_cuda:
        return name != "fp8"
    if name == "int8":
        return target.arch != _NO_INT8_ARCH
    return name == "bf16" or (name == "fp8" and target.arch >= _FP8_ARCH)


def _has_kv_cache(target: Target, name: str) -> bool:
    if not target.is_cuda:
        return name != "fp8"
    return name in ("bf16", "int8") or (name == "fp8" and target.arch >= _FP8_ARCH)


def _refusal(what: str, name: str, target: Target, known: list[str]) -> CompileError:
    has = _has_precision if what == "precision" else _has_kv_cache
    having = [other.name for other in TARGETS.values() if has(other, name)]
    elsewhere = f" Targets that have {name}: {', '.join(having)}." if name in (PRECISIONS | KV_CACHE_DTYPES) else ""
    return CompileError(f"{what} {name!r} is not there for {target.name}, which has {', '.join(known)}.{elsewhere}")
