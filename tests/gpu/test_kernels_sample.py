"""Sampling at real vocabularies, against the reference: the tokens that the runtime's own sampler draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from enginery.plugins.launches import Kernel
from enginery.plugins.sample import cuda
from enginery.plugins.sample.cuda import Sampler
from enginery.plugins.sample.reference import Sampling, sample
from numpy.typing import NDArray

from .launcher import DEVICE, INTERPRETED, bind_launches, target
from .shapes import MODELS, padded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    # The interpreter's: masked lanes hold infinities.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

VOCABS = [model.vocab for model in MODELS.values()]
ROWS = [1, 3] if INTERPRETED else [1, 64]
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
CHOICES = [
    Sampling(0.0),
    Sampling(),
    Sampling(0.7, top_k=40),
    Sampling(1.3, top_p=0.9),
    Sampling(0.9, min_p=0.05),
    Sampling(1.0, top_k=1500, top_p=0.8),
    Sampling(0.8, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1),
]
FORMS = {
    "greedy": Sampler(0, 0, greedy=True),
    "drawn": Sampler(0, 0),
    "edited": Sampler(0, 0, edits=True, rank=True),
    "listed": Sampler(0, 0, rank=True, top=20),
}


def sampler_of(form: str, vocab: int) -> Sampler:
    return replace(FORMS[form], vocab=vocab, stride=padded(vocab))


def kernels() -> Iterator[Kernel]:
    for form in FORMS:
        for vocab in VOCABS:
            sampler = sampler_of(form, vocab)
            launches = cuda.launches(sampler, architecture=target().arch)
            edits = cuda.edit_launches(sampler, architecture=target().arch) if sampler.edits else ()
            yield from (launch.kernel for launch in (*launches, *edits))


class Step:
    """The arrays of a step, and its launches."""

    def __init__(self, sampler: Sampler, logits: NDArray[np.float32], samplings: list[Sampling]) -> None:
        self.sampler, rows = sampler, len(logits)
        wide = torch.full((rows, sampler.stride), float("nan"), device=DEVICE)
        wide[:, : sampler.vocab] = torch.from_numpy(logits)
        self.arrays: dict[str, torch.Tensor] = {"logits": wide}
        for name in FLOATS:
            self._add(name, [getattr(each, name) for each in samplings], torch.float32)
        for name in ("top_k", "num_generated"):
            self._add(name, [getattr(each, name) for each in samplings], torch.int32)
        self._add("seed", [each.seed for each in samplings], torch.int64)
        self._add("edit_slots", list(range(rows, 0, -1)), torch.int32)
        slots = (rows + 1, sampler.stride) if sampler.edits else (1, 1)
        self.arrays["token_counts"] = torch.full(slots, 3, dtype=torch.int32, device=DEVICE)
        self.arrays["token_bias"] = torch.full(slots, 9.0, device=DEVICE)
        for name in ("token", "rank"):
            self.arrays[name] = torch.full((rows,), -77, dtype=torch.int32, device=DEVICE)
        self.arrays["logprob"] = torch.full((rows,), float("nan"), device=DEVICE)
        self.arrays["top_tokens"] = torch.full((rows, sampler.top), -77, dtype=torch.int32, device=DEVICE)
        self.arrays["top_logprobs"] = torch.full((rows, sampler.top), float("nan"), device=DEVICE)
        self._scratch: dict[str, torch.Tensor] = {}

    def _add(self, name: str, values: list[Any], kind: torch.dtype) -> None:
        self.arrays[name] = torch.tensor(values, dtype=kind, device=DEVICE)

    def edit(self, samplings: list[Sampling]) -> None:
        """Clears the rows' slots and writes their counts and biases."""
        entries: list[tuple[int, int, int, float]] = []
        for slot, sampling in zip(self.arrays["edit_slots"].tolist(), samplings, strict=True):
            entries.append((slot, -1, 0, 0.0))
            for token in {*sampling.token_counts, *sampling.logit_bias}:
                count = 1 + sampling.token_counts[token] if token in sampling.token_counts else 0
                entries.append((slot, token, count, sampling.logit_bias.get(token, 0.0)))
        columns = zip(*entries, strict=True)
        for name, values in zip(("slots", "tokens", "counts", "biases"), columns, strict=True):
            self._add(name, list(values), torch.float32 if name == "biases" else torch.int32)
        launches = cuda.edit_launches(self.sampler, architecture=target().arch)
        for call in bind_launches(launches, {"edits": len(entries)}, self.arrays):
            call()

    def run(self) -> list[tuple[int, float, int]]:
        """Of each row token, logprob and rank."""
        launches = cuda.launches(self.sampler, architecture=target().arch)
        for call in bind_launches(launches, {"rows": len(self.arrays["token"])}, self.arrays, self._scratch):
            call()
        assert not self._scratch["arrivals"].any()
        return list(zip(*(self.arrays[name].tolist() for name in ("token", "logprob", "rank")), strict=True))


def samplings_of(form: str, rows: int) -> list[Sampling]:
    choices = CHOICES[:1] if form == "greedy" else CHOICES if form == "edited" else CHOICES[:-1]
    given = [replace(choices[row % len(choices)], seed=77 * row, num_generated=row) for row in range(rows)]
    if form != "edited":
        return given
    return [replace(each, token_counts={5: 2, 6: 0, 9: 1}, logit_bias={7: 1.5, 8: -np.inf}) for each in given]


def assert_alike(found: list[tuple[int, float, int]], logits: NDArray[np.float32], samplings: list[Sampling]) -> None:
    """Where the device's exponential differs in its last bit, a draw at the border of two tokens may too."""
    differing = 0
    for (token, logprob, rank), row, sampling in zip(found, logits, samplings, strict=True):
        wanted = sample(row, sampling)
        if (token, rank) == (wanted[0], wanted[2]):
            assert logprob == pytest.approx(wanted[1], abs=2e-4)
        else:
            assert sampling.temperature > 0, "a greedy row took another token"
            differing += 1
    assert differing <= len(found) // 50


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_are_drawn_as_the_reference_draws_them(vocab: int, form: str, rows: int) -> None:
    logits = np.random.default_rng(rows).standard_normal((rows, vocab)).astype(np.float32) * 2
    samplings, sampler = samplings_of(form, rows), sampler_of(form, vocab)
    step = Step(sampler, logits, samplings)
    if sampler.edits:
        step.edit(samplings)
    found = step.run()
    if not sampler.rank:
        ranks = [sample(row, each)[2] for row, each in zip(logits, samplings, strict=True)]
        found = [(token, logprob, rank) for (token, logprob, _), rank in zip(found, ranks, strict=True)]
    assert_alike(found, logits, samplings)
    if sampler.top:
        wanted = np.argsort(-logits, axis=1, kind="stable")[:, : sampler.top]
        np.testing.assert_array_equal(step.arrays["top_tokens"].cpu().numpy(), wanted)
