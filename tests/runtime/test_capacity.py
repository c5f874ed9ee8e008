"""Blocks of state for the memory there is: what a sequence holds at most, and what is told of too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from enginery.engines.errors import CapacityError
from enginery.engines.plan import StateGroup
from enginery.runtime import capacity
from enginery.runtime.capacity import StateShape, available_memory, choose_blocks

FULL = StateGroup("full", "full", 0, 1, 32, 1000, 2, 16, "bf16")
WINDOW = StateGroup("window64", "window", 64, 1, 32, 1000, 2, 16, "bf16")


@pytest.mark.parametrize(
    ("group", "length", "step", "blocks"),
    [
        (FULL, 1, 128, 1),
        (FULL, 32, 128, 1),
        (FULL, 33, 128, 2),
        (WINDOW, 33, 128, 2),
        (WINDOW, 4096, 1, 3),  # 64 tokens that may begin in the middle of a block
        (WINDOW, 4096, 2, 3),  # 65, of which the first may be the last of its block
        (WINDOW, 4096, 3, 4),
        (WINDOW, 4096, 128, 7),
        (WINDOW, 96, 128, 3),
    ],
)
def test_a_window_holds_what_it_sees_and_a_step(group: StateGroup, length: int, step: int, blocks: int) -> None:
    assert StateShape((group,), 1, step).blocks_of_sequence(group, length) == blocks


@pytest.mark.parametrize("step", [1, 2, 31, 32, 33, 100])
def test_no_window_ever_holds_more(step: int) -> None:
    """Counted out: tokens up to `end` are computed in a step of at most `step`, wherever that begins."""
    most = StateShape((WINDOW,), 1, step).blocks_of_sequence(WINDOW, 1 << 20)
    held = [(end - 1) // 32 - max(end - step - 63, 0) // 32 + 1 for end in range(1, 500)]
    assert max(held) == most


def test_without_a_budget_it_is_what_the_sequences_need_at_most_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StateShape((FULL,), 2, 128)
    monkeypatch.setattr(capacity, "available_memory", lambda: 1 << 40)
    assert choose_blocks(shape, 64, 5, None) == [10]
    monkeypatch.setattr(capacity, "available_memory", lambda: 40_000)
    assert choose_blocks(shape, 64, 50, None) == [6]  # 30 % of 40,000 bytes, 1,000 of each rank


def test_too_little_is_told_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StateShape((FULL,), 1, 128)
    with pytest.raises(CapacityError) as raised:
        choose_blocks(shape, 1000, 5, 3_500)
    text = str(raised.value)
    assert "one sequence of max_model_len 1000 needs 32000 bytes" in text
    assert "kv_cache_memory_bytes gives 3500" in text
    assert "--kv-cache-memory-bytes 32000, or run it with --max-model-len 96 or less." in text
    with pytest.raises(CapacityError, match=r"--kv-cache-memory-bytes 32000\.$"):
        choose_blocks(shape, 1000, 5, 10)
    monkeypatch.setattr(capacity, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="30% of the free memory is 300"):
        choose_blocks(shape, 1000, 5, None)


def test_blocks_have_an_end_whatever_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_memory", lambda: 1 << 61)
    for group in (FULL, WINDOW):
        assert choose_blocks(StateShape((group,), 1, 128), 64, 1 << 40, 1 << 60) == [1 << 24]


@pytest.mark.parametrize("length", [1, 32, 33, 200, 500, 4096])
def test_memory_for_one_sequence_holds_one_sequence_of_every_group(length: int) -> None:
    shape = StateShape((FULL, replace(WINDOW, block_bytes=50_000)), 1, 128)
    blocks = choose_blocks(shape, length, 8, shape.sequence_bytes(length))
    assert blocks == [shape.blocks_of_sequence(group, length) for group in shape.groups]


def test_no_groups_have_no_blocks() -> None:
    assert choose_blocks(StateShape((), 1, 128), 64, 5, None) == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemFree: 3 kB\nMemAvailable: 5 kB\n"}, 5120),
        ({"meminfo": "MemAvailable: 5 kB\n", "max": "max\n", "current": "1000\n"}, 5120),
        ({"meminfo": "MemAvailable: 5 kB\n", "max": "3000\n", "current": "1000\n"}, 2000),
        ({"meminfo": "MemAvailable: 5 kB\n", "max": "90000\n", "current": "1000\n"}, 5120),
        ({"meminfo": "MemAvailable: 5 kB\n", "max": "1000\n", "current": "3000\n"}, 0),
    ],
)
def test_free_memory_is_the_machines_or_the_containers(
    files: dict[str, str], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        name = path.name.removeprefix("memory.")
        if name not in files:
            raise FileNotFoundError
        return files[name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == wanted


def test_without_proc_it_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "MemAvailable:\n", "MemAvailable: many kB\n"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text if path.name == "meminfo" else "max")
        assert available_memory() > 0
