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
TOLERANCES = {"f32": 3e-6, "bf16": 3e-6, "i8": 3e-6, "u8": 3e-6, "codes": 3e-6, "kv bf16": 8e-3, "kv i8": 1e-3}

DTYPES = {
    np.dtype(np.float32): "f32",
    np.dtype(np.uint16): "bf16",
    np.dtype(np.int8): "i8",
    np.dtype(np.uint8): "u8",
    np.dtype(np.int32): "i32",
}


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
    per_thread: list[str] = field(default_factory=list)
    version: int = 0

    def buffer(self, name: str, array: Array, per_thread: bool = False) -> Array:
        self.operands[name] = {"kind": "buffer", "layout": DTYPES[array.dtype]}
        if per_thread:
            self.per_thread.append(name)
        self.arrays[name] = array
        return array

    def weight(self, name: str, layout: str, array: Array) -> None:
        self.operands[name] = {"kind": "weight", "layout": f"{layout}.v0"}
        self.arrays[name] = np.ascontiguousarray(array)

    def state(self, array: Array) -> None:
        self.operands["state"] = {"kind": "state", "name": "group", "layer": 0}
        self.arrays["state"] = array

    def inputs(self, *names: str) -> None:
        for name in names:
            self.operands[name] = {"kind": "input", "name": name}

    def run(self, isa: str, num_threads: int = 1, **limits: int) -> None:
        call = {"op": self.op, "version": self.version, "attributes": self.attributes, "operands": self.operands}
        call |= {"groups": self.groups, "per_thread": self.per_thread, **limits}
        _core.run_calls(isa, [call], [self.arrays], self.step, num_threads)


def assert_close(found: Array, wanted: Array, dtype: str, size: float = 0) -> None:
    """Fails where an element is off by more than the tolerance of its type, relative to the largest one.

    size: what results are as large as typically, where the largest of a few may happen to be small.
    """
    largest = max(1e-30, size, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCES[dtype] * largest)


def pack_state(keys: Array, values: Array, dtype: str) -> Array:
    """One layer's keys and values [blocks, T, heads, d] f32 as its state lies in memory (plugins/README.md)."""
    blocks, _, heads, d = keys.shape
    padded = np.pad(values, ((0, 0), (0, 0), (0, 0), (0, -d % 16)))
    parts: list[Array] = []
    if dtype == "f32":
        parts = [_panels(keys, 1), padded.transpose(0, 2, 1, 3)]
    elif dtype == "bf16":
        parts = [_panels(to_bf16(keys), 2), _pairs(to_bf16(padded))]
    else:
        quantized, scales = zip(*(_quantize(x) for x in (keys, padded)), strict=True)
        parts = [_panels(quantized[0], 2), _pairs(quantized[1]), *(s.transpose(0, 2, 1) for s in scales)]
    flat = [np.ascontiguousarray(part).reshape(blocks, heads, -1).view(np.uint8) for part in parts]
    return np.ascontiguousarray(np.concatenate(flat, axis=2).reshape(blocks, -1)).view(np.int8)


def _panels(keys: Array, packed: int) -> Array:
    blocks, size, heads, d = keys.shape
    return keys.reshape(blocks, size // 16, 16, heads, d // packed, packed).transpose(0, 3, 1, 4, 2, 5)


def _pairs(values: Array) -> Array:
    blocks, size, heads, d = values.shape
    return values.reshape(blocks, size // 2, 2, heads, d).transpose(0, 3, 1, 4, 2)


def _quantize(x: Array) -> tuple[Array, Array]:
    scales = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float16)
    safe = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[..., None]
    quotients = np.where(scales[..., None] > 0, x / safe, 0)
    return np.clip(np.rint(quotients), -127, 127).astype(np.int8), scales


def state_group(block_size: int, num_kv_heads: int, head_dim: int, dtype: str, num_layers: int = 1) -> dict[str, Any]:
    """A group of layers as the plan declares it."""
    element = {"f32": 4, "bf16": 2, "i8": 1}[dtype]
    columns = head_dim + -(-head_dim // 16) * 16
    head_bytes = block_size * (columns * element + (4 if dtype == "i8" else 0))
    return {
        "block_size": block_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "num_layers": num_layers,
        "block_bytes": num_layers * num_kv_heads * head_bytes,
    }


class Kernels:
    """What the tests of this folder share; importing from a conftest is not possible."""

    Call = Call
    pad_rows = staticmethod(pad_rows)
    assert_close = staticmethod(assert_close)
    pack_state = staticmethod(pack_state)
    state_group = staticmethod(state_group)
    to_bf16 = staticmethod(to_bf16)
    from_bf16 = staticmethod(from_bf16)


@pytest.fixture(scope="session")
def kernels() -> type[Kernels]:
    return Kernels


@pytest.fixture(scope="session", params=[isa for isa, feature in NEEDS.items() if feature in _core.cpu_features()])
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)
