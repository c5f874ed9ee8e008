"""What a build decides beyond the model: the knobs that passes and lowering read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engines.precisions import Precision
from ...engines.targets import Target

if TYPE_CHECKING:
    from ..calibration.file import Calibration


@dataclass(frozen=True)
class LayerPrecision:
    """pattern: of modules' names; weight: how theirs are held, as plans spell it ("int8", "int4g32")."""

    pattern: str
    weight: str


@dataclass(frozen=True)
class Options:
    """rank, world_size: of tensor parallelism; kv_dtype: as plans spell it ("f32", "bf16", "fp8", "i8").

    batch_invariant: on a GPU a token's result must not depend on what else is in its step; on a CPU it never does
    calibration: what is known of activations, if anything
    layers: what some products have instead of the precision's; of those that match the last counts
    """

    target: Target
    precision: Precision
    kv_dtype: str
    rank: int = 0
    world_size: int = 1
    batch_invariant: bool = False
    calibration: Calibration | None = None
    layers: tuple[LayerPrecision, ...] = ()
