"""all_reduce's kernels for a GPU: one for few rows, where waiting is all, and one that keeps a bus busy."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.layouts import GPU_PADDING, round_up
from ...engines.plan import Range
from ..launches import Constant, Kernel, Launch
from .meeting import MOST_PROGRAMS, PARAMETERS, Meeting


@dataclass(frozen=True)
class _Size:
    """Elements that a program adds at a time. A thread's share of them is 16 bytes of each rank, or some of those."""

    block: int
    warps: int


_FEW = _Size(block=1024, warps=4)
# What is under way, 64 bytes of each thread and rank, is then enough for the fastest bus.
_MANY = _Size(block=8192, warps=8)


@dataclass(frozen=True)
class AllReduce:
    """Sums [rows, columns] over ranks, bf16 from f32 sums. residual: added to it; domain: tokens or rows."""

    columns: int
    meeting: Meeting
    residual: bool = False
    domain: str = "tokens"


def launches(reduce: AllReduce, *, architecture: int) -> tuple[Launch, ...]:
    """architecture: 80, 90 …"""
    stride = round_up(reduce.columns, GPU_PADDING)
    # Twice round for the programs of the small kernel: above, what they wait for once is no longer most of the time.
    few = max(1, 2 * MOST_PROGRAMS * _FEW.block // stride)
    return (
        _launch(reduce, stride, _FEW, Range(reduce.domain, 1, few), architecture),
        _launch(reduce, stride, _MANY, Range(reduce.domain, few + 1, LARGEST), architecture),
    )


def _launch(reduce: AllReduce, stride: int, size: _Size, guard: Range, architecture: int) -> Launch:
    types = {"parts": "*i64", "residual": "*bf16", "out": "*bf16", **PARAMETERS}
    constants: dict[str, Constant] = {"STRIDE": stride, "BLOCK": size.block, "PDL": architecture >= 90}
    if not reduce.residual:
        del types["residual"]
        constants["residual"] = None
    kernel = Kernel(
        plugin="all_reduce",
        function="all_reduce",
        role="collective",
        parameters=tuple(types.items()),
        constants=tuple((constants | reduce.meeting.constants).items()),
        num_warps=size.warps,
        pdl=architecture >= 90,
    )
    blocks: Expression = ["ceil_div", ["*", reduce.domain, stride], size.block]
    return Launch(kernel, (["min", blocks, MOST_PROGRAMS], 1, 1), (guard,), values=reduce.meeting.values)
