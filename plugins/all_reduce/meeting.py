"""What launches of collectives have in common: the meetings of ranks (triton_meeting.py), in Python."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.errors import CompileError
from ..launches import Constant

# Two ranks may share a GPU: while programs of the one wait, those of the other must find room.
MOST_PROGRAMS = 32
MOST_RANKS = 8
PARAMETERS = {"flags": "*i32", "signals": "*i64", "count": "i32", "rank": "i32", "half": "i32"}


@dataclass(frozen=True)
class Meeting:
    """How the ranks of one collective meet.

    rank, world_size  of tensor parallelism
    half              of the flags: 0 or 1, other than that of the meeting before
    twice             nobody returns before all have read; the second meeting has the other half
    """

    rank: int
    world_size: int
    half: int
    twice: bool = False

    def __post_init__(self) -> None:
        if self.world_size > MOST_RANKS:
            raise CompileError(
                f"--tensor-parallel-size {self.world_size}: GPUs that read each other's memory are those of one "
                f"machine, at most {MOST_RANKS}. Give {MOST_RANKS} or less."
            )

    @property
    def constants(self) -> dict[str, Constant]:
        """Of the kernel: the same for all ranks."""
        return {
            "PROGRAMS": MOST_PROGRAMS,
            "WORLD": self.world_size,
            "MEETINGS": 2 if self.twice else 1,
            "WAIT": True,
        }

    @property
    def values(self) -> dict[str, int | float]:
        """Of the launch."""
        return {"rank": self.rank, "half": self.half}


def flags_bytes(world_size: int) -> int:
    """Bytes of the flags of one rank, which are zero before the first launch and after every step."""
    return 2 * MOST_PROGRAMS * world_size * 4
