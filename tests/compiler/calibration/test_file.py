"""The calibration file: what is written is read, and what does not fit is refused with what was wanted and got."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.calibration.file import Calibration, Origin, read_calibration, write_calibration
from enginery.compiler.calibration.statistics import Statistics
from enginery.compiler.checkpoint.tensors import Checkpoint, open_checkpoint
from enginery.compiler.checkpoint.weights import Factors, Part, Weight
from enginery.engines.errors import CompileError
from enginery.engines.manifest import hash_file
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ...tiny import make_checkpoint

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def opened(checkpoint: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(checkpoint) as found:
        yield found


def part_of(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Weight:
    rows, columns = checkpoint.tensors[name].shape
    return Weight(checkpoint, (Part(name, (0, rows), (start, stop or columns)),), vector=False)


def rewrite(path: Path, out: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """The file with its tensors and metadata changed."""
    tensors: dict[str, Any] = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, out, metadata=metadata)
    if "data" in metadata:
        metadata["data"] = hashlib.sha256(data_of(out)).hexdigest()
        save_file(tensors, out, metadata=metadata)
    return out


def data_of(path: Path) -> bytes:
    """What follows the header."""
    whole = path.read_bytes()
    return whole[8 + int.from_bytes(whole[:8], "little") :]


def test_what_is_written_is_read(calibration: Path, opened: Checkpoint) -> None:
    stored, found = load_file(calibration), read_calibration(calibration, opened)
    assert found.sha256 == hash_file(calibration, "calibration", "safetensors").sha256
    for name in (DOWN, "model.layers.1.self_attn.k_proj.weight"):
        first = name.replace("k_proj", "q_proj")
        np.testing.assert_array_equal(found.absmax(part_of(opened, name)), stored[f"{first}.absmax"])
        moments, wanted = found.moments(part_of(opened, name)), stored[f"{first}.moments"]
        np.testing.assert_array_equal(moments, wanted)
        likely, beside = found.likely_moments(part_of(opened, name)), ~np.eye(128, dtype=bool)
        np.testing.assert_array_equal(np.einsum("bii->bi", likely), np.einsum("bii->bi", wanted))
        np.testing.assert_allclose(likely[:, beside], wanted[:, beside] * (1000 / 1512), rtol=1e-6)
        np.testing.assert_array_equal(found.samples(part_of(opened, name)), stored[f"{first}.samples"])


def test_the_same_text_makes_the_same_bytes(checkpoint: Path, text: Path, calibration: Path, tmp_path: Path) -> None:
    from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate

    again = calibrate(CalibrationRequest(str(checkpoint), text, tmp_path / "again", 1000))
    assert again.read_bytes() == calibration.read_bytes()
    more = calibrate(CalibrationRequest(str(checkpoint), text, tmp_path / "more", 1001))
    assert more.read_bytes() != calibration.read_bytes()


def test_a_rank_gets_the_moments_of_its_columns(tmp_path: Path) -> None:
    """Blocks begin at its first column; what lay in two blocks is not known, and 0."""
    rng, name = np.random.default_rng(0), "w"
    dense = np.zeros((384, 384), np.float32)
    for start in (0, 128, 256):
        x = rng.standard_normal((500, 128)).astype(np.float32)
        dense[start : start + 128, start : start + 128] = x.T @ x
    blocks = np.stack([dense[start : start + 128, start : start + 128] for start in (0, 128, 256)])
    (tmp_path / "config.json").write_text("{}")
    save_file({name: np.ones((4, 384), np.float32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        from enginery.compiler.checkpoint.fingerprint import fingerprint

        samples = rng.standard_normal((3, 384)).astype(np.float32)
        entry = Statistics([name], np.arange(384, dtype=np.float32), blocks, samples)
        write_calibration(tmp_path / "c", [entry], Origin(fingerprint(checkpoint), "", 1, 1))
        found = read_calibration(tmp_path / "c", checkpoint)
        for start, stop in ((0, 384), (128, 384), (96, 192), (192, 384), (100, 101)):
            weight = part_of(checkpoint, name, start, stop)
            moments = found.moments(weight)
            assert len(moments) == -(-(stop - start) // 128)
            for index, block in enumerate(moments):
                low, high = start + index * 128, min(start + index * 128 + 128, stop)
                np.testing.assert_array_equal(block[: high - low, : high - low], dense[low:high, low:high])
                assert not block[high - low :].any()
            np.testing.assert_array_equal(found.absmax(weight), np.arange(start, stop))
            np.testing.assert_array_equal(found.samples(weight), samples[:, start:stop])


def test_moments_are_those_of_what_a_smoothed_weight_reads(calibration: Path, opened: Checkpoint) -> None:
    factors = np.exp2(np.arange(72) % 5 - 2).astype(np.float32)
    weight, found = part_of(opened, DOWN), read_calibration(calibration, opened)
    plain, smoothed = found.moments(weight), found.moments(weight.times(columns=Factors(lambda: factors)))
    np.testing.assert_array_equal(smoothed[0, :72, :72], plain[0, :72, :72] / factors / factors[:, None])


def refused(path: Path, checkpoint: Checkpoint, reason: str) -> None:
    with pytest.raises(CompileError, match=reason) as caught:
        read_calibration(path, checkpoint)
    assert "enginery calibrate" in str(caught.value) or "upgrade" in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_file_of_another_checkpoint_is_refused(calibration: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    with open_checkpoint(tmp_path) as other:
        refused(calibration, other, "another checkpoint: wanted fingerprint [0-9a-f]{16}.*got [0-9a-f]{16}")


@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.layers.2.self_attn.v_proj.bias"])
def test_one_number_makes_another_checkpoint(name: str, calibration: Path, checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = {key: value.copy() for key, value in load_file(checkpoint / "model.safetensors").items()}
    tensors[name].reshape(-1)[3] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as other:
        refused(calibration, other, "another checkpoint")


def test_what_is_no_calibration_file_is_refused(
    calibration: Path, checkpoint: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    refused(checkpoint / "model.safetensors", opened, "wanted a calibration file, got safetensors of the format 'pt'")
    refused(checkpoint / "config.json", opened, "no calibration file, or damaged")
    refused(tmp_path / "missing", opened, "no such file")
    refused(tmp_path, opened, "not a file")
    data = calibration.read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        refused(tmp_path / "cut", opened, "no calibration file, or damaged")


def set_inputs(metadata: dict[str, str], change: Callable[[dict[str, list[str]]], None]) -> None:
    inputs = json.loads(metadata["inputs"])
    change(inputs)
    metadata["inputs"] = json.dumps(inputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, m: m.update(version="0"), "version 0; this release reads version 1"),
        (lambda t, m: m.update(version="9" * 5000), "version 99999999999999999999; this"),
        (lambda t, m: m.update(version="new"), "version new"),
        (lambda t, m: m.update(tokens="many"), "'tokens' is damaged"),
        (lambda t, m: m.update(tokens="9" * 5000), "'tokens' is damaged"),
        (lambda t, m: m.pop("data"), "damaged: wanted data of sha256 None"),
        (lambda t, m: t.pop(f"{DOWN}.samples"), r"samples: wanted F32 \[1, 72\], got nothing"),
        (
            lambda t, m: t.update({f"{DOWN}.samples": np.ones((65, 72), np.float32)}),
            r"samples: wanted F32 \[64, 72\], got F32 \[65, 72\]",
        ),
        (
            lambda t, m: t.update({f"{DOWN}.samples": np.ones(72, np.float32)}),
            r"samples: wanted F32 \[64, 72\], got F32 \[72\]",
        ),
        (lambda t, m: m.update(inputs="[]"), "'inputs' is damaged"),
        (lambda t, m: m.update(inputs="{"), "'inputs' is damaged"),
        (lambda t, m: m.pop("inputs"), "'inputs' is damaged"),
        (lambda t, m: t.pop(f"{DOWN}.absmax"), r"absmax: wanted F32 \[72\], got nothing"),
        (lambda t, m: t.update({f"{DOWN}.absmax": np.ones(71, np.float32)}), r"wanted F32 \[72\], got F32 \[71\]"),
        (lambda t, m: t.update({f"{DOWN}.absmax": np.ones(72, np.float16)}), r"wanted F32 \[72\], got F16 \[72\]"),
        (
            lambda t, m: t.update({f"{DOWN}.moments": np.ones((2, 128, 128), np.float32)}),
            r"moments: wanted F32 \[1, 128, 128\], got F32 \[2, 128, 128\]",
        ),
    ],
)
def test_faults_are_told(
    change: Callable[[Any, Any], None], reason: str, calibration: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    refused(rewrite(calibration, tmp_path / "c", change), opened, reason)


def test_a_file_that_lacks_a_tensor_is_refused(calibration: Path, opened: Checkpoint, tmp_path: Path) -> None:
    changed = rewrite(calibration, tmp_path / "c", lambda t, m: set_inputs(m, lambda inputs: inputs.pop(DOWN)))
    found = read_calibration(changed, opened)
    with pytest.raises(CompileError, match=f"nothing of the input of {DOWN}"):
        found.require([part_of(opened, DOWN)])


@pytest.mark.parametrize("kind", ["absmax", "moments", "samples"])
def test_numbers_that_are_none_are_refused(kind: str, calibration: Path, opened: Checkpoint, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[f"{DOWN}.{kind}"] = np.full_like(tensors[f"{DOWN}.{kind}"], np.nan)

    found: Calibration = read_calibration(rewrite(calibration, tmp_path / "c", damage), opened)
    with pytest.raises(CompileError, match=rf"{DOWN}\.{kind} holds what is no finite number"):
        getattr(found, kind)(part_of(opened, DOWN))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_bit_that_has_changed_is_found(place: float, calibration: Path, opened: Checkpoint, tmp_path: Path) -> None:
    data = bytearray(calibration.read_bytes())
    start = len(data) - len(data_of(calibration))
    data[start + int(place * (len(data) - start - 1))] ^= 4
    (tmp_path / "c").write_bytes(data)
    refused(tmp_path / "c", opened, "damaged: wanted data of sha256")
