"""An engine's directory: written beside its place, then renamed, so that half an engine is never seen."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engines.errors import CompileError
from ..engines.manifest import MANIFEST


def require_vacant(output: Path, force: bool) -> None:
    """Raises CompileError unless an engine may be put at `output`."""
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise CompileError(f"{output}: exists. Choose another directory, or replace it with --force.")
    if output.is_symlink() or not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise CompileError(f"{output}: is no engine, so --force does not replace it. Remove it, or choose another.")


@contextmanager
def directory_beside(output: Path) -> Iterator[Path]:
    """An empty directory beside `output`, locked against other builds and removed at the end if it is still there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.building"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.exists(partial) and os.path.samestat(os.stat(partial), os.fstat(lock))
        except BlockingIOError:
            locked = False
        if not locked:  # or it was renamed into place between opening and locking
            raise CompileError(f"{output}: another build is writing it now. Wait for it, or choose another directory.")
        try:
            for leftover in partial.iterdir():  # of a build that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
        finally:
            if os.path.exists(partial) and os.path.samestat(os.stat(partial), os.fstat(lock)):
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def publish(partial: Path, output: Path, force: bool) -> None:
    """Renames the finished engine into place; an engine that it replaces goes first, its manifest before the rest."""
    require_vacant(output, force)  # again: a build may take long, and what came meanwhile is not ours to replace
    if output.exists():
        (output / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(output)
    os.rename(partial, output)


def require_space(directory: Path, needed: int) -> None:
    """Raises OSError, as writing would, if the disk of `directory` has less than `needed` bytes free."""
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full(output: Path, needed: int) -> str:
    """What is said of a full disk."""
    free = shutil.disk_usage(output.parent).free
    return (
        f"{output}: the disk is full: the engine needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. "
        f"Free some space, or choose a directory on another disk. Nothing was left behind."
    )
