"""Products of a model's shapes, the kernels and tiles that engines have, beside torch's of the same operands.

fp8 is compared with torch._scaled_mm, scaled by row and by column, in the same accumulation mode (use_fast_accum);
bf16 with torch's matmul. Weights come from memory, not from the L2 cache: as many copies as that takes, in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from enginery.plugins.launches import Kernel
from enginery.plugins.linear.cuda import Linear

from tests.gpu.launcher import bind_launches, prepare
from tests.gpu.products import Product, kernel_of
from tests.gpu.shapes import padded

from .results import Cell, Results
from .roofs import Shape
from .timing import copies, graph_seconds

PART = "gemm"
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
DTYPES = ("fp8", "bf16")
_MOST_HEAD_ROWS = 256
_ALIKE = 0.03


def products(shape: Shape, dtype: str) -> dict[str, Linear]:
    """Those of a layer and the head, without what is fused into them, as the rival has none of it."""
    heads, kv_heads, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    return {
        "qkv": Linear((heads + 2 * kv_heads) * size, hidden, dtype),
        "o": Linear(hidden, heads * size, dtype),
        "gate_up": Linear(2 * inner, hidden, dtype),
        "down": Linear(hidden, inner, dtype),
        "head": Linear(shape["vocab_size"], hidden, dtype),
    }


def cells(shape: Shape, dtypes: tuple[str, ...]) -> Iterator[tuple[str, str, Linear, int]]:
    """(type, name, product, rows)."""
    for dtype in dtypes:
        for name, linear in products(shape, dtype).items():
            for rows in ROWS:
                if name != "head" or rows <= _MOST_HEAD_ROWS:
                    yield dtype, name, linear, rows


def kernels(shape: Shape, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Kernel]:
    """What this part launches."""
    for _, _, linear, rows in cells(shape, dtypes):
        yield kernel_of(linear, rows).kernel


def run(results: Results, shape: Shape, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Each product at each number of rows, then of each type the mean and the worst."""
    results.begin(PART)
    prepare(kernels(shape, dtypes))
    ratios: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for dtype, name, linear, rows in cells(shape, dtypes):
        with results.attempt(PART, f"{dtype} {name} {rows}"):
            ours, theirs = measure(linear, rows)
            ratios[dtype].append(theirs / ours)
            cell = f"{dtype} {name} {linear.n}x{linear.k} M {rows}"
            rival = "_scaled_mm" if dtype == "fp8" else "torch matmul"
            results.add(Cell(PART, cell, ours * 1e6, "us", theirs * 1e6, rival, theirs / ours))
        torch.cuda.empty_cache()
    for dtype, found in ratios.items():
        judge(results, dtype, found)


def judge(results: Results, dtype: str, ratios: list[float]) -> None:
    """The issue's row: the geometric mean, and the worst cell."""
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        must = (1.0, 0.95, 1.2) if dtype == "fp8" else (None, None, None)
        rival = "torch, mean of cells"
        results.add(Cell(PART, f"{dtype} geometric mean", mean, "x", 1.0, rival, mean, must[0], must[2]))
        results.add(Cell(PART, f"{dtype} worst", min(ratios), "x", 1.0, "torch", min(ratios), must[1]))


def measure(linear: Linear, rows: int) -> tuple[float, float]:
    """Seconds of ours and of torch's, both with their operands in memory."""
    product = Product(linear, rows)
    del product.a, product.weight
    weight = product.operands["weight"]
    count = copies(weight.numel() * weight.itemsize)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    scratch: dict[str, torch.Tensor] = {}
    ours: list[Callable[[], Any]] = []
    for each in weights:
        arguments = {**product.operands, "weight": each, "count": rows}
        ours += bind_launches(product.launches(), {linear.domain: rows}, arguments, scratch)
    assert len(ours) == len(weights), "one launch for each product"
    theirs = rival_calls(product, weights)
    require_alike(product, ours[0], theirs[0])
    return graph_seconds(ours), graph_seconds(theirs)


def require_alike(product: Product, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Raises ValueError where the rival computes something else: then there is nothing to compare."""
    ours()
    found, wanted = product.operands["out"][: product.rows].float(), theirs().float()
    error = float((found - wanted).std() / wanted.std())
    if not error < _ALIKE:
        raise ValueError(f"the results differ by {error:.3g} of their deviation")


def rival_calls(product: Product, weights: list[torch.Tensor]) -> list[Callable[[], Any]]:
    """torch's, of operands without padding between rows, which all of these shapes have."""
    operands, linear = product.operands, product.linear
    assert padded(linear.n) == linear.n, f"{linear.n} columns are padded"
    a, columns = operands["a"], operands["weight_scale"][None, :]
    rows = operands["a_scale"][:, None].contiguous()

    def call(weight: torch.Tensor) -> Callable[[], Any]:
        if linear.dtype == "bf16":
            return lambda: a @ weight.t()
        assert linear.dtype == "fp8", f"torch has nothing to compare {linear.dtype} with"
        return lambda: torch._scaled_mm(a, weight.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [call(weight) for weight in weights]
