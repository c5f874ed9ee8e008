"""What a build decides beyond the model: the knobs that passes and lowering read."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.precisions import Precision
from ...engines.targets import Target


@dataclass(frozen=True)
class Options:
    """rank, world_size: of tensor parallelism; kv_dtype: as plans spell it ("f32", "bf16", "i8")."""

    target: Target
    precision: Precision
    kv_dtype: str
    rank: int = 0
    world_size: int = 1
