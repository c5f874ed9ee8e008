"""gather_rows' kernel for a GPU."""

from __future__ import annotations

from ...engines.layouts import GPU_PADDING, round_up
from ..launches import Kernel, Launch

_BLOCK = 1024


def launches(*, columns: int, architecture: int) -> tuple[Launch, ...]:
    """columns: of a row, without padding; architecture: 80, 90 …"""
    stride = round_up(columns, GPU_PADDING)
    kernel = Kernel(
        plugin="gather_rows",
        function="gather_rows",
        role="copy",
        parameters=(("rows", "*i32"), ("x", "*bf16"), ("out", "*bf16")),
        constants=(("STRIDE", stride), ("BLOCK", _BLOCK), ("PDL", architecture >= 90)),
        num_warps=4,
        pdl=architecture >= 90,
    )
    return (Launch(kernel, ("rows", -(-stride // _BLOCK), 1)),)
