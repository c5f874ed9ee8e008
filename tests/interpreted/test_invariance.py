"""Batch-invariant builds: a token gets the same bits alone and among others, in chunks, behind a cached prefix.

Ordinary builds do not, which shows that these tests would notice. What the interpreter cannot see, in which order an
instruction adds, is the same because the machine code is: tests/compiler/cuda/test_invariance.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.write import write_weights
from enginery.plugins.attention import cuda
from enginery.plugins.linear.cuda import Linear
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ..tiny import make_checkpoint
from .device import Device, Piece
from .test_attention import Scene
from .test_linear import LINEARS, Case, check, chosen, make_case, make_scratch, run

Array = NDArray[Any]
NUM_SMS = 8
OF_ROWS = ("x", "a", "a_scale", "residual", "out")


def some_rows(case: Case, rows: list[int]) -> Case:
    """The case's rows in this order, and room for one more."""
    taken = {name: np.ascontiguousarray(value[rows]) for name, value in case.operands.items() if name in OF_ROWS}
    taken["out"] = case.operands["out"][[*rows, -1]].copy()
    return Case(case.operands | taken, case.a[rows], case.weight)


def outputs(linear: Linear, case: Case, rows: list[int]) -> Array:
    taken, scratch = some_rows(case, rows), make_scratch(linear, len(rows), NUM_SMS)
    return run(linear, taken, len(rows), NUM_SMS, scratch)[: len(rows)]


@settings(max_examples=6, deadline=None)
@given(LINEARS, st.integers(1, 150), st.integers(0, 99))
def test_products_match_the_reference(linear: Linear, rows: int, seed: int) -> None:
    check(replace(linear, invariant=True, prologue=None), rows, seed, num_sms=NUM_SMS)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("activation", ["none", "silu_gated"])
def test_a_row_of_a_product_is_the_same_among_any(dtype: str, activation: str) -> None:
    """Few rows have a program for each part of K, and 140 one for all."""
    linear = Linear(40, 2600, dtype, activation=activation, bias=True, residual=True, invariant=True)
    case = make_case(linear, 140, seed=1)
    assert chosen(linear, 1, NUM_SMS).grid[1] != chosen(linear, 140, NUM_SMS).grid[1] == 1
    whole = outputs(linear, case, list(range(140)))
    for rows in ([3], [139, 3, 77], list(range(60, 130))):
        np.testing.assert_array_equal(outputs(linear, case, rows), whole[rows])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_ordinary_products_are_not_that_way(dtype: str) -> None:
    linear = Linear(40, 2600, dtype, out_dtype="f32")
    case = make_case(linear, 520, seed=1)
    assert (outputs(linear, case, [3]) != outputs(linear, case, list(range(520)))[3]).any()


class Steps(Scene):
    """A scene whose tokens are asked for in any pieces: (sequence, first, number) of its queries."""

    def ask(self, pieces: list[tuple[int, int, int]], architecture: int = 90) -> list[Array]:
        starts = np.cumsum([0, *(queries for _, queries in self.contexts)])
        tokens = [starts[sequence] + first + np.arange(count) for sequence, first, count in pieces]
        kept = (self.contexts, self.q, self.cos, self.sin, self.positions, self.token_sequence)
        chosen = np.concatenate(tokens)
        self.contexts = [(0, count) for _, _, count in pieces]
        self.q, self.cos, self.sin, self.positions, self.token_sequence = (
            np.ascontiguousarray(values[chosen]) for values in kept[1:]
        )
        out = self.run(architecture=architecture)
        self.contexts, self.q, self.cos, self.sin, self.positions, self.token_sequence = kept
        return np.split(out, np.cumsum([len(piece) for piece in tokens])[:-1])


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SPAN", 64)
    monkeypatch.setattr(cuda, "SPAN_PAIRS", 6)


def assert_a_token_sees_the_same_in_any_step(scene: Steps, architecture: int) -> None:
    """The scene's first sequence has 150 tokens, of which the last 12 are queries; its others 3 and 7 queries."""
    scene.operator = replace(scene.operator, invariant=True)
    whole = scene.ask([(0, 0, 12)], architecture)[0]
    scene.check(whole, scene.wanted()[:12])
    # Alone and decoding, in a chunk that begins elsewhere, among others, with more decoding ones than have spans.
    assert (scene.ask([(0, 8, 1)], architecture)[0] == whole[8]).all()
    assert (scene.ask([(0, 5, 7)], architecture)[0] == whole[5:]).all()
    others = scene.ask([(1, 0, 1), (0, 11, 1), (2, 0, 7), (0, 3, 5)], architecture)
    assert (others[1] == whole[11]).all()
    assert (others[3] == whole[3:8]).all()
    crowd = scene.ask([(0, token, 1) for token in range(12)], architecture)
    assert (np.concatenate(crowd) == whole).all()


