"""Defaults that the compiler's memory plan and the runtime share."""

from __future__ import annotations

# A CPU server does best with small steps: long chunks of prompts would stop everybody's stream (DESIGN section 6).
MAX_NUM_BATCHED_TOKENS = 128
# Of prompts beside sequences that decode: enough rows to keep the cores busy, few enough to keep the streams steady.
MIXED_PROMPT_TOKENS = 48
MAX_NUM_SEQS = 64

# A GPU reads its weights once for a step, however many tokens it has.
CUDA_MAX_NUM_BATCHED_TOKENS = 8192
CUDA_MAX_NUM_SEQS = 256
GPU_MEMORY_UTILIZATION = 0.9

# Logits that the requests of one step have changed: penalties count every token of a prompt.
MOST_EDITS = 1 << 16

# What every thread, and what a rank's threads together, have as scratch: kThreadScratchBytes and kSharedScratchBytes
# of plugins/kernel.h. A test compares them.
THREAD_SCRATCH_BYTES = 1 << 20
SHARED_SCRATCH_BYTES = 1 << 20


def default_step(is_cuda: bool) -> tuple[int, int]:
    """Tokens of a step and sequences that run at once, of a GPU target or a CPU one."""
    if is_cuda:
        return CUDA_MAX_NUM_BATCHED_TOKENS, CUDA_MAX_NUM_SEQS
    return MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS


def step_limits(max_num_batched_tokens: int, max_num_seqs: int, max_blocks: int) -> dict[str, int]:
    """The largest values of a step's variables. Rows: one for each sequence, and room for prompts that are scored.

    max_blocks: of the longest sequence
    """
    tokens = max(max_num_batched_tokens, max_num_seqs)
    return {
        "tokens": tokens,
        "rows": max_num_seqs,
        "sequences": max_num_seqs,
        "decodes": max_num_seqs,
        "tiles": tokens,
        "max_blocks": max_blocks,
        **dict.fromkeys(("drawn", "edited", "ranked", "listed"), max_num_seqs),
        "edits": MOST_EDITS,
    }
