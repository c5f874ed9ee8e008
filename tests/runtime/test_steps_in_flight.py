"""A loop whose steps are launched before the tokens of the one before are read, step by step by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from enginery.engines.errors import EngineryError
from enginery.runtime._core import Core, Output
from enginery.runtime.loader import CoreSettings

from .cuda_engines import build_shell
from .serving import Request
from .test_cuda_executor import settings


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CoreSettings:
    return settings(build_shell("llama", tmp_path_factory.mktemp("engine"), precision="bf16"))


def manual(made: CoreSettings, isa: str = "", edit_slots: int = 64, max_edits: int = 1000, **changes: Any) -> Core:
    spec = copy.deepcopy(made.spec) | {"isa": isa}
    spec["ranks"][0]["draws"]["edit_slots"] = edit_slots
    spec["cuda"]["max_edits"] = max_edits
    return Core(spec, {**made.config, "manual_steps": True, **changes}, "cuda-null")


def request(prompt: list[int], max_tokens: int, **values: Any) -> Request:
    return {"prompt_token_ids": prompt, "max_tokens": max_tokens, "temperature": 0.0, **values}


def step(core: Core, count: int = 1) -> list[Output]:
    """Outputs of the last of some steps."""
    for _ in range(count):
        core.step()
    return core.wait(0)


def told(core: Core, steps: int) -> list[int]:
    """How many tokens each of the next steps tells: as many as it has rows, if the loop draws them itself."""
    return [sum(len(output.token_ids) for output in step(core)) for _ in range(steps)]


def alone(made: CoreSettings, prompt: list[int], max_tokens: int) -> list[int]:
    core = manual(made)
    core.submit(request(prompt, max_tokens))
    while core.step():
        pass
    (output,) = core.wait(0)
    core.close()
    return output.token_ids


def used_blocks(core: Core) -> int:
    return sum(int(group["used_blocks"]) for group in core.stats()["groups"])


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read(llama: CoreSettings) -> None:
    core = manual(llama)
    core.submit(request([5, 6], 3))
    told = [[token for output in step(core) for token in output.token_ids] for _ in range(4)]
    assert [len(tokens) for tokens in told] == [0, 1, 1, 1]
    assert [token for tokens in told for token in tokens] == alone(llama, [5, 6], 3)
    # It was known beforehand that the third is the last.
    assert core.stats()["steps"] == 3
    assert not core.step()
    core.close()


def test_the_token_after_a_stop_token_is_nobodys(llama: CoreSettings) -> None:
    free = alone(llama, [5, 6], 9)
    core = manual(llama)
    core.submit(request([5, 6], 9, stop_token_ids=[free[2]]))
    (output,) = step(core, 4)
    assert (output.token_ids, output.finish_reason) == (free[: free.index(free[2]) + 1], "stop")
    assert core.stats()["steps"] == 4  # the last of them for nothing
    assert used_blocks(core) == 0
    assert core.stats()["finished"]["stop"] == 1
    assert core.step()  # waits for it
    assert not core.step()
    assert core.wait(0) == []
    assert core.stats()["generation_tokens"] == len(output.token_ids)
    core.close()


def test_the_loop_draws_where_slots_do_not_suffice(llama: CoreSettings) -> None:
    core = manual(llama, edit_slots=1)
    for _ in range(3):
        core.submit(request([5], 3, frequency_penalty=1.0))
        assert told(core, 4) == [0, 1, 1, 1]
    for _ in range(2):
        core.submit(request([5], 3, frequency_penalty=1.0))
    assert told(core, 4) == [2, 2, 2, 0]
    core.submit(request([5], 3, presence_penalty=1.0))
    core.submit(request([6], 3, temperature=1.0))
    assert told(core, 4) == [0, 2, 2, 2]
    core.close()


@pytest.mark.parametrize(
    ("values", "edits"),
    [
        ({"frequency_penalty": 1.0}, 1 + 3),
        ({"logit_bias": {9: 1.0, 10: 1.0}}, 1 + 2),
        ({"min_tokens": 2, "stop_token_ids": [299, 298]}, 1 + 2),
        ({"min_tokens": 1, "stop_token_ids": [299], "presence_penalty": 1.0}, 1 + 3 + 1),
    ],
)
def test_the_loop_draws_where_a_step_would_bring_too_many_edits(
    llama: CoreSettings, values: dict[str, Any], edits: int
) -> None:
    for most, wanted in ((edits, [0, 1]), (edits - 1, [1, 1])):
        core = manual(llama, max_edits=most)
        core.submit(request([5, 6, 7], 9, **values))
        assert told(core, 2) == wanted
        core.close()


def test_a_slot_is_another_s_when_nothing_is_masked_any_more(llama: CoreSettings) -> None:
    core = manual(llama, edit_slots=1)
    core.submit(request([5], 6, min_tokens=2, stop_token_ids=[299]))
    assert told(core, 2) == [0, 1]
    core.submit(request([5], 3, frequency_penalty=1.0))
    assert told(core, 3) == [1, 2, 2]
    core.close()


@pytest.mark.parametrize("change", [{"prompt_logprobs": 1}, {"logprobs": 21}])
def test_the_loop_draws_what_no_plan_can(llama: CoreSettings, change: dict[str, int]) -> None:
    core = manual(llama)
    core.submit(request([5, 6], 4))
    assert told(core, 2) == [0, 1]
    core.submit(request([5, 6], 2, **change))
    # Of the first two: what was in flight, and what the loop draws.
    assert told(core, 1) == [3]
    core.close()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_who_is_aborted_between_two_steps_holds_nothing(llama: CoreSettings, steps: int) -> None:
    core = manual(llama)
    first = core.submit(request([5, 6], 9, frequency_penalty=1.0))
    core.submit(request([7], 30))
    step(core, steps)
    core.abort(first)
    outputs = {output.request_id: output for output in step(core)}
    assert (outputs[first].token_ids, outputs[first].finish_reason) == ([], "abort")
    # A third takes the place and the slot of the first, of which the step in flight still speaks.
    third = core.submit(request([5, 6], 9, frequency_penalty=1.0))
    while core.step():
        outputs |= {output.request_id: output for output in core.wait(0) if output.request_id == third}
    lone = manual(llama)
    lone.submit(request([5, 6], 9, frequency_penalty=1.0))
    while lone.step():
        pass
    assert core.stats()["finished"] == {"stop": 0, "length": 2, "abort": 1, "error": 0}
    assert used_blocks(core) == 0
    assert outputs[third].finish_reason == "length"
    assert lone.wait(0)[0].token_ids[-1:] == outputs[third].token_ids[-1:]
    for each in (core, lone):
        each.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_close_and_fail_end_a_loop_with_a_step_in_flight(llama: CoreSettings, steps: int) -> None:
    for end, reason in ((Core.close, "abort"), (lambda core: core.fail("no more"), "error")):
        core = manual(llama)
        core.submit(request([5, 6], 9))
        step(core, steps)
        end(core)
        if reason == "error":
            while core.step():
                pass
        (output,) = core.wait(0)
        assert (output.token_ids, output.finish_reason) == ([], reason)
        with pytest.raises(EngineryError, match="takes no requests"):
            core.submit(request([5], 1))
        assert used_blocks(core) == 0
        assert core.stats()["internal_error"] is None
        core.close()


def test_a_launch_that_fails_ends_the_requests_of_its_step_alone(llama: CoreSettings) -> None:
    """The step in flight is collected all the same."""
    core = manual(llama, isa="fail_on=13", max_num_batched_tokens=1)
    first, second = core.submit(request([5], 9)), core.submit(request([13], 3))
    # The first decodes in every step; a step has room for one token.
    outputs = {}
    while core.step():
        outputs |= {output.request_id: output for output in core.wait(0)}
    assert outputs[second].finish_reason == "error"
    assert "token 13 fails on request" in str(outputs[second].error)
    assert used_blocks(core) == 0
    assert core.stats()["internal_error"] is None
    assert outputs[first].finish_reason is not None
    core.close()


@pytest.mark.parametrize("fault", ["wrong_on", "unlisted_on"])
def test_a_token_that_no_vocabulary_has_ends_both_steps_that_may_hold_it(llama: CoreSettings, fault: str) -> None:
    free = alone(llama, [5, 6], 9)
    core = manual(llama, isa=f"{fault}={free[3]}")
    core.submit(request([5, 6], 9, logprobs=2))
    step(core, 4)
    core.submit(request(list(range(3, 103)), 9))  # in the step that is launched before the fourth token is read
    outputs = {output.request_id: output for output in step(core)}
    assert len(outputs) == 2
    size = llama.spec["vocab_size"]
    for output in outputs.values():
        assert output.finish_reason == "error"
        assert f"token {size} was drawn of a vocabulary of {size}: the engine is damaged" in str(output.error)
    assert core.step()
    assert not core.step()
    assert used_blocks(core) == 0
    # Nor is the prompt's state to be found, which is as little to be trusted.
    assert sum(int(group["cached_blocks"]) for group in core.stats()["groups"]) == 0
    core.submit(request([9], 2))
    while core.step():
        pass
    (output,) = core.wait(0)
    assert (len(output.token_ids), output.finish_reason) == (2, "length")
    core.close()


def without(function: str) -> Callable[[dict[str, Any]], None]:
    def damage(spec: dict[str, Any]) -> None:
        names = [kernel["name"] for kernel in spec["cuda"]["kernels"]]
        rank = spec["ranks"][0]
        rank["sample"] = [launch for launch in rank["sample"] if f"_{function}_" not in names[launch["kernel"]]]

    return damage


def not_kept(spec: dict[str, Any]) -> None:
    for buffer in spec["ranks"][0]["buffers"]:
        buffer["kept"] = False


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("scan"), r"4 bytes of 'sample.token' are read, of which the step has written 0"),
        (without("likeliest"), r"80 bytes of 'sample.top_tokens' are read, of which the step has written 0"),
        (not_kept, r"argument drawn: reads 'sample.token', which is not written in this step"),
    ],
)
def test_what_is_not_drawn_is_noticed(
    llama: CoreSettings, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    spec = copy.deepcopy(llama.spec)
    damage(spec)
    core = Core(spec, {**llama.config, "manual_steps": True}, "cuda-null")
    core.submit(request([5, 6], 3, logprobs=1))
    while core.step():
        pass
    (output,) = core.wait(0)
    assert re.search(message, str(output.error)), output.error
    core.close()
