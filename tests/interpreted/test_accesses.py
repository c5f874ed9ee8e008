"""Plans' declarations against what their launches touch, in steps of every form; and that a wrong plan is seen.

device.py checks every launch that any test of plans runs (accesses.py has the rules, and why they leave no hazards).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.write import write_weights
from enginery.engines.plan import Launch, Plan
from enginery.plugins.launches import Kernel
from triton.runtime.errors import InterpreterError

from ..tiny import make_checkpoint
from .device import Device, Piece

Engine = tuple[Plan, tuple[Kernel, ...], Path]
LIMITS = {"tokens": 160, "rows": 8, "sequences": 8, "decodes": 8, "tiles": 16, "max_blocks": 4}
PADDING = Piece([0], 0, 1, [0] * LIMITS["max_blocks"], is_padding=True)


def compiled(case: str, directory: Path, **options: Any) -> Engine:
    """Plan, kernels and weights of a tiny engine."""
    make_checkpoint(case, directory / "model")
    with prepare(BuildRequest(str(directory / "model"), None, **options)) as prepared:
        rank = prepared.ranks[0]
        write_weights(directory / "weights", rank.jobs, 0, 1, lambda count: None)
    return rank.plan, rank.kernels, directory / "weights"


def random_steps(seed: int, count: int) -> Iterator[tuple[list[Piece], list[int]]]:
    """Steps of up to three sequences, of single tokens and pieces of prompts, with padding where there are no others.

    Rows are their last tokens.
    """
    random = np.random.default_rng(seed)
    blocks = random.permutation(np.arange(1, 10)).reshape(3, 3).tolist()
    known = [0, 0, 0]
    for step in range(count):
        pieces, rows, tokens = [], [], 0
        for sequence in range(3):
            if step % 3 == 1:
                new = 1
            else:
                new = int(random.choice([0, 1, 2, 9, 30]))
            if known[sequence] + new > 150 or new == 0:
                continue
            pieces.append(Piece(random.integers(3, 250, new).tolist(), known[sequence], 40, blocks[sequence]))
            known[sequence] += new
            tokens += new
            if new == 1 or random.random() < 0.7:
                rows.append(tokens - 1)
        padding = 2 if tokens == len(pieces) == len(rows) else 0
        pieces += [PADDING] * padding
        rows += range(tokens, tokens + padding)
        if pieces:
            yield pieces, rows or [tokens - 1]


# Of padding, which reads a block that nobody has written.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("qwen2-window", {"target": "h100", "precision": "fp8", "kv_cache_dtype": "bf16"}),
        *(
            pytest.param(
                case, {"target": target, "precision": precision, "kv_cache_dtype": kv}, marks=pytest.mark.heavy
            )
            for case, target, precision, kv in [
                ("llama-biases", "h100", "int8", "int8"),
                ("llama-dynamic", "a100", "int8", "bf16"),
                ("llama-tied-llama3", "h100", "bf16", "int8"),
                ("llama-wide-heads", "l4", "fp8", "int8"),
                ("llama-odd-sizes", "b200", "bf16", "fp8"),
                ("llama-head-256", "h100", "fp8", "fp8"),
                ("mistral-window", "h100", "bf16", "bf16"),
                ("qwen3", "h100", "fp8", "fp8"),
                ("phi3-longrope", "h100", "int8", "bf16"),
                ("phi3-partial", "h100", "bf16", "fp8"),
                ("gemma3_text", "h100", "fp8", "bf16"),
                ("gemma3_text-softcap", "rtx5090", "int8", "int8"),
            ]
        ),
    ],
    ids=lambda item: item if isinstance(item, str) else "-".join(item.values()),
)
def test_launches_touch_what_they_declare_and_no_two_of_them_have_a_hazard(
    case: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Between launches of a graph there is no hazard, and this is what is checked of it here.

    A launch of a kernel without programmatic dependent launch begins when all before it have ended. One with it may
    begin earlier, but each of its programs waits (gdc_wait) until the launch before it has ended, with all its stores
    visible, and until then touches weights only, by reading; no launch stores weights. As every program of the launch
    before has waited in its turn before it ended, all launches before have ended too. So what two launches do to memory
    that either stores is in the order of the plan: the counters that one leaves zero and the next one counts in, the
    partial sums of split products in the same scratch, buffers that follow each other in a slot. What is left is that
    the order itself is right, that is, that each launch finds what it reads: not yet another buffer's bytes in the
    slot, nor what is written in other steps only (the owner of each byte is followed), zeros in counters (every launch
    leaves them so), and in scratch nothing but what it has stored itself; and that the programs of one launch, which
    nothing orders, do not meet but where atomics put one after the other.
    """
    plan, kernels, weights = compiled(case, tmp_path, **options)
    device = Device(plan, kernels, weights, LIMITS, num_blocks=10)
    for pieces, rows in random_steps(seed=len(case), count=3):
        assert np.isfinite(
            device.step(pieces, rows)[[not pieces[-1].is_padding or i < 1 for i in range(len(rows))]]
        ).all()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("llama")
    return compiled("llama-biases", directory, target="h100", precision="fp8", kv_cache_dtype="int8")


