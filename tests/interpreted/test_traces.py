"""What is seen of a launch: kernels that do one thing wrong each, and what is said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait
from triton.runtime.errors import InterpreterError

from .interpreter import Pointer, run_function
from .traces import Declared, Trace

# A count of programs, each of which takes four elements.
SIZE = tl.constexpr(4)


@triton.jit
def _copy(x, out, count, BEFORE: tl.constexpr, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program copies its elements. BEFORE: what it does before it waits."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    if BEFORE == "load":
        tl.load(x + at, mask=at < count)
    if BEFORE == "store":
        tl.store(out + at, 0.0, mask=at < count)
    if tl.program_id(0) < WAITS:
        gdc_wait()
    tl.store(out + at, tl.load(x + at, mask=at < count), mask=at < count)


@triton.jit
def _neighbours(out, BY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program stores, then takes in what the program BY before it has stored."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, 1.0)
    other = tl.maximum(tl.program_id(0) - BY, 0) * SIZE + tl.arange(0, SIZE)
    tl.debug_barrier()
    found = tl.load(out + other)
    tl.debug_barrier()
    tl.store(out + at, found)


@triton.jit
def _last_adds(parts, out, counter, SEM: tl.constexpr, BARRIER: tl.constexpr, RESETS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program leaves its elements; the last one adds them up."""
    i = tl.arange(0, SIZE)
    tl.store(parts + tl.program_id(0) * SIZE + i, 1.0)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        total = tl.zeros((SIZE,), tl.float32)
        for program in range(tl.num_programs(0)):
            total += tl.load(parts + program * SIZE + i)
        tl.store(out + i, total)
    if RESETS:
        tl.store(counter, 0)


@triton.jit
def _through_memory(out, BARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turns its elements around by storing and loading them."""
    i = tl.arange(0, SIZE)
    tl.store(out + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    turned = tl.load(out + SIZE - 1 - i)
    tl.debug_barrier()
    tl.store(out + i, turned)


def trace(
    function: Any, programs: int, waits: bool = False, declared: dict[str, Declared] | None = None, **given: Any
) -> Trace:
    pointers = {name: Pointer(item) for name, item in given.items() if isinstance(item, np.ndarray)}
    return run_function(function, (programs,), given, Trace("it", waits, pointers, declared or {}))


def copy(
    programs: int = 2, before: str = "", waits: int = 9, declared: dict[str, Declared] | None = None, count: int = 7
) -> Trace:
    x, out = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    found = trace(_copy, programs, True, declared, x=x, out=out, count=count, BEFORE=before, WAITS=waits)
    np.testing.assert_array_equal(out[:count], x[:count])
    return found


def test_masked_lanes_touch_nothing() -> None:
    found = copy(declared={"x": Declared(28, "r"), "out": Declared(28, "w")})
    assert found.arguments["out"].written().tolist() == [True] * 28
    assert found.arguments["out"].touched.brought == []
    assert sorted(np.concatenate(found.arguments["x"].touched.brought or [np.arange(7)])) == list(range(7))
    assert found.early == set()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"out": Declared(24, "w")}, r"program \(1, 0, 0\) stores out: bytes 16 to 28 of it, of which 0 to 24"),
        ({"x": Declared(8, "r")}, r"program \(0, 0, 0\) loads x: bytes 0 to 16 of it"),
        ({"out": Declared(28, "r")}, "stores out: which is declared to be read only"),
        ({"out": Declared(64, "w")}, "out: 64 bytes are declared, 32 are there"),
    ],
)
def test_declarations_bound_what_is_touched(declared: dict[str, Declared], message: str) -> None:
    with pytest.raises((InterpreterError, AssertionError), match=message):
        copy(declared=declared)


def test_arrays_bound_what_is_touched_where_nothing_is_declared() -> None:
    with pytest.raises(InterpreterError, match="loads x: bytes 32 to 48 of it, of which 0 to 32"):
        copy(programs=3, count=12)


def test_what_is_read_before_the_wait_is_told() -> None:
    assert copy(before="load").early == {"x"}


@pytest.mark.parametrize(
    ("before", "waits", "message"),
    [
        ("store", 9, "stores out: before it waits"),
        ("", 0, r"program \(0, 0, 0\) .*before it waits"),
        ("", 1, r"program \(1, 0, 0\) .*before it waits"),
    ],
)
def test_nothing_is_stored_before_the_wait(before: str, waits: int, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        copy(before=before, waits=waits)


def test_programs_that_have_nothing_to_do_wait_too() -> None:
    with pytest.raises((InterpreterError, AssertionError), match=r"program \(2, 0, 0\) never waits"):
        copy(programs=3, waits=2, count=8)
    copy(programs=3, count=8)


@pytest.mark.parametrize("by", [0, 1])
def test_programs_do_not_read_what_others_store(by: int) -> None:
    out = np.zeros(8, np.float32)
    if by == 0:
        trace(_neighbours, 2, out=out, BY=by)
        return
    with pytest.raises(InterpreterError, match="a race: a program reads what another may be about to store"):
        trace(_neighbours, 2, out=out, BY=by)


def test_programs_do_not_store_the_same() -> None:
    with pytest.raises(InterpreterError, match="a race: a program stores what another may be about to store"):
        trace(_through_memory, 2, out=np.zeros(4, np.float32), BARRIER=True)


def last_adds(sem: str = "acq_rel", barrier: bool = True, resets: bool = False) -> None:
    arrays = {"parts": np.zeros(12, np.float32), "out": np.zeros(4, np.float32), "counter": np.zeros(1, np.int32)}
    trace(_last_adds, 3, **arrays, SEM=sem, BARRIER=barrier, RESETS=resets)
    assert arrays["out"].tolist() == [3.0] * 4


def test_the_last_to_come_may_read_what_the_others_have_left() -> None:
    last_adds()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sem": "relaxed"}, "reads what another may be about to store"),
        ({"barrier": False}, "reads what another may be about to store"),
        ({"resets": True}, "counts what another may be about to store"),
    ],
)
def test_counting_orders_only_what_is_released_before(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        last_adds(**change)


def test_threads_of_a_program_need_a_barrier() -> None:
    out = np.zeros(4, np.float32)
    trace(_through_memory, 1, out=out, BARRIER=True)
    assert out.tolist() == [3.0, 2.0, 1.0, 0.0]
    with pytest.raises(InterpreterError, match="reads what it has stored, with no barrier between"):
        trace(_through_memory, 1, out=out, BARRIER=False)
