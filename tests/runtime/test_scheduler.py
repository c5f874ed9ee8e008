"""Random schedules on the null device: whatever happens beside a request, it gets what it would get alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
from enginery.engines.errors import CapacityError
from enginery.runtime._core import Core, Output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOCAB = 48
MAX_MODEL_LEN = 40
SCHEDULES = 400  # random ones of each kind of engine and policy

KINDS = {"full": [0], "window": [5], "full and window": [0, 5], "two windows": [3, 9]}
POLICIES = ["guaranteed_no_evict", "max_utilization"]


def groups_of(windows: tuple[int, ...], block_size: int) -> list[dict[str, Any]]:
    return [
        {"name": f"g{i}", "kind": "window" if window else "full", "window": window, "block_size": block_size}
        for i, window in enumerate(windows)
    ]


def spec_of(windows: tuple[int, ...], block_size: int, num_blocks: list[int], **changes: int) -> dict[str, Any]:
    return {
        "ranks": [],
        "groups": groups_of(windows, block_size),
        "num_blocks": num_blocks,
        "vocab_size": VOCAB,
        "max_tokens": 64,
        "max_rows": 64,
        "max_sequences": 64,
        **changes,
    }


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 64,
        "manual_steps": True,
        **changes,
    }


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    finish_reason: str | None = None
    error: str | None = None

    def add(self, output: Output) -> None:
        assert self.finish_reason is None, "a request went on after its end"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt logprobs came twice"
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        self.error = output.error


def run_to_end(core: Core, results: dict[int, Result], max_steps: int) -> None:
    steps = 0
    while core.step():
        steps += 1
        assert steps <= max_steps, "requests starve"
        for output in core.wait(0):
            results[output.request_id].add(output)


def freeze(request: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in request.items())


@lru_cache(maxsize=20_000)
def alone(windows: tuple[int, ...], block_size: int, request: tuple[tuple[str, Any], ...]) -> Result:
    """What a request gets on a machine of its own, the prompt in one step."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in request}
    core = Core(spec_of(windows, block_size, [64] * len(windows)), config_of(enable_prefix_caching=False), "null")
    result = Result()
    run_to_end(core, {core.submit(values): result}, MAX_MODEL_LEN)
    assert result.finish_reason in ("stop", "length"), result.error
    core.close()
    return result


def capacity(windows: tuple[int, ...], block_size: int, num_blocks: list[int]) -> int:
    """Tokens of one sequence that fit: without limit where the window of any position fits."""
    limits = [10**6]
    for window, count in zip(windows, num_blocks, strict=True):
        if window == 0 or (window + block_size - 2) // block_size + 1 > count:
            limits.append(count * block_size)
    return min(limits)


requests = st.fixed_dictionaries(
    {
        # A few stems, so that prompts share prefixes.
        "stem": st.integers(0, 2),
        "stem_tokens": st.integers(1, 20),
        "tail": st.lists(st.integers(0, VOCAB - 1), max_size=4),
        "max_tokens": st.integers(1, 12),
        "open_ended": st.booleans(),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "prompt_logprobs": st.sampled_from([-1, -1, -1, 0, 2]),
        "logprobs": st.sampled_from([-1, 1]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 1.5]),
        "stop_token_ids": st.sampled_from([(), (), (3, 17, 31)]),
        "cache_salt": st.sampled_from(["", "", "tenant"]),
        "arrival": st.integers(0, 12),
        "abort": st.sampled_from([None, None, None, 2, 5, 9]),
    }
)

machines = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 4),
        "num_blocks": st.integers(3, 24),
        "max_rows": st.integers(1, 10),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 12),
        "mixed_prompt_tokens": st.integers(0, 6),
        "enable_prefix_caching": st.booleans(),
        "max_preemptions": st.integers(0, 3),
        "expected_output_tokens": st.integers(0, 12),
    }
)


