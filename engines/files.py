"""Reading files of a directory that nobody vouches for: sizes bounded, special files refused without being opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import EngineFormatError


def is_plain_name(name: str) -> bool:
    """True for a name without separators, leading dot, control characters or surprising length."""
    return (
        0 < len(name) <= 255
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and name.isprintable()
    )


def require_regular(path: Path, what: str) -> int:
    """Size of the regular file at `path` (links are followed). Raises EngineFormatError, without opening it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        reason = "is a link to nothing" if path.is_symlink() else "is missing"
        raise EngineFormatError(f"{path}: {what} {reason}. Build the engine again, or copy it again whole.") from None
    except (OSError, ValueError) as error:
        raise EngineFormatError(f"{path}: {what} cannot be read: {error}.") from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a directory",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        raise EngineFormatError(f"{path}: {what} must be a regular file, but is {kind}. Build the engine again.")
    return status.st_size


def read_bounded(path: Path, what: str, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes. Raises EngineFormatError."""
    size = require_regular(path, what)
    if size > limit:
        raise EngineFormatError(
            f"{path}: {what} has {size} bytes; at most {limit} are allowed. Build the engine again."
        )
    try:
        # O_NONBLOCK: were the file changed for a FIFO meanwhile, opening it would not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(limit + 1)[:limit]
    except OSError as error:
        raise EngineFormatError(f"{path}: {what} cannot be read: {error}.") from None
