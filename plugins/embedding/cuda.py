"""embedding's kernel for a GPU."""

from __future__ import annotations

from ...engines.layouts import GPU_PADDING, round_up
from ..launches import Constant, Kernel, Launch

_BLOCK = 1024
_TABLE_TYPES = {"bf16": "*bf16", "fp8": "*fp8e4nv", "i8": "*i8"}


def launches(
    *, hidden: int, vocab: int, vocab_start: int, scale: float, table: str, architecture: int
) -> tuple[Launch, ...]:
    """table: bf16, fp8 or i8; vocab: rows of the table that are tokens; architecture: 80, 90 …"""
    stride = round_up(hidden, GPU_PADDING)
    pointers = {"token_ids": "*i32", "drawn": "*i32", "table": _TABLE_TYPES[table]}
    constants: dict[str, Constant] = {
        "VOCAB": vocab,
        "VOCAB_START": vocab_start,
        "STRIDE": stride,
        "SCALE": scale,
        "BLOCK": _BLOCK,
    }
    if table == "bf16":
        constants["table_scale"] = None
    else:
        pointers["table_scale"] = "*fp32"
    constants["PDL"] = architecture >= 90
    kernel = Kernel(
        plugin="embedding",
        function="embedding",
        role="embedding",
        parameters=(*pointers.items(), ("out", "*bf16")),
        constants=tuple(constants.items()),
        num_warps=4,
        pdl=architecture >= 90,
    )
    return (Launch(kernel, ("tokens", -(-stride // _BLOCK), 1)),)
