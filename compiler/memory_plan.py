"""What an engine will need, told before it is built: the numbers of `build-engine --plan` and of the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.defaults import (
    MAX_NUM_BATCHED_TOKENS,
    SHARED_SCRATCH_BYTES,
    THREAD_SCRATCH_BYTES,
    default_step,
    step_limits,
)
from ..engines.plan import Plan, StateGroup, plan_arena


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes over all ranks.

    weights      as mapped
    activations  of the default step with `num_threads` threads a rank: buffers and scratch
    groups       state groups of one rank, and world_size ranks hold each
    step_tokens  of the default step
    """

    weights: int
    activations: int
    num_threads: int
    world_size: int
    groups: tuple[StateGroup, ...]
    step_tokens: int = MAX_NUM_BATCHED_TOKENS

    @property
    def state_bytes_per_token(self) -> int:
        """While every group still grows: windows stop growing at their size."""
        return sum(group.block_bytes // group.block_size for group in self.groups) * self.world_size

    def sequence_bytes(self, length: int) -> int:
        """State of one sequence of `length` tokens, in whole blocks; a window keeps its tokens and a step's."""
        total = 0
        for group in self.groups:
            kept = min(length, group.window + self.step_tokens + group.block_size) if group.window else length
            total += -(-kept // group.block_size) * group.block_bytes
        return total * self.world_size

    def largest_batch(self, memory_bytes: int, length: int) -> int:
        """Sequences of `length` tokens that fit `memory_bytes` beside weights and activations."""
        return max(memory_bytes - self.weights - self.activations, 0) // self.sequence_bytes(length)

    def largest_length(self, memory_bytes: int, batch: int, max_model_len: int) -> int:
        """Tokens that each of `batch` sequences may have in `memory_bytes`, at most `max_model_len`."""
        low, high = 0, max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.largest_batch(memory_bytes, middle) >= batch else (low, middle - 1)
        return low


def plan_memory(
    plans: list[Plan], weights_bytes: int, num_threads: int, is_cuda: bool, max_model_len: int
) -> MemoryPlan:
    """The memory plan of an engine with these ranks, which serves sequences of up to `max_model_len` tokens.

    num_threads: of each rank, which a GPU has no scratch for
    """
    tokens, sequences = default_step(is_cuda)
    limits = step_limits(tokens, sequences, -(-max_model_len // plans[0].state_groups[0].block_size))
    activations = 0
    for plan in plans:
        arena = plan_arena(plan, limits)
        threads = num_threads * (arena.per_thread_bytes + THREAD_SCRATCH_BYTES)
        activations += arena.arena_bytes + (0 if is_cuda else threads + SHARED_SCRATCH_BYTES)
    return MemoryPlan(weights_bytes, activations, num_threads, len(plans), plans[0].state_groups, tokens)
