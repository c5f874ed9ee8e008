"""The knobs of an engine that is loaded. They carry the names that users know from vLLM."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from ..engines.defaults import (
    CUDA_MAX_NUM_BATCHED_TOKENS,
    CUDA_MAX_NUM_SEQS,
    GPU_MEMORY_UTILIZATION,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MIXED_PROMPT_TOKENS,
)
from ..engines.errors import EngineryError, faults
from ..engines.sizes import parse_bytes
from ..engines.targets import Target

POLICIES = ("guaranteed_no_evict", "max_utilization")
WEIGHT_PAGES = ("auto", "mapped", "huge")


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is run. None: the engine's own choice, or its target's.

    max_model_len            tokens of prompt and output together, at most the model's
    max_num_seqs             sequences that run at once
    max_num_batched_tokens   tokens of one step; on a CPU by default 128, of prompts 48 (or twice as many as
                             decode) beside others that decode
    kv_cache_memory_bytes    state of all ranks together; a number, or text such as "4GiB"
    gpu_memory_utilization   on a GPU: the share of its memory that all of the engine may take
    gpus                     of each rank the number of its GPU, as the driver counts them; ranks may share one
    num_threads              of all ranks together
    verify                   hash the weights before serving, not while serving
    weight_pages             on a CPU: "mapped" serves weights from the pages of their file, "huge" copies them to huge
                             pages while serving goes on, "auto" does where a sample is read faster there
    tensor_parallel_size, kv_cache_dtype  are baked into the engine; what is given here must equal them
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | str | None = None
    gpu_memory_utilization: float | None = None
    capacity_scheduler_policy: str = "guaranteed_no_evict"
    gpus: tuple[int, ...] | None = None
    num_threads: int | None = None
    verify: bool = False
    weight_pages: str = "auto"
    tensor_parallel_size: int | None = None
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        reasons = [
            f"{name} must be a positive integer, or None, got {value!r}"
            for name in _COUNTS
            if not _is_count(value := getattr(self, name))
        ]
        reasons += [
            f"{name} must be True or False, got {value!r}"
            for name in ("enable_prefix_caching", "verify")
            if not isinstance(value := getattr(self, name), bool)
        ]
        if self.capacity_scheduler_policy not in POLICIES:
            wanted = " or ".join(map(repr, POLICIES))
            reasons.append(f"capacity_scheduler_policy must be {wanted}, got {self.capacity_scheduler_policy!r}")
        if self.weight_pages not in WEIGHT_PAGES:
            reasons.append(f"weight_pages must be {' or '.join(map(repr, WEIGHT_PAGES))}, got {self.weight_pages!r}")
        if isinstance(self.kv_cache_memory_bytes, str):
            object.__setattr__(self, "kv_cache_memory_bytes", parse_bytes(self.kv_cache_memory_bytes))
        if not _is_count(self.kv_cache_memory_bytes):
            reasons.append(f"kv_cache_memory_bytes must be a positive size, got {self.kv_cache_memory_bytes!r}")
        if not _is_share(self.gpu_memory_utilization):
            reasons.append(
                f"gpu_memory_utilization must be a number above 0 and at most 1, or None, got "
                f"{self.gpu_memory_utilization!r}"
            )
        if isinstance(self.gpus, (list, tuple)):
            object.__setattr__(self, "gpus", tuple(self.gpus))
        if not _are_gpus(self.gpus):
            reasons.append(f"gpus must be numbers of GPUs, counted from 0, got {self.gpus!r}")
        if self.kv_cache_dtype is not None and not isinstance(self.kv_cache_dtype, str):
            reasons.append(f"kv_cache_dtype must be text, got {self.kv_cache_dtype!r}")
        if reasons:
            raise faults(EngineryError, "The engine cannot be loaded so", reasons)

    @property
    def kv_cache_bytes(self) -> int | None:
        """kv_cache_memory_bytes as a number."""
        assert not isinstance(self.kv_cache_memory_bytes, str)
        return self.kv_cache_memory_bytes

    def sequences(self, target: Target) -> int:
        """max_num_seqs on `target`."""
        return self.max_num_seqs or (CUDA_MAX_NUM_SEQS if target.is_cuda else MAX_NUM_SEQS)

    def batched_tokens(self, target: Target) -> int:
        """max_num_batched_tokens on `target`."""
        return self.max_num_batched_tokens or (
            CUDA_MAX_NUM_BATCHED_TOKENS if target.is_cuda else MAX_NUM_BATCHED_TOKENS
        )

    def mixed_prompt_tokens(self, target: Target) -> int:
        """Prompt tokens of a step in which others decode; 0 = all that fit, as where the size of a step is given."""
        return 0 if target.is_cuda or self.max_num_batched_tokens else MIXED_PROMPT_TOKENS

    @property
    def gpu_share(self) -> float:
        """gpu_memory_utilization as a number."""
        return self.gpu_memory_utilization or GPU_MEMORY_UTILIZATION

    @staticmethod
    def of(knobs: dict[str, Any]) -> EngineConfig:
        """The configuration with these knobs. Raises EngineryError naming those that do not exist."""
        known = [field.name for field in fields(EngineConfig)]
        reasons = [_unknown(name, known) for name in knobs if name not in known]
        if reasons:
            raise faults(EngineryError, "The engine cannot be loaded so", reasons)
        return EngineConfig(**knobs)


_COUNTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_threads", "tensor_parallel_size")


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62)


def _is_share(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1)


def _are_gpus(value: object) -> bool:
    if not isinstance(value, tuple):
        return value is None
    are_numbers = all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1 << 16 for each in value)
    return len(value) > 0 and are_numbers


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"there is no knob {name!r}; did you mean {nearest[0]!r}?"
    return f"there is no knob {name!r}; known are {', '.join(known)}"
