"""Precisions: how weights, activations and the KV cache of an engine are held."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .errors import CompileError
from .layouts import GROUPS
from .targets import TARGETS, Target

# The first architecture with fp8.
_FP8_ARCH = 89
# Triton 3.6 has no int8 tensor cores there.
_NO_INT8_ARCH = 100


@dataclass(frozen=True)
class Precision:
    """One scheme.

    name          as the manifest spells it
    activation    what a linear layer reads: "f32", "bf16", or "int8" or "fp8" (per token, dynamic)
    weight        how its weights are held: as activations are, or in four bits with a scale for each group of a row:
                  "int4g32" (symmetric), "uint4g32" (with zero points), or in groups of 64 or 128
    head          how those of lm_head are, whose errors go straight into the logits
    table         how tables are held that are read row by row (embeddings without a tied head)
    kv_cache      what `--kv-cache-dtype auto` means
    codes         how weights in four bits are held, as `weight`: of products that are asked for in them
    """

    name: str
    activation: str
    weight: str
    head: str
    table: str
    kv_cache: str
    codes: str = ""


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "f32", "f32", "f32", "f32", "fp32"),
    "bf16": Precision("bf16", "bf16", "bf16", "bf16", "bf16", "bf16"),
    "fp8": Precision("fp8", "fp8", "fp8", "fp8", "bf16", "bf16"),
    "int8": Precision("int8", "int8", "int8", "int8", "bf16", "bf16"),
    "int4": Precision("int4", "int8", "int4g32", "int8", "bf16", "bf16"),
}

# How single products can be held where activations are int8.
WEIGHTS_OF_INT8 = ("int8", "int4")

# As users spell them -> as plans do.
KV_CACHE_DTYPES: dict[str, str] = {"fp32": "f32", "bf16": "bf16", "fp8": "fp8", "int8": "i8"}


def find_precision(
    name: str, target: Target, group_size: int = 0, zero_points: bool = False, some_int4: bool = False
) -> Precision:
    """The precision called `name`. Raises CompileError where the target does not have it.

    group_size, zero_points: of int4 alone, or where some products are asked for in it; 0 is the precision's own
    """
    if name not in PRECISIONS or not _has_precision(target, name):
        raise _refusal("precision", name, target, PRECISIONS, _has_precision)
    precision = PRECISIONS[name]
    codes = f"{'u' if zero_points else ''}int4g{group_size or GROUPS[0]}"
    if name != "int4":
        if (group_size or zero_points) and not some_int4:
            option = "--group-size" if group_size else "--zero-points"
            raise CompileError(f"{option} belongs to --precision int4; {name} has one scale for each row.")
        return replace(precision, codes=codes) if name in WEIGHTS_OF_INT8 else precision
    return replace(precision, weight=codes, codes=codes)


def find_kv_cache_dtype(name: str, precision: Precision, target: Target) -> str:
    """`name` or, for "auto", the precision's own. Raises CompileError where the target does not have it."""
    resolved = precision.kv_cache if name == "auto" else name
    if resolved not in KV_CACHE_DTYPES or not _has_kv_cache(target, resolved):
        raise _refusal("KV cache dtype", name, target, KV_CACHE_DTYPES, _has_kv_cache, "auto, ")
    return resolved


def _has_precision(target: Target, name: str) -> bool:
    if not target.is_cuda:
        return name != "fp8"
    if name == "int4":
        return False
    if name == "int8":
        return target.arch != _NO_INT8_ARCH
    return name == "bf16" or (name == "fp8" and target.arch >= _FP8_ARCH)


def _has_kv_cache(target: Target, name: str) -> bool:
    if not target.is_cuda:
        return name != "fp8"
    return name in ("bf16", "int8") or (name == "fp8" and target.arch >= _FP8_ARCH)


def _refusal(
    what: str,
    name: str,
    target: Target,
    known: Iterable[str],
    has: Callable[[Target, str], bool],
    always: str = "",
) -> CompileError:
    here = always + ", ".join(each for each in known if has(target, each))
    having = ", ".join(other.name for other in TARGETS.values() if name in known and has(other, name))
    elsewhere = f" Targets that have {name}: {having}." if having else ""
    return CompileError(f"{what} {name!r} is not there for {target.name}, which has {here}.{elsewhere}")
