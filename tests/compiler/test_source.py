"""Where checkpoints come from: directories, and hub ids through the hub's own cache and offline switch."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from enginery.compiler.checkpoint.source import find_checkpoint
from enginery.engines.errors import CheckpointError
from huggingface_hub.errors import HFValidationError

PROGRAM = """
import sys
from enginery.compiler.checkpoint.source import find_checkpoint
from enginery.engines.errors import CheckpointError
try:
    source = find_checkpoint(sys.argv[1])
    print(source.name, source.revision, (source.directory / "config.json").read_text())
except CheckpointError as error:
    print("CheckpointError:", error)
"""


def offline(model: str, cache: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", PROGRAM, model]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_a_hub_id_is_found_in_the_hubs_cache(tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "snapshots" / revision / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert offline("owner/name", tmp_path) == f"owner/name {revision} {{}}\n"


def test_offline_a_hub_id_that_is_not_cached_is_refused(tmp_path: Path) -> None:
    answer = offline("owner/name", tmp_path)
    assert answer.startswith("CheckpointError: owner/name: not a local directory, not in the hub's cache")
    assert "hf download owner/name" in answer


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_what_is_neither_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(str(tmp_path / "x.gguf"))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["n" * 5000, "~nobody-of-that-name/model"])
def test_a_path_that_the_system_refuses_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        find_checkpoint(name)


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/model").directory == tmp_path / "model"


def test_pickles_and_other_formats_are_not_even_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        wanted.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint("owner/name").revision == tmp_path.name
    for name in ("pytorch_model.bin", "model.gguf", "model.pth", "modeling_evil.py", "model.onnx"):
        assert not any(fnmatch(name, pattern) for pattern in wanted)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "x.jinja"):
        assert any(fnmatch(name, pattern) for pattern in wanted)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HFValidationError("no such id\nand more"), "owner/name: the hub refused it: no such id Check the id"),
        (OSError("No space left on device"), "could not be downloaded: No space left on device. It can be resumed"),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=reason) as raised:
        find_checkpoint("owner/name")
    assert "\n" not in str(raised.value)
