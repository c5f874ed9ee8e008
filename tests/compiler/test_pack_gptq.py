"""Calibrated weights of four bits: what stands in the engine is what GPTQ makes of the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler import pack_gptq
from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate
from enginery.compiler.calibration.file import read_calibration
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.checkpoint.weights import Part, Weight
from enginery.compiler.pack_gptq import gptq_packer
from enginery.engines.errors import CheckpointError
from enginery.engines.layouts import LAYOUTS
from enginery.engines.weights import read_weights_header
from enginery.plugins.linear.layouts import deinterleave_gated, unpack_int4_k8n16
from enginery.plugins.linear.quantize_int4 import find_feedback, quantize_gptq, quantize_int4
from safetensors.numpy import load_file, save_file

from .building import compile_to, contents

PREFIX = "model.layers.1"


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 600))))
    return calibrate(CalibrationRequest(str(checkpoint), text, text.parent / "c", 500))


def codes_of(engine: Path, name: str) -> Any:
    """Codes [N, K], rows padded to 16, as the engine has them."""
    placed = read_weights_header(engine / "weights.rank0.safetensors").placed[name]
    data = np.fromfile(engine / "weights.rank0.safetensors", np.uint8)
    packed = data[placed.offset : placed.offset + placed.tensor.num_bytes]
    rows, columns = -(-placed.tensor.rows // 16) * 16, placed.tensor.columns
    return unpack_int4_k8n16(packed.reshape(rows // 16, -1, 16, 4), rows, columns)


@pytest.mark.parametrize("zero_points", [False, True])
def test_engines_hold_what_gptq_makes(
    zero_points: bool, checkpoint: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = sys.modules["enginery.compiler.passes.smooth"]  # whose name in the package is the pass
    monkeypatch.setattr(smooth, "_STRENGTHS", ())  # so that weights are the checkpoint's
    options: dict[str, Any] = {"precision": "int4", "zero_points": zero_points, "group_size": 32}
    engine = compile_to(checkpoint, tmp_path / "e", calibration=calibration, **options)
    source = load_file(checkpoint / "model.safetensors")

    def wanted(tensor: str, moments_of: str) -> Any:
        with open_checkpoint(checkpoint) as opened:
            rows, columns = opened.tensors[moments_of].shape
            weight = Weight(opened, (Part(moments_of, (0, rows), (0, columns)),), vector=False)
            moments = read_calibration(calibration, opened).likely_moments(weight)
        return quantize_int4(source[tensor], 32, not zero_points, moments)[0]

    down = f"{PREFIX}.mlp.down_proj.weight"
    np.testing.assert_array_equal(codes_of(engine, down)[:48], wanted(down, down))
    halves = deinterleave_gated(codes_of(engine, "layers.1.gate_up.weight"), 72)
    for got, name in zip(halves, ("gate", "up"), strict=True):
        np.testing.assert_array_equal(got, wanted(f"{PREFIX}.mlp.{name}_proj.weight", f"{PREFIX}.mlp.gate_proj.weight"))


def test_threads_and_chunks_do_not_matter(
    checkpoint: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_to(checkpoint, tmp_path / "a", precision="int4", calibration=calibration, num_threads=1)
    monkeypatch.setattr("enginery.compiler.write.ROWS_AT_A_TIME", 16)
    monkeypatch.setattr("enginery.compiler.write._CHUNK_BYTES", 1)
    second = compile_to(checkpoint, tmp_path / "b", precision="int4", calibration=calibration, num_threads=3)
    assert contents(first) == contents(second)
    nearest = compile_to(checkpoint, tmp_path / "c", precision="int4")
    assert contents(nearest)["weights.rank0.safetensors"] != contents(first)["weights.rank0.safetensors"]


def test_ranks_take_the_moments_of_their_columns(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e", precision="int4", calibration=calibration, tensor_parallel_size=2)
    assert (engine / "weights.rank1.safetensors").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_found(value: float) -> None:
    w = np.ones((40, 64), np.float32)
    w[37, 5] = value
    feedback = find_feedback(np.eye(128, dtype=np.float32)[None])
    layout = "int4_k8n16g32.v0"
    out, scale = np.zeros(LAYOUTS[layout].num_bytes(40, 64), np.uint8), np.zeros(48 * 2, np.uint16)
    pack_rows = gptq_packer(feedback)
    source = w.view(np.uint8)
    arguments = (source, "f32", 40, 64, layout, out, scale, None, None)
    assert pack_rows(*arguments, add=0.0, stride=1, num_threads=2) == 37 * 64 + 5


def test_a_damaged_checkpoint_is_told_as_ever(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    """The damage came behind what the fingerprint samples, or it would be another checkpoint."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.copy() for name, tensor in load_file(copy / "model.safetensors").items()}
    tensors[f"{PREFIX}.mlp.down_proj.weight"][7, 9] = np.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("enginery.compiler.calibration.file.fingerprint", lambda opened: _fingerprint_of(calibration))
        with pytest.raises(CheckpointError, match=rf"{PREFIX}\.mlp\.down_proj\.weight\[7, 9\] is not a finite number"):
            compile_to(copy, tmp_path / "e", precision="int4", calibration=calibration)


def _fingerprint_of(calibration: Path) -> str:
    from enginery.compiler.checkpoint.tensors import read_header

    return str(read_header(calibration)[0]["checkpoint"])


def test_rows_are_cut_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(w: Any, *rest: Any) -> Any:
        sizes.append(len(w))
        return quantize_gptq(w, *rest)

    monkeypatch.setattr(pack_gptq, "quantize_gptq", spy)
    layout, w = "uint4_k8n16g64.v0", np.ones((100, 64), np.float32)
    out = np.zeros(LAYOUTS[layout].num_bytes(100, 64), np.uint8)
    scale, zeros = np.zeros(112, np.uint16), np.zeros(112, np.uint8)
    feedback = find_feedback(np.eye(128, dtype=np.float32)[None])
    arguments = (w.view(np.uint8), "f32", 100, 64, layout, out, scale, None, zeros)
    assert gptq_packer(feedback)(*arguments, add=0.0, stride=1, num_threads=3) == -1
    assert sorted(sizes) == [4, 48, 48]
