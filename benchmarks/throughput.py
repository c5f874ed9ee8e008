"""Prefill and decode on the CPU beside what the machine can do, probed right before and after.

    python benchmarks/throughput.py [SHAPE] [--precision int8] [--repeats 3] [--json FILE]

Prefill: tokens/s of one prompt of 512 and 2048 tokens. Decode: tokens/s of 1, 8 and 32 sequences, 128 tokens in and 64
out, the difference of two runs so that prefill does not count. The roof of a cell is the slower of reading its weights
and KV cache from DRAM and of doing its multiply-adds at the peak of their type, both as probed in this run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import enginery
import numpy as np
from checkpoints import SHAPES
from cold_start import built_engine
from enginery import SamplingParams
from machine import probe, save
from roofs import decode_roof, prefill_roof

PREFILLS = (512, 2048)
BATCHES = (1, 8, 32)
PROMPT, OUTPUT = 128, 64


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    engine, shape = built_engine(arguments.shape, arguments.precision), SHAPES[arguments.shape]
    before = probe(threads)
    with enginery.Engine.load(engine, max_num_seqs=32, max_model_len=4096, enable_prefix_caching=False) as loaded:
        rates = measure(loaded, shape["vocab_size"], arguments.repeats)
    after = probe(threads)
    # A limit is what the machine can do at most: a neighbour who slows one probe down must not flatter us.
    limits = {name: max(before[name], after[name]) for name in before}
    if any(min(before[name], after[name]) < 0.9 * limits[name] for name in limits):
        print("The probes before and after differ by more than a tenth: somebody else was at work. Run it again.")
    roofs = {f"prefill {n}": prefill_roof(shape, arguments.precision, n, limits) for n in PREFILLS}
    roofs |= {f"decode b{n}": decode_roof(shape, arguments.precision, n, PROMPT + OUTPUT / 2, limits) for n in BATCHES}
    print(f"{arguments.shape} {arguments.precision}: " + ", ".join(f"{k} {v:g}" for k, v in limits.items()))
    print(f"{'':14}{'tokens/s':>10}{'roof':>10}{'of roof':>10}")
    for name, rate in rates.items():
        print(f"{name:14}{rate:10.1f}{roofs[name]:10.1f}{rate / roofs[name]:10.0%}")
    result = {"shape": arguments.shape, "precision": arguments.precision, "tokens_per_s": rates, "roof": roofs}
    save(arguments.json, result | {"limits_before": before, "limits_after": after})


def measure(loaded: enginery.Engine, vocab_size: int, repeats: int) -> dict[str, float]:
    """Median tokens/s of each cell; every prompt is new."""
    random = np.random.default_rng(0)

    def seconds(batch: int, length: int, output: int) -> float:
        prompts = [[int(token) for token in random.integers(3, vocab_size, length)] for _ in range(batch)]
        started = time.perf_counter()
        loaded.generate(prompts, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False))
        return time.perf_counter() - started

    seconds(1, PROMPT, 4)
    rates = {}
    for length in PREFILLS:
        rates[f"prefill {length}"] = length / statistics.median(seconds(1, length, 1) for _ in range(repeats))
    for batch in BATCHES:
        pairs = [seconds(batch, PROMPT, OUTPUT + 1) - seconds(batch, PROMPT, 1) for _ in range(repeats)]
        rates[f"decode b{batch}"] = batch * OUTPUT / statistics.median(pairs)
    return rates


if __name__ == "__main__":
    main()
