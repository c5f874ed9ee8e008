"""What is counted of requests as they go by, for /metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG_SECONDS = (*_SECONDS, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Histogram:
    """Observations by upper bounds, as Prometheus has them. buckets: counts, the last of what is above all bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` times."""
        self.buckets[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass
class Observations:
    """Of all outputs of an engine, each of the n of a prompt counted. Written by one thread."""

    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_LONG_SECONDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    end_to_end_latency: Histogram = field(default_factory=lambda: Histogram(_LONG_SECONDS))
    finished: Counter[str] = field(default_factory=Counter)
