"""The C++ core of the runtime (csrc/): serving loop, scheduler, block manager, sampler, executors.

Errors are those of engines/errors.py. A dict with an unknown key, a missing one or a value of the wrong type raises
TypeError.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class Output:
    """What one request produced since it was last drained. Lists are parallel to token_ids.

    Times are seconds of time.monotonic(), 0.0 where not reached yet.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None
    """Of each token, if asked for: the sampled one, then the k likeliest, as (token id, logprob, rank from 1)."""
    prompt_logprobs: list[list[tuple[int, float, int]] | None] | None
    """Once, with the first token, if asked for; the first entry is None."""
    finish_reason: str | None
    """None while it runs; then "stop", "length", "abort" or "error"."""
    stop_token_id: int | None
    """The stop token that ended it, if one did (it is the last of token_ids)."""
    error: str | None
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    arrival_time: float
    first_scheduled_time: float
    first_token_time: float

class Core:
    """The serving loop on its own thread, which never takes the GIL.

    spec: the fields of ExecutorSpec (csrc/executor.h) under their names, nested as dicts and lists; an operand's kind
        is "buffer", "weight", "input" or "state", a guard a list of [variable, min, max]. Groups share one block size.
    config: the fields of LoopConfig (csrc/loop.h) under their names.
    executor: "cpu"; "cuda", on the first GPU; "cuda-null", on a device that checks every launch and computes nothing;
        "null". The null executor reads groups, sizes and vocab_size alone; its isa injects faults: "fail_on=7" fails a
        step that computes token 7, "nan_on=9" gives token 9's row a NaN; "cuda-null" draws, for "wrong_on=11", a token
        beyond the vocabulary in place of 11, and for "unlisted_on=11" lists one in its place.
    """

    def __init__(self, spec: dict[str, Any], config: dict[str, Any], executor: str = "cpu") -> None: ...
    def submit(self, request: dict[str, Any]) -> int:
        """Queues a request and returns its id; ids rise with arrival.

        request: the fields of Request (csrc/request.h), logit_bias as a dict of floats by token; prompt_token_ids and
        max_tokens must be there. It ends with "length" at max_tokens, at
        max_model_len, or where its state would fill the whole cache.
        Raises RequestError with all faults, CapacityError if the prompt fits no cache of this size, EngineryError after
        fail() or close().
        """

    def abort(self, request_id: int) -> None:
        """Ends a request before the next step, whatever its state, and frees what it holds.

        Its last Output says "abort". Unknown or finished ids are ignored.
        """

    def wait(self, timeout_s: float) -> list[Output]:
        """Outputs since the last call, one for each request that has news, woken at most once per step.

        Blocks without the GIL until there are some, the timeout ends or the loop is closed.
        """

    def step(self) -> bool:
        """With manual_steps (no thread, for tests): makes one step on this thread; False when no request is left."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as of the last step.

        steps, num_running, num_waiting, num_preemptions
        prompt_tokens, generation_tokens           of requests that were scheduled, each once; sampled tokens
        prefix_cache_queries, prefix_cache_hits    prompt tokens looked up and found
        finished                                   requests by reason: {"stop": n, "length": n, "abort": n, "error": n}
        loop_seconds, executor_seconds             time in steps outside of the executor, and in it
        wake_seconds                               time after steps to wake who waits for outputs
        groups                                     of each state group name, num_blocks, used_blocks, cached_blocks
        kv_cache_usage                             used share of the fullest group, 0 to 1
        internal_error                             None, or what broke: then every request ended and no new one is taken
        memory                                     bytes by purpose
        sums_by                                    what sums large messages over GPUs: "NCCL 2.27.3", or "kernels" and
                                                   why; "" where nothing does
        weights_in                                 what settle_weights did, in words; "" before, or where it did nothing
        """

    def settle_weights(self) -> None:
        """Puts weights where they are read the fastest (csrc/weight_pages.h), while steps go on. Without the GIL."""

    def stop_settling(self) -> None:
        """Makes settle_weights return soon, whenever it is called."""

    def fail(self, reason: str) -> None:
        """Ends every request with an error and refuses new ones, naming the reason."""

    def close(self) -> None:
        """Aborts what runs, stops the loop and frees its threads. A second call does nothing."""

def cpu_features() -> list[str]:
    """The ISA features of this machine that targets ask for: "avx2", "avxvnni", "avx512f", "avx512vnni", ..."""

def cuda_gpu_count() -> int:
    """GPUs that the NVIDIA driver shows; raises TargetError where there is no driver, or no GPU."""

def cuda_gpu(number: int = 0) -> dict[str, Any]:
    """One of the GPUs that the NVIDIA driver shows; raises TargetError where there is no driver, or no such GPU.

    name; arch, 90 for 9.0; driver, the newest CUDA it knows, 12040 for 12.4; shared_bytes of a block; free_bytes,
    total_bytes
    """

def nodes_of_cpus(cpus: list[int], root: str = "/sys/devices/system/node") -> list[int]:
    """The memory nodes that CPUs belong to, in order; none where the system does not say. root: where it says so."""

def run_calls(
    isa: str,
    calls: list[dict[str, Any]],
    operands: list[dict[str, NDArray[Any]]],
    step: dict[str, Any],
    num_threads: int = 1,
) -> float:
    """Runs operators' kernels on arrays, in place and one after another; the seconds that it took.

    For tests and measurements. isa: exactly that build of the kernels, also "avx512-vnni-bf16". calls: the fields of
    CallSpec (csrc/call.h), "groups" (of StateGroupSpec) and "per_thread", operands of which each thread has a copy in
    turn. operands: of each call, an array for each buffer, weight and state [num_blocks, block_bytes]. step: the
    arrays of Step (csrc/step.h) under their names.
    Raises EngineFormatError for a call that is not sound, TargetError where the machine lacks the ISA.
    """

def run_forward(
    spec: dict[str, Any], steps: list[dict[str, Any]], executor: str = "cpu"
) -> tuple[list[NDArray[np.float32]], dict[str, int]]:
    """Runs steps on an executor without a loop: each step's logits [rows, vocab_size], and the executor's memory.

    spec, executor: as for Core. steps: as for run_calls. Raises what loading an engine raises.
    """

def sample_row(
    logits: NDArray[np.float32], request: dict[str, Any], output_token_ids: list[int]
) -> tuple[int, list[tuple[int, float, int]]]:
    """The sampler alone, for tests: the token that logits [vocab_size] give after output_token_ids, and its logprobs.

    Without a seed in the request it is 0.
    """
