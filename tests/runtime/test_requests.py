"""SamplingParams: what is allowed, and how it is refused."""

from __future__ import annotations

from typing import Any

import pytest
from enginery import EngineryError, SamplingParams
from enginery.runtime.config import EngineConfig
from enginery.runtime.requests import InvalidField


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("seed", 1 << 63),
        ("seed", "x"),
        ("stop", 3),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", ["x"] * 65),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", "x"),
        ("detokenize", None),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {1: 101}),
        ("logit_bias", [1]),
        ("best_of", 2),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
    ],
)
def test_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidField, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"n": 128, "best_of": 128},
        {"temperature": 0, "top_p": 1, "top_k": -1},
        {"seed": -(1 << 63)},
        {"seed": (1 << 63) - 1},
        {"stop": "x"},
        {"stop": []},
        {"stop": None, "stop_token_ids": None},
        {"max_tokens": None},
        {"logit_bias": {}},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"bad_words": []},
    ],
)
def test_accepts(values: dict[str, Any]) -> None:
    SamplingParams(**values)


def test_lists_all_faults_at_once() -> None:
    with pytest.raises(InvalidField, match=r"(?s)n must be.*temperature must be.*got -1.*stop must be") as caught:
        SamplingParams(n=0, temperature=-1, stop=[2])  # type: ignore[list-item]
    assert caught.value.param == "n"


def test_long_values_are_cut() -> None:
    with pytest.raises(InvalidField) as caught:
        SamplingParams(stop_token_ids=["x" * 10_000])  # type: ignore[list-item]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
        ({"colour": 3}, "no knob 'colour'; known are"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer, or None, got 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be a number above 0 and at most 1, or None"),
        ({"gpu_memory_utilization": True}, "above 0 and at most 1, or None, got True"),
        ({"max_model_len": "long"}, "max_model_len must be a positive integer, or None"),
        ({"kv_cache_memory_bytes": "much"}, "is no size"),
        ({"kv_cache_memory_bytes": 0}, "positive size"),
        ({"capacity_scheduler_policy": "best"}, "'guaranteed_no_evict' or 'max_utilization'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False"),
        ({"verify": 1, "num_threads": -1}, r"(?s)num_threads.*verify"),
    ],
)
def test_knobs_are_refused_by_name(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineryError, match=message):
        EngineConfig.of(knobs)


def test_sizes_may_be_text() -> None:
    assert EngineConfig.of({"kv_cache_memory_bytes": "4GiB"}).kv_cache_bytes == 4 << 30
