"""Prefill and decode on the CPU beside what the machine can do, probed right before and after.

    python benchmarks/throughput.py [SHAPE] [--precision int8] [--repeats 3] [--json FILE]
    python benchmarks/throughput.py [SHAPE] --contexts 4096 16384 --kv-cache-dtype int8

Prefill: tokens/s of one prompt of 512 and 2048 tokens. Decode: tokens/s of 1, 8 and 32 sequences, 128 tokens in and 64
out, the difference of two runs so that prefill does not count; with --contexts instead of all that of one sequence
behind prompts of so many tokens. The roof of a cell is the slower of reading its weights and KV cache from DRAM and of
doing its multiply-adds at the peak of their type, both as probed in this run.
"""

from __future__ import annotations

import argparse
import asyncio
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
from roofs import CACHE_BYTES, decode_roof, prefill_roof

PREFILLS = (512, 2048)
BATCHES = (1, 8, 32)
PROMPT, OUTPUT = 128, 64


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--kv-cache-dtype", default="bf16", choices=CACHE_BYTES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    precision, cache, contexts = arguments.precision, arguments.kv_cache_dtype, arguments.contexts
    engine, shape = built_engine(arguments.shape, precision, cache), SHAPES[arguments.shape]
    sizes = {"max_num_seqs": 1 if contexts else max(BATCHES), "max_model_len": max([*contexts, *PREFILLS]) + 2 * PROMPT}
    before = probe(threads)
    with enginery.Engine.load(engine, **sizes, enable_prefix_caching=False) as loaded:
        loaded.generate([[3, 4, 5]], SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False))
        loaded.wait_until_settled()  # nothing copies weights beside what is measured
        if contexts:
            rates = measure_contexts(loaded, shape["vocab_size"], contexts, arguments.repeats)
        else:
            rates = measure(loaded, shape["vocab_size"], arguments.repeats)
    after = probe(threads)
    # A limit is what the machine can do at most: a neighbour who slows one probe down must not flatter us.
    limits = {name: max(before[name], after[name]) for name in before}
    if any(min(before[name], after[name]) < 0.9 * limits[name] for name in limits):
        print("The probes before and after differ by more than a tenth: somebody else was at work. Run it again.")
    roofs = {f"prefill {n}": prefill_roof(shape, precision, n, limits) for n in PREFILLS}
    roofs |= {f"decode b{n}": decode_roof(shape, precision, n, PROMPT + OUTPUT / 2, limits, cache) for n in BATCHES}
    roofs |= {f"decode b1 at {n}": decode_roof(shape, precision, 1, n + OUTPUT / 2, limits, cache) for n in contexts}
    roofs = {name: roofs[name] for name in rates}
    print(f"{arguments.shape} {precision}, cache {cache}: " + ", ".join(f"{k} {v:g}" for k, v in limits.items()))
    print(f"{'':20}{'tokens/s':>10}{'roof':>10}{'of roof':>10}")
    for name, rate in rates.items():
        print(f"{name:20}{rate:10.1f}{roofs[name]:10.1f}{rate / roofs[name]:10.0%}")
    result = {"shape": arguments.shape, "precision": precision, "cache": cache, "tokens_per_s": rates, "roof": roofs}
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


def measure_contexts(loaded: enginery.Engine, vocab_size: int, contexts: list[int], repeats: int) -> dict[str, float]:
    """Median tokens/s of one sequence after each context; every prompt is new."""
    random = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT + 1, ignore_eos=True, detokenize=False)

    async def rate(length: int) -> float:
        prompt = [int(token) for token in random.integers(3, vocab_size, length)]
        times = [time.perf_counter() async for _ in loaded.generate_stream(prompt, params)]
        return (len(times) - 1) / (times[-1] - times[0])

    return {
        f"decode b1 at {length}": statistics.median(asyncio.run(rate(length)) for _ in range(repeats))
        for length in contexts
    }


if __name__ == "__main__":
    main()
