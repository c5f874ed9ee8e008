"""all_reduce and all_gather for GPUs, interpreted, against their references; ranks run one after the other."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.engines.errors import CompileError
from enginery.engines.expressions import evaluate
from enginery.engines.fields import LARGEST
from enginery.plugins.all_gather import cuda as cuda_gather
from enginery.plugins.all_gather.cuda import AllGather
from enginery.plugins.all_gather.reference import all_gather
from enginery.plugins.all_reduce import cuda as cuda_reduce
from enginery.plugins.all_reduce.cuda import AllReduce
from enginery.plugins.all_reduce.meeting import Meeting
from enginery.plugins.all_reduce.reference import all_reduce
from enginery.plugins.launches import Launch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import Pointer, run_kernel
from .traces import Declared

Array = NDArray[Any]


def padded(x: Array, kind: Any) -> Array:
    return np.ascontiguousarray(np.pad(x, ((0, 0), (0, -x.shape[1] % 128)))).astype(kind)


def run(plan: Launch, domain: str, parts: list[Array], arrays: dict[str, Array]) -> None:
    """One rank's launch; it may read the parts and touch the arrays, and nothing else."""
    count = len(parts[0])
    table = np.array([part.ctypes.data for part in parts], np.int64)
    pointers = {"parts": table, "flags": np.zeros(4, np.int32), "signals": np.zeros(len(parts), np.int64), **arrays}
    numbers = {"count": count, **plan.values}
    given = {
        name: Pointer(pointers[name]) if kind[0] == "*" else numbers[name] for name, kind in plan.kernel.parameters
    }
    grid = tuple(evaluate(size, {domain: count}) for size in plan.grid)
    declared = {name: Declared(array.nbytes, "w" if name == "out" else "r") for name, array in arrays.items()}
    declared["parts"] = Declared(max(part.nbytes for part in parts), "r", peers=True)
    run_kernel(plan.kernel, grid, given, declared)


@settings(max_examples=30, deadline=None, database=None)
@given(
    world_size=st.integers(1, 8),
    columns=st.sampled_from([1, 100, 128, 333, 2048]),
    rows=st.sampled_from([1, 2, 9, 33]),
    residual=st.booleans(),
    twice=st.booleans(),
    kernel=st.integers(0, 2),
)
def test_all_reduce(world_size: int, columns: int, rows: int, residual: bool, twice: bool, kernel: int) -> None:
    """Sums of bfloat16 in the order of ranks, to the bit; the padding stays zero. The last kernel adds no residual."""
    residual = residual and kernel < 2
    random = np.random.default_rng(rows * columns)
    wide = [random.normal(size=(rows, columns)).astype(ml_dtypes.bfloat16) for _ in range(world_size + 1)]
    parts = [padded(part, ml_dtypes.bfloat16) for part in wide[:-1]]
    stream = padded(wide[-1], ml_dtypes.bfloat16)
    arrays = {"out": np.full(parts[0].shape, np.nan, ml_dtypes.bfloat16)} | ({"residual": stream} if residual else {})
    operator = AllReduce(columns, Meeting(0, world_size, 0, twice), residual, "rows")
    made = cuda_reduce.launches(operator, architecture=90) + cuda_reduce.large_launches(operator, architecture=90)
    run(made[kernel], "rows", parts, arrays)
    wanted = all_reduce([x.astype(np.float32) for x in parts], stream.astype(np.float32) if residual else None)
    np.testing.assert_array_equal(arrays["out"].view(np.uint16), wanted.astype(ml_dtypes.bfloat16).view(np.uint16))


@settings(max_examples=20, deadline=None, database=None)
@given(
    ends=st.lists(st.integers(1, 300), min_size=1, max_size=8, unique=True).map(sorted),
    cut=st.integers(0, 15),
    rows=st.sampled_from([1, 2, 40]),
)
def test_all_gather(ends: list[int], cut: int, rows: int) -> None:
    """Ranks' columns are any numbers of panels of 16, the last's what is left."""
    starts = (0, *(16 * end for end in ends[:-1]), 16 * ends[-1] - cut)
    random = np.random.default_rng(rows)
    sizes = np.diff(starts)
    plain = [random.normal(size=(rows, size)).astype(np.float32) for size in sizes]
    stride = starts[-1] + -starts[-1] % 128
    out = np.full((rows, stride), np.nan, np.float32)
    (plan,) = cuda_gather.launches(AllGather(starts, Meeting(0, len(sizes), 1, False)), architecture=80)
    run(plan, "rows", [padded(part, np.float32) for part in plain], {"out": out})
    np.testing.assert_array_equal(out[:, : starts[-1]], all_gather(plain))
    assert not out[:, starts[-1] :].any()


@given(world_size=st.integers(2, 8), columns=st.integers(1, 1 << 16), invariant=st.booleans())
def test_every_number_of_rows_has_one_kernel(world_size: int, columns: int, invariant: bool) -> None:
    operator = AllReduce(columns, Meeting(0, world_size, 0), True, "rows", invariant)
    made = cuda_reduce.launches(operator, architecture=90)
    assert all(each.collective is None for each in made)
    large = cuda_reduce.large_launches(operator, architecture=90)
    assert bool(large) != invariant  # a library adds in another order
    assert all(each.collective is not None for each in large)
    ranges = [each.guard[0] for each in (*made, *large)]
    assert [each.low for each in ranges] == [1, *(each.high + 1 for each in ranges[:-1])]
    assert ranges[-1].high == LARGEST


def test_kernels_are_the_same_for_all_ranks() -> None:
    first, second = (cuda_reduce.launches(AllReduce(4096, Meeting(rank, 2, 0)), architecture=90) for rank in (0, 1))
    assert [each.kernel for each in first] == [each.kernel for each in second]
    assert [each.values["rank"] for each in (*first, *second)] == [0, 0, 1, 1]


def test_more_ranks_than_a_machine_has_gpus() -> None:
    with pytest.raises(CompileError, match=r"--tensor-parallel-size 16: .* at most 8"):
        Meeting(0, 16, 0)
