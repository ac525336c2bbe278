"""Arithmetic in recipes: expressions such as 'num_epochs * 0.5', computed without running any code."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..support.printable import printable, quoted
from ..support.registry import close_matches
from ..support.warning import own_filters
from ..support.work import Work

Number = int | float

# Limits far beyond what a recipe needs, which keep every expression quick.
LONGEST = 500  # characters
MOST_CHARACTERS = 1_000_000  # of all expressions that are computed for a recipe, four times those of its text
DEEPEST = 50  # levels of nesting
LONGEST_CHAIN = 50  # variables that depend on each other
LARGEST = 10**100
HIGHEST_EXPONENT = 100
MOST_DIGITS = 100  # of round()


def _power(base: Number, exponent: Number) -> Any:
    if abs(exponent) > HIGHEST_EXPONENT:
        raise ValueError(f"the exponent {exponent!r} is beyond {HIGHEST_EXPONENT}")
    return base**exponent


def _round(value: Number, digits: Number | None = None) -> Any:
    if digits is not None and abs(digits) > MOST_DIGITS:
        raise ValueError(f"round() to {digits!r} digits is beyond {MOST_DIGITS}")
    return round(value, digits)  # type: ignore[arg-type]


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}

# The functions that an expression may call.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": _round,
}


def is_expression(value: Any) -> bool:
    """Whether a value has SparseML's form of an expression, 'eval(...)'.

    Args:
        value: Any value of a recipe.
    """
    return isinstance(value, str) and value.strip().startswith("eval(") and value.strip().endswith(")")


def without_eval(expression: str) -> str:
    """An expression without SparseML's 'eval(...)' around it: 'eval(a + b)' -> 'a + b'.

    Args:
        expression: With or without 'eval(...)'.
    """
    return expression.strip()[len("eval(") : -1].strip() if is_expression(expression) else expression.strip()


def evaluate(expression: str, variables: Mapping[str, Any]) -> float | int:
    """Compute an arithmetic expression.

    It may have numbers, names of variables, + - * / // % **, parentheses, and the functions abs, float, int, max, min
    and round. 'eval(...)' around it is ignored.

    Args:
        expression: The expression, up to 500 characters.
        variables: Name -> a number, or an expression of its own.

    Returns:
        The value, a finite number of at most 10^100.

    Raises:
        ValueError: The expression has other syntax or unknown names, variables depend on themselves, or a value is not
            a finite number of at most 10^100.

    Example:
        >>> evaluate('max(epochs * 0.5, 3)', {'epochs': 'eval(2 * 10)'})
        10.0
    """
    return Evaluation(variables).of(expression)


def work_of_recipe() -> Work:
    """What may be spent on the expressions of one recipe, counted in characters."""
    return Work(MOST_CHARACTERS, f"the expressions of the recipe have more than {MOST_CHARACTERS:,} characters in all")


class Evaluation:
    """Computes expressions of the same variables; each variable is computed once, however often it is named.

    Args:
        variables: Name -> a number, or an expression of its own. Names may be added later.
        work: What may be spent, counted in characters. Default: `work_of_recipe()`.
    """

    def __init__(self, variables: Mapping[str, Any], work: Work | None = None):
        self.variables, self.known = variables, dict[str, Number]()
        self.work = work_of_recipe() if work is None else work

    def of(self, expression: Any, chain: tuple[str, ...] = ()) -> Number:
        """The value of an expression.

        Args:
            expression: The expression.
            chain: The variables whose values led to it, outermost first. Default: none.

        Raises:
            ValueError: As `evaluate`; or the work is spent.
        """
        self.work.spend(1 + len(expression) if isinstance(expression, str) else 1)
        try:
            return self._node(_parsed(expression), chain, 0)
        except RecursionError:
            raise _LocatedError(
                f"expression {quoted(expression)}: it and its variables are nested too deeply"
            ) from None
        except (ValueError, TypeError, ArithmeticError) as error:
            if isinstance(error, _LocatedError):
                raise
            where = f" (the value of {quoted(chain[-1])})" if chain else ""
            raise _LocatedError(f"expression {quoted(expression)}{where}: {error}") from None

    def _node(self, node: ast.AST, chain: tuple[str, ...], depth: int) -> Number:
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        if isinstance(node, ast.Constant):
            return _checked(node.value)
        if isinstance(node, ast.Name):
            return self._variable(node.id, chain)
        if isinstance(node, ast.BinOp):
            function, operands = _OPERATORS.get(type(node.op)), [node.left, node.right]
        elif isinstance(node, ast.UnaryOp):
            function, operands = _OPERATORS.get(type(node.op)), [node.operand]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function, operands = FUNCTIONS.get(node.func.id), node.args
            if function is None:
                raise ValueError(f"unknown function {quoted(node.func.id)}; {close_matches(node.func.id, FUNCTIONS)}")
        else:
            function, operands = None, []
        if function is None:
            raise ValueError(
                f"it is not arithmetic; use numbers, names, + - * / // % **, parentheses and {', '.join(FUNCTIONS)}"
            )
        return _checked(function(*(self._node(operand, chain, depth + 1) for operand in operands)))

    def _variable(self, name: str, chain: tuple[str, ...]) -> Number:
        if name in chain:
            circle = [*chain[chain.index(name) :], name]
            raise _LocatedError(f"variables depend on themselves: {printable(' -> '.join(circle))}")
        if len(chain) == LONGEST_CHAIN:
            raise _LocatedError(
                f"more than {LONGEST_CHAIN} variables depend on each other, starting with {quoted(chain[0])}"
            )
        if name not in self.known:
            if name not in self.variables:
                hint = close_matches(name, map(str, self.variables)) if self.variables else "no variable is defined"
                raise ValueError(f"undefined name {quoted(name)}; {hint}")
            value = self.variables[name]
            self.known[name] = self.of(value, (*chain, name)) if isinstance(value, str) else _checked(value, name)
        return self.known[name]


class _LocatedError(ValueError):
    """An error whose message says already which expression or variable is wrong."""


def _parsed(expression: Any) -> ast.AST:
    if not isinstance(expression, str):
        raise TypeError(f"it must be a str, not {type(expression).__name__}")
    text = without_eval(expression)
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST}")
    try:
        with own_filters():
            warnings.simplefilter("error")  # Python warns of what looks like a mistake: '1if'
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError, Warning):
        raise ValueError("it is not valid arithmetic") from None


def _checked(value: Any, name: str = "") -> Number:
    """A value, if it is a finite number within the limits. name: of the variable that has it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_subject(value, name)} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{_subject(value, name)} is not a finite number")
    if abs(value) > LARGEST:  # its digits may be too many to show
        raise ValueError(f"{quoted(name) if name else 'a number'} is beyond 1e100")
    return value


def _subject(value: Any, name: str) -> str:
    return f"{quoted(name)} is {quoted(value)}, which" if name else quoted(value)
