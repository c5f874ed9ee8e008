"""Attention over the paged cache beside torch's scaled_dot_product_attention, whose keys and values are not paged.

Ours rotates the queries too, which the rivals are spared; the rivals are bf16, whatever our cache is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from enginery.plugins.launches import Kernel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.gpu.launcher import prepare
from tests.gpu.paged import Heads, Scene, make_launches, make_operator

from .results import Cell, Results
from .roofs import Shape, prefill_attention_flops
from .timing import copies, graph_seconds

PART = "attention"
PREFILLS = (1024, 8192)
DECODES = ((1, 1024), (1, 8192), (64, 1024), (64, 8192))
KV_DTYPES = ("bf16", "fp8", "i8")
# Must be reached of each, and the goal of both.
RIVALS = {"FLASH_ATTENTION": (SDPBackend.FLASH_ATTENTION, 1.0), "CUDNN_ATTENTION": (SDPBackend.CUDNN_ATTENTION, 0.75)}


def heads_of(shape: Shape) -> Heads:
    """The model's."""
    size = shape["head_dim"]
    return Heads(shape["num_attention_heads"], shape["num_key_value_heads"], size, size)


def kernels(shape: Shape) -> Iterator[Kernel]:
    """What this part launches; the number of layers is a constant of each."""
    for kv_dtype in KV_DTYPES:
        for layers in {layers for _, layers in cases(shape, kv_dtype).values()}:
            yield from (launch.kernel for launch in make_launches(make_operator(heads_of(shape), kv_dtype, layers)))


def cases(shape: Shape, kv_dtype: str) -> dict[str, tuple[list[tuple[int, int]], int]]:
    """Name -> contexts, and how many layers must be read in turn so that none is in the L2 cache."""
    heads, found = heads_of(shape), {}
    for tokens in PREFILLS:
        found[f"prefill {tokens}"] = ([(tokens, tokens)], 1)
    for batch, context in DECODES:
        # The powers of two above what is enough: fewer kernels, as the number of layers is a constant of each.
        layer = 2 * batch * context * heads.num_kv_heads * heads.head_dim * (2 if kv_dtype == "bf16" else 1)
        found[f"decode b{batch} {context}"] = ([(context, 1)] * batch, 1 << (copies(layer, 64) - 1).bit_length())
    return found


def run(results: Results, shape: Shape) -> None:
    """Each case with each type of cache, against each rival."""
    results.begin(PART)
    prepare(kernels(shape))
    heads = heads_of(shape)
    rivals: dict[str, dict[str, float]] = {}
    for kv_dtype in KV_DTYPES:
        for name, (contexts, layers) in cases(shape, kv_dtype).items():
            with results.attempt(PART, f"{kv_dtype} {name}"):
                ours = measure(kv_dtype, heads, contexts, layers)
                if name not in rivals:
                    rivals[name] = measure_rivals(results, heads, contexts, layers)
                report(results, heads, f"{kv_dtype} {name}", contexts, ours, rivals[name])
            torch.cuda.empty_cache()


def report(
    results: Results,
    heads: Heads,
    name: str,
    contexts: list[tuple[int, int]],
    ours: float,
    rivals: dict[str, float],
) -> None:
    """A cell for each rival; of prefill the rate too."""
    for rival, seconds in rivals.items():
        must = RIVALS[rival][1]
        results.add(Cell(PART, name, ours * 1e6, "us", seconds * 1e6, rival, seconds / ours, must, 1.0))
    if contexts[0][1] > 1:
        flops = prefill_attention_flops(heads.num_heads, heads.head_dim, contexts[0][1])
        limit = results.document["limits"].get("bf16_flops")
        ratio = flops / ours / limit if limit else None
        results.add(Cell(PART, name, flops / ours / 1e12, "TFLOP/s", limit and limit / 1e12, "bf16 peak", ratio))


def measure(kv_dtype: str, heads: Heads, contexts: list[tuple[int, int]], layers: int) -> float:
    """Seconds of ours: decode or prefill of one layer."""
    scene = Scene(kv_dtype, heads, contexts, layers)
    scratch: dict[str, torch.Tensor] = {}
    return graph_seconds([call for layer in range(layers) for call in scene.calls(layer, scratch)])


def measure_rivals(results: Results, heads: Heads, contexts: list[tuple[int, int]], layers: int) -> dict[str, float]:
    """Seconds of torch's back ends, of those that can; what they could not is noted."""
    found = {}
    for name, (backend, _) in RIVALS.items():
        for grouped in (True, False):
            try:
                with sdpa_kernel(backend):
                    found[name] = graph_seconds(rival_calls(heads, contexts, layers, grouped))
                used = "grouped" if grouped else "K, V repeated"
                results.note(PART, **{f"{name} {len(contexts)}x{contexts[0]}": used})
                break
            except RuntimeError as error:
                results.note(PART, **{f"{name} {len(contexts)}x{contexts[0]} grouped={grouped}": str(error)[:300]})
        torch.cuda.empty_cache()
    return found


def rival_calls(heads: Heads, contexts: list[tuple[int, int]], layers: int, grouped: bool) -> list[Callable[[], Any]]:
    """One for each layer. grouped: with as many heads of K and V as there are; else as many as of Q."""
    batch, (length, queries) = len(contexts), contexts[0]
    kv_heads = heads.num_kv_heads if grouped else heads.num_heads

    def tensor(count: int, tokens: int) -> torch.Tensor:
        # As projections leave them: tokens, then heads.
        shape = (batch, tokens, count, heads.head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def call() -> Callable[[], Any]:
        q, k, v = tensor(heads.num_heads, queries), tensor(kv_heads, length), tensor(kv_heads, length)
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=grouped)

    return [call() for _ in range(layers)]
