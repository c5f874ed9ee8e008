"""The C++ core of the runtime (csrc/): serving loop, scheduler, block manager, sampler, executors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class Output:
    """What one request produced since it was last drained. Lists are parallel to token_ids."""

    request_id: int
    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None
    """Of each token, if asked for: the sampled token first, then the k likeliest, as (token id, logprob, rank from 1)."""
    prompt_logprobs: list[list[tuple[int, float, int]] | None] | None
    """Once, before or with the first token, if asked for; the first entry is None."""
    finish_reason: str | None
    """None while it runs; then "stop", "length", "abort" or "error"."""
    stop_token_id: int | None
    """The stop token that ended it, if one did (it is the last of token_ids)."""
    error: str | None
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""

class Core:
    """The serving loop on its own thread, which never takes the GIL.

    spec: the fields of ExecutorSpec (csrc/executor.h) under their names, nested as dicts and lists.
    config: the fields of LoopConfig (csrc/loop.h) under their names; an unknown key raises TypeError.
    executor: "cpu" or "null".
    """

    def __init__(self, spec: dict[str, Any], config: dict[str, Any], executor: str = "cpu") -> None: ...
    def submit(self, request: dict[str, Any]) -> int:
        """Queues a request (the fields of Request, csrc/request.h) and returns its id. Raises RequestError."""

    def abort(self, request_id: int) -> None:
        """Ends a request, whatever its state, and frees what it holds; unknown or finished ids are ignored."""

    def wait(self, timeout_s: float) -> list[Output]:
        """Outputs since the last call; blocks without the GIL until there are some, the timeout ends or the loop stops."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the loop, and "memory": bytes by purpose."""

    def fail(self, reason: str) -> None:
        """Ends every request with an error and refuses new ones, naming the reason."""

    def close(self) -> None:
        """Aborts what runs, stops the loop and frees everything. A second call does nothing."""

def cpu_features() -> list[str]:
    """The ISA features of this machine that targets ask for: "avx2", "avxvnni", "avx512f", "avx512vnni", ..."""

def run_call(isa: str, call: dict[str, Any], operands: dict[str, NDArray[Any]], step: dict[str, Any]) -> None:
    """Runs one operator's kernel on arrays, in place; for tests and the compiler's checks."""
