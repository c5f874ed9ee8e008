"""An engine on the GPU beside what the GPU can do, measured in the same run.

    python benchmarks/gpu.py [SHAPE] [--precision fp8] [--kv-cache-dtype fp8] [--json FILE]

Decode: tokens/s of 1 and 64 sequences at 1k context, the difference of two runs so that prefill does not count, against
the bytes that a step must read at the measured copy bandwidth. Prefill: tokens/s of one prompt of 8k tokens, against
its products at the measured peak of their type. Random weights; needs torch, for the limits alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import enginery
import numpy as np
from checkpoints import SHAPES, make_checkpoint
from enginery import SamplingParams
from machine import ROOT, save

CONTEXT, OUTPUT, PREFILL = 1024, 64, 8192
BATCHES = (1, 64)
_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--precision", default="fp8", choices=_BYTES)
    parser.add_argument("--kv-cache-dtype", default="bf16", choices=_BYTES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work, shape = ROOT / "build" / "benchmarks", SHAPES[arguments.shape]
    engine = work / f"{arguments.shape}.{arguments.target}.{arguments.precision}.{arguments.kv_cache_dtype}"
    if not (engine / "manifest.json").exists():
        build(make_checkpoint(arguments.shape, work / arguments.shape), engine, arguments)
    limits = measure_limits(arguments.precision)
    release_memory()
    with enginery.Engine.load(
        engine, max_model_len=PREFILL + 8, max_num_seqs=64, enable_prefix_caching=False
    ) as loaded:
        rates = measure(loaded, shape["vocab_size"], arguments.repeats)
    roofs = {f"decode b{n}": decode_roof(shape, arguments, n, limits) for n in BATCHES}
    roofs[f"prefill {PREFILL}"] = prefill_roof(shape, limits)
    print(f"{arguments.shape} {arguments.precision}: " + ", ".join(f"{k} {v:g}" for k, v in limits.items()))
    print(f"{'':14}{'tokens/s':>10}{'roof':>10}{'of roof':>10}")
    for name, rate in rates.items():
        print(f"{name:14}{rate:10.1f}{roofs[name]:10.1f}{rate / roofs[name]:10.0%}")
    result = {"shape": arguments.shape, "precision": arguments.precision, "kv_cache_dtype": arguments.kv_cache_dtype}
    save(arguments.json, result | {"tokens_per_s": rates, "roof": roofs, "limits": limits})


def build(checkpoint: Path, engine: Path, arguments: argparse.Namespace) -> None:
    """The engine, by the command."""
    command = [str(Path(sys.executable).parent / "build-engine"), str(checkpoint), "-o", str(engine)]
    command += ["--target", arguments.target, "--precision", arguments.precision]
    subprocess.run([*command, "--kv-cache-dtype", arguments.kv_cache_dtype], check=True)


def measure(loaded: enginery.Engine, vocab_size: int, repeats: int) -> dict[str, float]:
    """Median tokens/s of each cell; every prompt is new."""
    random = np.random.default_rng(0)

    def seconds(batch: int, length: int, output: int) -> float:
        prompts = [[int(token) for token in random.integers(3, vocab_size, length)] for _ in range(batch)]
        started = time.perf_counter()
        loaded.generate(prompts, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False))
        return time.perf_counter() - started

    seconds(1, CONTEXT, 4)
    rates = {}
    for batch in BATCHES:
        pairs = [seconds(batch, CONTEXT, OUTPUT + 1) - seconds(batch, CONTEXT, 1) for _ in range(repeats)]
        rates[f"decode b{batch}"] = batch * OUTPUT / statistics.median(pairs)
    rates[f"prefill {PREFILL}"] = PREFILL / statistics.median(seconds(1, PREFILL, 1) for _ in range(repeats))
    return rates


def measure_limits(precision: str) -> dict[str, float]:
    """Copy bandwidth, and the peaks of products in bf16 and in the engine's type, through torch."""
    import torch

    def best(run: Any, repeats: int = 20) -> float:
        run()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / best(lambda: target.copy_(source))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / best(lambda: a @ b)
    peak = bf16
    if precision == "fp8":
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        peak = 2 * n**3 / best(lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return {"copy_bytes_per_s": copy, "bf16_flops": bf16, "product_flops": peak}


def release_memory() -> None:
    """Torch keeps what it had on the device."""
    import torch

    torch.cuda.empty_cache()


def _macs(shape: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds of one token in the layers, and in the head."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query, key = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (query + 2 * key) + query * hidden + 3 * hidden * inner
    return layer * shape["num_hidden_layers"], shape["vocab_size"] * hidden


def decode_roof(shape: dict[str, Any], arguments: argparse.Namespace, batch: int, limits: dict[str, float]) -> float:
    """Tokens/s: a step reads all weights and every sequence's cache once."""
    layers, head = _macs(shape)
    cache = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * (CONTEXT + OUTPUT / 2)
    read = (layers + head) * _BYTES[arguments.precision] + batch * cache * _BYTES[arguments.kv_cache_dtype]
    return batch * limits["copy_bytes_per_s"] / read


def prefill_roof(shape: dict[str, Any], limits: dict[str, float]) -> float:
    """Tokens/s: every layer's products for all tokens, attention in bf16, the head for one."""
    layers, head = _macs(shape)
    attention = 2 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * PREFILL / 2
    seconds = 2 * (layers * PREFILL + head) / limits["product_flops"] + 2 * attention * PREFILL / limits["bf16_flops"]
    return PREFILL / seconds


if __name__ == "__main__":
    main()
