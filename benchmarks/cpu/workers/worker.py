"""What every engine's worker is: a script that its own environment's Python runs. Standard library only.

    python X_worker.py convert CHECKPOINT MODEL PRECISION     writes the model that the engine loads
    python X_worker.py measure MODEL OPTIONS                  loads, then answers requests, a JSON line each
    python X_worker.py first-token MODEL OPTIONS              loads, answers a text with one token, tells when, ends
    python X_worker.py server MODEL OPTIONS                   becomes the engine's own server

OPTIONS is JSON (see Options). A request is {"kind": "prefill" | "decode" | …, "batch": …, "input": …, "output": …}; its
answer {"value": tokens/s} or {"error": …}; {"kind": "logprobs", "prompts": [token ids, …]} has each prompt's mean.
After the last one comes {"peak_rss_bytes": …}.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A cell that is over sooner is measured again, and the median counts.
_ENOUGH_SECONDS, _ENOUGH_TIMES = 3.0, 5
# What first-token asks.
_QUESTION = "Once upon a time, there was a girl named Lily. She lived near the barn."

Prompts = list[list[int]]
# Of each sequence, when each of its tokens came: seconds since it was asked for.
Times = list[list[float]]


@dataclass(frozen=True)
class Options:
    """What a measurement may need.

    precision   as the engine calls it
    context     tokens of the longest sequence, prompt and output
    sequences   at once
    port        of a server, on the loopback
    """

    precision: str
    vocab_size: int
    threads: int = 2
    context: int = 4096
    sequences: int = 32
    port: int = 0


class Worker:
    """One engine. Subclasses load it and generate; the rest is the same for all."""

    options: Options

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        """Writes what `load` reads."""
        raise NotImplementedError

    def load(self, model: Path, options: Options) -> None:
        """Imports what is needed, and loads."""
        raise NotImplementedError

    def generate(self, prompts: Prompts, output: int) -> Times:
        """Exactly `output` tokens for each prompt, greedily, through any end-of-sequence."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids, by the engine's own tokenizer."""
        raise NotImplementedError

    def server(self, model: Path, options: Options) -> None:
        """Replaces this process by the engine's own server."""
        raise NotImplementedError

    def logprobs(self, prompt: list[int]) -> list[float]:
        """Natural logarithms of the probabilities of a prompt's tokens, but for its first."""
        raise NotImplementedError

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """To a request."""
        if request["kind"] == "logprobs":
            rows = [self.logprobs(prompt) for prompt in request["prompts"]]
            if [len(row) + 1 for row in rows] != [len(prompt) for prompt in request["prompts"]]:
                raise RuntimeError(f"{sum(map(len, rows))} logprobs came")
            return {"value": [statistics.fmean(row) for row in rows]}
        return self.measure(request)

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for a cell."""
        kind, batch, length, output = (request[name] for name in ("kind", "batch", "input", "output"))
        if kind == "prefill":
            return {"value": median(lambda: length / self.times(1, length, 1)[0][0])}
        if kind == "decode":
            return {"value": median(lambda: decode_rate(self.times(batch, length, output + 1)))}
        if kind == "clients":
            self.clients(2, length, 8, 1)
            return {"streams": self.clients(batch, length, output, request["times"])}
        raise ValueError(f"no such kind: {kind}")

    def clients(self, clients: int, length: int, output: int, times: int) -> list[list[float]]:
        """Where there is no server: of each request of each client the time it was made, then those of its tokens."""
        raise NotImplementedError

    def times(self, batch: int, length: int, output: int) -> Times:
        """Of new prompts. Raises RuntimeError where a sequence is shorter or longer."""
        times = self.generate(self.prompts(batch, length), output)
        if any(len(sequence) != output for sequence in times):
            raise RuntimeError(f"sequences have {sorted({len(sequence) for sequence in times})} tokens, not {output}")
        return times

    def prompts(self, batch: int, length: int) -> Prompts:
        """New ones every time: nothing may be found in a cache."""
        return [[random.randrange(300, self.options.vocab_size - 300) for _ in range(length)] for _ in range(batch)]

    def peak_rss_bytes(self) -> int:
        """Of this process, mapped files counted, or of the largest of its children."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own = int(fields["VmHWM"].split()[0])
        return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def log_softmax_at(logits: Any, tokens: list[int]) -> list[float]:
    """logits: [len(tokens), vocab], an array. Of each row the logarithm of one token's probability."""
    import numpy as np

    rows = np.asarray(logits, np.float64)
    largest = rows.max(1)
    totals = np.log(np.exp(rows - largest[:, None]).sum(1)) + largest
    values: list[float] = (rows[np.arange(len(tokens)), tokens] - totals).tolist()
    return values


def decode_rate(times: Times) -> float:
    """tokens/s while all sequences decode: from the moment the last one has begun until the first one has ended."""
    begin, end = max(sequence[0] for sequence in times), min(sequence[-1] for sequence in times)
    tokens = sum(begin < time <= end for sequence in times for time in sequence)
    return tokens / (end - begin)


def median(rate: Callable[[], float]) -> float:
    """Of as many runs as fit into a few seconds."""
    rates: list[float] = []
    started = time.perf_counter()
    while not rates or (time.perf_counter() - started < _ENOUGH_SECONDS and len(rates) < _ENOUGH_TIMES):
        rates.append(rate())
    return statistics.median(rates)


def main(worker: Worker) -> None:
    """The command line of a worker."""
    command, model, rest = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if command == "convert":
        worker.convert(model, Path(rest), sys.argv[4])
        return
    worker.options = options = Options(**json.loads(rest))
    if command == "server":
        worker.server(model, options)
        return
    answer = _answer_stream()
    worker.load(model, options)
    if command == "first-token":
        worker.generate([worker.encode(_QUESTION)], 1)
        answer({"time": time.time()})
        # The interpreter's way out belongs to the process, and is measured with it.
        return
    with _failures(answer):
        worker.generate(worker.prompts(1, 64), 4)
    answer({"ready": True})
    for line in sys.stdin:
        with _failures(answer):
            answer(worker.answer(json.loads(line)))
    answer({"peak_rss_bytes": worker.peak_rss_bytes()})


def _answer_stream() -> Callable[[dict[str, Any]], None]:
    """Answers have a pipe of their own: what libraries print to stdout goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=pipe, flush=True)

    return answer


class _failures:
    """A measurement that fails is an answer; the worker goes on."""

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        self.answer = answer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        self.answer({"error": f"{type(error).__name__}: {error}"[:500]})
        return True
