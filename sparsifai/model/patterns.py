"""Patterns that select layers, for `layers=`, `exclude=` and the keys of a dictionary of sparsities.

A pattern is a module class, a module, the name of a layer, parameter or container, a glob of names, 're:' followed by a
regular expression that matches a whole name, or a function of (name, module) that returns whether it selects the layer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from functools import lru_cache
from typing import Any

from torch import nn

from ..support.printable import quoted
from ..support.registry import close_matches
from ..support.regular_expression import LONGEST, TimeLimit, matcher
from ..support.warning import own_filters
from .layers import NamedWeight

Pattern = str | type | nn.Module | Callable[[str, nn.Module], bool]

MOST_EXPRESSIONS = 2000  # globs and regular expressions in a list
SECONDS = 5.0  # for all patterns of a list together
SECONDS_PER_NAME = 0.001  # more for each name in a model, as its own author may have many patterns
NAMES_AT_ONCE = 30  # between two looks at the clock


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """Return one pattern or several as a list, and check each.

    Args:
        patterns: A pattern, or an iterable of patterns.

    Raises:
        TypeError: One of them is not a pattern.
        ValueError: A regular expression is not valid, or there are too many.
    """
    # A Sequential is iterable too, but is a pattern itself.
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, nn.Module, type))
    if isinstance(patterns, Mapping):
        raise TypeError(
            f"{patterns!r} cannot select layers; pass a dictionary of sparsities as the first argument, `sparsity`"
        )
    listed: list[Any] = list(patterns) if several else [patterns]  # type: ignore[arg-type]
    expressions = sum(isinstance(pattern, str) and not is_name(pattern) for pattern in listed)
    if expressions > MOST_EXPRESSIONS:
        raise ValueError(
            f"there are {expressions:,} globs and regular expressions, more than {MOST_EXPRESSIONS:,}; name layers or "
            "containers instead"
        )
    for pattern in listed:
        if not (isinstance(pattern, (str, nn.Module)) or callable(pattern)):
            raise TypeError(
                f"{pattern!r} cannot select layers; pass a module class, a module, a name, a glob such as 'layer1.*', "
                "'re:' followed by a regular expression, or a function of (name, module)"
            )
        if isinstance(pattern, str):
            name_matcher(pattern)
    return listed


def matching_each(patterns: Iterable[Pattern], targets: Mapping[str, NamedWeight], model: nn.Module) -> list[set[str]]:
    """Find the weights that each pattern selects, in a time that is bounded for all patterns together.

    Args:
        patterns: The patterns. One that matches a container selects all weights in it.
        targets: The weights of the model by name.
        model: The model.

    Returns:
        For each pattern the names of the weights.

    Raises:
        ValueError: A pattern selects none, or matching them all takes too long.
    """
    places = Places({name: weight.names for name, weight in targets.items()})
    found = []
    for pattern in patterns:
        if isinstance(pattern, str):
            matched = places.matching(pattern)
        else:
            matched = {name for name, weight in targets.items() if _matches(pattern, weight, model)}
        if not matched:
            shown = (
                quoted(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
            )
            kinds = ", ".join(sorted({weight.kind for weight in targets.values()}))
            hint = close_matches(pattern, places.known) if isinstance(pattern, str) else f"the model has {kinds}"
            raise ValueError(f"no layer with a weight to sparsify matches {shown}; {hint}")
        found.append(matched)
    return found


def _matches(pattern: Any, weight: NamedWeight, model: nn.Module) -> bool:
    if isinstance(pattern, (type, nn.Module)):
        containers = (model.get_submodule(place) for name, _ in weight.owners for place in prefixes(name))
        if isinstance(pattern, type):
            return any(isinstance(module, pattern) for module in containers)
        return any(module is pattern for module in containers)
    return any(pattern(name, module) for name, module in weight.owners)


class Places:
    """The names of parameters and of all containers in a model, to find those that match a pattern.

    All patterns together may take so much time that a list of them is matched within seconds, whoever wrote it.

    Args:
        names: Parameter -> its names; it has several if a module has.
    """

    def __init__(self, names: Mapping[str, Iterable[str]]):
        self._of: dict[str, set[str]] = {}
        for parameter, each_name in names.items():
            for name in each_name:
                for place in prefixes(name)[1:]:
                    self._of.setdefault(place, set()).add(parameter)
        self._limit = TimeLimit(
            SECONDS + SECONDS_PER_NAME * len(self._of),
            "matching these patterns with the names of the model takes too long; give fewer or simpler patterns, or "
            "name the layers or containers",
        )

    @property
    def known(self) -> Iterable[str]:
        """The names of all parameters and containers."""
        return self._of.keys()

    def matching(self, pattern: str) -> set[str]:
        """The parameters that a pattern matches, or a container of which.

        Args:
            pattern: A name, a glob, or 're:' followed by a regular expression.

        Raises:
            ValueError: The patterns so far have taken too long.
        """
        matches = name_matcher(pattern)
        if matches is None:
            return set(self._of.get(pattern, ()))
        found = set[str]()
        for number, (place, of) in enumerate(self._of.items()):
            if number % NAMES_AT_ONCE == 0:
                self._limit.left()  # each name is matched fast, but there may be many
            if place == pattern or matches(place, self._limit):
                found |= of
        return found


def name_matcher(pattern: str) -> Callable[[str, TimeLimit], bool] | None:
    """Return a function of (name, time limit) that tells whether a whole name matches a pattern; None for a mere name.

    Args:
        pattern: A name, a glob, or 're:' followed by a regular expression, such as 're:layer[12].*'.

    Raises:
        ValueError: The pattern is too long, or the regular expression is not valid or not supported.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"the pattern {quoted(pattern)} has {len(pattern):,} characters, more than {LONGEST:,}")
    if pattern.startswith("re:"):
        try:
            return matcher(pattern[len("re:") :])
        except ValueError as error:
            raise ValueError(f"{quoted(pattern)} is not a valid regular expression: {error}") from None
    return None if is_name(pattern) else _glob(pattern)


def is_name(pattern: str) -> bool:
    """Whether a pattern is a mere name, neither a glob nor a regular expression."""
    return not (pattern.startswith("re:") or any(each in pattern for each in "*?["))


@lru_cache(maxsize=2000)
def _glob(pattern: str) -> Callable[[str, TimeLimit], bool]:
    # Python's expression for a glob never tries a part of it twice at one place, so it takes no exponential time.
    with own_filters():
        warnings.simplefilter("ignore")
        fullmatch = re.compile(translate(pattern)).fullmatch
    return lambda name, limit: fullmatch(name) is not None


def prefixes(name: str) -> list[str]:
    """List the names of all modules that contain a name, and the name itself.

    Example:
        >>> prefixes('a.b')
        ['', 'a', 'a.b']
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]
