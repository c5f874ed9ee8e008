"""What lies around the memory of an engine: pages that nobody may touch."""

from __future__ import annotations

import mmap
from pathlib import Path

from enginery import Engine


def regions() -> list[tuple[int, int, str]]:
    """(begin, end, permissions) of this process's memory, in order."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        begin, end = (int(bound, 16) for bound in span.split("-"))
        found.append((begin, end, permissions))
    return found


def guarded(size: int) -> list[bool]:
    """Of each region of `size` bytes that can be written: whether what touches it on both sides cannot be."""
    found = regions()
    return [
        before[1] == begin and end == behind[0] and before[2] == behind[2] == "---p"
        for before, (begin, end, permissions), behind in zip(found, found[1:], found[2:], strict=False)
        if end - begin == size and permissions == "rw-p"
    ]


def test_state_and_scratch_lie_between_pages_that_fault(built_engine: Path) -> None:
    scratch = 3 << 20  # 1 MiB for each thread and one for all
    before = sum(guarded(scratch))
    with Engine.load(built_engine, num_threads=2, kv_cache_memory_bytes="5MB") as engine:
        state = -(-engine.stats()["memory"]["state"] // mmap.PAGESIZE) * mmap.PAGESIZE
        assert state != scratch
        assert any(guarded(state))
        assert sum(guarded(scratch)) > before
