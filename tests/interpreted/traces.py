"""What the programs of one launch touch, seen while Triton's interpreter runs them.

Every pointer argument gets a number, in the bits of its address that no process uses: however a kernel computes with
it, each load, store and atomic tells whose memory it means, and must stay within it. Of programmatic dependent launch
it is seen where a program waits for the launch before: until then it may store nothing, and it must wait somewhere,
since what follows takes the launches before its predecessor for done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .races import Races, Touched

_ADDRESS_BITS = 48
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8e4nv": 1, "i8": 1, "u8": 1, "i32": 4, "i64": 8}
_ADDRESS = np.uint64((1 << _ADDRESS_BITS) - 1)


class Place(Protocol):
    """Somewhere in an array; dtype as Triton spells it."""

    array: NDArray[Any]
    dtype: str

    def data_ptr(self) -> int:
        """The address."""
        ...


@dataclass(frozen=True)
class Declared:
    """What a plan says of a pointer.

    extent  bytes from it on that may be touched, or None: those of the array
    access  r, w or rw
    peers   it is a table of addresses, of which this is said
    """

    extent: int | None = None
    access: str = "rw"
    peers: bool = False


class Argument:
    """A pointer of a launch. first, end: the bytes that it may touch, relative to it; width: bytes of an element."""

    def __init__(self, name: str, number: int, place: Place, declared: Declared) -> None:
        self.name, self.dtype, self.width, self.declared = name, place.dtype, _BYTES[place.dtype], declared
        address, array = place.data_ptr(), place.array
        self.first, self.end = array.ctypes.data - address, array.ctypes.data - address + array.nbytes
        if declared.extent is not None and not declared.peers:
            is_there = self.first <= 0 <= declared.extent <= self.end
            assert is_there, f"{name}: {declared.extent} bytes are declared, {self.end} are there"
            self.first, self.end = 0, declared.extent
        self._tagged = np.uint64(address | number << _ADDRESS_BITS)
        self.peers = place.array.view(np.uint64) if declared.peers else np.empty(0, np.uint64)
        self.touched = Touched(np.zeros((self.end - self.first) // self.width, np.int32))

        # What is only read has no races; its reads are kept where more than their extent is to be known.
        self.is_followed = declared.access != "r" or declared.extent is None

    def data_ptr(self) -> int:
        """The address, with the argument's number."""
        return int(self._tagged)

    def elements(self, addresses: NDArray[np.uint64], width: int) -> NDArray[np.int64]:
        """Numbers of the elements at these addresses, counted from `first`. Raises AssertionError outside."""
        offsets = (addresses - self._tagged).view(np.int64)
        low, high = int(offsets.min()), int(offsets.max()) + width
        is_inside = self.first <= low and high <= self.end
        assert is_inside, f"bytes {low} to {high} of it, of which {self.first} to {self.end} are its own"
        return (offsets - self.first) // self.width

    def written(self) -> NDArray[Any]:
        """bool [bytes from `first` to `end`]: which are stored."""
        return np.repeat(self.touched.writers != 0, self.width)


class Trace:
    """The accesses of a launch, checked as they come. early: the arguments that programs read before they wait."""

    def __init__(
        self, kernel: str, waits: bool, pointers: Mapping[str, Place], declared: Mapping[str, Declared]
    ) -> None:
        """waits: its programs may start before the launch before has ended."""
        self.kernel, self.early = kernel, set[str]()
        self.arguments = {
            name: Argument(name, number, place, declared.get(name, Declared()))
            for number, (name, place) in enumerate(pointers.items(), 1)
        }
        self._numbered = list(self.arguments.values())
        self._waits, self._waiting, self._program = waits, False, ""
        self._races = Races()

    def begin_program(self, *place: int) -> None:
        """What follows is done by this program of the grid."""
        self.end()
        self._waiting, self._program = self._waits, f", program {place}"
        self._races.begin_program()

    def end(self) -> None:
        """After the last program, too."""
        assert not self._waiting, f"{self.kernel}{self._program} never waits for the launch before it"

    def wait(self) -> None:
        """The launch before has ended, and so have all before that."""
        self._waiting = False

    def barrier(self) -> None:
        """All threads of the program are here."""
        self._races.barrier()

    def prefetch(self, lines: NDArray[Any], width: int) -> None:
        """Lines of `width` bytes are brought into the cache."""
        self._touch("prefetches", lines.ravel().view(np.uint64), np.True_, width)

    def access(self, kind: str, addresses: NDArray[np.uint64], mask: NDArray[Any], ordered: bool = False) -> Any:
        """A load, store or atomic ("loads", "stores", "counts") where mask is true; the addresses without numbers."""
        self._touch(kind, addresses, mask, 0, ordered)
        return addresses & _ADDRESS

    def _touch(self, kind: str, addresses: NDArray[Any], mask: Any, width: int, ordered: bool = False) -> None:
        live = addresses[np.broadcast_to(mask, addresses.shape).astype(bool, copy=False)]
        if live.size == 0:
            return
        number = int(live[0]) >> _ADDRESS_BITS
        if number == 0:
            return self._touch_peers(kind, live)
        argument = self._numbered[number - 1]
        place = f"{self.kernel}{self._program} {kind} {argument.name}"
        try:
            elements = argument.elements(live, width or argument.width)
            is_read_only = argument.declared.peers or argument.declared.access == "r"
            assert not is_read_only or kind in ("loads", "prefetches"), "which is declared to be read only"
            if self._waiting:
                assert kind in ("loads", "prefetches"), "before it waits for the launch before it"
                self.early.add(argument.name)
            if kind == "loads" and argument.is_followed:
                self._races.load(argument.touched, elements)
            elif kind == "stores":
                self._races.store(argument.touched, elements)
            elif kind == "counts":
                self._races.count(argument.touched, elements, ordered)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from None

    def _touch_peers(self, kind: str, addresses: NDArray[np.uint64]) -> None:
        """Other ranks' memory, by addresses from a table."""
        place = f"{self.kernel}{self._program} {kind} what a table points to"
        assert not self._waiting, f"{place}: before it waits for the launch before it"
        for argument in self._numbered:
            extent = np.uint64(argument.declared.extent or 0)
            if any((addresses - peer < extent).all() for peer in argument.peers):
                is_read_only = kind == "loads" and argument.declared.access == "r"
                assert is_read_only, f"{place}: it is {argument.name}, declared {argument.declared.access!r}"
                return
        raise AssertionError(f"{place}: {hex(int(addresses[0]))}, which is not declared")
