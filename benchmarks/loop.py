"""The serving loop's own time per step: scheduling, block tables, greedy sampling, on the null executor.

    python benchmarks/loop.py [--sequences 64] [--vocab 256] [--json FILE]

The loop runs on its own thread while this one drains it, as the server does; what the kernel takes to wake this thread
after a step is told apart, since on a virtual machine it may be more than all the rest. Also measured: the time from
submit() to the return of the wait() that brings the first token, on an idle loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from enginery.runtime._core import Core
from machine import save

PROMPT_TOKENS = 64


def make_core(sequences: int, vocab: int, output_tokens: int) -> Core:
    block_size = 32
    longest = PROMPT_TOKENS + output_tokens
    spec = {
        "ranks": [],
        "groups": [{"name": "full", "kind": "full", "window": 0, "block_size": block_size}],
        "num_blocks": [(sequences + 1) * (longest // block_size + 1)],
        "vocab_size": vocab,
        "max_tokens": 2 * max(sequences, 64),
        "max_rows": max(sequences, 64),
        "max_sequences": sequences,
    }
    config = {
        "max_model_len": longest + 1,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": 2 * max(sequences, 64),
    }
    return Core(spec, config, "null")


def request(index: int, vocab: int, max_tokens: int) -> dict[str, Any]:
    prompt = [(index * 31 + position * 7) % vocab for position in range(PROMPT_TOKENS)]
    return {"prompt_token_ids": prompt, "max_tokens": max_tokens, "temperature": 0.0}


def drain(core: Core, num_requests: int) -> None:
    while num_requests > 0:
        num_requests -= sum(output.finish_reason is not None for output in core.wait(60.0))


def step_times(sequences: int, vocab: int, output_tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """Microseconds per step, prefill included, for each repeat: of the loop, and to wake the thread that drains."""
    core = make_core(sequences, vocab, output_tokens)
    times, wakes = [], []
    for repeat in range(repeats):
        before = core.stats()
        for index in range(sequences):
            core.submit(request(repeat * sequences + index, vocab, output_tokens))
        drain(core, sequences)
        after = core.stats()
        steps = after["steps"] - before["steps"]
        times.append(1e6 * (after["loop_seconds"] - before["loop_seconds"]) / steps)
        wakes.append(1e6 * (after["wake_seconds"] - before["wake_seconds"]) / steps)
    core.close()
    return times, wakes


def wake_up_times(vocab: int, repeats: int) -> list[float]:
    """Microseconds from submit() on an idle loop to the return of the wait() that brings the token."""
    core = make_core(1, vocab, 1)
    times = []
    for repeat in range(repeats):
        values = request(repeat, vocab, 1)
        started = time.perf_counter()
        core.submit(values)
        drain(core, 1)
        times.append(1e6 * (time.perf_counter() - started))
    core.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    steps, step_wakes = step_times(arguments.sequences, arguments.vocab, arguments.output_tokens, arguments.repeats)
    wakes = wake_up_times(arguments.vocab, 200)
    figures = {
        "sequences": arguments.sequences,
        "vocab_size": arguments.vocab,
        "loop_us_per_step_median": round(statistics.median(steps), 2),
        "loop_us_per_step_max": round(max(steps), 2),
        "wake_us_per_step_median": round(statistics.median(step_wakes), 2),
        "submit_to_token_us_median": round(statistics.median(wakes), 1),
        "submit_to_token_us_p95": round(sorted(wakes)[int(0.95 * len(wakes))], 1),
    }
    for name, value in figures.items():
        print(f"{name:28} {value}")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
