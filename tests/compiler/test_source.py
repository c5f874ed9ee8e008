"""Where checkpoints come from: directories, and hub ids through the hub's own cache and offline switch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from enginery.compiler.checkpoint.source import find_checkpoint
from enginery.engines.errors import CheckpointError

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
