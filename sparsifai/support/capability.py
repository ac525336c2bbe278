"""Capabilities: what the value of an axis says of itself, as attributes beside it."""

from __future__ import annotations

from typing import Any


def declare(value: Any, **capabilities: Any) -> None:
    """Set capabilities as attributes of a value, such as a function."""
    for name, capability in capabilities.items():
        setattr(value, name, capability)
    value.declared_by = value


def capability(value: Any, name: str, default: Any = None) -> Any:
    """A capability of a value, or the default if it does not declare it.

    A wrapper that functools.wraps has made is another function and has only copies of the attributes, so it has to
    declare its own.
    """
    if hasattr(value, "__wrapped__") and getattr(value, "declared_by", None) is not value:
        return default
    return getattr(value, name, default)
