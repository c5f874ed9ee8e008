"""Whether the machine is quiet: what the processors do beside us, from /proc/stat."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Clock:
    """A moment: seconds, processor seconds that anybody used (stolen ones too), and those of our ended children."""

    now: float
    busy: float
    ours: float

    @classmethod
    def read(cls) -> Clock:
        """Now. Children count when they have been waited for."""
        times = os.times()
        ours = times.user + times.system + times.children_user + times.children_system
        return cls(time.monotonic(), busy_seconds(Path("/proc/stat").read_text()), ours)

    def others_since(self, earlier: Clock) -> float:
        """Share of all processors that others used."""
        passed = (self.now - earlier.now) * (os.cpu_count() or 1)
        return max((self.busy - earlier.busy) - (self.ours - earlier.ours), 0.0) / max(passed, 1e-9)


def busy_seconds(stat: str) -> float:
    """user, nice, system, irq, softirq and steal of the first line of /proc/stat."""
    fields = [int(field) for field in stat.splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / _TICKS


def wait_until_quiet(share: float, patience: float) -> float:
    """Waits until others use at most `share` of the processors for a second; the last share that was seen."""
    deadline = time.monotonic() + patience
    while True:
        earlier = Clock.read()
        time.sleep(1)
        seen = Clock.read().others_since(earlier)
        if seen <= share or time.monotonic() >= deadline:
            return seen
