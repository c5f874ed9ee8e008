"""The sampler against NumPy: what is filtered, how often tokens come, what logprobs say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineryError, RequestError
from enginery.runtime._core import sample_row
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

PROMPT = [1, 2, 2]
OUTPUT = [3, 3, 4]


def logits_of(size: int, seed: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def draw(logits: NDArray[np.float32], output: list[int] | None = None, **request: Any) -> int:
    values = {"prompt_token_ids": PROMPT, "max_tokens": 100, **request}
    return sample_row(logits, values, OUTPUT if output is None else output)[0]


def modified(logits: NDArray[np.float32], request: dict[str, Any], output: list[int]) -> NDArray[np.float64]:
    """Bias, mask and penalties, in vLLM's order."""
    row = logits.astype(np.float64)
    for token, bias in request.get("logit_bias", {}).items():
        row[token] += bias
    if len(output) < request.get("min_tokens", 0):
        row[request.get("stop_token_ids", [])] = -np.inf
    repetition = request.get("repetition_penalty", 1.0)
    counts = Counter(output)
    for token in set(PROMPT) | set(output):
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        row[token] -= request.get("frequency_penalty", 0.0) * counts[token]
        row[token] -= request.get("presence_penalty", 0.0) * (counts[token] > 0)
    return row


def distribution(logits: NDArray[np.float32], request: dict[str, Any], output: list[int]) -> NDArray[np.float64]:
    """The probabilities that a request draws from."""
    row = modified(logits, request, output) / request.get("temperature", 1.0)
    weights = np.exp(row - row.max())
    weights[weights < request.get("min_p", 0.0)] = 0
    order = np.argsort(-weights, kind="stable")
    weights[order[request.get("top_k", 0) or len(weights) :]] = 0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    dropped = order[before >= request.get("top_p", 1.0)]
    if request.get("top_p", 1.0) < 1:
        weights[dropped] = 0
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


REQUESTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"top_k": 6, "top_p": 0.8},
    {"top_k": 8, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.0},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 0.8},
    {"logit_bias": {0: 2.0, 5: -3.0}},
    {"min_tokens": 4, "stop_token_ids": [0, 1, 6]},
    {"min_tokens": 3, "stop_token_ids": [0, 1, 6]},
]


@pytest.mark.parametrize("request_values", REQUESTS, ids=str)
def test_tokens_come_as_often_as_they_should(request_values: dict[str, Any]) -> None:
    logits = logits_of(12, seed=5, scale=1.5)
    expected = distribution(logits, request_values, OUTPUT)
    draws = 4000
    counts = np.zeros(len(logits))
    for seed in range(draws):
        counts[draw(logits, seed=seed, **request_values)] += 1
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    likely = expected > 0
    # Chi square, far beyond its 99.99 % point for 11 degrees of freedom; the seeds are fixed.
    statistic = (((counts - draws * expected) ** 2)[likely] / (draws * expected[likely])).sum()
    assert statistic < 40


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 1500}, {"top_k": 1500, "top_p": 0.5}], ids=str)
def test_filters_may_leave_many_tokens(filters: dict[str, Any]) -> None:
    logits = logits_of(5003, seed=1, scale=0.1)
    expected = distribution(logits, filters, [])
    order = np.argsort(-expected, kind="stable")
    drawn = {draw(logits, output=[], seed=seed, **filters) for seed in range(1000)}
    kept = np.count_nonzero(expected)
    assert kept > 512
    # Rounding may decide about the last one.
    assert drawn <= set(order[: kept + 1].tolist())
    assert drawn & set(order[kept - kept // 10 : kept].tolist())


@settings(max_examples=300, deadline=None, database=None)
@given(
    size=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    values=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.5, 1.3]),
            "presence_penalty": st.sampled_from([-1.0, 2.0]),
            "frequency_penalty": st.sampled_from([-0.5, 1.0]),
        },
    ),
    bias=st.floats(-8, 8, width=32),
)
def test_greedy_takes_the_likeliest_after_all_changes(
    size: int, seed: int, values: dict[str, Any], bias: float
) -> None:
    logits = logits_of(size + 5, seed)
    request = {"logit_bias": {0: bias}, "temperature": 0.0, **values}
    row = modified(logits, request, OUTPUT)
    assert row[draw(logits, **request)] == pytest.approx(row.max(), abs=1e-5)


