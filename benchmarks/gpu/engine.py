"""An engine's steps beside what the GPU could do, without a server: decode, prefill, and what is lost between steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import enginery
import numpy as np
from enginery import SamplingParams

from .engines import Build, shape_of
from .results import Cell, Results
from .roofs import decode_seconds, prefill_seconds
from .timeline import Timeline, record

PART, GAPS = "engine", "gaps"
CONTEXT, OUTPUT, PREFILL = 1024, 64, 8192
BATCHES = (1, 64)
# Share of the roof that must be reached, and the goal (issue 4).
MUST = {"decode b1": (0.70, 0.85), "decode b64": (0.65, 0.75)}
MUST_PREFILL = {"bf16": (0.65, 0.75), "fp8": (0.60, 0.70)}
LEAST_BUSY, GOAL_BUSY = 0.97, 0.99


class Loaded:
    """An engine in this process, and prompts for it."""

    def __init__(self, build: Build) -> None:
        self._vocab, self._random = shape_of(build.name)["vocab_size"], np.random.default_rng(0)
        self.engine = enginery.Engine.load(
            build.directory, max_model_len=PREFILL + 8, max_num_seqs=max(BATCHES), enable_prefix_caching=False
        )

    def seconds(self, batch: int, length: int, output: int) -> float:
        """Of so many new prompts at once."""
        prompts = [self._random.integers(3, self._vocab, length).tolist() for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self.engine.generate(prompts, params)
        return time.perf_counter() - started

    def decode(self, batch: int, repeats: int = 3) -> float:
        """Median seconds of a decoding step: of two runs the difference, so that prefill does not count."""
        pairs = [self.seconds(batch, CONTEXT, OUTPUT + 1) - self.seconds(batch, CONTEXT, 1) for _ in range(repeats)]
        return statistics.median(pairs) / OUTPUT


def run(results: Results, builds: Iterator[Build]) -> None:
    """Cells of each engine."""
    results.begin(PART)
    results.begin(GAPS)
    for build in builds:
        with results.attempt(PART, build.label):
            started = time.monotonic()
            loaded = Loaded(build)
            results.add(Cell(PART, f"{build.label}: load", time.monotonic() - started, "s"))
            with loaded.engine:
                loaded.seconds(1, CONTEXT, 4)
                # Hashing the weights, which begins with the first request, would take cores from the loop.
                loaded.engine.wait_until_verified(300)
                steps = measure(results, build, loaded)
                with results.attempt(GAPS, build.label):
                    measure_gaps(results, build, loaded, steps)


def measure(results: Results, build: Build, loaded: Loaded) -> dict[int, float]:
    """Decode and prefill beside their roofs; seconds of a decoding step by batch."""
    shape, limits, steps = shape_of(build.name), results.document["limits"], {}
    cache, judged = build.kv_cache_dtype, build.precision == "fp8"
    for batch in BATCHES:
        steps[batch] = loaded.decode(batch)
        roof = decode_seconds(shape, build.precision, cache, batch, CONTEXT + OUTPUT / 2, limits)
        must, goal = MUST[f"decode b{batch}"] if judged else (None, None)
        name, rate = f"{build.label}: decode b{batch}", batch / steps[batch]
        results.add(Cell(PART, name, rate, "tokens/s", batch / roof, "copy bandwidth", roof / steps[batch], must, goal))
    seconds = statistics.median(loaded.seconds(1, PREFILL, 1) for _ in range(5))
    roof = prefill_seconds(shape, build.precision, PREFILL, limits)
    must, goal = MUST_PREFILL.get(build.precision, (None, None))
    name, rate = f"{build.label}: prefill {PREFILL}", PREFILL / seconds
    results.add(Cell(PART, name, rate, "tokens/s", PREFILL / roof, "measured peaks", roof / seconds, must, goal))
    return steps


def measure_gaps(results: Results, build: Build, loaded: Loaded, steps: dict[int, float]) -> None:
    """Idle time between decoding steps and inside of them, from the driver's own records of kernels (CUPTI).

    Recording slows launches down: so the steps' length is that of a run without it, and of the records only what the
    GPU computed in a step.
    """
    for batch in BATCHES:
        before = loaded.engine.stats()
        timeline = record(lambda batch=batch: loaded.seconds(batch, CONTEXT, OUTPUT))  # type: ignore[misc]
        spent = {key: loaded.engine.stats()[key] - before[key] for key in ("loop_seconds", "executor_seconds")}
        # The last ones are all of as many sequences; the first may still read the prompts of others.
        decode = timeline.last_steps(OUTPUT // 2)
        report_gaps(results, f"{build.label}: b{batch}", decode, steps[batch])
        results.note(GAPS, **{f"{build.label} b{batch}": describe(decode) | spent})


def report_gaps(results: Results, name: str, timeline: Timeline, step: float) -> None:
    """step: seconds of one, measured without recording."""
    between, inside = timeline.between_share, timeline.inside_share
    rival = "of the recorded steps"
    cell = Cell(GAPS, f"{name} idle between steps", 100 * between, "%", 3, rival, 1 - between, LEAST_BUSY, GOAL_BUSY)
    results.add(cell)
    results.add(Cell(GAPS, f"{name} idle inside graphs", 100 * inside, "%", None, rival, 1 - inside))
    busy = timeline.busy_seconds / timeline.num_steps
    results.add(Cell(GAPS, f"{name} busy of a step", busy * 1e6, "us", step * 1e6, "unrecorded step", busy / step))


def describe(timeline: Timeline) -> dict[str, Any]:
    """For the JSON: launches of a step, and microseconds of a step by kernel."""
    kernels = {name: seconds * 1e6 / timeline.num_steps for name, seconds in timeline.seconds_by_kernel().items()}
    return {"launches": timeline.num_kernels / timeline.num_steps, "us_by_kernel": kernels}
