"""all_reduce's kernels for a GPU: one for few rows, where waiting is all, and one that keeps a bus busy.

Every rank reads all of every other's part; libraries send each rank a share of the sum, which takes longer to begin and
moves less. So they may do large sums in place of the kernel, which then adds no residual: they could not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.layouts import GPU_PADDING, round_up
from ...engines.plan import Collective, Range
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
# That a rank reads of the others: beyond, a library may be faster. Not measured: no machine with two GPUs was at hand.
_LIBRARY_BYTES = 4 << 20
_BY_LIBRARY = Collective("all_reduce", part="parts", sum="out", dtype="bf16")


@dataclass(frozen=True)
class AllReduce:
    """Sums [rows, columns] over ranks, bf16 from f32 sums.

    residual   added to it
    domain     tokens or rows
    invariant  rows are summed in one order, whatever their number: never by a library
    """

    columns: int
    meeting: Meeting
    residual: bool = False
    domain: str = "tokens"
    invariant: bool = False

    @property
    def stride(self) -> int:
        """Elements of a row."""
        return round_up(self.columns, GPU_PADDING)

    @property
    def most(self) -> int:
        """Rows that the kernels alone sum."""
        read = (self.meeting.world_size - 1) * self.stride * 2
        return LARGEST if self.invariant else max(1, _LIBRARY_BYTES // max(1, read))


def launches(reduce: AllReduce, *, architecture: int) -> tuple[Launch, ...]:
    """Of up to `most` rows. architecture: 80, 90 …"""
    # Twice round for the programs of the small kernel: above, what they wait for once is no longer most of the time.
    few = min(max(1, 2 * MOST_PROGRAMS * _FEW.block // reduce.stride), reduce.most)
    return (
        _launch(reduce, _FEW, Range(reduce.domain, 1, few), architecture),
        _launch(reduce, _MANY, Range(reduce.domain, few + 1, reduce.most), architecture),
    )


def large_launches(reduce: AllReduce, *, architecture: int) -> tuple[Launch, ...]:
    """Of more rows: the sum alone, without the residual. architecture: 80, 90 …"""
    if reduce.most == LARGEST:
        return ()
    launch = _launch(
        replace(reduce, residual=False), _MANY, Range(reduce.domain, reduce.most + 1, LARGEST), architecture
    )
    return (replace(launch, collective=_BY_LIBRARY),)


def _launch(reduce: AllReduce, size: _Size, guard: Range, architecture: int) -> Launch:
    types = {"parts": "*i64", "residual": "*bf16", "out": "*bf16", **PARAMETERS}
    constants: dict[str, Constant] = {"STRIDE": reduce.stride, "BLOCK": size.block, "PDL": architecture >= 90}
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
    blocks: Expression = ["ceil_div", ["*", reduce.domain, reduce.stride], size.block]
    return Launch(kernel, (["min", blocks, MOST_PROGRAMS], 1, 1), (guard,), values=reduce.meeting.values)
