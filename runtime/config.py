"""The knobs of an engine that is loaded. They carry the names that users know from vLLM."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from ..engines.defaults import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
from ..engines.errors import EngineryError, faults
from ..engines.sizes import parse_bytes

POLICIES = ("guaranteed_no_evict", "max_utilization")


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is run. None: the engine's own choice.

    max_model_len            tokens of prompt and output together, at most the model's
    max_num_seqs             sequences that run at once
    max_num_batched_tokens   tokens of one step
    kv_cache_memory_bytes    state of all ranks together; a number, or text such as "4GiB"
    num_threads              of all ranks together
    verify                   hash the weights before serving, not while serving
    tensor_parallel_size, kv_cache_dtype  are baked into the engine; what is given here must equal them
    """

    max_model_len: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | str | None = None
    capacity_scheduler_policy: str = "guaranteed_no_evict"
    num_threads: int | None = None
    verify: bool = False
    tensor_parallel_size: int | None = None
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        reasons = [
            f"{name} must be a positive integer{', or None' if optional else ''}, got {value!r}"
            for name, optional in _COUNTS.items()
            if not _is_count(value := getattr(self, name), optional)
        ]
        reasons += [
            f"{name} must be True or False, got {value!r}"
            for name in ("enable_prefix_caching", "verify")
            if not isinstance(value := getattr(self, name), bool)
        ]
        if self.capacity_scheduler_policy not in POLICIES:
            wanted = " or ".join(map(repr, POLICIES))
            reasons.append(f"capacity_scheduler_policy must be {wanted}, got {self.capacity_scheduler_policy!r}")
        if isinstance(self.kv_cache_memory_bytes, str):
            object.__setattr__(self, "kv_cache_memory_bytes", parse_bytes(self.kv_cache_memory_bytes))
        if not _is_count(self.kv_cache_memory_bytes, optional=True):
            reasons.append(f"kv_cache_memory_bytes must be a positive size, got {self.kv_cache_memory_bytes!r}")
        if self.kv_cache_dtype is not None and not isinstance(self.kv_cache_dtype, str):
            reasons.append(f"kv_cache_dtype must be text, got {self.kv_cache_dtype!r}")
        if reasons:
            raise faults(EngineryError, "The engine cannot be loaded so", reasons)

    @property
    def kv_cache_bytes(self) -> int | None:
        """kv_cache_memory_bytes as a number."""
        assert not isinstance(self.kv_cache_memory_bytes, str)
        return self.kv_cache_memory_bytes

    @staticmethod
    def of(knobs: dict[str, Any]) -> EngineConfig:
        """The configuration with these knobs. Raises EngineryError naming those that do not exist."""
        known = [field.name for field in fields(EngineConfig)]
        reasons = [_unknown(name, known) for name in knobs if name not in known]
        if reasons:
            raise faults(EngineryError, "The engine cannot be loaded so", reasons)
        return EngineConfig(**knobs)


_COUNTS = {
    "max_model_len": True,
    "max_num_seqs": False,
    "max_num_batched_tokens": False,
    "num_threads": True,
    "tensor_parallel_size": True,
}


def _is_count(value: object, optional: bool) -> bool:
    if value is None:
        return optional
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"there is no knob {name!r}; did you mean {nearest[0]!r}?"
    return f"there is no knob {name!r}; known are {', '.join(known)}"
