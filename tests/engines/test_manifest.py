"""The manifest: stable, believed in nothing, and special files in an engine's place are refused without being read."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.files import is_plain_name, read_bounded
from enginery.engines.manifest import (
    LARGEST_MANIFEST_BYTES,
    MANIFEST,
    FileEntry,
    Manifest,
    Model,
    RunningHash,
    encode_manifest,
    hash_file,
    read_manifest,
)
from hypothesis import given
from hypothesis import strategies as st

SHA = "0" * 64
FILES = {
    "plan.rank0.msgpack": FileEntry("plan", "msgpack", 3, SHA, (), 0),
    "weights.rank0.safetensors": FileEntry("weights", "safetensors", 5, SHA, (SHA,), 0),
    "config.json": FileEntry("config", "json", 2, SHA),
    "tokenizer.json": FileEntry("tokenizer", "json", 2, SHA),
}
ENGINE = Manifest(
    Model("llama", "m", "", 99, 512, 1000), "cpu-avx2", "int8", "bf16", 256, 1, {"weights": 5}, FILES, True
)


def write(directory: Path, change: Any = lambda document: None) -> Path:
    document = json.loads(encode_manifest(ENGINE))
    change(document)
    (directory / MANIFEST).write_text(json.dumps(document))
    return directory


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest(ENGINE))
    assert read_manifest(tmp_path) == ENGINE
    assert encode_manifest(read_manifest(tmp_path)) == encode_manifest(ENGINE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["versions"].update(plan=1), "plan version 1 is newer than 0"),
        (lambda d: d["versions"].update(manifest=7), "manifest version 7 is newer than 0"),
        (lambda d: d["versions"].update(moons=0), "moons"),
        (lambda d: d.update(format="tarball"), "enginery-engine"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(batch_invariant=1), "batch_invariant: wanted true or false"),
        (lambda d: d.pop("batch_invariant"), "'batch_invariant' is missing"),
        (lambda d: d.pop("target"), "'target' is missing"),
        (lambda d: d["files"].update({"../evil": d["files"]["config.json"]}), "plain file name"),
        (lambda d: d["files"].update({"a/b": d["files"]["config.json"]}), "plain file name"),
        (lambda d: d["files"].update({MANIFEST: d["files"]["config.json"]}), "plain file name"),
        (lambda d: d["files"].pop("plan.rank0.msgpack"), "plan of rank 0"),
        (lambda d: d["files"]["config.json"].update(sha256="xyz"), "sha256 in hex"),
        (lambda d: d["files"]["config.json"].update(size=-1), "size"),
        (lambda d: d["files"]["config.json"].update(role="virus"), "virus"),
        (lambda d: d["files"]["weights.rank0.safetensors"].update(chunks=[SHA, SHA]), "chunks"),
        (lambda d: d["mesh"].update(tensor_parallel_size=2), "2 ranks"),
        (lambda d: d["model"].update(vocab_size=0), "vocab_size"),
        (lambda d: d["model"].update(vocab_size=1 << 25), "vocab_size"),
        (lambda d: d["model"].update(max_model_len=0), r"model\.max_model_len"),
        (lambda d: d["model"].update(max_model_len=1 << 32), r"model\.max_model_len"),
        (lambda d: d.update(max_model_len=0), r"manifest\.json\.max_model_len"),
        (lambda d: d.update(max_model_len=1 << 32), r"manifest\.json\.max_model_len"),
        (lambda d: d["versions"].pop("kernels"), "'kernels' is missing"),
        (lambda d: d["versions"].update(kernels=1), "kernels version 1 is newer than 0"),
        (lambda d: d["mesh"].update(ranks=[{"rank": 1, "tp": 1}]), "1 ranks"),
        (lambda d: d["mesh"].update(tensor_parallel_size=0, ranks=[]), "tensor_parallel_size"),
        (lambda d: d["files"].pop("weights.rank0.safetensors"), "weights of rank 0"),
        (lambda d: d["files"].pop("config.json"), "the role config"),
        (lambda d: d["files"].pop("tokenizer.json"), "the role tokenizer"),
        (lambda d: d["files"]["config.json"].update(rank=1024), "rank"),
        (lambda d: d["files"]["config.json"].update(sha256=SHA + "0"), "sha256 in hex"),
        (lambda d: d["files"]["config.json"].update(sha256=SHA.replace("0", "A")), "sha256 in hex"),
        (lambda d: d["files"]["weights.rank0.safetensors"].update(chunks=["x"]), r"chunks\[0\]: wanted a sha256"),
        (lambda d: d["files"].update({f"f{i}": d["files"]["config.json"] for i in range(5000)}), "at most 4096"),
        (lambda d: d["memory"].update(weights=-1), r"memory\.weights"),
    ],
)
def test_damaged_manifests_are_refused_by_name(change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        read_manifest(write(tmp_path, change))


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '"x"', "[" * 5000, "\xff"])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineFormatError):
        read_manifest(tmp_path)


def test_files_are_found_by_their_role_and_rank() -> None:
    second = {name.replace("rank0", "rank1"): replace(file, rank=1) for name, file in FILES.items() if file.rank == 0}
    engine = replace(ENGINE, files=FILES | second)
    assert [engine.of_role("plan", rank) for rank in range(3)] == ["plan.rank0.msgpack", "plan.rank1.msgpack", None]
    assert (engine.of_role("config"), engine.of_role("plan"), engine.of_role("template")) == ("config.json", None, None)
    assert engine.total_bytes() == 3 + 5 + 2 + 2 + 3 + 5


def test_bytes_do_not_depend_on_the_order_of_files() -> None:
    assert encode_manifest(replace(ENGINE, files=dict(reversed(FILES.items())))) == encode_manifest(ENGINE)


def test_names_stay_readable() -> None:
    named = replace(ENGINE, model=replace(ENGINE.model, source="模型"))
    assert "模型".encode() in encode_manifest(named)


def test_a_manifest_of_another_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest(ENGINE) + b" " * LARGEST_MANIFEST_BYTES)
    with pytest.raises(EngineFormatError, match=f"at most {LARGEST_MANIFEST_BYTES}"):
        read_manifest(tmp_path)


def test_a_directory_without_a_manifest_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineFormatError, match="build-engine MODEL"):
        read_manifest(tmp_path)
    with pytest.raises(EngineFormatError, match="does not exist"):
        read_manifest(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(EngineFormatError, match="is not a directory"):
        read_manifest(tmp_path / "file")


def _directory(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(os.mkfifo, "FIFO"), (_directory, "directory"), (_device, "device"), (_dangling, "link to nothing")],
)
def test_special_files_are_refused_without_being_read(make: Any, reason: str, tmp_path: Path) -> None:
    make(tmp_path / MANIFEST)
    with pytest.raises(EngineFormatError, match=reason):
        read_manifest(tmp_path)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EngineFormatError, match="at most 100"):
        read_bounded(tmp_path / "big", "it", 100)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "x" * 256, "/etc/passwd"])
def test_names_that_are_not_plain(name: str) -> None:
    assert not is_plain_name(name)


def test_weights_are_hashed_by_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginery.engines.manifest.CHUNK_BYTES", 4)
    (tmp_path / "w").write_bytes(b"0123456789")
    entry = hash_file(tmp_path / "w", "weights", "safetensors", 0)
    assert (entry.size, len(entry.chunks)) == (10, 3)
    assert entry.chunks == tuple(hashlib.sha256(part).hexdigest() for part in (b"0123", b"4567", b"89"))
    assert not hash_file(tmp_path / "w", "config", "json").chunks


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=40)), max_size=8), st.integers(1, 50))
def test_a_file_is_hashed_while_it_is_written(pieces: list[tuple[int, bytes]], chunk_bytes: int) -> None:
    """Each piece after a gap, which holds zeros."""
    running, content = RunningHash(chunk_bytes), b""
    for gap, data in pieces:
        running.update(memoryview(data), len(content) + gap)
        content += bytes(gap) + data
    chunks = [content[start : start + chunk_bytes] for start in range(0, max(len(content), 1), chunk_bytes)]
    assert running.digests() == tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)


def test_a_long_gap_is_hashed_as_zeros() -> None:
    running = RunningHash()
    running.update(b"x", 1_000_000)
    running.update(np.arange(3, dtype=np.int32).data, 1_000_001)
    content = bytes(1_000_000) + b"x" + np.arange(3, dtype=np.int32).tobytes()
    assert running.digests() == (hashlib.sha256(content).hexdigest(),)
