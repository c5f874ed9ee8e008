"""Tensors of a checkpoint as lazy slices: the right rows and columns, whatever the file system gives at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enginery.compiler.checkpoint.tensors import Checkpoint, open_checkpoint
from enginery.compiler.checkpoint.weights import Part, Weight
from enginery.engines.errors import CheckpointError
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

Array = NDArray[Any]

RANDOM = np.random.default_rng(5)
STORED: dict[str, Array] = {
    "a": RANDOM.normal(size=(7, 12)).astype(np.float32),
    "b": RANDOM.normal(size=(5, 12)).astype(np.float32),
    "v": RANDOM.normal(size=9).astype(np.float32),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_file({name: torch.from_numpy(array) for name, array in STORED.items()}, path / "model.safetensors")
    return path


def stacked(checkpoint: Checkpoint) -> Weight:
    """b below a."""
    whole = [Weight(checkpoint, (Part(name, (0, len(STORED[name])), (0, 12)),), vector=False) for name in "ab"]
    return whole[1].below(whole[0])


WHOLE = np.concatenate([STORED["a"], STORED["b"]])


@given(st.data())
def test_slices_of_slices_are_those_of_arrays(directory: Path, data: st.DataObject) -> None:
    with open_checkpoint(directory) as checkpoint:
        weight, wanted = stacked(checkpoint), WHOLE
        for _ in range(data.draw(st.integers(1, 3))):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(wanted))] * 2)))
            left, right = sorted(data.draw(st.tuples(*[st.integers(0, wanted.shape[1])] * 2)))
            if start == stop or left == right:
                continue
            weight, wanted = weight.take_rows(start, stop).take_columns(left, right), wanted[start:stop, left:right]
        assert weight.shape == wanted.shape
        np.testing.assert_array_equal(weight.plus(1.5).plus(-0.5).numpy(), wanted + np.float32(1))
        first = data.draw(st.integers(0, len(wanted) - 1))
        raw = weight.read(first, len(wanted))
        assert raw.tobytes() == wanted[first:].tobytes()


def test_vectors_are_one_column(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        weight = Weight(checkpoint, (Part("v", (0, 9), (0, 1)),), vector=True)
        assert weight.shape == (9,)
        np.testing.assert_array_equal(weight.take_rows(3, 8).numpy(), STORED["v"][3:8])


def test_a_file_system_may_give_a_little_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with open_checkpoint(directory) as checkpoint:
        raw = stacked(checkpoint).read(0, 12, np.full(WHOLE.nbytes, 0xA5, np.uint8))
    assert raw.tobytes() == WHOLE.tobytes()


def test_a_file_that_is_cut_off_meanwhile_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 0)
    with open_checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match="tensor a ends early"):
        stacked(checkpoint).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_value_of_a_narrow_type_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = torch.nan_to_num(values.float(), 0, 0, 0).to(dtype)[None]
    save_file({"w": values}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        weight = Weight(checkpoint, (Part("w", (0, 1), (0, values.shape[1])),), vector=False)
        np.testing.assert_array_equal(weight.numpy(), values.float().numpy())


def _index(directory: Path, names: list[str]) -> None:
    weight_map = {f"t{number}": name for number, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_files_are_those_of_the_index_then_model_then_all(tmp_path: Path) -> None:
    for name in ("one", "two", "model"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    _index(tmp_path, ["two.safetensors", "one.safetensors", "two.safetensors"])
    assert set(Checkpoint(tmp_path).tensors) == {"one", "two"}
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(Checkpoint(tmp_path).tensors) == {"model"}
    (tmp_path / "model.safetensors").unlink()
    assert set(Checkpoint(tmp_path).tensors) == {"one", "two"}


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    _index(tmp_path, ["a.safetensors", "b.safetensors"])
    with pytest.raises(CheckpointError, match=r"(?s)shards are missing.*a\.safetensors.*b\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="wanted a JSON object with a weight_map"):
        Checkpoint(tmp_path)


def _write(path: Path, header: bytes, data: int = 0, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data))


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        (b"{}", 0, 1 << 40, "its header should have 1099511627776 bytes"),
        (b"{}", 0, 3, "its header should have 3 bytes, the file has 10"),
        (b"[]", 0, None, "no safetensors header"),
        (_entry("F32", [2, 2], 0, 16), 15, None, "w should end at byte"),
        (_entry("F32", [2, 2], 0, 12), 16, None, r"w \[2, 2\] F32 does not fit its bytes"),
        (_entry("BF16", [2, 2], 0, 16), 16, None, r"w \[2, 2\] BF16 does not fit its bytes"),
        (_entry("F32", [-2, -2], 0, 16), 16, None, "no safetensors header"),
        (_entry("F32", [2, 2], -16, 0), 16, None, "no safetensors header"),
    ],
)
def test_damaged_headers_are_refused(header: bytes, data: int, length: int | None, reason: str, tmp_path: Path) -> None:
    _write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=f"truncated or damaged: .*{reason}"):
        Checkpoint(tmp_path)


def test_types_that_nobody_asks_for_are_no_obstacle(tmp_path: Path) -> None:
    _write(tmp_path / "model.safetensors", _entry("F8_E4M3", [2, 2], 0, 4), 4)
    assert Checkpoint(tmp_path).tensors["w"].dtype == "F8_E4M3"
