"""Times of launches: in a graph, so that the host's speed does not count, over operands that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]

# Several times the largest L2 cache of any target.
COLD_BYTES = 512 << 20


def copies(item_bytes: int, most: int = 64) -> int:
    """Of an operand, so that going through all of them leaves none in the L2 cache."""
    return max(1, min(most, -(-COLD_BYTES // max(item_bytes, 1))))


def graph_seconds(calls: Calls, least_s: float = 0.03, repeats: int = 5) -> float:
    """Seconds of one of `calls`: the median of replays of a graph of all, each of `least_s` or more.

    Every call is made once before, so that what it loads and allocates is there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    once = _replay_seconds(graph, 1)
    times = max(1, round(least_s / max(once, 1e-6)))
    return statistics.median(_replay_seconds(graph, times) for _ in range(repeats)) / (times * len(calls))


def best_seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """The shortest of several single calls: what the GPU can do at most."""
    call()
    return min(_event_seconds(call) for _ in range(repeats))


def _replay_seconds(graph: torch.cuda.CUDAGraph, times: int) -> float:
    def replay() -> None:
        for _ in range(times):
            graph.replay()

    return _event_seconds(replay)


def _event_seconds(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
