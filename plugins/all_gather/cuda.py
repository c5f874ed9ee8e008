"""all_gather's kernel for a GPU: every rank copies the columns of all ranks side by side."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.expressions import Expression
from ...engines.layouts import GPU_PADDING, round_up
from ..all_reduce.meeting import MOST_PROGRAMS, PARAMETERS, Meeting
from ..launches import Constant, Kernel, Launch

_BLOCK = 2048
_WARPS = 8


@dataclass(frozen=True)
class AllGather:
    """Gathers f32 [rows, starts[r + 1] - starts[r]] of each rank r. starts: of each rank's columns, and their end."""

    starts: tuple[int, ...]
    meeting: Meeting
    domain: str = "rows"


def launches(gather: AllGather, *, architecture: int) -> tuple[Launch, ...]:
    """architecture: 80, 90 …"""
    stride = round_up(gather.starts[-1], GPU_PADDING)
    constants: dict[str, Constant] = {
        "STARTS": gather.starts,
        "STRIDE": stride,
        "PADDING": GPU_PADDING,
        "BLOCK": _BLOCK,
        "PDL": architecture >= 90,
    }
    kernel = Kernel(
        plugin="all_gather",
        function="all_gather",
        role="collective",
        parameters=(("parts", "*i64"), ("out", "*fp32"), *PARAMETERS.items()),
        constants=tuple((constants | gather.meeting.constants).items()),
        num_warps=_WARPS,
        pdl=architecture >= 90,
    )
    blocks: Expression = ["*", gather.domain, -(-stride // _BLOCK)]
    return (Launch(kernel, (["min", blocks, MOST_PROGRAMS], 1, 1), values=gather.meeting.values),)
