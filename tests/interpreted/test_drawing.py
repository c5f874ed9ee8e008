"""The entry point `sample` of a plan, after a step: tokens as the reference draws them, which the next step reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.plugins.sample.reference import Sampling, sample
from numpy.typing import NDArray

from .device import Device, Piece
from .test_accesses import LIMITS, compiled

Array = NDArray[Any]
PIECES = [Piece(list(range(3, 12)), 0, 9, [1]), Piece([7], 0, 1, [3])]
TYPES = {"seed": np.int64, **dict.fromkeys(("top_k", "num_generated", "slots", "tokens", "counts"), np.int32)}
NAMES = ("temperature", "top_k", "top_p", "min_p", "seed", "num_generated")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.fixture
def device(tmp_path: Path) -> Device:
    plan, kernels, weights = compiled("mistral", tmp_path, target="h100", precision="bf16")
    return Device(plan, kernels, weights, LIMITS, num_blocks=4)


def inputs_of(samplings: list[Sampling], slots: list[int]) -> dict[str, Array]:
    """The step inputs; slots: of each row, -1 where its logits are not changed."""
    arrays = {n: np.array([getattr(s, n) for s in samplings], TYPES.get(n, np.float32)) for n in (*NAMES, *PENALTIES)}
    arrays["edit_slots"] = np.array(slots, np.int32)
    entries: list[tuple[int, int, int, float]] = []
    for slot, sampling in zip(slots, samplings, strict=True):
        if slot < 0:
            continue
        entries.append((slot, -1, 0, 0.0))
        for token in {*sampling.token_counts, *sampling.logit_bias}:
            count = 1 + sampling.token_counts[token] if token in sampling.token_counts else 0
            entries.append((slot, token, count, sampling.logit_bias.get(token, 0.0)))
    columns = zip(*entries, strict=True) if entries else [(), (), (), ()]
    for name, values in zip(("slots", "tokens", "counts", "biases"), columns, strict=True):
        arrays[f"edited_{name}"] = np.array(values, TYPES.get(name, np.float32))
    return arrays


def draw(device: Device, samplings: list[Sampling], slots: list[int], **asked: int) -> list[tuple[int, float, int]]:
    """Token, logprob and rank of each row."""
    draws = device.plan.draws
    assert draws is not None
    inputs, count = inputs_of(samplings, slots), len(samplings)
    drawn = count if any(sampling.temperature > 0 for sampling in samplings) else 0
    edits = len(inputs["edited_slots"])
    edited = count if edits else 0
    found = device.draw(inputs, {"drawn": drawn, "edited": edited, "edits": edits, "ranked": 0, "listed": 0} | asked)
    kinds = {draws.token: np.int32, draws.logprob: np.float32, draws.rank: np.int32}
    return list(zip(*(found[name].view(kind)[:, 0].tolist() for name, kind in kinds.items()), strict=True))


@pytest.mark.parametrize(
    ("samplings", "slots", "asked"),
    [
        ([Sampling(0.0), Sampling(0.0)], [-1, -1], {}),
        ([Sampling(0.8, top_k=9, seed=5), Sampling(0.0)], [-1, -1], {"ranked": 2}),
        (
            [Sampling(1.5, top_p=0.7, seed=3), Sampling(0.0, logit_bias={9: 50.0}, token_counts={4: 2})],
            [-1, 5],
            {"ranked": 2, "listed": 2},
        ),
    ],
    ids=["greedy", "drawn", "edited"],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # masked lanes hold infinities
def test_rows_are_drawn_as_the_reference_draws_them(
    samplings: list[Sampling], slots: list[int], asked: dict[str, int], device: Device
) -> None:
    logits = device.step(PIECES, [8, 9])
    for row, sampling, found in zip(logits, samplings, draw(device, samplings, slots, **asked), strict=True):
        token, logprob, rank = sample(row, sampling)
        assert (found[0], found[2] if asked else rank) == (token, rank)
        assert found[1] == pytest.approx(logprob, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_next_step_reads_the_tokens_where_they_are(device: Device) -> None:
    """Of any row of the step before, whatever its own size is."""
    device.step(PIECES, [8, 9])
    tokens = [token for token, _, _ in draw(device, [Sampling(0.0)] * 2, [-1, -1])]
    of_second = device.step([Piece([-2], 1, 1, [3])], [0])
    np.testing.assert_array_equal(device.step([Piece([tokens[1]], 1, 1, [3])], [0]), of_second)
    of_first = device.step([Piece([-1], 9, 9, [1])], [0])
    np.testing.assert_array_equal(device.step([Piece([tokens[0]], 9, 9, [1])], [0]), of_first)
    assert (of_first != of_second).any()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_likeliest_are_listed(device: Device) -> None:
    """Of the unmodified distribution, whatever the row's own token is."""
    draws, logits = device.plan.draws, device.step(PIECES, [8, 9])
    assert draws is not None
    inputs = inputs_of([Sampling(0.0), Sampling(0.0, logit_bias={9: 50.0})], [-1, 5])
    found = device.draw(inputs, {"drawn": 0, "edited": 2, "edits": 2, "ranked": 0, "listed": 2})
    tokens, logprobs = found[draws.top_tokens].view(np.int32), found[draws.top_logprobs].view(np.float32)
    for row, listed, values in zip(logits, tokens, logprobs, strict=True):
        wanted = np.argsort(-row, kind="stable")[: draws.top]
        assert listed.tolist() == wanted.tolist()
        peak = row.max()
        log_total = np.log(np.exp((row - peak).astype(np.float64)).sum())
        np.testing.assert_allclose(values, row[wanted] - peak - log_total, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_counts_and_biases_live_from_step_to_step(device: Device) -> None:
    """The second step tells nothing of the slot: what it was told, and its token, the device remembers."""
    first = Sampling(0.0, frequency_penalty=60.0, token_counts={4: 0}, logit_bias={9: 50.0})
    device.step(PIECES, [8, 9])
    tokens = [token for token, _, _ in draw(device, [first, Sampling(0.0)], [3, -1])]
    assert tokens[0] == 9
    (row,) = device.step([Piece([-1], 9, 9, [1])], [0])
    inputs = inputs_of([first], [3]) | {f"edited_{n}": np.zeros(1, np.int32) for n in ("slots", "tokens", "counts")}
    found = device.draw(inputs, {"drawn": 0, "edited": 1, "edits": 0, "ranked": 1, "listed": 0})
    assert device.plan.draws is not None
    token = found[device.plan.draws.token].view(np.int32).item()
    assert token == sample(row, replace(first, token_counts={4: 0, 9: 1}))[0]
    assert token != sample(row, first)[0]
