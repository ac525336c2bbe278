"""Regular expressions that others wrote, matched within a limit of time.

Python's `re` takes exponential time for `(a|a)*x`, and cannot be interrupted. The package `regex` has the same syntax,
sees at once that most such expressions cannot match, and stops after a given time.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache
from typing import Any

# Far beyond what names of layers need.
LONGEST = 1100  # characters

# An expression that calls itself takes memory until its time is over.
_RECURSION = re.compile(r"\(\?(?:R|[0-9+-]|&|P>)")


class TimeLimit:
    """Seconds that all matches together may take, from now on, of the time of the processor.

    Args:
        seconds: So many.
        problem: The message of the error when they are over.

    Example:
        >>> limit = TimeLimit(10, 'it takes too long')
        >>> limit.matches(compiled('(a|a)*x'), 'a' * 40)
        False
    """

    def __init__(self, seconds: float, problem: str):
        self._end, self._problem = time.process_time() + seconds, problem

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            ValueError: There are none.
        """
        left = self._end - time.process_time()
        if left <= 0:
            raise ValueError(self._problem)
        return left

    def matches(self, expression: Any, text: str) -> bool:
        """Whether a regular expression matches a whole text.

        Args:
            expression: What `compiled` returned.
            text: The text.

        Raises:
            ValueError: The time is over.
        """
        try:
            return expression.fullmatch(text, timeout=self.left()) is not None
        except TimeoutError:
            raise ValueError(self._problem) from None


@lru_cache(maxsize=500)
def compiled(expression: str) -> Any:
    """A regular expression of the package `regex`, for `TimeLimit.matches`.

    Args:
        expression: The expression, in the syntax of Python's `re`.

    Raises:
        ValueError: It is not valid, is too long, or calls itself.
    """
    import regex  # not with the package, because few users need it

    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, more than {LONGEST:,}")
    if _RECURSION.search(expression):
        raise ValueError("it calls itself or a group, which is not supported")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested sets, which `re` reads otherwise in the future
            return regex.compile(expression)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
