"""A mapping from names to functions: the form that each of the four axes takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any


def close_matches(name: str, known: Iterable[str]) -> str:
    """End of an error message: the known names most like `name`, or all of them if none is."""
    known = sorted(known)
    likely = get_close_matches(name, known, n=3, cutoff=0.5)
    if likely:
        return f"did you mean {' or '.join(repr(match) for match in likely)}?"
    return f"known are {', '.join(repr(match) for match in known)}"


def name_of(function: Any) -> str:
    """How a message calls a function: its name, that of a partial with its options, or what it prints as."""
    if isinstance(function, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
        return f"{name_of(function.func)}({options})"
    return getattr(function, "__name__", None) or repr(function)


class Registry(Mapping[str, Callable]):
    """The functions of one axis by name; `resolve` turns what a user gives into one of them.

    check: raises on a function that the axis cannot use; called on registration and on resolving.
    parse: turns other values (a tuple, '2:4') into a function, or returns None.

    >>> colours = Registry('colour')
    >>> @colours.register
    ... def red(): return 'ff0000'
    >>> colours.resolve('red') is colours.resolve(red) is red
    True
    >>> list(colours)
    ['red']
    """

    def __init__(
        self,
        kind: str,
        *,
        check: Callable[[Callable], None] | None = None,
        parse: Callable[[Any], Callable | None] | None = None,
    ):
        self.kind, self._check, self._parse = kind, check, parse
        self._functions: dict[str, Callable] = {}

    def register(self, function: Callable | None = None, *, name: str | None = None, replace: bool = False) -> Callable:
        """Add a function under its own name or `name`; a decorator with or without arguments.

        ValueError if the name is taken, unless `replace` is true.
        """
        if function is None:
            return lambda later: self.register(later, name=name, replace=replace)
        if not callable(function):
            raise TypeError(f"{self.kind} registry: {function!r} is not a function")
        name = name or getattr(function, "__name__", None)
        if not name or name == "<lambda>":
            raise ValueError(f"{self.kind} registry: {function!r} has no name of its own; pass name=")
        if name in self._functions and not replace:
            raise ValueError(
                f"{self.kind} {name!r} is registered already; choose another name, or pass replace=True to replace it"
            )
        if self._check:
            self._check(function)
        self._functions[name] = function
        return function

    def resolve(self, value: Any) -> Callable:
        """The function that `value` means: a registered name, a function, or what `parse` understands."""
        if isinstance(value, str) and value in self._functions:
            return self._functions[value]
        parsed = self._parse(value) if self._parse else None
        if parsed is not None:
            return parsed
        if isinstance(value, str):
            raise ValueError(f"unknown {self.kind} {value!r}; {close_matches(value, self)}")
        if not callable(value):
            raise TypeError(f"a {self.kind} is a registered name or a function, not {value!r}")
        if self._check:
            self._check(value)
        return value

    def __getitem__(self, name: str) -> Callable:
        if name not in self._functions:
            raise KeyError(f"unknown {self.kind} {name!r}; {close_matches(name, self)}")
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __repr__(self) -> str:
        return f"<{self.kind}: {', '.join(self)}>"
