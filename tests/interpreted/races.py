"""Finds races inside of a launch: the interpreter runs one program after the other, a GPU all of them at once.

A program's accesses lie in segments, cut by its barriers and atomics. What is before a barrier is released by the
acquire-release atomics that follow, and is before whatever a program does after an atomic of its own at the same place
(the order "happens before", as race detectors with vector clocks keep it). Two programs may touch one element in
another way than by reading only if they are so ordered, or both by atomics. What a program itself has stored it may
read after a barrier, as another of its threads may have stored it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Elements = NDArray[np.int64]


@dataclass
class Touched:
    """Which elements of an argument a launch touches.

    writers   of each element the segment that stored it last, or 0
    brought   elements that are read before this launch has stored them
    """

    writers: NDArray[np.int32]
    brought: list[Elements] = field(default_factory=list)
    is_stored: bool = False
    reads: list[tuple[int, int, int, Elements]] = field(default_factory=list)
    counts: list[tuple[int, int, int, Elements]] = field(default_factory=list)


class Races:
    """The order of the accesses of one launch. Methods raise AssertionError where there is none."""

    def __init__(self) -> None:
        self._segment = 0
        self._own: set[int] = set()
        self._sealed: set[int] = set()
        self._known: set[int] = set()
        self._released: dict[tuple[int, int], set[int]] = {}

    def begin_program(self) -> None:
        """What follows is another program's."""
        self._own, self._sealed, self._known = set(), set(), set()
        self._next_segment()

    def barrier(self) -> None:
        """All threads of the program have come here."""
        self._sealed = set(self._own)
        self._next_segment()

    def load(self, touched: Touched, elements: Elements) -> None:
        """A program reads these elements."""
        touched.reads.append(self._access(elements))
        self._check(touched.counts, elements, "reads", "count")
        if not touched.is_stored:
            touched.brought.append(elements)
            return
        found = self._check_writers(touched, elements, "reads")
        if 0 in found:
            touched.brought.append(elements[touched.writers[elements] == 0])
        unsealed = found & self._own - self._sealed
        assert not unsealed, "a program reads what it has stored, with no barrier between"

    def store(self, touched: Touched, elements: Elements) -> None:
        """A program stores these elements."""
        if touched.is_stored:
            self._check_writers(touched, elements, "stores")
        self._check(touched.counts, elements, "stores", "count")
        self._check(touched.reads, elements, "stores", "read")
        touched.writers[elements] = self._segment
        touched.is_stored = True

    def count(self, touched: Touched, elements: Elements, ordered: bool) -> None:
        """An atomic operation; ordered: acquire-release."""
        self._check_writers(touched, elements, "counts")
        self._check(touched.reads, elements, "counts", "read")
        # In a segment of its own: what precedes it without a barrier is not released.
        self._next_segment()
        touched.counts.append(self._access(elements))
        if ordered:
            places = [(id(touched), element) for element in elements.tolist()]
            for place in places:
                self._known |= self._released.get(place, set())
            for place in places:
                self._released.setdefault(place, set()).update(self._known, self._sealed, {self._segment})
        self._next_segment()

    def _next_segment(self) -> None:
        self._segment += 1
        self._own.add(self._segment)

    def _access(self, elements: Elements) -> tuple[int, int, int, Elements]:
        return self._segment, int(elements.min()), int(elements.max()), elements

    def _check_writers(self, touched: Touched, elements: Elements, does: str) -> set[int]:
        writers = touched.writers[elements]
        found = {int(writers[0])} if (writers == writers[0]).all() else set(np.unique(writers).tolist())
        others = found - self._own - self._known - {0}
        assert not others, f"a race: a program {does} what another may be about to store"
        return found

    def _check(self, accesses: list[tuple[int, int, int, Elements]], elements: Elements, does: str, other: str) -> None:
        low, high = int(elements.min()), int(elements.max())
        for segment, first, last, found in accesses:
            if last < low or high < first or segment in self._own or segment in self._known:
                continue
            assert not np.isin(found, elements).any(), f"a race: a program {does} what another may be about to {other}"
