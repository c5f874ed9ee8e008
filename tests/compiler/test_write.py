"""Writing weights: the same bytes in any number of steps, and what is not finite named by its place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import CheckpointError
from enginery.engines.layouts import LAYOUTS
from enginery.engines.manifest import read_manifest
from enginery.engines.weights import read_weights_header
from enginery.plugins.linear import layouts
from enginery.plugins.linear.quantize_int4 import quantize_int4
from safetensors.torch import load_file, save_file

from ..tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases everywhere, and gate and up of 72 rows, which is no multiple of 16."""
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama-biases", directory)
    return directory


def written(model: Path, output: Path, **options: Any) -> list[bytes]:
    """The weights of every rank, which are as large as was said, and hashed as they are."""
    told: list[int] = []
    with prepare(BuildRequest(str(model), output, **({"target": "cpu-avx2"} | options))) as prepared:
        engine = build(prepared, told.append)
        assert sum(told) >= prepared.tensor_bytes
        files = [(engine / f"weights.rank{rank}.safetensors").read_bytes() for rank in range(len(prepared.ranks))]
        assert sum(map(len, files)) == prepared.weights_bytes
    entries = read_manifest(engine).files
    for rank, content in enumerate(files):
        assert entries[f"weights.rank{rank}.safetensors"].sha256 == hashlib.sha256(content).hexdigest()
    return files


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_steps_do_not_show(
    precision: str, ranks: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows at a time, and 32 of the shorter rows."""
    options = {"precision": precision, "tensor_parallel_size": ranks}
    whole = written(checkpoint, tmp_path / "whole", **options)
    for size in (1, 48 * 4 * 17):
        monkeypatch.setattr("enginery.compiler.write._CHUNK_BYTES", size)
        assert written(checkpoint, tmp_path / f"steps{size}", **options) == whole


def test_a_disk_may_take_a_little_at_a_time(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = written(checkpoint, tmp_path / "whole"), os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, data, offset: real(descriptor, memoryview(data)[:1000], offset)
    )
    assert written(checkpoint, tmp_path / "little") == whole


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("model.layers.1.mlp.down_proj.weight", 45, 70),
        ("model.layers.1.mlp.up_proj.weight", 70, 5),
        ("model.layers.2.self_attn.v_proj.weight", 15, 47),
        ("lm_head.weight", 300, 1),
        ("model.embed_tokens.weight", 299, 3),
    ],
)
def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_checkpoint(
    name: str, row: int, column: int, ranks: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever step, fused tensor and rank it is found."""
    monkeypatch.setattr("enginery.compiler.write._CHUNK_BYTES", 1)
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name][row, column] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}\[{row}, {column}\] is not a finite number"):
        written(model, tmp_path / "engine", tensor_parallel_size=ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.gate_proj.bias", "model.layers.1.mlp.up_proj.bias"]
)
def test_vectors_are_checked_too(name: str, checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name][7] = float("inf")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}\[7\] is not a finite number"):
        written(model, tmp_path / "engine")


def test_values_that_only_the_layout_cannot_hold_are_refused(tmp_path: Path) -> None:
    """The largest float32 is infinite in bfloat16."""
    make_checkpoint("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][2, 3] = torch.finfo(torch.float32).max
    save_file(tensors, path)
    written(tmp_path / "model", tmp_path / "fp32", precision="fp32")
    with pytest.raises(CheckpointError, match=r"down_proj.weight\[2, 3\] is not a finite number \(or not one in bf16_"):
        written(tmp_path / "model", tmp_path / "bf16", precision="bf16")


def test_int8_weights_of_every_kind_are_those_of_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    """Plain, stacked and gated, with the scales and sums of each row; gate and up take turns by panels."""
    (content,) = written(checkpoint, tmp_path / "engine", precision="int8")
    placed = read_weights_header(tmp_path / "engine" / "weights.rank0.safetensors").placed
    source = {name: tensor.numpy() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    checked = 0

    def bytes_of(name: str) -> bytes:
        return content[placed[name].offset :][: placed[name].tensor.num_bytes]

    for name, place in placed.items():
        if place.tensor.layout != "int8_k4n16.v0":
            continue
        names = dict.fromkeys(piece.partition("[")[0] for piece in place.tensor.sources)
        parts = [source[part] for part in names]
        if name.endswith("gate_up.weight"):
            parts = [layouts.interleave_gated(*parts)]
        quantized, scale = layouts.quantize_int8(np.concatenate(parts))
        assert bytes_of(name) == layouts.pack_int8_k4n16(quantized).tobytes()
        assert bytes_of(f"{name}.scale") == layouts.pad_vector(scale).tobytes()
        assert bytes_of(f"{name}.sum") == layouts.pad_vector(layouts.row_sums(quantized)).tobytes()
        checked += 1
    assert checked == 3 * 4 + 1 + 1


@pytest.mark.parametrize("zero_points", [False, True])
def test_int4_weights_of_every_kind_are_those_of_the_reference(
    zero_points: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """Plain, stacked and gated, with the scales and zero points of each group."""
    options = {"precision": "int4", "zero_points": zero_points, "group_size": 32}
    (content,) = written(checkpoint, tmp_path / "engine", **options)
    placed = read_weights_header(tmp_path / "engine" / "weights.rank0.safetensors").placed
    source = {name: tensor.numpy() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    checked = 0

    def bytes_of(name: str) -> bytes:
        return content[placed[name].offset :][: placed[name].tensor.num_bytes]

    for name, place in placed.items():
        if "int4" not in place.tensor.layout:
            continue
        names = dict.fromkeys(piece.partition("[")[0] for piece in place.tensor.sources)
        parts = [quantize_int4(source[part], 32, symmetric=not zero_points) for part in names]
        join = layouts.interleave_gated if name.endswith("gate_up.weight") else lambda *each: np.concatenate(each)
        codes, scales, zeros = (join(*each) for each in zip(*parts, strict=True))
        groups = LAYOUTS[place.tensor.layout].num_groups(codes.shape[1])
        assert bytes_of(name) == layouts.pack_int4_k8n16(codes).tobytes()
        assert bytes_of(f"{name}.scale") == layouts.pack_groups(scales, groups).tobytes()
        assert (f"{name}.zero" in placed) == zero_points
        if zero_points:
            assert bytes_of(f"{name}.zero") == layouts.pack_groups(zeros, groups).tobytes()
        checked += 1
    assert checked == 3 * 4 + 1