def request_of(drawn: dict[str, Any]) -> dict[str, Any]:
    stem = [
        (7 * drawn["stem"] + 5 * position + position * position) % VOCAB for position in range(drawn["stem_tokens"])
    ]
    values = {key: drawn[key] for key in drawn if key not in ("stem", "stem_tokens", "tail", "arrival", "abort")}
    return {**values, "seed": 11, "prompt_token_ids": stem + drawn["tail"]}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_gets_what_it_gets_alone(kind: str, policy: str) -> None:
    windows = tuple(KINDS[kind])

    @settings(max_examples=SCHEDULES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(machine=machines, drawn=st.lists(requests, min_size=1, max_size=7))
    def check(machine: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        check_schedule(windows, policy, machine, drawn)

    check()


def check_schedule(windows: tuple[int, ...], policy: str, machine: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
    block_size = machine["block_size"]
    num_blocks = [machine["num_blocks"]] * len(windows)
    core = Core(
        spec_of(windows, block_size, num_blocks, max_rows=machine["max_rows"]),
        config_of(
            capacity_scheduler_policy=policy,
            **{key: machine[key] for key in machine if key not in ("block_size", "num_blocks", "max_rows")},
        ),
        "null",
    )
    fits = capacity(windows, block_size, num_blocks)
    submitted: dict[int, dict[str, Any]] = {}
    results: dict[int, Result] = {}
    aborts: dict[int, int] = {}
    for step in range(13):
        for entry in drawn:
            if entry["arrival"] != step:
                continue
            values = request_of(entry)
            if len(values["prompt_token_ids"]) > fits:
                with pytest.raises(CapacityError):
                    core.submit(values)
                continue
            request_id = core.submit(values)
            submitted[request_id], results[request_id] = values, Result()
            if entry["abort"] is not None:
                aborts[request_id] = step + entry["abort"]
        for request_id, when in aborts.items():
            if when == step:
                core.abort(request_id)
        core.step()
        for output in core.wait(0):
            results[output.request_id].add(output)

    total = sum(len(values["prompt_token_ids"]) + values["max_tokens"] for values in submitted.values())
    run_to_end(core, results, 40 + 12 * total)
    stats = core.stats()
    assert stats["internal_error"] is None
    assert [group["used_blocks"] for group in stats["groups"]] == [0] * len(windows)
    may_preempt = policy == "max_utilization" or any(values["open_ended"] for values in submitted.values())
    assert may_preempt or stats["num_preemptions"] == 0
    core.close()

    for request_id, values in submitted.items():
        check_result(
            results[request_id], alone(windows, block_size, freeze(values)), values, fits, request_id in aborts
        )


def check_result(result: Result, expected: Result, values: dict[str, Any], fits: int, aborted: bool) -> None:
    assert result.error is None
    count = len(result.token_ids)
    assert result.token_ids == expected.token_ids[:count]
    assert result.logprobs == expected.logprobs[: len(result.logprobs)]
    if count > 0:
        assert result.prompt_logprobs == expected.prompt_logprobs
    if aborted and result.finish_reason == "abort":
        return
    if count < len(expected.token_ids):
        assert result.finish_reason == "length"
        assert len(values["prompt_token_ids"]) + count == fits + 1, "it ended before the cache was full"
    else:
        assert result.finish_reason == expected.finish_reason


def blocks_per_step(core: Core) -> list[int]:
    """With blocks of one token, how many tokens each step computed for the first group."""
    used = []
    while core.step():
        used.append(core.stats()["groups"][0]["used_blocks"])
    return used


def busy_core(num_decodes: int, **config: Any) -> Core:
    core = Core(spec_of((0,), 1, [6000]), config_of(max_model_len=400, enable_prefix_caching=False, **config), "null")
    for index in range(num_decodes):
        core.submit({"prompt_token_ids": [index], "max_tokens": 300})
    core.step()
    core.step()
    core.wait(0)
    return core


def test_streams_that_run_get_a_token_each_step_while_a_long_prompt_is_computed() -> None:
    core = busy_core(4, max_num_batched_tokens=16)
    late = core.submit({"prompt_token_ids": [1] * 100, "max_tokens": 1})
    for _ in range(9):  # 12 tokens beside 4 decodes: 100 / 12 rounded up
        core.step()
        outputs = core.wait(0)
        assert [len(output.token_ids) for output in outputs if output.request_id != late] == [1] * 4
    assert [output.finish_reason for output in outputs if output.request_id == late] == ["length"]


def test_a_prompt_beside_decodes_is_cut_into_like_chunks() -> None:
    core = busy_core(4, max_num_batched_tokens=16)
    core.submit({"prompt_token_ids": [1] * 26, "max_tokens": 300})
    before = core.stats()["groups"][0]["used_blocks"]
    chunks = []
    for _ in range(3):
        core.step()
        after = core.stats()["groups"][0]["used_blocks"]
        chunks.append(after - before - 4)
        before = after
    assert chunks == [9, 9, 8]


@pytest.mark.parametrize(("num_decodes", "chunks"), [(1, [6, 5, 5, 5, 5]), (5, [9, 9, 8])])
def test_a_prompt_beside_decodes_takes_no_more_than_a_mixed_step_may(num_decodes: int, chunks: list[int]) -> None:
    core = busy_core(num_decodes, max_num_batched_tokens=16, mixed_prompt_tokens=6)
    core.submit({"prompt_token_ids": [1] * 26, "max_tokens": 300})
    used = [core.stats()["groups"][0]["used_blocks"], *(blocks_per_step(core)[: len(chunks)])]
    assert [after - before - num_decodes for before, after in pairwise(used)] == chunks


def test_a_prompt_alone_takes_the_whole_step() -> None:
    core = busy_core(0, max_num_batched_tokens=16)
    core.submit({"prompt_token_ids": [1] * 26, "max_tokens": 3})
    assert blocks_per_step(core)[:2] == [16, 26]


def test_decodes_leave_a_quarter_of_the_step_to_prompts() -> None:
    core = busy_core(16, max_num_batched_tokens=16)
    core.submit({"prompt_token_ids": [1] * 40, "max_tokens": 1})
    steps = 0
    finished: list[int] = []
    counts: dict[int, int] = {}
    while not finished:
        core.step()
        steps += 1
        for output in core.wait(0):
            counts[output.request_id] = counts.get(output.request_id, 0) + len(output.token_ids)
            finished += [output.request_id] if output.finish_reason else []
    assert steps == 10  # of 4 prompt tokens each
    assert max(list(counts.values())[:16]) - min(list(counts.values())[:16]) <= 1, "decodes take turns"


def test_nobody_is_overtaken() -> None:
    core = Core(spec_of((0,), 1, [20]), config_of(enable_prefix_caching=False), "null")
    order = [core.submit({"prompt_token_ids": [1] * size, "max_tokens": 2}) for size in (10, 15, 2, 2)]
    firsts = []
    while core.step():
        firsts += [
            output.request_id for output in core.wait(0) if len(output.token_ids) and output.finish_reason is None
        ]
    assert firsts == order


def test_the_youngest_gives_way_and_comes_back_and_the_oldest_never_waits() -> None:
    core = Core(
        spec_of((0,), 4, [5]),
        config_of(capacity_scheduler_policy="max_utilization", enable_prefix_caching=False),
        "null",
    )
    # In the sixth step the older one needs its third block, and the younger one, in its own third, needs none.
    counts = {core.submit({"prompt_token_ids": [1] * size, "max_tokens": 8}): 0 for size in (4, 7)}
    steps_of_the_oldest = []
    while core.step():
        outputs = {output.request_id: output for output in core.wait(0)}
        for request_id, output in outputs.items():
            counts[request_id] += len(output.token_ids)
        steps_of_the_oldest.append(0 in outputs)
    assert list(counts.values()) == [8, 8]
    assert steps_of_the_oldest[:8] == [True] * 8
    assert core.stats()["num_preemptions"] == 1


def test_a_prompt_that_gives_way_halfway_gets_each_logprob_once() -> None:
    core = Core(
        spec_of((0,), 1, [20]),
        config_of(capacity_scheduler_policy="max_utilization", max_num_batched_tokens=2),
        "null",
    )
    older = {"prompt_token_ids": [1] * 4, "max_tokens": 13, "temperature": 0.0, "prompt_logprobs": -1, "logprobs": 0}
    younger = {**older, "prompt_token_ids": list(range(12)), "max_tokens": 2, "prompt_logprobs": 1}
    submitted = {core.submit(values): values for values in (older, younger)}
    results = {request_id: Result() for request_id in submitted}
    run_to_end(core, results, 100)
    assert core.stats()["num_preemptions"] == 1
    for request_id, values in submitted.items():
        assert results[request_id] == alone((0,), 1, freeze(values))


def test_guaranteed_no_evict_sets_blocks_aside_for_the_whole_output() -> None:
    core = Core(spec_of((0,), 1, [20]), config_of(enable_prefix_caching=False), "null")
    for index in range(3):
        core.submit({"prompt_token_ids": [index] * 4, "max_tokens": 6})
    core.step()
    assert (core.stats()["num_running"], core.stats()["num_waiting"]) == (2, 1)
    while core.step():
        assert core.stats()["num_preemptions"] == 0


def test_an_open_ended_request_is_expected_to_take_what_others_took() -> None:
    core = Core(
        spec_of((0,), 1, [38]),
        config_of(enable_prefix_caching=False, expected_output_tokens=4, max_model_len=30),
        "null",
    )
    request = {"prompt_token_ids": [1] * 4, "max_tokens": 26, "open_ended": True}

    def running_together() -> int:
        for index in range(5):
            core.submit({**request, "prompt_token_ids": [index] * 4})
        core.step()
        together: int = core.stats()["num_running"]
        while core.step():
            pass
        assert {output.finish_reason for output in core.wait(0)} == {"length"}
        return together

    # 38 blocks: four of 4 + 4 tokens; then, since all took 26, one of 30.
    assert running_together() == 4
    assert core.stats()["num_preemptions"] > 0, "the estimate was too low, so some gave way"
    assert running_together() == 1
    for _ in range(12):  # each of a single token: 26, 23, 21, ... 6
        core.submit({**request, "max_tokens": 1})
        while core.step():
            pass
    assert running_together() > 1


def test_a_request_beyond_its_estimate_keeps_the_room_that_it_has() -> None:
    core = Core(
        spec_of((5,), 1, [8]),
        config_of(enable_prefix_caching=False, expected_output_tokens=1, max_model_len=40),
        "null",
    )
    core.submit({"prompt_token_ids": [1], "max_tokens": 20, "open_ended": True})
    for _ in range(10):
        core.step()
    core.submit({"prompt_token_ids": [2] * 3, "max_tokens": 3})
    core.step()
    assert (core.stats()["num_running"], core.stats()["num_waiting"]) == (1, 1)
    while core.step():
        pass
    assert core.stats()["num_preemptions"] == 0
