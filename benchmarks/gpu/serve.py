"""End to end: `run-engine` on loopback, many clients at once, every token streamed."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.gpu.http_load import Answer, Server, complete, serving

from .engines import Build, shape_of
from .results import Cell, Results
from .roofs import serve_seconds

PART = "serve"
CLIENTS, PROMPT, OUTPUT = 128, 1024, 256
REPEATS, STEADY_REQUESTS = 3, 512
MUST, GOAL = 0.50, 0.75


@dataclass(frozen=True)
class Load:
    """What came of some requests. seconds: from the first one's beginning to the last token."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def rate(self) -> float:
        """Output tokens/s."""
        return sum(answer.num_tokens for answer in self.answers) / self.seconds

    def first_token_ms(self, percentile: float) -> float:
        """Time to first token."""
        return _percentile([answer.events[0] - answer.began for answer in self.answers if answer.events], percentile)

    def between_tokens_ms(self, percentile: float) -> float:
        """Inter-token latency; tokens that came together count as one."""
        gaps = [b - a for answer in self.answers for a, b in zip(answer.events, answer.events[1:], strict=False)]
        return _percentile(gaps, percentile)


def run(results: Results, build: Build, clients: int = CLIENTS, prompt: int = PROMPT, output: int = OUTPUT) -> None:
    """All clients at once, several times; then as many one after the other, as traffic is."""
    results.begin(PART)
    shape, limits = shape_of(build.name), results.document["limits"]
    # Verified before, not while it is measured.
    options = ["--verify", "--max-model-len", str(prompt + output + 8), "--max-num-seqs", str(clients)]
    with results.attempt(PART, build.label), serving(build.directory, *options) as server:
        vocab = shape["vocab_size"]
        asyncio.run(load(server, vocab, 8, 8, prompt, 8))
        bursts = [asyncio.run(load(server, vocab, clients, clients, prompt, output)) for _ in range(REPEATS)]
        roof = clients * output
        roof /= serve_seconds(shape, build.precision, build.kv_cache_dtype, clients, prompt, output, limits)
        rate = statistics.median(burst.rate for burst in bursts)
        name = f"{build.label}: {clients} x ({prompt} in, {output} out)"
        results.add(Cell(PART, name, rate, "tokens/s", roof, "roofline", rate / roof, MUST, GOAL))
        report_latencies(results, f"{name}, at once", bursts[-1])
        steady = asyncio.run(load(server, vocab, STEADY_REQUESTS * clients // CLIENTS, clients, prompt, output))
        results.add(Cell(PART, f"{name}, steady", steady.rate, "tokens/s", roof, "roofline", steady.rate / roof))
        report_latencies(results, f"{name}, steady", steady)
        metrics = server.metrics()
        kept = ("loop_seconds_total", "executor_seconds_total", "iterations_total", "num_preemptions_total")
        results.note(PART, **{key: metrics[key] for key in kept if key in metrics})


def report_latencies(results: Results, name: str, load: Load) -> None:
    """p50 and p99."""
    for percentile in (50, 99):
        results.add(Cell(PART, f"{name}: TTFT p{percentile}", load.first_token_ms(percentile), "ms"))
        results.add(Cell(PART, f"{name}: ITL p{percentile}", load.between_tokens_ms(percentile), "ms"))


async def load(server: Server, vocab: int, requests: int, clients: int, prompt: int, output: int) -> Load:
    """`requests` of random tokens, `clients` at once. Raises RuntimeError with the first that fails."""
    random = np.random.default_rng(time.time_ns())
    prompts = [random.integers(3, vocab, prompt).tolist() for _ in range(requests)]
    answers: list[Answer] = []

    async def client() -> None:
        while prompts:
            answer = await complete(server, prompts.pop(), max_tokens=output)
            if answer.error or answer.num_tokens != output:
                raise RuntimeError(f"a request gave {answer.num_tokens} tokens, wanted {output}: {answer.error}")
            answers.append(answer)

    await asyncio.gather(*(client() for _ in range(clients)))
    ends = [answer.events[-1] for answer in answers]
    return Load(answers, max(ends) - min(answer.began for answer in answers))


def _percentile(seconds: list[float], percentile: float) -> float:
    return float(np.percentile(seconds, percentile)) * 1e3 if seconds else float("nan")
