"""The entry point `sample`: whatever a step asks for, each row is drawn once, from what was edited before."""

from __future__ import annotations

import itertools

import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.lower.lowering import View
from enginery.compiler.lower.sampling import lower_sampling
from enginery.engines.expressions import evaluate
from enginery.engines.plan import Launch, Operand, Plan
from enginery.plugins.launches import Kernel

from ...tiny import make_checkpoint

Planned = tuple[Plan, dict[str, Kernel]]


@pytest.fixture(scope="module", params=[("cuda-sm80", "bf16"), ("cuda-sm90", "fp8")])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint("llama", directory)
    target, precision = request.param
    with prepare(BuildRequest(str(directory), None, target=target, precision=precision)) as prepared:
        rank = prepared.ranks[0]
        return rank.plan, {kernel.name: kernel for kernel in rank.kernels}


def functions(planned: Planned, **asked: int) -> list[str]:
    """What a step of 3 rows launches, in order; `edit` behind a function that reads slots of edits."""
    plan, kernels = planned
    variables = {"rows": 3, "sequences": 3} | dict.fromkeys(("drawn", "edited", "ranked", "listed", "edits"), 0) | asked
    found = []
    for launch in plan.sample:
        if all(part.low <= variables[part.variable] <= part.high for part in launch.guard):
            kernel = kernels[launch.kernel]
            assert kernel.plugin == "sample"
            assert min(evaluate(size, variables) for size in launch.grid) > 0
            names = [name for name, _ in kernel.parameters]
            edits = " edited" if "edit_slots" in names and kernel.function != "write_edits" else ""
            found.append(kernel.function + edits)
    return found


@pytest.mark.parametrize("asked", list(itertools.product((0, 3), repeat=5)))
def test_a_step_launches_what_it_asks_for_once_and_in_order(planned: Planned, asked: tuple[int, ...]) -> None:
    drawn, edited, ranked, listed, edits = asked
    if edited:
        wanted = ["scan edited", "weigh edited", "choose edited"]
    else:
        wanted = ["scan", "weigh", "choose"] if drawn else ["scan"]
    wanted = ["write_edits", "write_edits"] * (edits > 0) + wanted
    wanted += ["rank"] * (ranked > 0) + ["likeliest"] * (listed > 0)
    names = ("drawn", "edited", "ranked", "listed", "edits")
    assert functions(planned, **dict(zip(names, asked, strict=True))) == wanted


def test_slots_are_cleared_before_they_are_written(planned: Planned) -> None:
    plan, kernels = planned
    clears = [dict(kernels[launch.kernel].constants).get("CLEAR") for launch in plan.sample[:2]]
    assert clears == [True, False]


def test_greedy_rows_read_no_parameters(planned: Planned) -> None:
    """So that the commonest step launches one kernel, which knows neither temperatures nor slots."""
    plan, _ = planned
    (greedy,) = [
        launch for launch in plan.sample if ("drawn", 0, 0) in [(g.variable, g.low, g.high) for g in launch.guard]
    ]
    assert {item.name for item in greedy.operands.values() if item.kind == "input"} == set()


def operands_of(plan: Plan, name: str) -> list[Operand]:
    return [item for launch in plan.sample for item in launch.operands.values() if item.name == name]


def test_where_what_is_drawn_lies(planned: Planned) -> None:
    plan, _ = planned
    assert plan.draws is not None
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    limits = {"rows": 5, "sequences": 5}
    assert (plan.draws.top, plan.draws.edit_slots) == (20, 64)
    for name, size in plan.draws.bytes_of_row().items():
        assert evaluate(buffers[name].bytes, limits) == 5 * size
        assert {item.extent == buffers[name].bytes for item in operands_of(plan, name)} == {True}
        assert any(item.access != "r" for item in operands_of(plan, name))
    logits = {(item.access, item.offset) for item in operands_of(plan, plan.logits.buffer)}
    assert logits == {("r", 0)}


def test_what_the_next_step_reads_is_kept_and_what_the_host_reads_lasts(planned: Planned) -> None:
    plan, _ = planned
    assert plan.draws is not None
    slots = {buffer.name: buffer.slot for buffer in plan.buffers}
    kept = {buffer.name for buffer in plan.buffers if buffer.kept}
    assert kept == {plan.draws.token, "sample.token_counts", "sample.token_bias"}
    last = {item.name: launch.region for launch in plan.instructions for item in launch.operands.values()}
    for name in kept | plan.draws.bytes_of_row().keys():
        others = {other for other, slot in slots.items() if slot == slots[name]} - {name}
        assert not {other for other in others if name in kept or last[other] > last[name]}, name


def test_the_embedding_reads_what_the_step_before_has_drawn(planned: Planned) -> None:
    plan, kernels = planned
    assert plan.draws is not None
    (embedding,) = [
        launch for launch in plan.forward if isinstance(launch, Launch) and kernels[launch.kernel].plugin == "embedding"
    ]
    drawn = embedding.arguments["drawn"]
    assert isinstance(drawn, Operand)
    assert (drawn.name, drawn.offset, drawn.access) == (plan.draws.token, 0, "r")


def test_a_vocabulary_may_be_smaller_than_what_is_listed() -> None:
    draws = lower_sampling(View("logits", "rows", 7, 128, "f32"), 7, 90, {}, lambda *_, **__: None)
    assert draws.top == 7
