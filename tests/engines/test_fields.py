"""Typed reading: a value of another kind or size is refused by its place, in a message that stays short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from enginery.engines.errors import EngineFormatError, EngineryError, TargetError, faults
from enginery.engines.fields import LARGEST, LONGEST_TEXT, Fields, describe


@pytest.mark.parametrize(
    ("read", "value", "reason"),
    [
        (lambda f: f.integer("k"), True, r"here\.k: wanted an integer from 0"),
        (lambda f: f.integer("k"), 1.0, "an integer"),
        (lambda f: f.integer("k"), LARGEST + 1, f"to {LARGEST}, got"),
        (lambda f: f.integer("k", 3, 5), 6, "from 3 to 5, got 6"),
        (lambda f: f.integer("k", 3, 5), 2, "from 3 to 5, got 2"),
        (lambda f: f.text("k"), 3, "text"),
        (lambda f: f.text("k"), "x" * (LONGEST_TEXT + 1), f"at most {LONGEST_TEXT} characters"),
        (lambda f: f.text("k"), "\ud800", "text"),
        (lambda f: f.text("k", ("a", "b")), "c", "one of a, b, got 'c'"),
        (lambda f: f.boolean("k"), 1, "true or false"),
        (lambda f: f.boolean("k"), "true", "true or false"),
        (lambda f: f.items("k", lambda item, where: item), {}, "a list"),
        (lambda f: f.items("k", lambda item, where: item, most=2), [1, 2, 3], "at most 2 items"),
        (lambda f: f.map("k"), [], r"here\.k: wanted a map"),
        (lambda f: f.map("k"), {1: 2}, "text keys"),
        (lambda f: f.map("k"), {"\ud800": 2}, "text keys"),
        (lambda f: f.only("j"), 1, "unknown field 'k'"),
        (lambda f: f.integer("j"), 1, "field 'j' is missing"),
    ],
)
def test_what_is_of_another_kind_is_refused(read: Callable[[Fields], Any], value: Any, reason: str) -> None:
    with pytest.raises(EngineFormatError, match=reason):
        read(Fields({"k": value}, "here"))


def test_what_is_right_is_read() -> None:
    found = Fields({"n": 5, "t": "é", "b": False, "l": [1, 2], "m": {"x": 3}, "long": "x" * LONGEST_TEXT}, "here")
    assert (found.integer("n", 5, 5), found.text("t"), found.boolean("b")) == (5, "é", False)
    assert found.items("l", lambda item, where: f"{where}={item}", most=2) == ["here.l[0]=1", "here.l[1]=2"]
    assert found.map("m").integer("x") == 3
    assert len(found.text("long")) == LONGEST_TEXT


@pytest.mark.parametrize("value", ["x" * 10_000, 10**4000, -(10**4000), [0] * 10_000, {"x": 1}, 1 << 63, None, 1.5])
def test_values_in_messages_are_short(value: Any) -> None:
    assert 0 < len(describe(value)) <= 80


def test_one_fault_stands_on_the_line_and_several_below_it() -> None:
    one, two = (faults(TargetError, "this", reasons) for reasons in (["is wrong"], ["is wrong", "and that"]))
    assert str(one) == "this: is wrong"
    assert str(two) == "this:\n  - is wrong\n  - and that"
    assert isinstance(two, TargetError)
    assert isinstance(two, EngineryError)
