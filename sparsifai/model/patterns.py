"""Patterns that select layers: what `layers=`, `exclude=` and the keys of a dictionary of sparsities may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..support.registry import close_matches
from .layers import NamedWeight

# What `layers=`, `exclude=` and the keys of a dictionary of targets may be.
Pattern = str | type | nn.Module | Callable[[str, nn.Module], bool]


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """One pattern or several, as a list. TypeError for what is no pattern."""
    # A Sequential can be iterated over, and means itself.
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, nn.Module, type))
    if isinstance(patterns, Mapping):
        raise TypeError(f"{patterns!r} selects no layers: a dictionary of sparsities is the first argument")
    listed: list[Any] = list(patterns) if several else [patterns]  # type: ignore[arg-type]
    for pattern in listed:
        if not (isinstance(pattern, (str, nn.Module)) or callable(pattern)):
            raise TypeError(
                f"{pattern!r} selects no layers: give a module class, a module, a name or glob such as 'layer1.*', "
                "'re:' and a regular expression, or a function of (name, module)"
            )
        if isinstance(pattern, str):
            name_matcher(pattern)
    return listed


def matching(pattern: Pattern, targets: Mapping[str, NamedWeight], model: nn.Module) -> set[str]:
    """Names of the targets that a pattern means; a container means all within it. ValueError if it means none."""
    matched = {name for name, target in targets.items() if _matches(pattern, target, model)}
    if not matched:
        shown = repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
        known = {place for target in targets.values() for name in target.names for place in prefixes(name)} - {""}
        kinds = ", ".join(sorted({target.kind for target in targets.values()}))
        hint = f"; {close_matches(pattern, known)}" if isinstance(pattern, str) else f"; those it has are {kinds}"
        raise ValueError(f"no layer with a weight to sparsify matches {shown}{hint}")
    return matched


def _matches(pattern: Pattern, target: NamedWeight, model: nn.Module) -> bool:
    if isinstance(pattern, str):
        matches = name_matcher(pattern)
        return any(matches(place) for name in target.names for place in prefixes(name)[1:])
    if isinstance(pattern, (type, nn.Module)):
        containers = (model.get_submodule(place) for name, _ in target.owners for place in prefixes(name))
        if isinstance(pattern, type):
            return any(isinstance(module, pattern) for module in containers)
        return any(module is pattern for module in containers)
    return any(pattern(name, module) for name, module in target.owners)


def name_matcher(pattern: str) -> Callable[[str], Any]:
    """Whether a name is meant by a glob, or by a regular expression of all of it: 're:layer[12].*'."""
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    if re.search(r"\([^()]*[+*}][^()]*\)[+*{]", pattern):
        raise ValueError(f"{pattern!r} repeats what is repeated, which can take forever; write it without")
    try:
        return re.compile(pattern[len("re:") :]).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; after 're:' comes one of Python's") from None


def prefixes(name: str) -> list[str]:
    """'a.b' -> ['', 'a', 'a.b']: the names of all modules that a name lies in, and itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]
