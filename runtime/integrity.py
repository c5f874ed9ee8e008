"""Hashing weights: chunk by chunk, before serving or while it goes on."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..engines.errors import EngineFormatError
from ..engines.manifest import CHUNK_BYTES, FileEntry
from .files import EngineFiles

_BLOCK_BYTES = 1 << 20


def find_damage(files: EngineFiles, stop: Callable[[], bool] = lambda: False) -> str | None:
    """The first weights chunk that is not as the manifest says, in words; None where all are, or `stop` says so."""
    for name, entry in files.manifest.files.items():
        if entry.role != "weights":
            continue
        wanted = entry.chunks or (entry.sha256,)
        for index, found in enumerate(_hashes(files.path(name), entry, stop)):
            if found != wanted[index]:
                return (
                    f"{files.path(name)}: chunk {index} (bytes {index * CHUNK_BYTES} on) is damaged: the manifest says "
                    f"sha256 {wanted[index]}, found {found}. Copy or build the engine again."
                )
    return None


def verify_weights(files: EngineFiles) -> None:
    """Raises EngineFormatError naming the first damaged chunk."""
    if damage := find_damage(files):
        raise EngineFormatError(damage)


def _hashes(path: Path, entry: FileEntry, stop: Callable[[], bool]) -> Iterator[str]:
    chunk_bytes = CHUNK_BYTES if entry.chunks else max(entry.size, 1)
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            for start in range(0, max(entry.size, 1), chunk_bytes):
                digest, remaining = hashlib.sha256(), min(chunk_bytes, entry.size - start)
                while remaining and (count := file.readinto(buffer[: min(remaining, _BLOCK_BYTES)])):
                    if stop():
                        return
                    digest.update(buffer[:count])
                    remaining -= count
                yield digest.hexdigest()
    except OSError as error:
        raise EngineFormatError(f"{path}: cannot be read: {error}.") from None


class BackgroundWork:
    """What an engine does beside serving, in a thread of the lowest priority, once the first token is out or `delay_s`
    has gone by: hashes the weights, if `files` are given, and where they are sound calls `settle`, which stop_settling
    makes return soon.
    """

    def __init__(
        self,
        files: EngineFiles | None,
        on_damage: Callable[[str], None],
        settle: Callable[[], None] = lambda: None,
        stop_settling: Callable[[], None] = lambda: None,
        delay_s: float = 2.0,
    ) -> None:
        self._files, self._on_damage, self._delay_s = files, on_damage, delay_s
        self._settle, self._stop_settling = settle, stop_settling
        self._begin, self._stopped = threading.Event(), threading.Event()
        self.verified, self.settled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="enginery-background", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Ends the delay."""
        self._begin.set()

    def stop(self) -> None:
        """Ends the work, finished or not."""
        self._stopped.set()
        self._stop_settling()
        self._begin.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        self._begin.wait(self._delay_s)
        try:
            # On Linux this is of the thread alone: serving must not feel it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            damage = self._find_damage()
            if damage and not self._stopped.is_set():
                self._on_damage(damage)
            self.verified.set()
            if not damage and not self._stopped.is_set():
                self._settle()
        finally:  # whoever waits must not wait for ever
            self.verified.set()
            self.settled.set()

    def _find_damage(self) -> str | None:
        if self._files is None:
            return None
        try:
            return find_damage(self._files, self._stopped.is_set)
        except EngineFormatError as error:
            return str(error)
