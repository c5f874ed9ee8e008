"""What is left of the speed when another process wants one of the processors, and of what is left to us.

    python benchmarks/neighbour.py [SHAPE] [--precision int8] [--repeats 5] [--json FILE]

The neighbour computes without end on one processor, of which the system gives it a half: of P processors P - 1/2 are
ours. In pairs, without it and with it: prefill of 512 tokens, which computes, and decode of one sequence, which reads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import enginery
import numpy as np
from checkpoints import SHAPES
from cold_start import built_engine
from enginery import SamplingParams
from machine import save

PROMPT, OUTPUT = 512, 64
# On the last processor, which is a worker's and not the loop's.
_NEIGHBOUR = "import os\nos.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    left = (processors - 0.5) / processors
    engine = built_engine(arguments.shape, arguments.precision)
    with enginery.Engine.load(engine, max_num_seqs=1, enable_prefix_caching=False) as loaded:
        shares = measure(loaded, SHAPES[arguments.shape]["vocab_size"], arguments.repeats)
    result = {name: statistics.median(each) for name, each in shares.items()}
    print(f"{'':14}{'of its speed':>14}{'of what is left':>17}")
    for name, share in result.items():
        print(f"{name:14}{share:14.0%}{share / left:17.0%}")
    save(arguments.json, {"shape": arguments.shape, "precision": arguments.precision, "left": left, "shares": result})


def measure(loaded: enginery.Engine, vocab_size: int, repeats: int) -> dict[str, list[float]]:
    """Of each pair, by cell: the speed with the neighbour over that without."""
    random = np.random.default_rng(0)

    def seconds(length: int, output: int) -> float:
        prompt = [int(token) for token in random.integers(3, vocab_size, length)]
        started = time.perf_counter()
        loaded.generate([prompt], SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False))
        return time.perf_counter() - started

    def both() -> dict[str, float]:
        prefill = seconds(PROMPT, 1)
        return {"prefill 512": prefill, "decode b1": seconds(8, OUTPUT + 1) - seconds(8, 1)}

    both()
    shares: dict[str, list[float]] = {}
    for _ in range(repeats):
        alone = both()
        with neighbour():
            for name, time_beside in both().items():
                shares.setdefault(name, []).append(alone[name] / time_beside)
    return shares


@contextmanager
def neighbour() -> Iterator[None]:
    """As long as this lasts, one is there."""
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR])
    time.sleep(0.5)  # until it is at work
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
