"""GET /metrics in Prometheus' text format; vLLM's names after `enginery_`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..histograms import Histogram
from .state import ServerState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REASONS = ("stop", "length", "abort", "error")

# Of Core.stats(): key -> (name, type, help).
_LOOP = {
    "num_running": ("num_requests_running", "gauge", "Requests that are being computed."),
    "num_waiting": ("num_requests_waiting", "gauge", "Requests that wait to be computed."),
    "kv_cache_usage": ("kv_cache_usage_perc", "gauge", "Share of the KV cache that requests hold, 0 to 1."),
    "prompt_tokens": ("prompt_tokens_total", "counter", "Prompt tokens of requests that began."),
    "generation_tokens": ("generation_tokens_total", "counter", "Tokens that were generated."),
    "prefix_cache_queries": ("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("num_preemptions_total", "counter", "Requests that gave way and were computed again."),
    "steps": ("iterations_total", "counter", "Steps of the serving loop."),
    "loop_seconds": ("loop_seconds_total", "counter", "Seconds in steps outside of the kernels."),
    "executor_seconds": ("executor_seconds_total", "counter", "Seconds in kernels."),
}


def render_metrics(state: ServerState) -> str:
    """The metrics as text."""
    lines: list[str] = []
    if state.engine is not None:
        model = f'model_name="{_escape(state.served_model_names[0])}"'
        _add_loop(lines, state.engine.stats(), model)
        observed = state.engine.observations
        _family(lines, "request_success_total", "counter", "Requests that ended, by reason.")
        for reason in _REASONS:
            _sample(lines, "request_success_total", f'{model},finished_reason="{reason}"', observed.finished[reason])
        _add_histogram(
            lines, "time_to_first_token_seconds", "Arrival to first token.", observed.time_to_first_token, model
        )
        _add_histogram(
            lines, "inter_token_latency_seconds", "From token to token.", observed.inter_token_latency, model
        )
        _add_histogram(
            lines, "e2e_request_latency_seconds", "Arrival to last token.", observed.end_to_end_latency, model
        )
    _family(lines, "http_requests_total", "counter", "Answers over HTTP, by path, method and status.")
    for (path, method, status), count in sorted(state.http_requests.items()):
        _sample(lines, "http_requests_total", f'handler="{path}",method="{method}",status="{status}"', count)
    return "\n".join(lines) + "\n"


def _add_loop(lines: list[str], stats: dict[str, Any], model: str) -> None:
    for key, (name, kind, text) in _LOOP.items():
        _family(lines, name, kind, text)
        _sample(lines, name, model, stats[key])
    _family(lines, "memory_bytes", "gauge", "Memory that the engine maps, by purpose.")
    for purpose, count in sorted(stats["memory"].items()):
        _sample(lines, "memory_bytes", f'{model},kind="{_escape(purpose)}"', count)
    _family(lines, "kv_cache_blocks", "gauge", "Blocks of each group of layers.")
    for group in stats["groups"]:
        _sample(lines, "kv_cache_blocks", f'{model},group="{_escape(group["name"])}"', group["num_blocks"])


def _add_histogram(lines: list[str], name: str, text: str, histogram: Histogram, labels: str) -> None:
    _family(lines, name, "histogram", text)
    count = 0
    for bound, bucket in zip(_bounds(histogram), list(histogram.buckets), strict=True):
        count += bucket
        _sample(lines, f"{name}_bucket", f'{labels},le="{bound}"', count)
    _sample(lines, f"{name}_sum", labels, histogram.total)
    _sample(lines, f"{name}_count", labels, count)


def _bounds(histogram: Histogram) -> Iterable[str]:
    return [*(str(bound) for bound in histogram.bounds), "+Inf"]


def _family(lines: list[str], name: str, kind: str, text: str) -> None:
    lines += [f"# HELP enginery_{name} {text}", f"# TYPE enginery_{name} {kind}"]


def _sample(lines: list[str], name: str, labels: str, value: float) -> None:
    lines.append(f"enginery_{name}{{{labels}}} {value}")


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
