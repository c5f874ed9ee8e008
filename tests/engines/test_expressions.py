"""Expressions: what each operator gives, what is refused, and that nothing overflows."""

from __future__ import annotations

from typing import Any

import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.expressions import DEEPEST, check_expression, evaluate
from enginery.engines.fields import LARGEST

VARIABLES = {"tokens": 7, "rows": 3, "sequences": 2}


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        (5, 5),
        ("tokens", 7),
        ("rows", 3),
        ("sequences", 2),
        (["+", "tokens", 5], 12),
        (["*", "tokens", 5], 35),
        (["ceil_div", "tokens", 4], 2),
        (["ceil_div", 8, 4], 2),
        (["round_up", "tokens", 4], 8),
        (["round_up", 8, 4], 8),
        (["min", "tokens", 4], 4),
        (["max", "tokens", 4], 7),
        (["*", ["round_up", ["+", "rows", 1], 16], 64], 1024),
    ],
)
def test_operators_give(expression: Any, wanted: int) -> None:
    assert evaluate(check_expression(expression, "here"), VARIABLES) == wanted


@pytest.mark.parametrize("operator", ["+", "*"])
def test_what_is_too_large_stays_small_enough_to_count_with(operator: str) -> None:
    """Without a limit, 16 squarings of a large number would take all memory."""
    expression: Any = LARGEST
    for _ in range(DEEPEST):
        expression = [operator, expression, expression]
    assert evaluate(check_expression(expression, "here"), VARIABLES) == LARGEST + 1


def nested(depth: int) -> Any:
    expression: Any = "tokens"
    for _ in range(depth):
        expression = ["+", 1, expression]
    return expression


def test_nesting_has_an_end() -> None:
    check_expression(nested(DEEPEST), "here")
    with pytest.raises(EngineFormatError, match="here: wanted an expression"):
        check_expression(nested(DEEPEST + 1), "here")


@pytest.mark.parametrize("value", [True, 1.5, None, [], ["+", 1], ["+", 1, 2, 3], LARGEST + 1, {"+": 1}])
def test_what_is_none_is_refused(value: Any) -> None:
    with pytest.raises(EngineFormatError, match="here: wanted an expression"):
        check_expression(value, "here")


@pytest.mark.parametrize("operator", ["ceil_div", "round_up"])
@pytest.mark.parametrize("divisor", [0, "tokens"])
def test_divisors_are_positive_integers(operator: str, divisor: Any) -> None:
    with pytest.raises(EngineFormatError, match="positive integer"):
        check_expression([operator, 8, divisor], "here")
