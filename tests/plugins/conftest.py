"""Running single CPU operators on arrays, on every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from enginery.plugins.linear.layouts import from_bf16, to_bf16
from enginery.runtime import _core
from numpy.typing import NDArray

Array = NDArray[Any]

NEEDS = {
    "avx2": "avx2",
    "avx2-vnni": "avxvnni",
    "avx512": "avx512bw",
    "avx512-vnni": "avx512vnni",
    "avx512-vnni-bf16": "avx512bf16",
}

# Of results against the reference, relative to the largest of them, by the type that products are made in.
TOLERANCES = {"f32": 3e-6, "bf16": 3e-6, "i8": 3e-6, "u8": 3e-6}

DTYPES = {np.dtype(np.float32): "f32", np.dtype(np.uint16): "bf16", np.dtype(np.int8): "i8", np.dtype(np.uint8): "u8"}


def pad_rows(x: Array, fill: float = 0) -> Array:
    """[M, columns] -> [M, round_up(columns, 64)], as activation buffers hold it."""
    return np.ascontiguousarray(np.pad(x, ((0, 0), (0, -x.shape[1] % 64)), constant_values=fill))


@dataclass
class Call:
    """One call of an operator: operands under their names, arrays as the kernel sees them."""

    op: str
    attributes: dict[str, Any]
    step: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    operands: dict[str, dict[str, Any]] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    version: int = 0

    def buffer(self, name: str, array: Array, per_thread: bool = False) -> Array:
        self.operands[name] = {"kind": "buffer", "layout": DTYPES[array.dtype], "per_thread": per_thread}
        self.arrays[name] = array
        return array

    def weight(self, name: str, layout: str, array: Array) -> None:
        self.operands[name] = {"kind": "weight", "layout": f"{layout}.v0"}
        self.arrays[name] = np.ascontiguousarray(array)

    def state(self, array: Array) -> None:
        self.operands["state"] = {"kind": "state"}
        self.arrays["state"] = array

    def inputs(self, *names: str) -> None:
        for name in names:
            self.operands[name] = {"kind": "input"}

    def run(self, isa: str, num_threads: int = 1, **limits: int) -> None:
        call = {"op": self.op, "version": self.version, "attributes": self.attributes, "operands": self.operands}
        _core.run_call(isa, call | {"groups": self.groups} | limits, self.arrays, self.step, num_threads)


def assert_close(found: Array, wanted: Array, dtype: str, size: float = 0) -> None:
    """Fails where an element is off by more than the tolerance of its type, relative to the largest one.

    size: what results are as large as typically, where the largest of a few may happen to be small.
    """
    largest = max(1e-30, size, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCES[dtype] * largest)


class Kernels:
    """What the tests of this folder share; importing from a conftest is not possible."""

    Call = Call
    pad_rows = staticmethod(pad_rows)
    assert_close = staticmethod(assert_close)
    to_bf16 = staticmethod(to_bf16)
    from_bf16 = staticmethod(from_bf16)


@pytest.fixture(scope="session")
def kernels() -> type[Kernels]:
    return Kernels


@pytest.fixture(scope="session", params=[isa for isa, feature in NEEDS.items() if feature in _core.cpu_features()])
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)
