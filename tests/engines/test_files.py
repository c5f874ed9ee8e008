"""Reading files of a directory that nobody vouches for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.files import is_plain_name, read_bounded, require_regular


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_files_up_to_the_limit_are_read_whole(size: int, tmp_path: Path) -> None:
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    assert read_bounded(tmp_path / "file", "it", 100) == content
    assert require_regular(tmp_path / "file", "it") == size


def test_a_file_that_grows_while_it_is_read_is_cut_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(500))
    monkeypatch.setattr("enginery.engines.files.require_regular", lambda path, what: 3)
    assert len(read_bounded(tmp_path / "file", "it", 100)) == 100


@pytest.mark.parametrize("name", ["\0", "x" * 300, "file/below"])
def test_paths_that_the_system_refuses_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineFormatError, match="it cannot be read"):
        require_regular(tmp_path / name, "it")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(EngineFormatError, match=r"it cannot be read.*Permission denied"):
        read_bounded(tmp_path / "file", "it", 100)


@pytest.mark.parametrize("name", ["manifest.json", "x" * 255, "plan.rank0.msgpack", "é.txt", "a b"])
def test_names_that_are_plain(name: str) -> None:
    assert is_plain_name(name)
