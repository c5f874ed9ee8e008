"""enginery: compiles Hugging Face checkpoints ahead of time into engines, and serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engines.errors import EngineryError as EngineryError
    from .runtime.engine import Engine as Engine
    from .runtime.requests import RequestOutput as RequestOutput
    from .runtime.requests import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "Engine": ".runtime.engine",
    "RequestOutput": ".runtime.requests",
    "SamplingParams": ".runtime.requests",
    "EngineryError": ".engines.errors",
}


__all__ = ["Engine", "EngineryError", "RequestOutput", "SamplingParams", "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'enginery' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
