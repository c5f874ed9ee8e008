"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from enginery.engines.errors import EngineryError
from enginery.engines.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("0", 0),
        ("3K", 3_000),
        ("3kB", 3_000),
        ("3KiB", 3 << 10),
        ("500M", 500_000_000),
        ("64MiB", 64 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 4 gib ", 4 << 30),
        ("2TB", 2_000_000_000_000),
        ("2TiB", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "4X", "-1", "1.5.2G", "GB", "4 Gi B", "1e9", "4iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(EngineryError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (1_240_000_000, "1.24 GB"),
        (99_990_000, "99.99 MB"),
        (123_456_789, "123 MB"),
        (5_000_000_000_000, "5.00 TB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text
