"""sample for a GPU, interpreted, against its reference, and the reference against the runtime's own sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from enginery.engines.expressions import evaluate
from enginery.plugins.launches import Kernel, Launch
from enginery.plugins.sample import cuda
from enginery.plugins.sample.cuda import Sampler
from enginery.plugins.sample.reference import NOT_FINITE, NOTHING_ALLOWED, Sampling, kept_tokens, sample, uniform, weigh
from enginery.runtime._core import sample_row
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .interpreter import launch

# Masked lanes hold infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TYPES = {"*fp32": np.float32, "*i32": np.int32}
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 700, 100000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.55, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
    num_generated=st.integers(0, 10000),
)
EDITS = st.fixed_dictionaries(
    {
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.25, 0.5]),
        "token_counts": st.dictionaries(st.integers(0, 49), st.integers(0, 4), max_size=12),
        "logit_bias": st.dictionaries(st.integers(0, 49), st.sampled_from([2.0, -3.0, -np.inf]), max_size=12),
    }
)


def logits_of(size: int, seed: int, scale: float, rounded: bool) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).standard_normal(size) * scale
    return np.asarray(np.round(logits, 1) if rounded else logits, np.float32)


class Device:
    """The arrays of one step, and its launches."""

    def __init__(self, rows: Sequence[NDArray[np.float32]], samplings: Sequence[Sampling], **asked: Any) -> None:
        vocab = len(rows[0])
        self.sampler = Sampler(vocab, -(-vocab // 128) * 128, **asked)
        count = len(rows)
        logits = np.full((count, self.sampler.stride), np.nan, np.float32)
        logits[:, :vocab] = rows
        self.arrays: dict[str, NDArray[Any]] = {"logits": logits}
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            self.arrays[name] = np.array([getattr(s, name) for s in samplings], np.float32)
        for name in ("top_k", "num_generated"):
            self.arrays[name] = np.array([getattr(s, name) for s in samplings], np.int32)
        self.arrays["seed"] = np.array([s.seed for s in samplings], np.int64)
        # One slot too many, and the rows' in reverse.
        self.arrays["edit_slots"] = np.arange(count, 0, -1, dtype=np.int32)
        self.arrays["token_counts"] = np.full((count + 1, self.sampler.stride), 3, np.int32)
        self.arrays["token_bias"] = np.full((count + 1, self.sampler.stride), 9.0, np.float32)
        self.arrays["token"], self.arrays["rank"] = np.full((2, count), -77, np.int32)
        self.arrays["logprob"] = np.full(count, np.nan, np.float32)
        self.arrays["top_tokens"] = np.full((count, self.sampler.top), -77, np.int32)
        self.arrays["top_logprobs"] = np.full((count, self.sampler.top), np.nan, np.float32)
        self.scratch: dict[str, NDArray[Any]] = {}

    def run(self) -> list[tuple[int, float, int]]:
        for plan in cuda.launches(self.sampler, architecture=90):
            self._launch(plan, rows=len(self.arrays["token"]))
        assert not self.scratch["arrivals"].any()
        return list(zip(*(self.arrays[name].tolist() for name in ("token", "logprob", "rank")), strict=True))

    def write_edits(self, samplings: Sequence[Sampling]) -> None:
        entries = []
        for slot, sampling in zip(self.arrays["edit_slots"], samplings, strict=True):
            entries.append((slot, -1, 0, 0.0))
            for token in {*sampling.token_counts, *sampling.logit_bias}:
                count = 1 + sampling.token_counts[token] if token in sampling.token_counts else 0
                entries.append((slot, token, count, sampling.logit_bias.get(token, 0.0)))
        kinds = {"slots": np.int32, "tokens": np.int32, "counts": np.int32, "biases": np.float32}
        for (name, kind), values in zip(kinds.items(), zip(*entries, strict=True), strict=True):
            self.arrays[name] = np.array(values, kind)
        for plan in cuda.edit_launches(self.sampler, architecture=90):
            self._launch(plan, edits=len(entries))

    def _launch(self, plan: Launch, **variables: int) -> None:
        kernel: Kernel = plan.kernel
        for name, kind in kernel.parameters:
            if name in plan.scratch:
                size = evaluate(plan.scratch[name].bytes, variables) // 4
                fresh = np.full(size, 0 if plan.scratch[name].zeroed else 12345, TYPES[kind])
                assert self.scratch.setdefault(name, fresh).size == size
        arguments = {name: self.scratch.get(name, self.arrays.get(name)) for name, _ in kernel.parameters}
        grid = tuple(evaluate(expression, variables) for expression in plan.grid)
        launch(kernel, grid, arguments)


def assert_agree(
    found: Sequence[tuple[int, float, int]], logits: Sequence[NDArray[np.float32]], samplings: Sequence[Sampling]
) -> None:
    for (token, logprob, rank), row, sampling in zip(found, logits, samplings, strict=True):
        wanted = sample(row, sampling)
        assert (token, rank) == (wanted[0], wanted[2])
        assert logprob == pytest.approx(wanted[1], abs=1e-5)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    size=st.sampled_from([50, 300, 5000]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.05, 1.0, 6.0]),
    rounded=st.booleans(),
    sampling=SAMPLINGS,
    edits=EDITS,
    output=st.lists(st.integers(0, 49), max_size=9),
)
def test_the_reference_draws_what_the_runtime_draws(
    size: int, seed: int, scale: float, rounded: bool, sampling: Sampling, edits: dict[str, Any], output: list[int]
) -> None:
    prompt = [0, *edits["token_counts"]]
    counts = dict.fromkeys(prompt, 0) | Counter(output)
    bias = edits["logit_bias"]
    masked = [token for token in bias if bias[token] == -np.inf]
    request = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")} | {
        name: edits[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
    }
    request |= {"logit_bias": {token: bias[token] for token in bias if token not in masked}}
    request |= {"prompt_token_ids": prompt, "max_tokens": 100, "logprobs": 0}
    request |= {"min_tokens": 99 if masked else 0, "stop_token_ids": masked}
    logits = logits_of(size, seed, scale, rounded)
    wanted_token, [(_, wanted_logprob, wanted_rank)] = sample_row(logits, request, output)
    sampling = replace(sampling, **{**edits, "token_counts": counts}, num_generated=len(output))
    token, logprob, rank = sample(logits, sampling)
    assert (token, rank) == (wanted_token, wanted_rank)
    assert logprob == pytest.approx(wanted_logprob, abs=2e-6)


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(
    size=st.sampled_from([50, 300, 5000]),
    rows=st.lists(st.tuples(SAMPLINGS, EDITS), min_size=1, max_size=2),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.05, 1.0, 6.0]),
    rounded=st.booleans(),
)
def test_rows_are_drawn_as_the_reference_draws_them(
    size: int, rows: list[tuple[Sampling, dict[str, Any]]], seed: int, scale: float, rounded: bool
) -> None:
    logits = [logits_of(size, seed + i, scale, rounded) for i in range(len(rows))]
    samplings = [replace(sampling, **edits) for sampling, edits in rows]
    device = Device(logits, samplings, edits=True, rank=True)
    device.write_edits(samplings)
    found = device.run()
    assert_agree(found, logits, samplings)
    for (token, _, _), slot, sampling in zip(found, device.arrays["edit_slots"], samplings, strict=True):
        counts = np.zeros(device.sampler.stride, np.int32)
        for known, count in sampling.token_counts.items():
            counts[known] = count + 1
        counts[token] = max(counts[token], 1) + 1
        np.testing.assert_array_equal(device.arrays["token_counts"][slot], counts)


# What each leaves to draw from, of 9,000 tokens: all; few; more than 256; more than can be collected.
PATHS = {
    "no filter": (Sampling(), 9000, 9000),
    "min_p": (Sampling(min_p=0.9), 9000, 9000),
    "few": (Sampling(top_k=40), 40, 40),
    "one": (Sampling(top_k=1), 1, 1),
    "many": (Sampling(top_k=1500, top_p=0.9), 500, 1499),
    "a wide nucleus": (Sampling(top_p=0.3), 257, 4000),
    "more than are collected": (Sampling(top_k=6000), 6000, 6000),
    "a nucleus of more than are collected": (Sampling(top_p=0.95), 4097, 9000),
}


@pytest.mark.parametrize("path", PATHS)
def test_filters_leave_any_number_of_tokens(path: str) -> None:
    sampling, fewest, most = PATHS[path]
    logits = logits_of(9000, 3, 0.3, True)
    assert fewest <= len(kept_tokens(weigh(logits, sampling), sampling)) <= most
    samplings = [replace(sampling, seed=seed, num_generated=seed) for seed in range(2)]
    assert_agree(Device([logits] * 2, samplings, rank=True).run(), [logits] * 2, samplings)


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.4}], ids=str)
def test_random_numbers_at_their_ends(filters: dict[str, Any], end: str) -> None:
    """Seeds whose number is below 10^-3 or above 1 - 10^-3."""
    seed = next(s for s in range(100_000) if (uniform(s, 0) < 1e-3 if end == "first" else uniform(s, 0) > 1 - 1e-3))
    logits, sampling = logits_of(300, 3, 0.1, True), Sampling(seed=seed, **filters)
    assert_agree(Device([logits], [sampling], rank=True).run(), [logits], [sampling])


def test_a_row_is_drawn_alike_whatever_else_is_in_the_step() -> None:
    logits = [logits_of(5000, seed, 2.0, False) for seed in range(3)]
    samplings = [Sampling(top_p=0.9, seed=5), Sampling(0.0), Sampling(0.7, seed=8)]
    together = Device(logits, samplings, rank=True).run()
    alone = [Device([row], [sampling], rank=True).run()[0] for row, sampling in zip(logits, samplings, strict=True)]
    assert together == alone


@pytest.mark.parametrize("position", [0, 4095, 4096, 8999])
def test_greedy_is_one_launch_and_takes_the_lowest_of_equals(position: int) -> None:
    logits = np.full(9000, -1.0, np.float32)
    logits[position:] = 2.0
    device = Device([logits], [Sampling(0.0)], greedy=True)
    assert len(cuda.launches(device.sampler, architecture=90)) == 1
    assert_agree(device.run(), [logits], [Sampling(0.0)])


def test_each_edit_of_a_greedy_row() -> None:
    """Token 3 is ahead of token 5 by 1, of 4,999 by 0.5; a prompt's tokens are penalized for repetition alone."""
    logits = np.full(5000, -4.0, np.float32)
    logits[[3, 5, 4999]] = 2.0, 1.0, 1.5
    edits: list[tuple[int, dict[str, Any]]] = [
        (3, {"token_counts": {3: 0}, "presence_penalty": 2.0, "frequency_penalty": 2.0}),
        (4999, {"token_counts": {3: 1}, "presence_penalty": 0.75}),
        (3, {"token_counts": {3: 1}, "frequency_penalty": 0.25}),
        (4999, {"token_counts": {3: 3}, "frequency_penalty": 0.25}),
        (5, {"token_counts": {3: 0, 4999: 0}, "repetition_penalty": 2.5}),
        (3, {"token_counts": {3: 0}, "repetition_penalty": 1.25}),
        (5, {"logit_bias": {3: -np.inf, 4999: -1.0}}),
        (4999, {"logit_bias": {4999: 0.75}, "token_counts": {3: 0}, "presence_penalty": 2.0}),
    ]
    samplings = [Sampling(0.0, **values) for _, values in edits]
    device = Device([logits] * len(edits), samplings, greedy=True, edits=True, rank=True)
    device.write_edits(samplings)
    found = device.run()
    assert [token for token, _, _ in found] == [token for token, _ in edits]
    assert_agree(found, [logits] * len(edits), samplings)
    counts = device.arrays["token_counts"][device.arrays["edit_slots"]]
    for (token, _, _), sampling, row in zip(found, samplings, counts, strict=True):
        assert row[token] == sampling.token_counts.get(token, 0) + 2


