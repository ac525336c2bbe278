"""The registry of functions by name, of which each of the four axes has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from heapq import nlargest
from os.path import commonprefix
from typing import Any

from .capability import declare
from .foreign_names import name_of_value
from .printable import quoted


def close_matches(name: str, known: Iterable[str]) -> str:
    """Write the end of an error message on an unknown name: the most similar names, or else all, of many the nearest.

    Args:
        name: The name that the user gave.
        known: The names that exist.

    Example:
        >>> close_matches('wieght', ['weight', 'filter'])
        "did you mean 'weight'?"
        >>> close_matches('x', ['weight', 'filter'])
        "choose from 'filter', 'weight'"
    """
    name, known = name[:LONGEST_NAME], sorted(known)
    compared = _candidates(name, known)
    likely = _closest(name, compared, 3, 0.5)
    if likely:
        return f"did you mean {' or '.join(map(quoted, likely))}?"
    if len(known) > LISTED:
        return f"the nearest names are {listed(_closest(name, compared, 5, 0.0))}"
    return f"choose from {listed(known, most=LISTED)}"


def _closest(name: str, known: Sequence[str], most: int, least: float) -> list[str]:
    """The most similar names, compared by their beginnings: what that takes grows with the square of their length."""
    whole = {each[:LONGEST_NAME]: each for each in reversed(known)}
    return [whole[each] for each in get_close_matches(name, whole, n=most, cutoff=least)]


def _candidates(name: str, known: Sequence[str]) -> Sequence[str]:
    """The names that are worth comparing: of many those that begin and end most like the name, in their order."""
    if len(known) <= COMPARED:
        return known

    def alike(other: str) -> int:
        return len(commonprefix((name, other))) + len(commonprefix((name[::-1], other[::-1])))

    return sorted(nlargest(COMPARED, known, key=alike))


# So many names are compared with an unknown one, up to so many characters of each.
COMPARED = 500
LONGEST_NAME = 200

# So many names are listed in a message: those of every axis of the library, but not those of every layer of a model.
LISTED = 40


def listed(names: Iterable[str], most: int = 5) -> str:
    """Join names for a message, quoted; of many only the first.

    Args:
        names: The names.
        most: How many are written at most.

    Example:
        >>> listed(['a', 'b', 'c'], most=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(quoted, names[:most]))}{more}"


def name_of(function: Any) -> str:
    """Return the name of a function for messages and tables.

    Args:
        function: A function, a `functools.partial`, which is shown with its options, or an object without a name, which
            is shown by its repr.

    Example:
        >>> name_of(partial(int, base=2))
        'int(base=2)'
    """
    if isinstance(function, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
        return f"{name_of(function.func)}({options})"
    return getattr(function, "__name__", None) or repr(function)


class Registry(Mapping[str, Callable]):
    """The functions of one axis by name. `resolve` turns the argument of a user into one of them.

    Args:
        kind: What the functions are, for messages, such as 'criterion'.
        check: A function that raises an error if the axis cannot use the function that it is given. It is called when a
            function is registered, and when one is resolved that is not registered.
        parse: A function that turns other values, such as a tuple or '2:4', into a function. It returns None for values
            that it does not know.
        forms: What these values look like, such as "tiles such as '4x4'". They are listed with the names.
        capabilities: Names of what a function can declare of itself, as keywords of `register`.

    Example:
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
        forms: tuple[str, ...] = (),
        capabilities: tuple[str, ...] = (),
    ):
        self.kind, self._check, self._parse, self.capabilities = kind, check, parse, capabilities
        self.forms = forms
        self._functions: dict[str, Callable] = {}

    def register(
        self,
        function: Callable | None = None,
        *,
        name: str | None = None,
        replace: bool = False,
        **capabilities: Any,
    ) -> Callable:
        """Add a function; also a decorator, with or without arguments.

        Args:
            function: The function to add.
            name: Its name in the registry; by default its own.
            replace: Whether it may replace a function of the same name. Default False.
            **capabilities: What the function declares of itself. They become attributes of it.

        Returns:
            The function itself, or a decorator if no function was given.

        Raises:
            TypeError: It is not a function, or the axis does not know a capability.
            ValueError: The name is already registered and `replace` is false, or the function has no name.
        """
        if unknown := [each for each in capabilities if each not in self.capabilities]:
            known = ", ".join(map(repr, self.capabilities)) or "none"
            raise TypeError(f"{self.kind} registry: unknown capability {unknown[0]!r}; known are {known}")
        if function is None:
            return lambda later: self.register(later, name=name, replace=replace, **capabilities)
        if not callable(function):
            raise TypeError(f"{self.kind} registry: {function!r} is not a function")
        name = name or getattr(function, "__name__", None)
        if not name or name == "<lambda>":
            raise ValueError(f"{self.kind} registry: {function!r} has no name of its own; pass name=")
        if name in self._functions and not replace:
            raise ValueError(
                f"{self.kind} {name!r} is already registered; choose another name, or pass replace=True to replace it"
            )
        if self._check:
            self._check(function)
        if capabilities:
            declare(function, **capabilities)
        self._functions[name] = function
        return function

    def resolve(self, value: Any) -> Callable:
        """Find the function that the user means.

        Args:
            value: A registered name, a function, or another value that the axis knows, such as a tuple of axis names.

        Returns:
            The function.

        Raises:
            ValueError: No function has that name.
            TypeError: It is neither a name nor a function.
        """
        if isinstance(value, str) and value in self._functions:
            return self._functions[value]
        parsed = self._parse(value) if self._parse else None
        if parsed is not None:
            return parsed
        if isinstance(value, str):
            raise ValueError(self._unknown(value))
        if not callable(value):
            raise TypeError(f"a {self.kind} must be a registered name or a function, not {value!r}")
        if self._check:
            self._check(value)
        return value

    def _unknown(self, name: str) -> str:
        """The message of an unknown name: what it is called here, or near names, or else all names and forms."""
        right = name_of_value(self.kind, name) or self._near(name)
        return f"unknown {self.kind} {quoted(name)}; {right}"

    def _near(self, name: str) -> str:
        near = close_matches(name, self)
        return near if near.endswith("?") else "".join([near, *(f", or {form}" for form in self.forms)])

    def name_of(self, function: Any) -> str:
        """The registered name of a function; `name_of` of one that is not registered."""
        return next((name for name, each in self._functions.items() if each is function), None) or name_of(function)

    def __getitem__(self, name: str) -> Callable:
        if name not in self._functions:
            raise KeyError(self._unknown(name))
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __repr__(self) -> str:
        return f"<{self.kind}: {', '.join([*self, *self.forms])}>"
