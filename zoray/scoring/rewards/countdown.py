"""Countdown: does an equation use the given numbers, each once, and give the target?"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from zoray.records import ConfigError
from zoray.scoring.rewards.base import LIMIT, column

OPEN, CLOSE = "<answer>", "</answer>"
LONGEST = 200  # characters of an equation
ARITHMETIC = re.compile(r"[0-9+\-*/() \n\t]+")
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the last <answer>...</answer> makes `target` of all `numbers`, each used once; 0.1 if there is one.

    TinyZero's scale (Pan et al., 2025). The arithmetic is exact: + - * /, parentheses, a minus before a number.
    """
    numbers, target = column(example, "numbers", "countdown"), column(example, "target", "countdown")
    if not isinstance(numbers, list | tuple) or not all(_is_whole(number) for number in (*numbers, target)):
        raise ConfigError(f"expected whole numbers and target for the reward countdown; got {numbers!r}, {target!r}")
    text = completion[-LIMIT:]
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    answer = text[start + len(OPEN) : end].strip() if start >= 0 else ""
    if not answer:
        return 0.0
    return 1.0 if evaluate(answer, numbers) == target else 0.1


def evaluate(equation: str, numbers: list[int] | tuple[int, ...]) -> Fraction | None:
    """The equation's value; None if it is malformed, divides by zero, or does not use exactly these numbers."""
    if len(equation) > LONGEST or not ARITHMETIC.fullmatch(equation):
        return None
    try:
        tree = ast.parse(" ".join(equation.split()), mode="eval").body
        used: list[int] = []
        value = _value(tree, used)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if sorted(used) == sorted(numbers) else None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a node; notes the numbers in it. Raises ValueError at anything but arithmetic."""
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, used)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, used), _value(right, used))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
