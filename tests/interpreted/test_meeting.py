"""The meeting of ranks as it is written, by ranks that do run at once: processes that share memory.

What Triton's interpreter lacks, inline assembly, is told in Python here; its atomics are real.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import multiprocessing
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from enginery.plugins.all_reduce.cuda import AllReduce, launches
from enginery.plugins.all_reduce.meeting import Meeting, flags_bytes
from numpy.typing import NDArray
from triton.runtime import interpreter

from .interpreter import Pointer

ROWS, COLUMNS = 16, 128  # two programs
STEPS = 6
SECOND = 1_000_000_000


class Assembly:
    """The instructions of triton_meeting.py. Nanoseconds pass with every look at the clock, not by themselves."""

    def __init__(self, tick: int) -> None:
        self.now, self.tick = 0, tick

    def run(self, text: str, constraints: str, values: Any, *rest: Any) -> Any:
        found = np.zeros((1,), np.int64 if constraints == "=l" else np.int32)
        if "%globaltimer" in text:
            self.now += self.tick
            found[:] = self.now
        elif "st.relaxed.sys" in text:
            ctypes.c_int32.from_address(int(values[0].data.item())).value = 1
        elif text.startswith("trap"):
            raise RuntimeError("trap")
        else:
            assert text.startswith("fence.acq_rel.sys")
        handle = interpreter.TensorHandle(found, tl.int64 if constraints == "=l" else tl.int32)
        return SimpleNamespace(get_result=lambda index: handle)


class Memory:
    """Of all ranks, shared by their processes: flags, and two parts."""

    def __init__(self, world_size: int) -> None:
        sizes = [flags_bytes(world_size), *[ROWS * COLUMNS * 2] * 2]
        self.world_size, self.bytes = world_size, mmap.mmap(-1, world_size * sum(sizes))
        whole = np.frombuffer(self.bytes, np.uint8).reshape(world_size, -1)
        pieces = np.split(whole, np.cumsum(sizes)[:-1], axis=1)
        self.flags = [piece.view(np.int32) for piece in pieces[0]]
        self.parts = [[piece.view(ml_dtypes.bfloat16) for piece in part] for part in pieces[1:]]

    def meet(self, rank: int, number: int, half: int, twice: bool) -> NDArray[Any]:
        """The sum of the ranks' parts for collective `number`, which are rank + number."""
        parts = self.parts[half]
        parts[rank][:] = rank + number
        reduce = AllReduce(COLUMNS, Meeting(rank, self.world_size, half, twice), domain="rows")
        kernel = launches(reduce, architecture=90)[0].kernel
        out = np.zeros((ROWS, COLUMNS), ml_dtypes.bfloat16)
        tables = [np.array([each.ctypes.data for each in arrays], np.int64) for arrays in (parts, self.flags)]
        pointers = {"parts": tables[0], "out": out, "flags": self.flags[rank], "signals": tables[1]}
        arguments: dict[str, Any] = {name: Pointer(array) for name, array in pointers.items()}
        arguments |= {"count": ROWS, "rank": rank, "half": half}
        function = importlib.import_module("enginery.plugins.all_reduce.triton").all_reduce
        function[(2, 1, 1)](**arguments, **dict(kernel.constants))
        return out


def serve(memory: Memory, rank: int, answers: Any) -> None:
    """Three collectives a step, the last of which meets twice; what is wrong, or nothing."""
    assembly = Assembly(tick=SECOND // 10_000)
    interpreter.InterpreterBuilder.create_inline_asm = lambda self, *given: assembly.run(*given)
    wrong = []
    for number in range(3 * STEPS):
        out = memory.meet(rank, number, number % 3 % 2, number % 3 == 2)
        wanted = sum(other + number for other in range(memory.world_size))
        wrong += [f"rank {rank}, collective {number}: {np.unique(out)}, wanted {wanted}"] * bool((out != wanted).any())
    answers.put(wrong)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_run_at_once_read_what_all_have_written(world_size: int) -> None:
    memory = Memory(world_size)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=serve, args=(memory, rank, answers)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size
    assert [answers.get() for _ in processes] == [[]] * world_size
    assert not any(flags.any() for flags in memory.flags)


def test_a_rank_that_waits_in_vain_traps(monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = Assembly(tick=SECOND)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", lambda self, *given: assembly.run(*given))
    with pytest.raises(Exception, match="trap"):
        Memory(2).meet(0, 0, 0, False)
    assert 30 * SECOND < assembly.now < 40 * SECOND
