"""Random requests that come and go, served by the real loop on one executor or another."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from enginery.runtime._core import Core, Output

Request = dict[str, Any]
_PREFIXES = 3
_SHORTEST = 250  # of the vocabularies of tests/tiny.py


@dataclass
class Answer:
    """What came of a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Served:
    """Answers in order of submission; those of aborted requests end where the abort met them. stats: at the end."""

    answers: list[Answer]
    aborted: frozenset[int]
    stats: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)


def random_requests(count: int, **changes: list[Any]) -> list[Request]:
    """Requests of all kinds; changes: what else to choose from."""
    source = random.Random(7)
    prefixes = [[source.randrange(3, _SHORTEST) for _ in range(150)] for _ in range(_PREFIXES)]
    return [_random_request(source, prefixes, changes) for _ in range(count)]


def _random_request(source: random.Random, prefixes: list[list[int]], changes: dict[str, list[Any]]) -> Request:
    prompt = source.choice(prefixes)[: source.randint(0, 150)]
    prompt = prompt + [source.randrange(3, _SHORTEST) for _ in range(source.choice([1, 2, 5, 40]))]
    request: Request = {"prompt_token_ids": prompt, "max_tokens": source.choice([1, 4, 30]), "seed": 1}
    if source.random() < 0.02:
        request["prompt_logprobs"] = 1  # which the host draws for, and all others of the step with it
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 0.0, 0.7, 1.0],
        "top_k": [0, 5],
        "top_p": [1.0, 0.9],
        "min_p": [0.0, 0.01],
        "presence_penalty": [0.0, 0.0, 1.0],
        "frequency_penalty": [0.0, 0.0, 0.5],
        "repetition_penalty": [1.0, 1.0, 1.3],
        "logprobs": [-1, -1, 0, 5, 20, 20, 20, 21],
        "min_tokens": [0, 0, min(3, request["max_tokens"])],
        "stop_token_ids": [[], list(range(3, 60)), [7, 10**6]],
        "logit_bias": [{}, {}, {9: 2.5, 11: -100.0}],
    }
    return request | {name: source.choice(values) for name, values in (choices | changes).items()}


def serve(spec: dict[str, Any], config: dict[str, Any], executor: str, requests: list[Request]) -> Served:
    """Step by step: requests arrive in bursts, and some are aborted while they run."""
    source, aborted = random.Random(5), set()
    core = Core(spec, {**config, "manual_steps": True}, executor)
    answers = [Answer() for _ in requests]
    submitted = 0
    while submitted < len(requests):
        for request in requests[submitted : submitted + source.choice([0, 0, 0, 1, 1, 3, 9])]:
            assert core.submit(request) == submitted
            submitted += 1
        if submitted and source.random() < 0.1:
            # Of those that have come last: most still run.
            aborted.add(victim := max(0, submitted - source.randint(1, 10)))
            core.abort(victim)
        core.step()
        _take(core.wait(0), answers)
    while core.step():
        _take(core.wait(0), answers)
    return _served(core, answers, frozenset(aborted))


def serve_at_once(spec: dict[str, Any], config: dict[str, Any], executor: str, requests: list[Request]) -> Served:
    """By the loop's own thread."""
    core = Core(spec, config, executor)
    answers = [Answer() for _ in requests]
    for request in requests:
        core.submit(request)
    while any(answer.finish_reason is None for answer in answers):
        outputs = core.wait(60.0)
        assert outputs, "the loop has nothing to say"
        _take(outputs, answers)
    return _served(core, answers, frozenset())


def _take(outputs: list[Output], answers: list[Answer]) -> None:
    for output in outputs:
        answer = answers[output.request_id]
        assert answer.finish_reason is None, "an output after the last"
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs or []
        answer.prompt_logprobs += output.prompt_logprobs or []
        answer.finish_reason, answer.error = output.finish_reason, output.error


def _served(core: Core, answers: list[Answer], aborted: frozenset[int]) -> Served:
    core.close()
    stats = core.stats()
    assert stats["internal_error"] is None
    assert all(group["used_blocks"] == 0 for group in stats["groups"])
    assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
    assert sum(stats["finished"].values()) == len(answers)
    assert stats["generation_tokens"] == sum(len(answer.token_ids) for answer in answers)
    return Served(answers, aborted, stats)


def check_same(got: Served, wanted: Served) -> None:
    """Asserts that nobody could tell the two apart, but by how far aborted requests had come."""
    for index, (one, other) in enumerate(zip(got.answers, wanted.answers, strict=True)):
        if index not in got.aborted | wanted.aborted:
            assert one == other, f"request {index}"
            continue
        common = min(len(one.token_ids), len(other.token_ids))
        assert one.token_ids[:common] == other.token_ids[:common], f"request {index}, aborted"
