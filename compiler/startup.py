"""Importing onnx-ir at the price of what a build uses of it."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until one of its attributes is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


def import_onnx_ir() -> None:
    """Imports onnx_ir without sympy: half of a build's imports, needed only to compute with symbolic dimensions.

    The stand-ins are seen by onnx_ir alone; sympy is imported when onnx_ir first computes with it.
    """
    if "onnx_ir" in sys.modules:
        return
    deferred = [name for name in ("sympy", "onnx_ir._symbolic_shapes") if name not in sys.modules]
    sys.modules.update((name, _Deferred(name)) for name in deferred)
    try:
        importlib.import_module("onnx_ir")
    finally:
        for name in deferred:
            del sys.modules[name]
