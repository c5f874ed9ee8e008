"""The loop on its own thread: submitting, draining, aborting, failing, closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from enginery.engines.errors import EngineryError, RequestError
from enginery.runtime._core import Core, Output

GROUP = {"name": "full", "kind": "full", "window": 0, "block_size": 4}
SPEC: dict[str, Any] = {
    "ranks": [],
    "groups": [GROUP],
    "num_blocks": [256],
    "vocab_size": 100,
    "max_tokens": 64,
    "max_rows": 64,
    "max_sequences": 16,
}
CONFIG: dict[str, Any] = {"max_model_len": 300, "max_num_seqs": 16, "max_num_batched_tokens": 64}


@contextmanager
def running(spec: dict[str, Any] | None = None, **config: Any) -> Iterator[Core]:
    core = Core({**SPEC, **(spec or {})}, {**CONFIG, **config}, "null")
    try:
        yield core
        assert core.stats()["internal_error"] is None
    finally:
        core.close()


def request(prompt: Iterable[int] = (1, 2, 3), max_tokens: int = 4, **values: Any) -> dict[str, Any]:
    return {"prompt_token_ids": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, **values}


def drain(core: Core, wanted: int) -> dict[int, list[Output]]:
    """All outputs until so many requests have ended."""
    outputs: dict[int, list[Output]] = {}
    while wanted > 0:
        news = core.wait(60.0)
        assert news, "the loop has nothing to say"
        for output in news:
            outputs.setdefault(output.request_id, []).append(output)
            wanted -= output.finish_reason is not None
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def wait_until_idle(core: Core) -> dict[str, Any]:
    """Stats after the loop has ended a request that was submitted last."""
    drain(core, 0)
    core.submit(request(max_tokens=1))
    drain(core, 1)
    return core.stats()


def test_threads_submit_while_one_drains() -> None:
    with running() as core:
        expected = {}
        for index in range(8):
            core.submit(request([index] * 5, max_tokens=9))
            expected[index] = tokens(next(iter(drain(core, 1).values())))
        ids: dict[int, int] = {}

        def submit(index: int) -> None:
            for _ in range(25):
                ids[core.submit(request([index] * 5, max_tokens=9))] = index

        threads = [threading.Thread(target=submit, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        outputs = drain(core, 200)
        for thread in threads:
            thread.join()
        assert len(outputs) == 200
        for request_id, parts in outputs.items():
            assert tokens(parts) == expected[ids[request_id]]
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        stats = core.stats()
        assert stats["finished"] == {"stop": 0, "length": 208, "abort": 0, "error": 0}
        assert stats["generation_tokens"] == 208 * 9


def test_one_output_for_each_request_however_many_steps_it_spans() -> None:
    with running(manual_steps=True) as core:
        first = core.submit(request(max_tokens=5, logprobs=2, prompt_logprobs=1))
        second = core.submit(request([9, 8], max_tokens=3))
        while core.step():
            pass
        outputs = {output.request_id: output for output in core.wait(0)}
        assert set(outputs) == {first, second}
        assert len(outputs[first].token_ids) == len(outputs[first].logprobs or []) == 5
        assert [len(entry or []) for entry in outputs[first].prompt_logprobs or []] == [0, 2, 2]
        assert outputs[second].logprobs is None
        assert outputs[second].prompt_logprobs is None
        assert core.wait(0) == []


def test_times_are_those_of_the_monotonic_clock() -> None:
    with running() as core:
        before = time.monotonic()
        core.submit(request(max_tokens=1))
        output = drain(core, 1)[0][0]
        times = [before, output.arrival_time, output.first_scheduled_time, output.first_token_time, time.monotonic()]
        assert times == sorted(times)


def test_a_stop_token_ends_a_request_and_is_its_last_token() -> None:
    with running() as core:
        core.submit(request(max_tokens=12))
        free = tokens(drain(core, 1)[0])
        stop = free[4]
        core.submit(request(max_tokens=12, stop_token_ids=[stop, 10**6]))
        outputs = drain(core, 1)[1]
        assert tokens(outputs) == free[: free.index(stop) + 1]
        assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stop)
        core.submit(request(max_tokens=12, min_tokens=6, stop_token_ids=[stop]))
        outputs = drain(core, 1)[2]
        assert stop not in tokens(outputs)[:6]


def test_a_request_ends_at_max_model_len() -> None:
    with running(max_model_len=10) as core:
        core.submit(request([1] * 9, max_tokens=50))
        outputs = drain(core, 1)[0]
        assert (len(tokens(outputs)), outputs[-1].finish_reason) == (1, "length")
        with pytest.raises(RequestError, match=r"the prompt has 10 tokens.*max_model_len, 10: shorten it"):
            core.submit(request([1] * 10))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_everything_before_the_next_step(steps: int) -> None:
    with running(manual_steps=True, max_num_batched_tokens=4) as core:
        aborted = core.submit(request([1] * 9, max_tokens=50))
        other = core.submit(request([2] * 9, max_tokens=2))
        for _ in range(steps):
            core.step()
        core.abort(aborted)
        core.abort(aborted)
        core.abort(777)
        core.abort(-5)
        outputs = core.wait(0)
        while core.step():
            outputs += core.wait(0)
        outputs += core.wait(0)
        ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
        assert ends == {aborted: "abort", other: "length"}
        assert core.stats()["groups"][0]["used_blocks"] == 0


def test_abort_reaches_a_running_loop() -> None:
    with running(max_model_len=10**6, spec={"num_blocks": [10**5]}) as core:
        request_id = core.submit(request(max_tokens=10**5))
        assert core.wait(60.0)
        core.abort(request_id)
        parts = drain(core, 1)[request_id]
        assert parts[-1].finish_reason == "abort"
        assert wait_until_idle(core)["groups"][0]["used_blocks"] == 0


def test_an_error_of_the_device_ends_the_requests_of_its_step_and_no_others() -> None:
    with running(spec={"isa": "fail_on=13"}, manual_steps=True, max_num_seqs=2) as core:
        beside = core.submit(request([1, 2]))
        failing = core.submit(request([13]))
        waiting = core.submit(request([4, 5]))
        outputs: list[Output] = []
        while core.step():
            outputs += core.wait(0)
        ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
        assert ends == {beside: "error", failing: "error", waiting: "length"}
        messages = {output.error for output in outputs if output.finish_reason == "error"}
        assert all("token 13 fails on request" in (message or "") for message in messages)
        assert core.stats()["groups"][0]["used_blocks"] == 0


def test_logits_that_are_not_finite_end_their_own_request_alone() -> None:
    with running(spec={"isa": "nan_on=13"}, manual_steps=True) as core:
        beside = core.submit(request([1, 2]))
        failing = core.submit(request([3, 13, 3], prompt_logprobs=0))
        outputs: list[Output] = []
        while core.step():
            outputs += core.wait(0)
        ends = {output.request_id: output for output in outputs if output.finish_reason}
        assert ends[beside].finish_reason == "length"
        assert ends[failing].finish_reason == "error"
        assert "not finite" in (ends[failing].error or "")


def test_fail_ends_everything_and_names_the_reason() -> None:
    with running(max_model_len=10**6, spec={"num_blocks": [10**5]}) as core:
        request_id = core.submit(request(max_tokens=10**5))
        core.fail("weights.rank0.safetensors: chunk 3 does not match its sha256")
        outputs = drain(core, 1)[request_id]
        assert outputs[-1].finish_reason == "error"
        assert "chunk 3" in (outputs[-1].error or "")
        with pytest.raises(EngineryError, match="chunk 3"):
            core.submit(request())


def test_close_aborts_what_runs_and_wakes_who_waits() -> None:
    core = Core({**SPEC, "num_blocks": [10**5]}, {**CONFIG, "max_model_len": 10**6}, "null")
    request_id = core.submit(request(max_tokens=10**5))
    outputs: list[Output] = []

    def wait() -> None:
        while not outputs or outputs[-1].finish_reason is None:
            outputs.extend(core.wait(60.0))

    waiter = threading.Thread(target=wait)
    waiter.start()
    core.close()
    waiter.join()
    core.close()
    assert (outputs[-1].request_id, outputs[-1].finish_reason) == (request_id, "abort")
    assert core.wait(60.0) == []
    with pytest.raises(EngineryError, match="closed"):
        core.submit(request())
    assert core.stats()["groups"][0]["used_blocks"] == 0


def test_waiting_lets_other_threads_run() -> None:
    with running() as core:
        outputs: list[Output] = []
        waiter = threading.Thread(target=lambda: outputs.extend(core.wait(60.0)))
        waiter.start()
        core.submit(request(max_tokens=1))  # never reached if wait() held the GIL
        waiter.join()
        assert len(outputs) == 1


def test_many_loops_come_and_go() -> None:
    for index in range(50):
        core = Core(SPEC, CONFIG, "null")
        core.submit(request(max_tokens=200))
        if index % 2:
            core.close()  # the others end with the object


def test_unseeded_requests_differ_and_seeded_ones_repeat() -> None:
    with running() as core:
        for seed in (None, None, 5, 5):
            values = request(max_tokens=40, temperature=1.0)
            core.submit(values if seed is None else {**values, "seed": seed})
        outputs = [tokens(parts) for _, parts in sorted(drain(core, 4).items())]
        assert outputs[0] != outputs[1]
        assert outputs[2] == outputs[3]


def test_penalties_count_what_the_loop_has_generated_and_the_prompt() -> None:
    with running() as core:
        favourite = request([1, 2], max_tokens=12, logit_bias={5: 9.0})  # beyond the null device's -4 to 4
        for changes in ({}, {"frequency_penalty": 2.0}, {"repetition_penalty": 100.0}):
            core.submit({**favourite, **changes})
        core.submit({**favourite, "prompt_token_ids": [1, 5], "repetition_penalty": 100.0})
        outputs = [tokens(parts) for _, parts in sorted(drain(core, 4).items())]
        assert outputs[0] == [5] * 12
        assert outputs[1][0] == 5
        assert outputs[1].count(5) < 12
        assert (outputs[2][0], outputs[2].count(5)) == (5, 1)
        assert outputs[3].count(5) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 17}, "max_num_seqs is 17, wanted 1 to 16"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, wanted 1 to 64"),
        ({"capacity_scheduler_policy": "evict"}, "capacity_scheduler_policy is 'evict'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineryError, match=message):
        Core(SPEC, {**CONFIG, **change}, "null")


@pytest.mark.parametrize(
    ("spec", "config", "executor", "message"),
    [
        (SPEC, {**CONFIG, "max_num_sequences": 3}, "null", "config: unknown: 'max_num_sequences'"),
        ({**SPEC, "blocks": 3}, CONFIG, "null", "spec: unknown: 'blocks'"),
        ({**SPEC, "groups": [{**GROUP, "size": 1}]}, CONFIG, "null", r"spec.groups\[0\]: unknown: 'size'"),
        ({**SPEC, "groups": 3}, CONFIG, "null", "spec: 'groups' is not a list"),
        (SPEC, {"max_model_len": 3}, "null", "config: 'max_num_seqs' is missing"),
        (SPEC, CONFIG, "tpu", "executor is 'tpu'"),
    ],
)
def test_what_has_no_place_in_a_configuration_is_a_type_error(
    spec: dict[str, Any], config: dict[str, Any], executor: str, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Core(spec, config, executor)


def test_steps_by_hand_are_for_manual_loops() -> None:
    with running() as core, pytest.raises(EngineryError, match="manual_steps"):
        core.step()
