"""Arithmetic of recipes: expressions such as 'num_epochs * 0.5', computed without running any code."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..support.registry import close_matches

Number = int | float

# What no recipe comes near, and what keeps any expression quick.
LONGEST, DEEPEST, CHAIN = 500, 50, 50  # characters, levels of nesting, variables that depend on each other


LARGEST, HIGHEST_EXPONENT, MOST_DIGITS = 10**100, 100, 100

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _power(base: Number, exponent: Number) -> Any:
    if abs(exponent) > HIGHEST_EXPONENT:
        raise ValueError(f"the exponent {exponent!r} is beyond {HIGHEST_EXPONENT}")
    return base**exponent


def _round(value: Number, digits: Number | None = None) -> Any:
    if digits is not None and abs(digits) > MOST_DIGITS:
        raise ValueError(f"round to {digits!r} digits is beyond {MOST_DIGITS}")
    return round(value, digits)  # type: ignore[arg-type]


_OPERATORS[ast.Pow] = _power


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": _round,
}


def is_expression(value: Any) -> bool:
    """Whether a value of a recipe is one to be computed: 'eval(...)'."""
    return isinstance(value, str) and value.strip().startswith("eval(") and value.strip().endswith(")")


def inner(expression: str) -> str:
    """What is to be computed: 'eval(a + b)' -> 'a + b'; others as they are."""
    return expression.strip()[len("eval(") : -1].strip() if is_expression(expression) else expression.strip()


def evaluate(expression: str, variables: Mapping[str, Any]) -> float | int:
    """The number that `expression` means: +, -, *, /, //, %, **, parentheses, names, and the functions of FUNCTIONS.

    variables: name -> a number, or an expression of its own. ValueError for all else: other syntax, unknown names,
    variables that depend on themselves, and what is no finite number below 10^100.

    >>> evaluate('max(epochs * 0.5, 3)', {'epochs': 'eval(2 * 10)'})
    10.0
    """
    return _Evaluation(variables).of(expression, ())


class _Evaluation:
    """One evaluation: each variable is computed once, however often it is named."""

    def __init__(self, variables: Mapping[str, Any]):
        self.variables, self.known = variables, dict[str, Number]()

    def of(self, expression: Any, chain: tuple[str, ...]) -> Number:
        """Value of an expression. chain: the variables that led to it, the first first."""
        try:
            return self._node(_parsed(expression), chain, 0)
        except (ValueError, TypeError, ArithmeticError) as error:
            if isinstance(error, _RefusedError):
                raise
            where = f" (the value of {chain[-1]!r})" if chain else ""
            raise _RefusedError(f"expression {_shown(expression)}{where}: {error}") from None

    def _node(self, node: ast.AST, chain: tuple[str, ...], depth: int) -> Number:
        if depth > DEEPEST:
            raise ValueError(f"is nested deeper than {DEEPEST} levels")
        if isinstance(node, ast.Constant):
            return _finite(node.value)
        if isinstance(node, ast.Name):
            return self._variable(node.id, chain)
        if isinstance(node, ast.BinOp):
            function, operands = _OPERATORS.get(type(node.op)), [node.left, node.right]
        elif isinstance(node, ast.UnaryOp):
            function, operands = _OPERATORS.get(type(node.op)), [node.operand]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function, operands = FUNCTIONS.get(node.func.id), node.args
            if function is None:
                raise ValueError(f"unknown function {node.func.id!r}; {close_matches(node.func.id, FUNCTIONS)}")
        else:
            function, operands = None, []
        if function is None:
            raise ValueError(
                "is not arithmetic; it may have numbers, names, + - * / // % **, parentheses and "
                f"{', '.join(FUNCTIONS)}"
            )
        return _finite(function(*(self._node(operand, chain, depth + 1) for operand in operands)))

    def _variable(self, name: str, chain: tuple[str, ...]) -> Number:
        if name in chain:
            circle = [*chain[chain.index(name) :], name]
            raise _RefusedError(f"variables that depend on themselves: {' -> '.join(circle)}")
        if len(chain) == CHAIN:
            raise _RefusedError(f"more than {CHAIN} variables that depend on each other, from {chain[0]!r} on")
        if name not in self.known:
            if name not in self.variables:
                hint = close_matches(name, map(str, self.variables)) if self.variables else "no variable is defined"
                raise ValueError(f"undefined name {name!r}; {hint}")
            value = self.variables[name]
            is_text = isinstance(value, str)
            self.known[name] = self.of(value, (*chain, name)) if is_text else _finite(value, f"{name!r} is ")
        return self.known[name]


class _RefusedError(ValueError):
    """An error whose message says already where it is."""


def _parsed(expression: Any) -> ast.AST:
    if not isinstance(expression, str):
        raise TypeError("is no text")
    text = inner(expression)
    if len(text) > LONGEST:
        raise ValueError(f"has {len(text)} characters, more than {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of what looks like a mistake: '1if'
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError, Warning):
        raise ValueError("is not arithmetic that can be read") from None


def _finite(value: Any, of_what: str = "") -> Number:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{of_what}{_shown(value)}, which is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{of_what}{value!r}, which is no finite number")
    if abs(value) > LARGEST:
        raise ValueError(f"{of_what or 'has '}a number beyond 1e100")
    return value


def _shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 90 else f"{text[:80]}..."
