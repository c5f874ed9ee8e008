"""Tiles and splits of attention on this GPU, measured: what plugins/attention/cuda.py has, and what would be faster.

It changes nothing: the tables there are of constants that every shape shares, and somebody should look at both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from enginery.engines.fields import LARGEST
from enginery.engines.plan import KernelImage
from enginery.plugins.attention import cuda
from enginery.plugins.attention.cuda import Split, Tiles

from tests.gpu.launcher import compiled, prepare, target
from tests.gpu.paged import Heads, Scene

from .attention import heads_of
from .results import Cell, Results
from .roofs import Shape
from .timing import copies, graph_seconds

PART = "tune-attention"
_DECODES = ((1, 1024), (1, 8192), (16, 1024), (64, 1024), (64, 8192))
_PREFILL = [(4096, 4096)]
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
_LEAST_KEYS = (64, 128, 256)


def run(results: Results, shape: Shape, kv_dtype: str, deadline_s: float) -> None:
    """A cell for each case: the table's time, and the best one's with what it is."""
    results.begin(PART)
    heads, deadline = heads_of(shape), time.monotonic() + deadline_s
    for batch, context in _DECODES:
        row = 2 * batch * context * heads.num_kv_heads * heads.head_dim * (2 if kv_dtype == "bf16" else 1)
        layers = 1 << (copies(row, 32) - 1).bit_length()
        compare(
            results, f"{kv_dtype} decode b{batch} {context}", kv_dtype, heads, [(context, 1)] * batch, layers, deadline
        )
    compare(results, f"{kv_dtype} prefill {_PREFILL[0][0]}", kv_dtype, heads, _PREFILL, 1, deadline)


def compare(
    results: Results,
    name: str,
    kv_dtype: str,
    heads: Heads,
    contexts: list[tuple[int, int]],
    layers: int,
    deadline: float,
) -> None:
    """The table against every candidate."""
    with results.attempt(PART, name):
        scene = Scene(kv_dtype, heads, contexts, layers)
        scene.calls(0, {})
        old, found = seconds(scene, layers), dict[str, float]()
        choices = list(decode_choices(scene) if contexts[0][1] == 1 else prefill_choices(scene))
        usable = compile_choices(scene, choices)
        for label, change in usable:
            if time.monotonic() < deadline:
                with change:
                    found[label] = seconds(scene, layers)
        best = min(found, key=lambda label: found[label])
        results.note(PART, **{name: {label: time_s * 1e6 for label, time_s in sorted(found.items())}})
        results.add(Cell(PART, f"{name}: {best}", found[best] * 1e6, "us", old * 1e6, "the table", old / found[best]))
    torch.cuda.empty_cache()


class Change:
    """Functions and tables of the plugin, exchanged while it lasts."""

    def __init__(self, **values: Any) -> None:
        self._values, self._old = values, dict[str, Any]()

    def __enter__(self) -> None:
        for name, value in self._values.items():
            self._old[name] = getattr(cuda, name)
            setattr(cuda, name, value)

    def __exit__(self, *error: object) -> None:
        for name, value in self._old.items():
            setattr(cuda, name, value)


def decode_choices(scene: Scene) -> Iterator[tuple[str, Change]]:
    """Every split with the table's tile, and other tiles with the table's splits."""
    for splits in _SPLITS:
        for least in _LEAST_KEYS if splits > 1 else (64,):
            one = (Split(LARGEST, splits, least),)
            yield f"{splits} splits of {least} keys or more", Change(SPLITS=one)
    usual = cuda.decode_tiles(scene.operator.layout, scene.heads.num_heads // scene.heads.num_kv_heads)
    for keys in (32, 64, 128):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                tiles = replace(usual, keys=keys, num_warps=warps, num_stages=stages)
                yield f"{tiles}", Change(decode_tiles=_always(tiles))


def prefill_choices(scene: Scene) -> Iterator[tuple[str, Change]]:
    """Other tiles."""
    for rows in (64, 128):
        for keys in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3):
                    tiles = Tiles(rows, keys, warps, stages)
                    yield f"{tiles}", Change(prefill_tiles=_always(tiles))


def compile_choices(scene: Scene, choices: list[tuple[str, Change]]) -> list[tuple[str, Change]]:
    """Those whose machine code neither spills nor wants too much."""
    kernels = {}
    for label, change in choices:
        with change:
            role = "decode" if scene.contexts[0][1] == 1 else "prefill"
            kernels[label] = next(one.kernel for one in scene.launches() if one.kernel.function == role)
    refused = set(prepare(kernels.values()))
    return [each for each in choices if kernels[each[0]] not in refused and _fits(compiled(kernels[each[0]]).image)]


def seconds(scene: Scene, layers: int) -> float:
    """Of one layer."""
    scratch: dict[str, torch.Tensor] = {}
    calls = [call for layer in range(layers) for call in scene.calls(layer, scratch)]
    return graph_seconds(calls, least_s=0.005, repeats=3)


def _always(tiles: Tiles) -> Callable[..., Tiles]:
    return lambda *_: tiles


def _fits(image: KernelImage) -> bool:
    return not image.spill_bytes and image.shared_bytes <= target().shared_bytes