def step_of(plan: Plan, kernels: tuple[Kernel, ...], weights: Path) -> None:
    """A step of a sequence of 18 tokens and one of a single token, with a row of each."""
    device = Device(plan, kernels, weights, LIMITS, num_blocks=4)
    device.step([Piece(list(range(3, 21)), 0, 18, [1]), Piece([5], 0, 1, [3])], [17, 18])


def runs(launch: Any) -> bool:
    """In step_of's step."""
    variables = {"tokens": 19, "rows": 2, "sequences": 2, "decodes": 1, "tiles": 1, "max_blocks": 4}
    return all(part.low <= variables[part.variable] <= part.high for part in launch.guard)


def first(plan: Plan, kernel: str) -> int:
    """The first of the launches of that step whose kernel is called so."""
    return next(i for i, launch in enumerate(plan.forward) if launch.label.startswith(kernel) and runs(launch))


def with_operand(plan: Plan, kernel: str, name: str, fields: dict[str, Any]) -> Plan:
    """The plan with other fields of that operand of that launch."""
    forward, index = list(plan.forward), first(plan, kernel)
    launch = forward[index]
    assert isinstance(launch, Launch)
    operand = launch.operands[name]
    forward[index] = replace(launch, arguments=launch.arguments | {name: replace(operand, **fields)})
    return replace(plan, forward=tuple(forward))


@pytest.mark.parametrize(
    ("kernel", "name", "fields", "message"),
    [
        # An extent that is too small, of a weight, of what is stored, of scratch.
        ("linear", "weight", {"extent": 128}, "(prefetches|loads) weight: bytes"),
        ("rotary_table", "cos", {"extent": ["*", "tokens", 12]}, "stores cos: bytes 0 to 304 of it, of which 0 to 228"),
        (
            "rms_norm",
            "out_scale",
            {"extent": ["*", "tokens", 3]},
            "stores out_scale: bytes 56 to 60 of it, of which 0 to 57",
        ),
        # An access that is not the declared one.
        ("rotary_table", "sin", {"access": "r"}, "bytes that it declares to read of .* are not stored in this step"),
        ("kv_write", "state", {"access": "r"}, "stores state: which is declared to be read only"),
        ("rms_norm", "x", {"access": "w"}, "x: reads what it has not stored; it is declared 'w'"),
        ("linear", "weight", {"offset": 128}, "weight: .* bytes from 128 on"),
        ("linear", "weight", {"access": "rw"}, "weight: a weight is declared 'rw'"),
        # A pointer that is somewhere else.
        ("rotary_table", "cos", {"offset": 256}, "cos: 256 of 304 bytes that it declares to read of .* are not stored"),
        ("attention_prefill", "out", {"offset": 512}, "bytes that it declares to read of .* are not stored"),
        ("attention_prefill", "q", {"offset": -256}, "q: 4864 bytes from -256 on of '.*', which has"),
        ("attention_prefill", "out", {"name": "logits"}, "bytes that it declares to read of .* are not stored"),
    ],
)
def test_a_wrong_declaration_is_seen(
    kernel: str, name: str, fields: dict[str, Any], message: str, engine: Engine
) -> None:
    plan, kernels, weights = engine
    with pytest.raises((InterpreterError, AssertionError), match=message):
        step_of(with_operand(plan, kernel, name, fields), kernels, weights)


