"""Tokens that the executor draws, by steps that are launched before those of the step before are read.

The null device draws with the host's sampler what lies on it as a step's inputs: whatever the loop does, every request
gets what it gets where the loop draws step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from enginery.runtime.loader import CoreSettings

from .cuda_engines import build_shell
from .serving import Served, check_same, random_requests, serve, serve_at_once
from .test_cuda_executor import settings

Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CoreSettings:
    return settings(build_shell("llama", tmp_path_factory.mktemp("engine"), precision="bf16"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> CoreSettings:
    """Of two state groups."""
    return settings(build_shell("gemma3_text", tmp_path_factory.mktemp("engine"), precision="bf16"))


LONG: dict[str, list[Any]] = {"stop_token_ids": [[], [7]], "max_tokens": [4, 60]}
EDITED: dict[str, list[Any]] = {"frequency_penalty": [0.5], "repetition_penalty": [1.3], "logprobs": [-1, 3]}
HELD: dict[str, list[Any]] = {"min_tokens": [1], "stop_token_ids": [list(range(3, 60))], "logit_bias": [{}, {9: 2.5}]}


def few_blocks(spec: dict[str, Any], config: dict[str, Any]) -> None:
    spec["num_blocks"] = [9] * len(spec["num_blocks"])
    config.update(capacity_scheduler_policy="max_utilization", max_preemptions=3)


def few_blocks_and_faults(spec: dict[str, Any], config: dict[str, Any]) -> None:
    few_blocks(spec, config)
    spec.update(isa="nan_on=9")


def wrong_guesses(spec: dict[str, Any], config: dict[str, Any]) -> None:
    spec["num_blocks"] = [9]
    config.update(expected_output_tokens=1)


def few_slots(spec: dict[str, Any], config: dict[str, Any]) -> None:
    spec["ranks"][0]["draws"]["edit_slots"] = 4


# What is changed, of what requests, and what the statistics must show.
SCENES: dict[str, tuple[Change, dict[str, list[Any]], Callable[[Served], bool]]] = {
    "sequences give way": (few_blocks, LONG, lambda served: served.stats["num_preemptions"] > 20),
    "those that were not expected to": (
        wrong_guesses,
        LONG | {"open_ended": [True]},
        lambda served: served.stats["num_preemptions"] > 5,
    ),
    "few slots": (few_slots, EDITED | HELD, lambda served: True),
    "few edits": (lambda spec, config: spec["cuda"].update(max_edits=150), EDITED | HELD, lambda served: True),
    "no shared prefixes": (
        lambda spec, config: config.update(enable_prefix_caching=False),
        {},
        lambda served: served.stats["prefix_cache_hits"] == 0,
    ),
    "small steps": (
        lambda spec, config: config.update(max_num_batched_tokens=9, max_num_seqs=7),
        {},
        lambda served: served.stats["steps"] > 1000,
    ),
    "logits that are not finite": (
        lambda spec, config: spec.update(isa="nan_on=9"),
        {},
        lambda served: served.stats["finished"]["error"] > 10,
    ),
    "those of sequences that give way": (
        few_blocks_and_faults,
        LONG,
        lambda served: served.stats["num_preemptions"] > 20,
    ),
    "nothing is allowed": (
        lambda spec, config: None,
        {"stop_token_ids": [[], [], list(range(400))], "min_tokens": [1]},
        lambda served: served.stats["finished"]["error"] > 10,
    ),
    "one by one": (lambda spec, config: config.update(max_num_seqs=1), EDITED, lambda served: True),
}


def changed(made: CoreSettings, change: Change) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, config = copy.deepcopy(made.spec), {**made.config, "max_num_seqs": 13}
    change(spec, config)
    return spec, config


@pytest.mark.parametrize("scene", SCENES)
def test_every_request_gets_what_the_loop_would_draw(llama: CoreSettings, scene: str) -> None:
    change, choices, is_shown = SCENES[scene]
    spec, config = changed(llama, change)
    requests = random_requests(300, **choices)
    wanted = serve(spec, config, "null", requests)
    got = serve(spec, config, "cuda-null", requests)
    check_same(got, wanted)
    assert is_shown(got), got.stats
    check_same(serve_at_once(spec, config, "cuda-null", requests[:40]), Served(wanted.answers[:40], wanted.aborted, {}))


@pytest.mark.parametrize("caching", [False, True])
def test_two_groups_whose_sequences_give_way(windows: CoreSettings, caching: bool) -> None:
    spec, config = changed(windows, few_blocks)
    config["enable_prefix_caching"] = caching
    requests = random_requests(300, **LONG)
    got = serve(spec, config, "cuda-null", requests)
    check_same(got, serve(spec, config, "null", requests))
    assert got.stats["num_preemptions"] > 20
    assert (got.stats["prefix_cache_hits"] > 0) == caching
