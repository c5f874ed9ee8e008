"""From an engine's files to what the core executes, for whatever target the engine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.targets import Target
from .config import EngineConfig
from .files import EngineFiles
from .loader import CoreSettings, Rank, prepare_cpu_core

if TYPE_CHECKING:
    from .gpus import Gpu


def prepare_core(
    files: EngineFiles, ranks: list[Rank], target: Target, config: EngineConfig, gpus: list[Gpu] | None = None
) -> CoreSettings:
    """Decides sizes and checks every operand against them. Raises EngineryError.

    gpus: of a CUDA target, where each rank will run; None: on the null device, which checks and computes nothing
    """
    if not target.is_cuda:
        return prepare_cpu_core(files, ranks, target, config)
    from .cuda_loader import prepare_cuda_core
    from .gpus import null_gpus

    return prepare_cuda_core(files, ranks, target, config, gpus or null_gpus(target, len(ranks)))