@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(
    size=st.sampled_from([7, 50, 4097, 9000]),
    seed=st.integers(0, 99),
    top=st.sampled_from([1, 5, 7]),
    rounded=st.booleans(),
    greedy=st.booleans(),
)
def test_the_likeliest_are_listed(size: int, seed: int, top: int, rounded: bool, greedy: bool) -> None:
    logits = [logits_of(size, seed + i, 1.0, rounded) for i in range(2)]
    device = Device(logits, [Sampling(0.0 if greedy else 1.0)] * 2, greedy=greedy, top=top)
    device.run()
    for row, tokens, logprobs in zip(logits, device.arrays["top_tokens"], device.arrays["top_logprobs"], strict=True):
        wanted = np.argsort(-row, kind="stable")[:top]
        assert tokens.tolist() == wanted.tolist()
        shifted = (row - row.max()).astype(np.float64)
        np.testing.assert_allclose(logprobs, (shifted - np.log(np.exp(shifted).sum()))[wanted], atol=1e-5)


@pytest.mark.parametrize("greedy", [True, False])
def test_faults_are_told_and_concern_one_row(greedy: bool) -> None:
    logits = [logits_of(5000, seed, 1.0, False) for seed in range(4)]
    for row, (position, value) in zip(logits, [(0, np.nan), (4999, np.inf), (4096, -np.inf)], strict=False):
        row[position] = value
    samplings = [Sampling(0.0 if greedy else 1.0, top_k=3)] * 4
    found = Device(logits, samplings, greedy=greedy, rank=not greedy).run()
    assert [token for token, _, _ in found[:3]] == [NOT_FINITE] * 3
    assert_agree(found[3:], logits[3:], samplings[3:])


