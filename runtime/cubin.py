"""What a cubin says of itself: the architecture that it is for, and how large its kernel's arguments are.

So that machine code in another's place is refused before any device is asked. Nothing is said of what is no ELF file,
or of a kind that is not known here: whether it is whole, csrc/cubin.cpp looks, and the driver refuses what it cannot
run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ..engines.plan import KernelImage

# Of an ELF file for GPUs: by its ABI's version, at which bit of e_flags the architecture begins.
_ARCH_BIT = {7: 0, 8: 8}
_EM_CUDA = 190
_SECTION_BYTES = 64
# Attributes of .nv.info: with a value of their own size, and of those one for each parameter.
_SIZED, _PARAMETER = 4, 0x17


def cubin_faults(cubin: bytes, kernel: KernelImage) -> Iterator[str]:
    """What does not fit the plan."""
    arch = architecture(cubin)
    if arch not in (None, kernel.arch):
        yield f"is for compute capability {arch}, the plan says {kernel.arch}"
    given = [8 if kind == "pointer" else 4 for kind in kernel.parameters] + [8] * kernel.hidden
    taken = argument_bytes(cubin, kernel.symbol)
    if taken not in (None, given):
        yield f"takes arguments of {_listed(taken)} bytes; the plan gives some of {_listed(given)}"


def architecture(cubin: bytes) -> int | None:
    """90 for compute capability 9.0; None where it is not told."""
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or cubin[18:20] != _EM_CUDA.to_bytes(2, "little"):
        return None
    bit = _ARCH_BIT.get(cubin[8])
    return None if bit is None else int.from_bytes(cubin[48:52], "little") >> bit & 0xFF


def argument_bytes(cubin: bytes, symbol: str) -> list[int] | None:
    """Of each argument of the kernel, in order; None where they are not told."""
    if architecture(cubin) is None:
        return None
    try:
        info = _section(cubin, f".nv.info.{symbol}".encode() + b"\0")
        return None if info is None else _arguments(info)
    except struct.error:
        return None


def _section(cubin: bytes, name: bytes) -> bytes | None:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + _SECTION_BYTES * index) for index in range(count)]
    if names >= count:
        return None
    begin = sections[names][1]
    for place, offset, size in sections:
        if cubin[begin + place : begin + place + len(name)] == name:
            return cubin[offset : offset + size]
    return None


def _arguments(info: bytes) -> list[int]:
    found, place = {}, 0
    while place < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if kind == _SIZED:
            if attribute == _PARAMETER:
                number, sizes = struct.unpack_from("<4xH2xI", info, place)
                found[number] = sizes >> 18
            place += size
    return [found[number] for number in sorted(found)]


def _listed(sizes: list[int] | None) -> str:
    return ", ".join(map(str, sizes or ())) or "no"