@pytest.mark.parametrize("position", [0, 7, 15, 16, 511, 512, 1023, 1024, 1499])
def test_of_equals_the_lowest_id_wins(position: int) -> None:
    logits = np.full(1500, -1.0, np.float32)
    logits[position:] = 2.0
    assert draw(logits, temperature=0.0) == position


@settings(max_examples=300, deadline=None, database=None)
@given(
    size=st.integers(3, 600), seed=st.integers(0, 2**32), count=st.integers(0, 8), temperature=st.sampled_from([0, 1])
)
def test_logprobs_are_of_the_unmodified_distribution(size: int, seed: int, count: int, temperature: int) -> None:
    logits = np.round(logits_of(size + 5, seed), 1)  # with ties
    request = {"prompt_token_ids": PROMPT, "max_tokens": 9, "temperature": temperature, "top_k": 3, "seed": seed}
    token, entries = sample_row(logits, {**request, "logit_bias": {0: 9.0}, "logprobs": count}, OUTPUT)
    row = logits.astype(np.float64)
    expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
    order = np.argsort(-logits, kind="stable")
    ranks = {int(token): rank + 1 for rank, token in enumerate(order)}
    assert entries[0][0] == token
    assert [entry[0] for entry in entries[1:]] == order[:count].tolist()
    for entry_token, logprob, rank in entries:
        assert logprob == pytest.approx(expected[entry_token], abs=2e-6)
        assert rank == ranks[entry_token]


def test_no_logprobs_unless_asked_for() -> None:
    request = {"prompt_token_ids": PROMPT, "max_tokens": 9}
    assert sample_row(logits_of(20, 0), request, [])[1] == []
    assert len(sample_row(logits_of(20, 0), {**request, "logprobs": 0}, [])[1]) == 1


def test_a_seed_repeats_and_positions_differ() -> None:
    logits = np.zeros(1000, np.float32)
    again = [draw(logits, output=[0] * position, seed=7) for position in range(50)]
    assert again == [draw(logits, output=[0] * position, seed=7) for position in range(50)]
    assert len(set(again)) > 40
    assert again != [draw(logits, output=[0] * position, seed=8) for position in range(50)]
    assert draw(logits, seed=-1) >= 0


def test_every_token_can_be_drawn_to_the_ends_of_the_vocabulary() -> None:
    drawn = {draw(np.zeros(9, np.float32), seed=seed) for seed in range(300)}
    assert drawn == set(range(9))


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 1e5])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = logits_of(50, 3)
    token = draw(logits, temperature=temperature, seed=1)
    if temperature < 1:
        assert token == int(logits.argmax())


def test_wide_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 0.0, 2.9e38, 0.0], np.float32)
    assert draw(logits, seed=1) == 0
    assert draw(logits, temperature=0.0) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 15, 16, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, position: int, temperature: float) -> None:
    logits = logits_of(41, 0)
    logits[position] = value
    with pytest.raises(EngineryError, match="not finite"):
        draw(logits, temperature=temperature)


def test_when_every_token_is_masked_it_is_an_error() -> None:
    with pytest.raises(EngineryError, match="no token is allowed"):
        draw(np.zeros(6, np.float32), output=[], min_tokens=1, stop_token_ids=list(range(6)))


def test_all_faults_of_a_request_are_told_at_once() -> None:
    wrong = {
        "prompt_token_ids": [3, 77],
        "max_tokens": 0,
        "temperature": -1.0,
        "top_k": -2,
        "top_p": 0.0,
        "min_p": 1.5,
        "presence_penalty": 3.0,
        "frequency_penalty": -3.0,
        "repetition_penalty": 0.0,
        "logit_bias": {60: 1.0, 2: float("nan")},
        "stop_token_ids": [-1],
        "logprobs": -2,
        "prompt_logprobs": 51,
        "min_tokens": -1,
    }
    with pytest.raises(RequestError) as caught:
        sample_row(np.zeros(50, np.float32), wrong, [])
    for name in wrong:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 1}, "'prompt_token_ids' is missing"),
        ({"prompt_token_ids": [1]}, "'max_tokens' is missing"),
        ({"prompt_token_ids": [1], "max_tokens": 1, "top_q": 1}, "unknown: 'top_q'"),
        ({"prompt_token_ids": [1], "max_tokens": "2"}, "'max_tokens' is '2'"),
        ({"prompt_token_ids": [2**40], "max_tokens": 1}, "'prompt_token_ids' is"),
    ],
)
def test_what_a_request_has_no_place_for_is_a_type_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sample_row(np.zeros(50, np.float32), values, [])
