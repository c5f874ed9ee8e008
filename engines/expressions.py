"""Expressions of a plan: sizes as functions of a step's variables that never fall when a variable grows.

An expression is an integer, a variable's name, or a list [operator, left, right]. Since all operators are monotone, a
size at the variables' largest values is its largest: bounds are checked once, at load.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import EngineFormatError
from .fields import LARGEST, describe

# decodes: sequences with one token in the step; tiles: pieces of the others' tokens that attention takes at once;
# max_blocks: blocks of the longest sequence that is served, the same in every step. Of the rows that `sample` draws:
# drawn: all rows if one is drawn at random, else 0, as are edited (some logits are changed first), ranked (the token's
# rank is wanted) and listed (so are the likeliest tokens); edits: changes that the step brings.
VARIABLES = (
    *("tokens", "rows", "sequences", "decodes", "tiles", "max_blocks"),
    *("drawn", "edited", "ranked", "listed", "edits"),
)
OPERATORS = ("+", "*", "ceil_div", "round_up", "min", "max")
DEEPEST = 16

Expression = int | str | list["Expression"]


def check_expression(value: object, where: str, depth: int = 0) -> Expression:
    """`value` as an Expression. Raises EngineFormatError where it is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return value
    if isinstance(value, str) and value in VARIABLES:
        return value
    if isinstance(value, list) and len(value) == 3 and depth < DEEPEST and value[0] in OPERATORS:
        operator = value[0]
        left = check_expression(value[1], where, depth + 1)
        right = check_expression(value[2], where, depth + 1)
        if operator in ("ceil_div", "round_up") and (not isinstance(right, int) or right < 1):
            raise EngineFormatError(f"{where}: {operator} wants a positive integer after it, got {describe(value[2])}.")
        return [operator, left, right]
    raise EngineFormatError(
        f"{where}: wanted an expression (an integer, one of {', '.join(VARIABLES)}, or [operator, left, right] with "
        f"one of {' '.join(OPERATORS)}), got {describe(value)}."
    )


def evaluate(expression: Expression, variables: Mapping[str, int]) -> int:
    """The value of a checked expression; above LARGEST it is some number above LARGEST."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return variables[expression]
    operator, left_expression, right_expression = expression
    left, right = evaluate(left_expression, variables), evaluate(right_expression, variables)
    match operator:
        case "+":
            return min(left + right, LARGEST + 1)
        case "*":
            return min(left * right, LARGEST + 1)
        case "ceil_div":
            return -(-left // right)
        case "round_up":
            return -(-left // right) * right
        case "min":
            return min(left, right)
        case _:
            return max(left, right)
