"""A large file written from front to back, and hashed on the way, in threads of its own."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from ..engines.manifest import CHUNK_BYTES, RunningHash

# The kernel takes pages for a large write many at once: eight megabytes cost a fifth of what they do in pieces of one.
_SLAB_BYTES = 8 << 20
_SLABS = 3


class FileWriter:
    """Gathers what is appended in slabs; while one fills, those before it are written and hashed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._whole, self._chunks = RunningHash(), RunningHash(CHUNK_BYTES)
        self._lanes = [
            (ThreadPoolExecutor(1, f"enginery-{name}"), consume)
            for name, consume in (
                ("write", self._write_at),
                ("hash", self._whole.update),
                ("hash-chunks", self._chunks.update),
            )
        ]
        self._slabs = deque(np.zeros(_SLAB_BYTES, np.uint8) for _ in range(_SLABS))
        self._begin, self._filled = 0, 0  # of the slab at hand: where it goes, and how much of it is there
        self._pending: deque[list[Future[None]]] = deque()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor, _consume in self._lanes:
            executor.shutdown(cancel_futures=True)

    def append(self, data: memoryview, offset: int) -> None:
        """`data` goes to `offset`, which does not lie before the end of what came last; zeros fill a gap.

        Raises what writing raised.
        """
        gap = offset - self._begin - self._filled
        assert gap >= 0
        while gap > 0:
            room = min(gap, _SLAB_BYTES - self._filled)
            self._slabs[0][self._filled : self._filled + room] = 0
            self._advance(room)
            gap -= room
        view = data.cast("B") if data.nbytes else memoryview(b"")
        while view:
            room = min(len(view), _SLAB_BYTES - self._filled)
            self._slabs[0][self._filled : self._filled + room] = view[:room]
            self._advance(room)
            view = view[room:]

    def finish(self, size: int) -> tuple[str, tuple[str, ...]]:
        """Fills the file up to `size` with zeros. Returns the sha256 of the whole, and of each chunk."""
        self.append(memoryview(b""), size)
        self._submit()
        while self._pending:
            self._wait()
        return self._whole.digests()[0], self._chunks.digests()

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == _SLAB_BYTES:
            self._submit()

    def _submit(self) -> None:
        data = self._slabs[0].data[: self._filled]
        self._pending.append([executor.submit(consume, data, self._begin) for executor, consume in self._lanes])
        self._begin, self._filled = self._begin + self._filled, 0
        self._slabs.rotate(-1)
        if len(self._pending) == _SLABS:  # the slab that comes next may still be on its way
            self._wait()

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
