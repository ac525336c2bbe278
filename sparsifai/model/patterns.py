"""Patterns that select layers, for `layers=`, `exclude=` and the keys of a dictionary of sparsities.

A pattern is a module class, a module, the name of a layer, parameter or container, a glob of names, 're:' followed by a
regular expression that matches a whole name, or a function of (name, module) that returns whether it selects the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..support.registry import close_matches
from .layers import NamedWeight

Pattern = str | type | nn.Module | Callable[[str, nn.Module], bool]


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """Return one pattern or several as a list, and check each.

    Args:
        patterns: A pattern, or an iterable of patterns.

    Raises:
        TypeError: One of them is not a pattern.
        ValueError: A regular expression is not valid.
    """
    # A Sequential is iterable too, but is a pattern itself.
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, nn.Module, type))
    if isinstance(patterns, Mapping):
        raise TypeError(
            f"{patterns!r} cannot select layers; pass a dictionary of sparsities as the first argument, `sparsity`"
        )
    listed: list[Any] = list(patterns) if several else [patterns]  # type: ignore[arg-type]
    for pattern in listed:
        if not (isinstance(pattern, (str, nn.Module)) or callable(pattern)):
            raise TypeError(
                f"{pattern!r} cannot select layers; pass a module class, a module, a name, a glob such as 'layer1.*', "
                "'re:' followed by a regular expression, or a function of (name, module)"
            )
        if isinstance(pattern, str):
            name_matcher(pattern)
    return listed


def matching(pattern: Pattern, targets: Mapping[str, NamedWeight], model: nn.Module) -> set[str]:
    """Find the weights that a pattern selects.

    Args:
        pattern: The pattern. One that matches a container selects all weights in it.
        targets: The weights of the model by name.
        model: The model.

    Returns:
        The names of the weights.

    Raises:
        ValueError: The pattern selects none.
    """
    matched = {name for name, weight in targets.items() if _matches(pattern, weight, model)}
    if not matched:
        shown = repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
        known = {place for weight in targets.values() for name in weight.names for place in prefixes(name)} - {""}
        kinds = ", ".join(sorted({weight.kind for weight in targets.values()}))
        hint = f"; {close_matches(pattern, known)}" if isinstance(pattern, str) else f"; the model has {kinds}"
        raise ValueError(f"no layer with a weight to sparsify matches {shown}{hint}")
    return matched


def _matches(pattern: Pattern, weight: NamedWeight, model: nn.Module) -> bool:
    if isinstance(pattern, str):
        matches = name_matcher(pattern)
        return any(matches(place) for name in weight.names for place in prefixes(name)[1:])
    if isinstance(pattern, (type, nn.Module)):
        containers = (model.get_submodule(place) for name, _ in weight.owners for place in prefixes(name))
        if isinstance(pattern, type):
            return any(isinstance(module, pattern) for module in containers)
        return any(module is pattern for module in containers)
    return any(pattern(name, module) for name, module in weight.owners)


def name_matcher(pattern: str) -> Callable[[str], Any]:
    """Return a function that tells whether a whole name matches a pattern.

    Args:
        pattern: A glob, or 're:' followed by a regular expression, such as 're:layer[12].*'.

    Raises:
        ValueError: The regular expression is not valid, or could take forever to match.
    """
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    if re.search(r"\([^()]*[+*}][^()]*\)[+*{]", pattern):
        raise ValueError(
            f"{pattern!r} nests one repetition in another, which can take forever to match; write it without nesting"
        )
    try:
        return re.compile(pattern[len("re:") :]).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern!r} is not a valid regular expression: {error}; 're:' must be followed by a Python "
            "regular expression"
        ) from None


def prefixes(name: str) -> list[str]:
    """List the names of all modules that contain a name, and the name itself.

    Example:
        >>> prefixes('a.b')
        ['', 'a', 'a.b']
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]
