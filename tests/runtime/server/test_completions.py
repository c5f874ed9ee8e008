"""/v1/completions, asked by OpenAI's own client."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from .conftest import Served


def complete(served: Served, prompt: Any = "the cat", **values: Any) -> Any:
    values = {"model": "tiny", "temperature": 0, "max_tokens": 8, **values}
    return served.openai.completions.create(prompt=prompt, **values)


def test_answer_has_openais_shape(served: Served) -> None:
    answer = complete(served, max_tokens=5)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.choices[0].finish_reason, answer.choices[0].logprobs) == (
        "text_completion",
        "length",
        None,
    )
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_sixteen_tokens_by_default(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": "the", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_every_form_of_prompt(served: Served) -> None:
    token_ids = served.engine.tokenizer.encode("the cat")
    answers = [complete(served, form) for form in ("the cat", ["the cat"], token_ids, [token_ids])]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert {answer.usage.prompt_tokens for answer in answers} == {len(token_ids)}


def test_prompts_times_n(served: Served) -> None:
    prompts = ["one", "two", "one"]
    answer = complete(served, prompts, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == texts[4] == complete(served, "one").choices[0].text
    assert texts[2] == complete(served, "two").choices[0].text
    assert answer.usage.prompt_tokens == sum(len(served.engine.tokenizer.encode(prompt)) for prompt in prompts)
    streamed = [""] * 6
    for chunk in complete(served, prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 2}])
def test_stream_is_the_answer_in_parts(served: Served, extra: dict[str, Any]) -> None:
    whole = complete(served, max_tokens=30, **extra)
    *chunks, usage = complete(served, max_tokens=30, stream=True, stream_options={"include_usage": True}, **extra)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert usage.usage.completion_tokens == 30
    if "logprobs" in extra:
        wanted = whole.choices[0].logprobs
        parts = [chunk.choices[0].logprobs for chunk in chunks]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in parts for value in getattr(part, field)] == getattr(wanted, field)


def test_logprobs_are_parallel(served: Served) -> None:
    logprobs = complete(served, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == value == max(top.values()) <= 0
        assert len(top) in (3, 4)
        assert sum(map(math.exp, top.values())) <= 1.001


def test_no_logprobs_is_the_chosen_alone(served: Served) -> None:
    logprobs = complete(served, logprobs=0).choices[0].logprobs
    assert all(len(top) == 1 for top in logprobs.top_logprobs)


def test_echo_scores_the_prompt(served: Served) -> None:
    """As lm-eval asks: prompt and one token, the first without a logprob."""
    token_ids = served.engine.tokenizer.encode("the cat in")
    answer = complete(served, [token_ids], echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(token_ids) + 1
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert answer.choices[0].text.startswith("the cat in")
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_offsets_count_characters(served: Served) -> None:
    answer = complete(served, "é the 🦙", echo=True, logprobs=0, max_tokens=20)
    logprobs, text = answer.choices[0].logprobs, answer.choices[0].text
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        # What is no character shows late, with the next token.
        if not token.startswith(("bytes:", "<|")) and not text[offset:].startswith("\ufffd"):
            assert text[offset : offset + len(token)] == token


def test_no_tokens_but_scores(served: Served) -> None:
    answer = complete(served, "the cat", echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("the cat", "length", 0)
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens


def test_prompt_logprobs_extension(served: Served) -> None:
    body = {"prompt": "the cat", "max_tokens": 1, "prompt_logprobs": 0}
    entries = served.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert all(len(entry) == 1 for entry in entries[1:])


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": [""]}),
        ("prompt", {"prompt": 3}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [1, "a"]}),
        ("prompt", {"prompt": [1, 99999]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": ["x"] * 1025}),
        ("n", {"prompt": ["x"] * 100, "n": 100}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": "abc"}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 1000}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 512}),
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 3}),
        ("echo", {"echo": 1}),
        ("stop", {"stop": 3}),
        ("min_tokens", {"min_tokens": -1}),
        ("use_beam_search", {"use_beam_search": True}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refuses_by_name(served: Served, param: str, values: dict[str, Any], stream: bool) -> None:
    answer = served.post("/v1/completions", {"prompt": "the", "max_tokens": 1, "stream": stream, **values})
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("temperature", [-0.1, 2.1, True, "0", [0]])
def test_temperature_has_the_range_of_the_api(served: Served, temperature: Any) -> None:
    answer = served.post("/v1/completions", {"prompt": "the", "temperature": temperature})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("temperature must be a number from 0 to 2, got ")


def test_context_length(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(served, [1] * 512)
    assert caught.value.code == "context_length_exceeded"
    assert complete(served, [1] * 511, max_tokens=1).usage.total_tokens == 512
    assert complete(served, [1] * 500, max_tokens=None).choices[0].finish_reason == "length"


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) - 1, -(1 << 63)])
def test_seeds(served: Served, seed: int) -> None:
    texts = {complete(served, temperature=1, seed=seed).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_extensions_reach_the_sampler(served: Served) -> None:
    plain = complete(served, temperature=1, seed=3, max_tokens=20).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}, {"repetition_penalty": 2.0}):
        assert complete(served, temperature=1, seed=3, max_tokens=20, extra_body=extra).choices[0].text != plain
    stopped = complete(served, logit_bias={"5": 100}, extra_body={"stop_token_ids": [5], "min_tokens": 2})
    assert (stopped.choices[0].stop_reason, stopped.usage.completion_tokens) == (5, 3)


def test_cached_tokens_are_told(served: Served) -> None:
    prompt = list(range(40, 140))
    complete(served, prompt)
    assert complete(served, prompt).usage.prompt_tokens_details.cached_tokens == 96
