"""rotary_table's kernel for a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..launches import Constant, Kernel, Launch

_ELEMENTS = 256  # that a program computes


@dataclass(frozen=True)
class RotaryTable:
    """How angles grow with positions. kind: static, longrope or dynamic; the last three are of these alone."""

    rot_dim: int
    kind: str = "static"
    attention_factor: float = 1.0
    threshold: int = 0
    base: float = 0.0
    factor: float = 1.0


def launches(table: RotaryTable, *, architecture: int) -> tuple[Launch, ...]:
    """architecture: 80, 90 …"""
    half = table.rot_dim // 2
    block = 1 << (half - 1).bit_length()
    tokens = max(1, _ELEMENTS // block)
    dynamic = table.kind == "dynamic"
    constants: dict[str, Constant] = {
        "HALF": half,
        "KIND": table.kind,
        "ATTENTION_FACTOR": table.attention_factor,
        "THRESHOLD": table.threshold if table.kind != "static" else 0,
        "LOG2_BASE": math.log2(table.base) if dynamic else 0.0,
        "FACTOR": table.factor if dynamic else 1.0,
        "TOKENS": tokens,
        "BLOCK": block,
        "PDL": architecture >= 90,
    }
    types = {"positions": "*i32", "prompt_lengths": "*i32", "inv_freq": "*fp32", "inv_freq_long": "*fp32"}
    types |= {"cos": "*fp32", "sin": "*fp32", "count": "i32"}
    if table.kind == "static":
        constants["prompt_lengths"] = None
    if table.kind != "longrope":
        constants["inv_freq_long"] = None
    kernel = Kernel(
        plugin="rotary_table",
        function="rotary_table",
        role="rotary",
        parameters=tuple((name, kind) for name, kind in types.items() if name not in constants),
        constants=tuple(constants.items()),
        num_warps=4,
        pdl=architecture >= 90,
    )
    return (Launch(kernel, (["ceil_div", "tokens", tokens], 1, 1)),)
