"""Weights are hashed by chunks, of every rank, to the end, and no longer than anybody wants to know."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.manifest import FileEntry, Manifest, Model, hash_file
from enginery.runtime.files import EngineFiles
from enginery.runtime.integrity import BackgroundWork, find_damage, verify_weights

CHUNK = 1000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineFiles:
    """Two ranks of three chunks each, the last one short, and a file that is no weights."""
    monkeypatch.setattr("enginery.engines.manifest.CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("enginery.runtime.integrity.CHUNK_BYTES", CHUNK)
    entries: dict[str, FileEntry] = {}
    for rank in range(2):
        (tmp_path / f"w{rank}").write_bytes(os.urandom(2 * CHUNK + 500))
        entries[f"w{rank}"] = hash_file(tmp_path / f"w{rank}", "weights", "safetensors", rank)
    (tmp_path / "config.json").write_bytes(b"{}")
    entries["config.json"] = replace(hash_file(tmp_path / "config.json", "config", "json"), sha256="0" * 64)
    model = Model("llama", "m", "", 99, 512, 1000)
    return EngineFiles(tmp_path, Manifest(model, "cpu-avx2", "int8", "bf16", 256, 2, {}, entries, True))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_sound_weights_are_sound(files: EngineFiles) -> None:
    assert find_damage(files) is None
    verify_weights(files)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("position", "chunk"), [(0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (2499, 2)])
def test_the_damaged_chunk_is_named(files: EngineFiles, rank: int, position: int, chunk: int) -> None:
    flip(files.directory / f"w{rank}", position)
    with pytest.raises(EngineFormatError, match=rf"w{rank}: chunk {chunk} \(bytes {chunk * CHUNK} on\) is damaged"):
        verify_weights(files)


def test_without_chunks_the_whole_file_is_one(files: EngineFiles) -> None:
    files.manifest.files["w1"] = replace(files.manifest.files["w1"], chunks=())
    assert find_damage(files) is None
    flip(files.directory / "w1", 2400)
    assert "w1: chunk 0" in str(find_damage(files))


def test_a_file_that_lost_its_end_is_damaged(files: EngineFiles) -> None:
    os.truncate(files.directory / "w0", 2100)
    assert "w0: chunk 2" in str(find_damage(files))


def test_a_file_that_cannot_be_read_is_an_error(files: EngineFiles) -> None:
    (files.directory / "w0").unlink()
    with pytest.raises(EngineFormatError, match="w0: cannot be read"):
        find_damage(files)


def test_a_check_that_is_stopped_says_nothing(files: EngineFiles) -> None:
    flip(files.directory / "w0", 0)
    assert find_damage(files, lambda: True) is None


class Damages(list[str]):
    """What a background check found, and an event that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.found = threading.Event()

    def __call__(self, damage: str) -> None:
        self.append(damage)
        self.found.set()


def test_damage_is_told_from_the_background(files: EngineFiles) -> None:
    flip(files.directory / "w1", 1500)
    damages = Damages()
    check = BackgroundWork(files, damages, delay_s=1000)
    check.begin()
    assert check.verified.wait(60)
    assert ["w1: chunk 1" in damage for damage in damages] == [True]
    check.stop()


def test_a_file_that_is_gone_is_told_too(files: EngineFiles) -> None:
    (files.directory / "w0").unlink()
    damages = Damages()
    check = BackgroundWork(files, damages, delay_s=0)
    assert check.verified.wait(60)
    assert ["cannot be read" in damage for damage in damages] == [True]


def test_nobody_hears_of_damage_after_the_stop(files: EngineFiles) -> None:
    flip(files.directory / "w0", 0)
    damages = Damages()
    check = BackgroundWork(files, damages, delay_s=1000)
    check.stop()
    assert check.verified.is_set()
    assert not damages


def test_who_hears_of_damage_may_stop_the_check(files: EngineFiles) -> None:
    flip(files.directory / "w0", 0)
    begun = threading.Event()
    checks: list[BackgroundWork] = []

    def end(damage: str) -> None:
        begun.wait(60)
        checks[0].stop()

    checks.append(BackgroundWork(files, end, delay_s=0))
    begun.set()
    assert checks[0].verified.wait(60)


def test_serving_does_not_feel_the_check(files: EngineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux the priority is the thread's alone."""
    calls: list[tuple[int, bool, int]] = []

    def setpriority(which: int, who: int, priority: int) -> None:
        calls.append((which, who == threading.main_thread().native_id, priority))

    monkeypatch.setattr(os, "setpriority", setpriority)
    assert BackgroundWork(files, Damages(), delay_s=0).verified.wait(60)
    assert calls == [(os.PRIO_PROCESS, False, 19)]


def test_nobody_waits_for_ever_for_work_that_broke_down(files: EngineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: told.append(arguments.exc_value))

    def settle() -> None:
        raise MemoryError

    work = BackgroundWork(files, Damages(), settle, delay_s=0)
    assert work.settled.wait(60)
    assert work.verified.is_set()
    work.stop()
    assert [type(each) for each in told] == [MemoryError]
