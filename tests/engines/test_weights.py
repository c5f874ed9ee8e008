"""The weights file: an ordinary safetensors file, whose header is believed in nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.layouts import LAYOUTS
from enginery.engines.weights import LARGEST_HEADER, Tensor, lay_out, read_weights_header
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

TENSORS = [
    Tensor("norm", "rows_f32.v0", 1, 77, ("a[0:77,0:1]",)),
    Tensor("big", "int8_k4n16.v0", 300, 900),
    Tensor("big.scale", "scale_f32.v0", 300, 1),
]


def write(path: Path, tensors: list[Tensor] = TENSORS) -> Path:
    file = lay_out(tensors)
    path.write_bytes(file.header + bytes(file.size - len(file.header)))
    return path


def test_is_read_as_it_was_laid_out(tmp_path: Path) -> None:
    read = read_weights_header(write(tmp_path / "w.safetensors"))
    assert [placed.tensor for placed in read.placed.values()] == TENSORS
    assert read.placed == lay_out(TENSORS).placed


def test_other_readers_of_safetensors_read_it(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "w.safetensors"), "np") as file:
        assert file.get_tensor("big").shape == (LAYOUTS["int8_k4n16.v0"].num_bytes(300, 900),)
        assert json.loads(file.metadata()["tensors"])["norm"]["shape"] == [1, 77]


@given(st.lists(st.tuples(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 200), st.integers(1, 700)), max_size=8))
def test_tensors_are_aligned_and_tile_the_file(shapes: list[tuple[str, int, int]]) -> None:
    tensors = [Tensor(f"t{i}", layout, rows, columns) for i, (layout, rows, columns) in enumerate(shapes)]
    file = lay_out(tensors)
    assert file.size % 4096 == 0
    for placed in file.placed.values():
        assert placed.offset % (65536 if placed.tensor.num_bytes >= 65536 else 64) == 0


def _header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    document: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return document


def _with_header(path: Path, document: dict[str, Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(document).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text + b" " * (length - len(text)) + data[8 + length :])


def _edit_meanings(document: dict[str, Any], old: str, new: str) -> None:
    metadata = document["__metadata__"]
    metadata["tensors"] = metadata["tensors"].replace(old, new)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["big"].update(data_offsets=[0, 1 << 40]), "outside the file"),
        (lambda d: d["big"].update(data_offsets=[-1, 5]), "offset"),
        (lambda d: d["big"].update(data_offsets=[65536, 65536]), "does not make"),
        (lambda d: d["norm"].update(dtype="F32"), "U8"),
        (lambda d: d["norm"].update(data_offsets=[0]), "U8"),
        (lambda d: d["norm"].update(data_offsets=[308, 0]), "outside the file"),
        (lambda d: d["norm"].update(data_offsets=[0, 1 << 50]), "offset"),
        (lambda d: d["norm"].update(data_offsets=[True, 308]), "offset"),
        (lambda d: d["norm"].update(moon=1), "unknown field 'moon'"),
        (lambda d: d.update({".pad.9": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}), "overlap"),
        (lambda d: d["__metadata__"].update(tensors=5), "not that of an enginery weights file"),
        (lambda d: d.update(__metadata__=[]), "not that of an enginery weights file"),
        (lambda d: _edit_meanings(d, "[1,77]", "[77]"), "does not make"),
        (lambda d: _edit_meanings(d, "[1,77]", "[1,-77]"), "offset"),
        (lambda d: _edit_meanings(d, '"norm"', '"nose"'), "'norm' is missing"),
        (lambda d: d.pop("norm"), "overlap or leave a hole"),
        (lambda d: d.update(extra={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}), "extra"),
        (lambda d: d.pop("__metadata__"), "not that of an enginery weights file"),
        (lambda d: d["__metadata__"].update(tensors="[]"), "map"),
        (lambda d: _edit_meanings(d, "rows_f32.v0", "rows_f99.v0"), "rows_f99.v0"),
        (lambda d: _edit_meanings(d, "[1,77]", "[1,78]"), "does not make"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors")
    document = _header(path)
    change(document)
    _with_header(path, document)
    with pytest.raises(EngineFormatError, match=reason):
        read_weights_header(path)


@pytest.mark.parametrize("size", [0, 5, 8, 300, 70000])
def test_truncated_files_are_refused(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(EngineFormatError):
        read_weights_header(path)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors")
    path.write_bytes((1 << 50).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(EngineFormatError, match="truncated or damaged"):
        read_weights_header(path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(EngineFormatError, match="its tensors end at byte"):
        read_weights_header(path)


def test_tensors_may_stand_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors")
    _with_header(path, dict(reversed(_header(path).items())))
    assert read_weights_header(path).placed == lay_out(TENSORS).placed


def test_a_large_header_is_refused_though_the_file_is_larger(tmp_path: Path) -> None:
    with open(tmp_path / "w.safetensors", "wb") as file:
        file.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(LARGEST_HEADER << 1)
    with pytest.raises(EngineFormatError, match="header of"):
        read_weights_header(tmp_path / "w.safetensors")


def test_data_begins_where_a_mapping_is_aligned() -> None:
    """On 64 KiB of the file where there is as much data, else on a page: a small engine stays small."""
    small = lay_out(TENSORS[:1])
    assert (small.placed["norm"].offset, small.size) == (4096, 8192)
    assert len(lay_out(TENSORS).header) == 65536
