"""A modifier of a SparseML recipe, with its lines, and the notices of what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ...support.printable import LONGEST_MESSAGE, printable, quoted
from ...support.regular_expression import compiled
from ..expression import evaluate

MOST_SHOWN = 30  # parameters of a modifier in a notice
LONGEST_NAME = 500  # characters
LARGEST = 1e5  # no epoch and no fraction is larger


@dataclass(frozen=True)
class Notice:
    """Something in a SparseML recipe that has no counterpart, is left to fastai, or means something else here.

    Args:
        line: The line of the file, from 1 on.
        key: The modifier or the parameter.
        message: What becomes of it.
        lost: Whether it would have changed the model or its sparsity. Default: False.
    """

    line: int
    key: str
    message: str
    lost: bool = False

    def __str__(self) -> str:
        return printable(f"line {self.line}: {self.key}: {self.message}", LONGEST_MESSAGE)


@dataclass
class Modifier:
    """One modifier, and which of its parameters have been converted.

    Args:
        name: Its class in SparseML.
        line: The line where it begins, from 1 on.
        values: Parameter -> value.
        lines: Parameter -> line.
        notices: The notices of the recipe, to which this modifier adds.
        taken: The parameters that have been converted. Default: none.
        spelled: Parameter -> its name in the file, where that is another one. Default: none.
    """

    name: str
    line: int
    values: dict[str, Any]
    lines: dict[str, int]
    notices: list[Notice]
    taken: set[str] = field(default_factory=set)
    spelled: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, default: Any = None) -> Any:
        """A parameter, marked as converted.

        Args:
            key: The parameter.
            default: What to return if the recipe does not give it. Default: None.
        """
        self.taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def note(self, key: str, message: str, lost: bool = False) -> None:
        """Add a notice about a parameter, if the recipe gives it, or about the modifier.

        Args:
            key: The parameter, or the name of the modifier.
            message: What becomes of it.
            lost: Whether it would have changed the model or its sparsity. Default: False.
        """
        self.taken.add(key)
        if key in self.values or key == self.name:
            shown = self.spelled.get(key, key)
            self.notices.append(Notice(self.lines.get(key, self.line), shown, message, lost))

    def error(self, key: str, problem: str) -> ValueError:
        """A ValueError that names the line.

        Args:
            key: The parameter.
            problem: What is wrong with it.
        """
        return ValueError(
            f"line {self.lines.get(key, self.line)}: {self.name}, {printable(self.spelled.get(key, key))}: {problem}"
        )

    def number(self, key: str, default: float | None = None) -> Any:
        """A parameter that must be a number, marked as converted.

        Args:
            key: The parameter.
            default: What to return if the recipe does not give it. Default: None.

        Raises:
            ValueError: It is not a number.
        """
        return self.check_number(key, self.take(key, default))

    def check_number(self, key: str, value: Any) -> Any:
        """A value as a number, or None. A string such as '0.5' is a number, as in SparseML.

        Args:
            key: The parameter that has the value, for errors.
            value: The value.

        Raises:
            ValueError: It is not a number up to 1e5.
        """
        if isinstance(value, str):
            try:
                value = evaluate(value, {})
            except ValueError:
                raise self.error(key, f"expected a number, not {quoted(value)}") from None
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.error(key, f"expected a number, not {quoted(value)}")
        if value is not None and abs(value) > LARGEST:
            raise self.error(key, f"expected a number up to {LARGEST:g}, not {quoted(value)}")
        return value

    def fraction(self, key: str, value: Any) -> float:
        """A value as a number from 0 to 1.

        Args:
            key: The parameter that has the value, for errors.
            value: The value.

        Raises:
            ValueError: It is not a number from 0 to 1.
        """
        value = self.check_number(key, value)
        if value is None or not 0 <= value <= 1:
            raise self.error(key, f"expected a fraction from 0 to 1, not {quoted(value)}")
        return value

    def leave(self, message: str, lost: bool = True) -> None:
        """Add a notice that the whole modifier is left out, with its parameters.

        Args:
            message: Why.
            lost: Whether it would have changed the model or its sparsity. Default: True.
        """
        parameters = ", ".join(
            f"{self.spelled.get(key, key)}={quoted(value)}" for key, value in islice(self.values.items(), MOST_SHOWN)
        )
        parameters += f" and {len(self.values) - MOST_SHOWN} more" if len(self.values) > MOST_SHOWN else ""
        self.note(self.name, f"{message}; left out{f': {parameters}' if parameters else ''}", lost)
        self.taken.update(self.values)

    def leave_rest(self) -> None:
        """Add a notice for each parameter that has not been converted."""
        for key in self.values.keys() - self.taken:
            self.note(key, f"{quoted(self.values[key])} has no counterpart; left out", lost=True)


def pattern(modifier: Modifier, key: str, name: Any) -> str:
    """Convert a name of parameters in SparseML to a pattern that selects the same layers here.

    SparseML's regular expressions match the beginning of a name; here they must match all of it.

    Args:
        modifier: The modifier, for errors.
        key: Its parameter, for errors.
        name: A name, or 're:' and a regular expression.

    Returns:
        The pattern.

    Raises:
        ValueError: It is not a string of 1 to 500 characters, or not a valid regular expression.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise modifier.error(key, f"expected names of parameters, not {quoted(name)}")
    if not name.startswith("re:"):
        return name
    expression = name[len("re:") :]
    try:
        compiled(expression)
    except ValueError as error:
        raise modifier.error(key, f"{quoted(name)} is not a regular expression: {error}") from None
    if "|" in expression or "(?" in expression:
        return f"re:(?:{expression}).*"
    return name if expression.endswith((".*", "$")) else f"{name}.*"
