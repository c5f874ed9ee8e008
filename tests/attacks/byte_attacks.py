"""Damage that knows nothing of the format: truncated files, flipped bytes, things that are no files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from .forge import MANIFEST, WEIGHTS, Attack, Attacks, Forge

_FLIPS, _LENGTHS = 60, 12


def unsigned(forge: Forge) -> Attacks:
    """What a disk or a network does: the manifest does not know. Weights are hashed later: see signed()."""
    for name, data in forge.files.items():
        if name != MANIFEST:
            yield from _damages(name, data, False, _FLIPS // 4 if name != WEIGHTS else 4)


def signed(forge: Forge) -> Attacks:
    """What an attacker does: the manifest agrees."""
    for name, data in forge.files.items():
        yield from _damages(name, data, True, _FLIPS)


def _damages(name: str, data: bytes, sign: bool, flips: int) -> Attacks:
    chance = random.Random(name)

    def write(changed: bytes) -> Callable[[Forge], None]:
        return lambda forge: forge.write(name, changed, sign)

    lengths = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *(chance.randrange(len(data)) for _ in range(_LENGTHS))}
    for length in sorted(length for length in lengths if length < len(data)):
        yield Attack(f"{name} cut to {length}", write(data[:length]))
    yield Attack(f"{name} with a byte more", write(data + b"\0"))
    # Headers are where lengths and offsets are; data only makes wrong numbers.
    reach = min(len(data), 4096) if name == WEIGHTS else len(data)
    for _ in range(flips):
        at, value = chance.randrange(reach), chance.randrange(1, 256)
        yield Attack(f"{name} byte {at} ^ {value}", write(data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]))
    for _ in range(flips // 6):
        at, size = chance.randrange(reach), chance.randrange(1, 40)
        yield Attack(f"{name} noise at {at}", write(data[:at] + chance.randbytes(size) + data[at + size :]))
        yield Attack(f"{name} without {size} at {at}", write(data[:at] + data[at + size :]))


def special_files(forge: Forge) -> Attacks:
    """A directory, FIFO, device, socket or dangling link in the place of each file."""
    for name in forge.files:
        for what, make in _SPECIAL.items():
            yield Attack(f"{what} for {name}", _replace(name, make))


def _replace(name: str, make: Callable[[str], object]) -> Callable[[Forge], None]:
    def apply(forge: Forge) -> None:
        forge.path(name).unlink()
        make(str(forge.path(name)))

    return apply


_SPECIAL: dict[str, Callable[[str], object]] = {
    "nothing": lambda path: None,
    "directory": os.mkdir,
    "fifo": os.mkfifo,
    "link to nothing": lambda path: os.symlink("/nowhere", path),
    "link to itself": lambda path: os.symlink(path, path),
    "link to a directory": lambda path: os.symlink("/", path),
    "zeros": lambda path: os.symlink("/dev/zero", path),
    "a terminal": lambda path: os.symlink("/dev/tty", path),
    "a file without end": lambda path: os.symlink("/proc/kcore", path),
    "empty file of the kernel": lambda path: os.symlink("/proc/self/mem", path),
}
