"""What `--plan` tells: blocks of sequences over all ranks, and how many of them memory holds."""

from __future__ import annotations

import pytest
from enginery.compiler.memory_plan import MemoryPlan
from enginery.engines.plan import StateGroup
from enginery.runtime.capacity import StateShape

FULL = StateGroup("full", "full", 0, 1, 32, 3200, 2, 16, "bf16")
WINDOW = StateGroup("window64", "window", 64, 1, 32, 320, 2, 16, "bf16")


def plan(*groups: StateGroup, world_size: int = 1) -> MemoryPlan:
    return MemoryPlan(weights=1000, activations=500, num_threads=1, world_size=world_size, groups=groups)


def test_state_is_counted_in_blocks_over_all_ranks() -> None:
    assert plan(FULL, WINDOW).state_bytes_per_token == 110
    assert plan(FULL, WINDOW, world_size=2).state_bytes_per_token == 220
    assert [plan(FULL).sequence_bytes(length) for length in (1, 32, 33)] == [3200, 3200, 6400]
    assert plan(FULL, world_size=2).sequence_bytes(33) == 12800
    assert plan(FULL, WINDOW).sequence_bytes(64) == 2 * 3520


@pytest.mark.parametrize("length", [1, 50, 100, 200, 300, 5000])
@pytest.mark.parametrize("groups", [(FULL,), (WINDOW,), (FULL, WINDOW)])
def test_never_less_than_the_runtime_takes_and_a_block_more_at_most(
    groups: tuple[StateGroup, ...], length: int
) -> None:
    """The runtime's step is the default one here."""
    taken = StateShape(groups, 1, 128).sequence_bytes(length)
    assert (
        taken
        <= plan(*groups).sequence_bytes(length)
        <= taken + sum(group.block_bytes for group in groups if group.window)
    )


def test_memory_holds_what_fits_beside_weights_and_activations() -> None:
    sequence = plan(FULL).sequence_bytes(64)
    assert plan(FULL).largest_batch(1500 + 3 * sequence, 64) == 3
    assert plan(FULL).largest_batch(1500 + 3 * sequence - 1, 64) == 2
    assert plan(FULL).largest_batch(100, 64) == 0


def test_the_longest_of_a_batch_is_the_longest_that_fits() -> None:
    assert plan(FULL).largest_length(1500 + 4 * 3200 * 3, 4, 1000) == 96
    assert plan(FULL).largest_length(1500 + 4 * 3200 * 3 - 1, 4, 1000) == 64
    assert plan(FULL).largest_length(1 << 40, 4, 1000) == 1000
    assert plan(FULL).largest_length(1500, 1, 1000) == 0
