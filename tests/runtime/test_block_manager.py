"""Blocks of state groups, seen through the loop: what is shared, what is freed when, and what goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from enginery.engines.errors import CapacityError, EngineFormatError
from enginery.runtime._core import Core

BLOCK = 4


def make_core(windows: Sequence[int] = (0,), num_blocks: int = 32, isa: str = "", **config: Any) -> Core:
    groups = [
        {"name": f"g{i}", "kind": "window" if window else "full", "window": window, "block_size": BLOCK}
        for i, window in enumerate(windows)
    ]
    spec = {
        "isa": isa,
        "ranks": [],
        "groups": groups,
        "num_blocks": [num_blocks] * len(groups),
        "vocab_size": 100,
        "max_tokens": 512,
        "max_rows": 512,
        "max_sequences": 8,
    }
    settings = {"max_model_len": 400, "max_num_seqs": 8, "max_num_batched_tokens": 512, "manual_steps": True}
    return Core(spec, {**settings, **config}, "null")


def run(core: Core, prompt: Sequence[int], max_tokens: int = 1, **request: Any) -> int:
    """Runs a request to its end; returns how many of its prompt tokens came from the cache."""
    core.submit({"prompt_token_ids": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, **request})
    cached = -1
    while core.step():
        for output in core.wait(0):
            assert output.error is None
            cached = output.num_cached_tokens
    assert core.stats()["internal_error"] is None
    return cached


def used(core: Core) -> list[int]:
    return [group["used_blocks"] for group in core.stats()["groups"]]


def test_full_blocks_of_a_prefix_are_shared() -> None:
    core = make_core()
    assert run(core, range(10)) == 0
    assert run(core, [*range(10), 50, 51]) == 8
    assert run(core, [*range(6), 50, 51, 52]) == 4
    assert run(core, [9, *range(1, 10)]) == 0
    stats = core.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (41, 12)
    assert stats["prompt_tokens"] == 41


@pytest.mark.parametrize("windows", [(0,), (3,), (0, 3)])
def test_one_token_is_always_computed(windows: tuple[int, ...]) -> None:
    core = make_core(windows)
    run(core, range(8))
    assert run(core, range(8)) == 4
    assert run(core, range(9)) == 8


@pytest.mark.parametrize("windows", [(0,), (3,)])
def test_a_block_is_named_by_all_that_came_before_it(windows: tuple[int, ...]) -> None:
    core = make_core(windows)
    run(core, [1] * 4 + [2] * 4 + [3])
    assert run(core, [4] * 4 + [2] * 4 + [3]) == 0  # though the window sees no further than the block of 2s


def test_generated_tokens_are_shared_too() -> None:
    core = make_core()
    core.submit({"prompt_token_ids": [5] * 4, "max_tokens": 6, "temperature": 0.0})
    tokens: list[int] = []
    while core.step():
        tokens += [token for output in core.wait(0) for token in output.token_ids]
    assert run(core, [5] * 4 + tokens) == 8


def test_sharing_is_off_when_it_is_switched_off() -> None:
    core = make_core(enable_prefix_caching=False)
    run(core, range(10))
    assert run(core, range(10)) == 0
    assert core.stats()["prefix_cache_queries"] == 0
    assert core.stats()["groups"][0]["cached_blocks"] == 0


def test_salts_do_not_share() -> None:
    core = make_core()
    run(core, range(10), cache_salt="a")
    assert run(core, range(10), cache_salt="b") == 0
    assert run(core, range(10)) == 0
    assert run(core, range(10), cache_salt="a") == 8


def test_prompt_logprobs_read_no_cache() -> None:
    core = make_core()
    run(core, range(10))
    assert run(core, range(10), prompt_logprobs=0) == 0
    assert run(core, range(10)) == 8


def test_rope_that_changes_with_the_prompts_length_keeps_state_apart() -> None:
    core = make_core(rope_threshold=9)
    run(core, range(9))
    assert run(core, range(9)) == 8
    assert run(core, range(10)) == 0
    assert run(core, range(12)) == 8


def test_rope_that_changes_with_every_length_shares_equal_lengths_only() -> None:
    core = make_core(rope_threshold=9, rope_exact=True)
    run(core, range(10))
    assert run(core, range(12)) == 0
    assert run(core, [*range(8), 50, 51]) == 8


def test_blocks_behind_a_window_are_freed_as_the_sequence_advances() -> None:
    core = make_core((0, 6))
    core.submit({"prompt_token_ids": list(range(16)), "max_tokens": 40, "temperature": 0.0})
    core.step()
    # The query at position 16 sees 11 .. 16: blocks 0 and 1 lie behind it.
    assert used(core) == [4, 2]
    held = []
    while core.step():
        held.append(used(core))
    assert max(window for _, window in held) == 2
    assert held[-2][0] == 14


def test_a_window_group_hits_with_the_window_alone_but_a_full_group_needs_everything() -> None:
    prompt = list(range(16))
    # The window's first blocks are evicted by another prompt; those before the hit's end stay.
    only_window = make_core((4,), num_blocks=6)
    run(only_window, [*prompt, 99])
    run(only_window, [70] * 8)
    assert run(only_window, [*prompt, 99]) == 16
    both = make_core((0, 4), num_blocks=6)
    run(both, [*prompt, 99])
    run(both, [70] * 12)
    assert run(both, [*prompt, 99]) < 16


def test_the_least_recently_used_goes_first_and_the_beginning_of_a_prompt_last() -> None:
    core = make_core(num_blocks=8)
    run(core, [1] * 9)  # two full blocks and one that is not
    run(core, [2] * 9)
    run(core, [1] * 9)  # used again: [2] is the older one now
    run(core, [3] * 17)  # takes five of the eight, four of them free
    assert run(core, [1] * 9) == 8
    assert run(core, [2] * 9) == 4


def test_running_requests_hold_a_shared_block_once() -> None:
    core = make_core(num_blocks=8)
    run(core, range(13))
    for tail in (50, 51):
        core.submit({"prompt_token_ids": [*range(12), tail], "max_tokens": 2, "temperature": 0.0})
    core.step()
    assert core.stats()["num_running"] == 2
    assert used(core) == [5]  # three shared, one each


@pytest.mark.parametrize(("max_tokens", "num_running"), [(8, 2), (12, 1)])
def test_cached_blocks_that_a_request_takes_are_no_longer_free_for_others(max_tokens: int, num_running: int) -> None:
    core = make_core(num_blocks=8)
    run(core, range(13))
    core.submit({"prompt_token_ids": [9] * 4, "max_tokens": 9, "temperature": 0.0})  # three blocks in the end
    core.submit({"prompt_token_ids": list(range(13)), "max_tokens": max_tokens, "temperature": 0.0})  # five or six
    core.step()
    assert core.stats()["num_running"] == num_running


@pytest.mark.parametrize(("num_blocks", "num_running"), [(6, 2), (5, 1)])
def test_a_window_sets_blocks_aside_for_where_it_lies_worst(num_blocks: int, num_running: int) -> None:
    core = make_core((6,), num_blocks=num_blocks, max_num_batched_tokens=4)
    for token in (1, 2):
        core.submit({"prompt_token_ids": [token] * 3, "max_tokens": 50, "temperature": 0.0})
    core.step()
    core.step()
    assert core.stats()["num_running"] == num_running  # 6 tokens may touch three blocks of 4


def test_a_failed_request_leaves_nothing_in_the_cache() -> None:
    core = make_core(isa="nan_on=13")
    core.submit({"prompt_token_ids": [*range(8), 13], "max_tokens": 1})
    while core.step():
        assert [output.finish_reason for output in core.wait(0)] == ["error"]
    assert core.stats()["groups"][0]["cached_blocks"] == 0
    assert run(core, range(9)) == 0


def test_a_prompt_that_no_cache_of_this_size_holds_is_refused() -> None:
    core = make_core(num_blocks=4)
    with pytest.raises(CapacityError, match="the prompt has 17 tokens; the KV cache holds 16"):
        core.submit({"prompt_token_ids": [1] * 17, "max_tokens": 1})
    assert run(core, [1] * 16) == 0


def test_an_output_ends_where_the_cache_is_full() -> None:
    core = make_core(num_blocks=4)
    core.submit({"prompt_token_ids": [1] * 10, "max_tokens": 100, "temperature": 0.0})
    tokens = 0
    reasons = []
    while core.step():
        for output in core.wait(0):
            tokens += len(output.token_ids)
            reasons.append(output.finish_reason)
    assert (tokens, reasons[-1]) == (7, "length")


def test_a_window_lets_a_sequence_outgrow_its_blocks() -> None:
    core = make_core((6,), num_blocks=4)
    assert run(core, [1] * 100, max_tokens=50) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "window"}, "state group 'g0' is of kind 'window' with window 0"),
        ({"kind": "latent"}, "state group 'g0' is of kind 'latent'"),
        ({"block_size": 0}, "state group 'g0' has blocks of 0 tokens"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    group = {"name": "g0", "kind": "full", "window": 0, "block_size": 4, **change}
    spec = {"ranks": [], "groups": [group], "num_blocks": [4], "vocab_size": 9}
    sizes = {"max_tokens": 8, "max_rows": 8, "max_sequences": 8}
    config = {"max_model_len": 8, "max_num_seqs": 8, "max_num_batched_tokens": 8}
    with pytest.raises(EngineFormatError, match=message):
        Core({**spec, **sizes}, config, "null")
