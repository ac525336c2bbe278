"""A decorator for public functions: an error on a wrong argument names the function that was called, and the right one.

Python's own error names the function in which an argument ended up, which may be an inner one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar, overload

from .foreign_names import name_of_argument
from .printable import LONGEST_NAME, printable, quoted

Function = TypeVar("Function", bound=Callable)

_GATHERING = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@overload
def checks_arguments(function: Function) -> Function: ...


@overload
def checks_arguments(*, of: Callable | None = None, name: str = "") -> Callable[[Function], Function]: ...


def checks_arguments(function: Callable | None = None, *, of: Callable | None = None, name: str = "") -> Any:
    """Decorate a function, so that it tells of wrong arguments by their names.

    Args:
        function: The function; a class is decorated at its `__init__`.
        of: What the function passes its `*` and `**` arguments on to. They stand in its signature in their place.
        name: What the user calls it. Default: its name, for a method after that of the class.

    Returns:
        The function, with the same help.

    Example:
        >>> @checks_arguments
        ... def prune(layers=None, exclude=None): ...
        >>> prune(layer_type="conv")
        Traceback (most recent call last):
        TypeError: prune has no argument 'layer_type'; its name here is layers: layers=nn.Conv2d
        >>> prune(exlude="fc")
        Traceback (most recent call last):
        TypeError: prune has no argument 'exlude'; did you mean 'exclude'?
    """
    if function is None:
        return lambda later: _checking(later, of, name)
    return _checking(function, of, name)


def _checking(function: Callable, of: Callable | None, caller: str) -> Callable:
    shown = signature(function) if of is None else _joined(signature(function), signature(of))
    known = {
        name
        for name, each in shown.parameters.items()
        if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    } - {"self"}

    @wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        if not options.keys() <= known:
            unknown = next(name for name in options if name not in known)
            raise TypeError(unknown_argument(caller or _name_of_call(function, arguments), unknown, known))
        if of is not None:  # which would be named by Python
            try:
                shown.bind(*arguments, **options)
            except TypeError as error:
                raise TypeError(f"{caller or _name_of_call(function, arguments)}(): {error}") from None
        try:
            return function(*arguments, **options)
        except TypeError as error:
            # Where the call itself has failed, no line of the function has run.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                _, _, what = str(error).partition("() ")
                by_name = [f"{each.name}=" for each in shown.parameters.values() if each.kind == Parameter.KEYWORD_ONLY]
                if by_name and what.endswith("were given"):
                    what += f"; pass the others by name: {', '.join(by_name[:3])}{', ...' if by_name[3:] else ''}"
                raise TypeError(f"{caller or _name_of_call(function, arguments)}() {what or error}") from None
            raise

    if of is not None:
        checked.__signature__ = shown  # type: ignore[attr-defined]
    return checked


def unknown_argument(caller: str, name: str, known: Collection[str]) -> str:
    """The message of an argument that a function does not have.

    Args:
        caller: What was called.
        name: The argument.
        known: The arguments that it has.
    """
    nearest = get_close_matches(name[:LONGEST_NAME], known, n=1, cutoff=0.5)
    right = name_of_argument(name, known) or (
        f"did you mean {quoted(nearest[0])}?" if nearest else f"its arguments are {', '.join(sorted(known)) or 'none'}"
    )
    return f"{caller} has no argument {quoted(name)}; {right}"


def _joined(own: Signature, other: Signature) -> Signature:
    """A signature with the parameters of another one in place of its `*` and `**`."""
    parameters = list(own.parameters.values())
    kept = [each for each in parameters if each.kind not in _GATHERING]
    names = {each.name for each in kept} | {"self", "cls", "model"}
    added = [each for each in other.parameters.values() if each.name not in names and each.kind not in _GATHERING]
    if not any(each.kind == Parameter.VAR_POSITIONAL for each in parameters):
        added = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in added]
    return own.replace(parameters=sorted([*kept, *added], key=lambda each: each.kind))


def _name_of_call(function: Callable, arguments: tuple) -> str:
    """What the user has written to call a function: for a method, of the class of the object."""
    holder, _, name = function.__qualname__.rpartition(".")
    if not holder or holder.endswith("<locals>"):
        return name
    first = arguments[0] if arguments else None
    kind = first.__name__ if isinstance(first, type) else type(first).__name__ if arguments else holder
    return printable(kind if name == "__init__" else f"{kind}.{name}")