@pytest.mark.usefixtures("short_spans")
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([1, 3, 4, 40]),
    head_dim=st.sampled_from([1, 16, 24, 80, 136]),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    q_norm=st.booleans(),
    window=st.sampled_from([0, 1, 5, 100, 200]),
    softcap=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 2**31),
    architecture=st.sampled_from([80, 90, 100]),
)
@pytest.mark.parametrize(
    "kv_dtype", ["bf16", *(pytest.param(dtype, marks=pytest.mark.heavy) for dtype in ("fp8", "i8"))]
)
def test_a_token_sees_the_same_in_any_step(
    kv_dtype: str, group: int, head_dim: int, rotated: float, architecture: int, **options: Any
) -> None:
    scene = Steps(
        kv_dtype,
        [(150, 12), (90, 3), (7, 7)],
        kv_heads=2 if group < 40 else 1,
        group=group,
        head_dim=head_dim,
        rot_dim=int(head_dim * rotated) // 2 * 2,
        **options,
    )
    assert_a_token_sees_the_same_in_any_step(scene, architecture)


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(
    ("architecture", "kv_dtype", "head_dim", "rot_dim"),
    [
        (90, "bf16", 192, 192),
        (90, "i8", 192, 64),
        (100, "bf16", 136, 136),
        pytest.param(90, "fp8", 256, 256, marks=pytest.mark.heavy),
    ],
)
def test_a_token_of_wide_heads_does(architecture: int, kv_dtype: str, head_dim: int, rot_dim: int) -> None:
    """Where two programs may take half of the values each."""
    scene = Steps(
        kv_dtype, [(150, 12), (90, 3), (7, 7)], kv_heads=2, group=3, head_dim=head_dim, rot_dim=rot_dim, window=100
    )
    assert_a_token_sees_the_same_in_any_step(scene, architecture)


@pytest.mark.usefixtures("short_spans")
def test_rows_that_ask_alone_see_the_same_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Steps("fp8", [(150, 12), (300, 1)], rot_dim=16)
    scene.operator = replace(scene.operator, invariant=True)
    rows = np.array([0, 7, 12])
    found = scene.run(np.append(rows, -1))
    assert np.isnan(found[-1]).all()
    scene.check(found[:-1], scene.wanted()[rows])
    monkeypatch.setattr(cuda, "SPAN_PAIRS", 100)
    np.testing.assert_array_equal(scene.run(rows), found[:-1])


def test_ordinary_attention_is_not_that_way() -> None:
    scene = Steps("bf16", [(330, 12)])
    whole = scene.ask([(0, 0, 12)])[0]
    alone = np.concatenate([scene.ask([(0, token, 1)])[0] for token in range(12)])
    assert (alone != whole).any()


LIMITS = {"tokens": 240, "rows": 160, "sequences": 8, "decodes": 8, "tiles": 16, "max_blocks": 4}
PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 250, 150)]


def make_device(case: str, directory: Path, invariant: bool, precision: str, kv_cache_dtype: str = "auto") -> Device:
    make_checkpoint(case, directory / "model")
    request = BuildRequest(
        str(directory / "model"),
        None,
        target="h100",
        precision=precision,
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=invariant,
    )
    with prepare(request) as prepared:
        rank = prepared.ranks[0]
        write_weights(directory / "weights", rank.jobs, 0, 1, lambda count: None)
    return Device(rank.plan, rank.kernels, directory / "weights", LIMITS, num_blocks=16)


def logits_in_steps(device: Device) -> list[tuple[str, Array, Array]]:
    """How the last tokens of the prompt were computed, their logits, and those of the whole prompt in one step."""
    size, blocks = len(PROMPT), [5, 2, 0]
    last = list(range(size - 4, size))
    whole = device.step([Piece(PROMPT, 0, size, blocks)], last)
    found = []
    # In chunks among others, then token by token: alone, and with another prompt.
    others = [Piece(PROMPT[9:10], 0, 1, [6]), Piece(PROMPT[:70], 0, 70, [8, 9])]
    device.step([Piece(PROMPT[:70], 0, size, [3, 1]), *others], [69])
    chunk = device.step([others[1], Piece(PROMPT[70 : size - 2], 70, size, [3, 1, 4])], [147, 146])
    found.append(("in chunks", chunk, whole[[1, 0]]))
    alone = device.step([Piece(PROMPT[-2:-1], size - 2, size, [3, 1, 4])], [0])
    found.append(("decoding alone", alone, whole[2:3]))
    both = device.step([others[1], Piece(PROMPT[-1:], size - 1, size, [3, 1, 4]), others[0]], [70])
    found.append(("decoding among others", both, whole[3:]))
    # Behind 64 tokens that the first step has cached, with logits of all.
    cached = device.step([Piece(PROMPT[64:], 64, size, [5, *blocks[1:]])], list(range(size - 64)))
    found.append(("after a cached prefix", cached[-4:], whole))
    return found


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(
    ("case", "precision", "kv_cache_dtype"),
    [
        ("llama", "bf16", "auto"),
        pytest.param("gemma3_text-softcap", "fp8", "fp8", marks=pytest.mark.heavy),
        pytest.param("llama-biases", "int8", "int8", marks=pytest.mark.heavy),
        pytest.param("qwen3", "fp8", "bf16", marks=pytest.mark.heavy),
        pytest.param("mistral-window", "bf16", "fp8", marks=pytest.mark.heavy),
        pytest.param("phi3-longrope", "bf16", "int8", marks=pytest.mark.heavy),
        pytest.param("llama-odd-sizes", "fp8", "int8", marks=pytest.mark.heavy),
    ],
)
def test_logits_are_the_same_bits_however_they_are_computed(
    case: str, precision: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    device = make_device(case, tmp_path, True, precision, kv_cache_dtype)
    for how, found, wanted in logits_in_steps(device):
        np.testing.assert_array_equal(found, wanted, err_msg=how)


@pytest.mark.heavy
def test_logits_of_ordinary_builds_are_not_the_same_bits(tmp_path: Path) -> None:
    device = make_device("llama", tmp_path, False, "bf16")
    assert any((found != wanted).any() for _, found, wanted in logits_in_steps(device))