def test_when_every_token_is_masked_none_is_taken() -> None:
    samplings = [Sampling(seed=1, logit_bias=dict.fromkeys(range(6), -np.inf)), Sampling(seed=1, top_p=0.5)]
    logits = [np.zeros(6, np.float32)] * 2
    device = Device(logits, samplings, edits=True, rank=True)
    device.write_edits(samplings)
    found = device.run()
    assert found[0][0] == NOTHING_ALLOWED
    assert_agree(found[1:], logits[1:], samplings[1:])


def test_rows_without_a_slot_are_not_edited() -> None:
    logits = [logits_of(300, seed, 1.0, False) for seed in range(2)]
    samplings = [Sampling(0.0, presence_penalty=2.0, repetition_penalty=1.5), Sampling(seed=4, frequency_penalty=2.0)]
    device = Device(logits, samplings, edits=True, rank=True)
    device.arrays["edit_slots"][:] = -1
    before = device.arrays["token_counts"].copy()
    assert_agree(device.run(), logits, samplings)
    np.testing.assert_array_equal(device.arrays["token_counts"], before)


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 1e5])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = [logits_of(50, 3, 3.0, False), np.array([3e38, -3e38, 0.0, 2.9e38, 0.0] * 10, np.float32)]
    samplings = [Sampling(temperature, seed=1), Sampling(temperature, seed=1, top_k=2)]
    found = Device(logits, samplings).run()
    assert [token for token, _, _ in found] == [sample(*pair)[0] for pair in zip(logits, samplings, strict=True)]
