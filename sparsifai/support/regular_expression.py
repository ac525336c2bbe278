"""Regular expressions that others wrote, matched within a limit of time.

Python's `re` takes exponential time for `(a|a)*x`, and cannot be interrupted. The package `regex` has the same syntax,
sees at once that most such expressions cannot match, and stops after a given time.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .warning import own_filters

# Far beyond what names of layers need.
LONGEST = 1100  # characters

# Characters of an expression times all its {n}: `regex` writes out repeated groups before it matches anything.
LARGEST = 30_000

SHORT = 120  # characters of a text

# An expression that calls itself takes memory until its time is over.
_RECURSION = re.compile(r"\(\?(?:R|[0-9+-]|&|P>)")
# With this flag a {n} may hold spaces and comments.
_VERBOSE = re.compile(r"\(\?[A-Za-z0-9]*x")
_REPEAT = re.compile(r"\{([0-9]+)")
# What repeats a group, or a group that is none, such as a comment.
_REPEATED_GROUP = re.compile(r"\)[*+?{]|\(\?#")


class TimeLimit:
    """Seconds that all matches together may take, from now on, of the time of the processor in this thread.

    Args:
        seconds: So many.
        problem: The message of the error when they are over.

    Example:
        >>> limit = TimeLimit(10, 'it takes too long')
        >>> limit.matches(compiled('(a|a)*x'), 'a' * 40)
        False
    """

    def __init__(self, seconds: float, problem: str):
        self._end, self._problem = time.thread_time() + seconds, problem

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            ValueError: There are none.
        """
        left = self._end - time.thread_time()
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
        ValueError: It is not valid, is too long, repeats too much, calls itself, or has the flag x.
    """
    import regex  # not with the package, because few users need it

    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, more than {LONGEST:,}")
    if _RECURSION.search(expression):
        raise ValueError("it calls itself or a group, which is not supported")
    if _VERBOSE.search(expression):
        raise ValueError("it has the flag x, which is not supported")
    if len(expression) * math.prod(max(int(each[:9]), 1) for each in _REPEAT.findall(expression)) > LARGEST:
        raise ValueError("its parts are repeated too often; use * or + in place of large {n}")
    try:
        with own_filters():
            warnings.simplefilter("ignore")  # of nested sets, which `re` reads otherwise in the future
            return regex.compile(expression)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def matcher(expression: str) -> Callable[[str, TimeLimit], bool]:
    """Return a function of (text, time limit) that tells whether a regular expression matches a whole text.

    Args:
        expression: The expression, in the syntax of Python's `re`.

    Raises:
        ValueError: As `compiled`.
    """
    whole = compiled(expression)
    short, fullmatch = SHORT if is_quick(expression) else -1, whole.fullmatch
    return lambda text, limit: fullmatch(text) is not None if len(text) <= short else limit.matches(whole, text)


def is_quick(expression: str) -> bool:
    """Whether a match with a text of up to `SHORT` characters takes no long time, whatever the text.

    No group is repeated, and there are at most three repeats and four choices in all, so n characters take some n^3
    steps at worst. A limit of time for each match would take longer than most of these matches.
    """
    repeats = sum(map(expression.count, "*+?{"))
    return repeats <= 3 and repeats + expression.count("|") <= 4 and not _REPEATED_GROUP.search(expression)
