"""How many blocks of state an engine gets, for the memory it may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..engines.errors import CapacityError
from ..engines.plan import StateGroup
from ..engines.sizes import format_bytes

# Of the memory that is free, what the state may take when nobody says how much.
_DEFAULT_SHARE = 0.3
# Each costs the block manager memory of its own, whatever it holds.
_MOST_BLOCKS = 1 << 24


@dataclass(frozen=True)
class StateShape:
    """What decides how much state a sequence needs. world_size: ranks, each with state of its own."""

    groups: tuple[StateGroup, ...]
    world_size: int
    max_num_batched_tokens: int

    def blocks_of_sequence(self, group: StateGroup, length: int) -> int:
        """The most blocks that a sequence of `length` tokens holds; a window keeps what it sees and a step's tokens."""
        blocks = -(-length // group.block_size)
        if not group.window:
            return blocks
        span = group.window - 1 + min(self.max_num_batched_tokens, length)
        return min(blocks, (span + group.block_size - 2) // group.block_size + 1)

    def sequence_bytes(self, length: int) -> int:
        """Bytes of one sequence of `length` tokens, over all ranks."""
        return self._bytes([self.blocks_of_sequence(group, length) for group in self.groups])

    def blocks_for(self, total_tokens: int, num_seqs: int, max_model_len: int) -> list[int]:
        """Blocks of each group for `total_tokens` spread over `num_seqs` sequences, one of which may be the longest."""
        blocks = []
        for group in self.groups:
            longest = self.blocks_of_sequence(group, max_model_len)
            most = num_seqs * longest if group.window else _MOST_BLOCKS
            blocks.append(max(longest, min(total_tokens // group.block_size, most, _MOST_BLOCKS)))
        return blocks

    def largest(self, budget: int, num_seqs: int, max_model_len: int) -> list[int]:
        """The most blocks of each group that `budget` bytes hold."""
        low, high = 0, budget // max(1, min(group.block_bytes for group in self.groups)) * self.groups[0].block_size
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bytes(self.blocks_for(middle, num_seqs, max_model_len)) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.blocks_for(low, num_seqs, max_model_len)

    def longest_sequence(self, budget: int, most: int) -> int:
        """The longest sequence whose state `budget` bytes hold, at most `most` tokens."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequence_bytes(middle) <= budget else (low, middle - 1)
        return low

    def _bytes(self, blocks: list[int]) -> int:
        each = sum(count * group.block_bytes for count, group in zip(blocks, self.groups, strict=True))
        return each * self.world_size


def choose_blocks(
    shape: StateShape, max_model_len: int, max_num_seqs: int, given_bytes: int | None, activation_bytes: int = 0
) -> list[int]:
    """Blocks of each state group. Raises CapacityError where not even one sequence fits, or memory does not suffice.

    given_bytes       the state's memory over all ranks; None takes what the sequences could need, at most a share of
                      what is free
    activation_bytes  what steps take beside it
    """
    if not shape.groups:
        return []
    needed = shape.sequence_bytes(max_model_len)
    wanted = max_num_seqs * needed
    budget = given_bytes if given_bytes is not None else min(wanted, int(available_memory() * _DEFAULT_SHARE))
    if needed > budget:
        raise CapacityError(_too_small(shape, max_model_len, needed, budget, given_bytes is not None))
    if budget + activation_bytes > (free := available_memory()):
        raise CapacityError(
            f"The KV cache is to have {budget} bytes ({format_bytes(budget)}) and activations take "
            f"{format_bytes(activation_bytes)}; {format_bytes(free)} are free. Give less with "
            f"--kv-cache-memory-bytes, or a smaller --max-num-batched-tokens or --max-num-seqs."
        )
    return shape.largest(budget, max_num_seqs, max_model_len)


def _too_small(shape: StateShape, max_model_len: int, needed: int, budget: int, given: bool) -> str:
    source = "kv_cache_memory_bytes gives" if given else f"{_DEFAULT_SHARE:.0%} of the free memory is"
    longest = shape.longest_sequence(budget, max_model_len)
    shorter = f", or run it with --max-model-len {longest} or less" if longest else ""
    return (
        f"The KV cache is too small: one sequence of max_model_len {max_model_len} needs {needed} bytes "
        f"({format_bytes(needed)}), {source} {budget} ({format_bytes(budget)}). "
        f"Give it --kv-cache-memory-bytes {needed}{shorter}."
    )


def available_memory() -> int:
    """Bytes that this process could still take: the machine's free memory, or its container's if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used))
