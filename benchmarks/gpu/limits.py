"""What this GPU can do at most, through torch: memory, and products of each type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .results import Cell, Results
from .timing import best_seconds

PART = "limits"
_SIZE = 8192


def measure(results: Results) -> dict[str, float]:
    """copy_bytes_per_s (reads and writes), read_bytes_per_s, {bf16,fp8,int8}_flops; kept with the results."""
    results.begin(PART)
    limits: dict[str, float] = {}
    for name, find, unit, per in (
        ("copy_bytes_per_s", copy_bandwidth, "TB/s", 1e12),
        ("read_bytes_per_s", read_bandwidth, "TB/s", 1e12),
        ("bf16_flops", lambda: product_peak(_bf16), "TFLOP/s", 1e12),
        ("fp8_flops", lambda: product_peak(_fp8), "TFLOP/s", 1e12),
        ("int8_flops", lambda: product_peak(_int8), "TFLOP/s", 1e12),
    ):
        with results.attempt(PART, name):
            # What was reached once can be reached: a slower run lowers no limit.
            limits[name] = max(find(), results.document["limits"].get(name, 0.0))
            results.document["limits"][name] = limits[name]
            results.add(Cell(PART, name, limits[name] / per, unit))
    torch.cuda.empty_cache()
    return limits


def copy_bandwidth() -> float:
    """Bytes/s, read and written, of 4 GiB."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source))


def read_bandwidth() -> float:
    """Bytes/s of a sum of 4 GiB: products of few rows read much and write little."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return 4 * source.numel() / best_seconds(lambda: source.sum())


def product_peak(make: Callable[[int], Callable[[], Any]]) -> float:
    """Operations/s of a large square product of random numbers."""
    return 2 * _SIZE**3 / best_seconds(make(_SIZE))


def _bf16(n: int) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _fp8(n: int) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8(n: int) -> Callable[[], Any]:
    a, b = (torch.randint(-127, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())
