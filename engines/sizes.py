"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from .errors import EngineryError

_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def parse_bytes(text: str) -> int:
    """The bytes that "4GiB", "500M", "1.5 GB" or "4096" mean. Raises EngineryError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None:
        raise EngineryError(f"{text!r} is no size. Wanted a number of bytes, or one with a unit: 4GiB, 500MB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: int) -> str:
    """For people: "1.24 GB"."""
    for unit, size in (("TB", 1000**4), ("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count} bytes"