@pytest.mark.parametrize("kernel", ["rotary_table", "rms_norm", "linear", "attention_prefill", "attention_decode"])
def test_a_launch_that_is_missing_is_seen(kernel: str, engine: Engine) -> None:
    plan, kernels, weights = engine
    forward = [launch for index, launch in enumerate(plan.forward) if index != first(plan, kernel)]
    with pytest.raises(AssertionError, match=r"bytes that it declares to read of .* are not stored in this step"):
        step_of(replace(plan, forward=tuple(forward)), kernels, weights)


def test_launches_in_another_order_are_seen(engine: Engine) -> None:
    plan, kernels, weights = engine
    forward, index = list(plan.forward), first(plan, "attention_prefill")
    forward[index], forward[index + 2] = forward[index + 2], forward[index]
    with pytest.raises(AssertionError, match=r"bytes that it declares to read of .* are not stored in this step"):
        step_of(replace(plan, forward=tuple(forward)), kernels, weights)


def test_buffers_that_share_a_slot_too_early_are_seen(engine: Engine) -> None:
    plan, kernels, weights = engine
    rotary = plan.forward[first(plan, "rotary_table")].operands
    slots = {buffer.name: buffer.slot for buffer in plan.buffers}
    buffers = [
        replace(buffer, slot=slots[rotary["cos"].name]) if buffer.name == rotary["sin"].name else buffer
        for buffer in plan.buffers
    ]
    with pytest.raises(AssertionError, match=r"(cos|sin), which it stores, and (cos|sin) share bytes"):
        step_of(replace(plan, buffers=tuple(buffers)), kernels, weights)
    norm = plan.forward[first(plan, "rms_norm")].operands
    buffers = [
        replace(buffer, slot=slots[rotary["cos"].name]) if buffer.name == norm["out"].name else buffer
        for buffer in plan.buffers
    ]
    with pytest.raises(AssertionError, match=r"cos: .* are not stored in this step, or another buffer's since"):
        step_of(replace(plan, buffers=tuple(buffers)), kernels, weights)


@pytest.mark.parametrize(
    ("kernel", "constants", "message"),
    [
        ("kv_write", {"BLOCK_STRIDE": 0.5}, "bytes of state that are not of the step's slots"),
        (
            "kv_write",
            {"HEAD_STRIDE": 0},
            "stores what another may be about to store|not of the step's slots|as they were",
        ),
        ("kv_write", {"NUM_KV_HEADS": 0.5}, "bytes of the step's slots as they were|not of the step's slots"),
        ("attention_prefill", {"HEAD_STRIDE": 3}, "reads another layer than 0"),
        ("attention_prefill", {"BLOCK_STRIDE": 2}, r"reads blocks \{2\}, which are in no block table"),
        ("attention_prefill", {"STRIDE": 2}, "loads q: bytes"),
        ("rms_norm", {"STRIDE": 0.5}, "not stored in this step|a race"),
        ("linear_gemm", {"PDL": False}, "waits for its predecessor, or not"),
    ],
    ids=str,
)
def test_a_kernel_that_touches_something_else_is_seen(
    kernel: str, constants: dict[str, float], message: str, engine: Engine
) -> None:
    """constants: by what they are multiplied."""
    plan, kernels, weights = engine

    def wrong(item: Kernel) -> Kernel:
        if item.name != plan.forward[first(plan, kernel)].label:
            return item
        return replace(item, constants=tuple((k, _times(v, constants.get(k, 1))) for k, v in item.constants))

    # Under the name that the plan knows.
    found = tuple(Renamed(wrong(item), item.name) for item in kernels)
    with pytest.raises((InterpreterError, AssertionError), match=message):
        step_of(plan, found, weights)  # type: ignore[arg-type]


def _times(value: Any, factor: float) -> Any:
    return value if factor == 1 else bool(factor) if isinstance(value, bool) else int(value * factor)


class Renamed:
    """A kernel under another's name."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.kernel, attribute)
