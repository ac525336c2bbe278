"""Checks of arguments: each returns the checked value, or raises an error that says what is wrong with it."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from .printable import quoted


def check_fraction(value: Any, name: str = "sparsity", instead: str = "") -> float:
    """Check a fraction from 0 to 1.

    Args:
        value: What the user passed: a number, or an array or tensor with one number and no axes.
        name: Name of the argument, for the message.
        instead: What else the argument may be, for the message, such as ', or a dictionary'.

    Returns:
        The fraction as a float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not from 0 to 1. For a number from 1 to 100 the message suggests the fraction.

    Example:
        >>> check_fraction(50)
        Traceback (most recent call last):
        ValueError: sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %
    """
    value = _without_axes(value)
    if not _is_number(value):
        raise TypeError(f"{name} must be a number from 0 to 1{instead}, not {value!r}")
    value = float(value)
    if 1 < value <= 100:
        raise ValueError(f"{name} {value:g} is a percentage, not a fraction; pass {value / 100:g} for {value:g} %")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value!r} is not a fraction from 0 to 1")
    return value


def check_is_module(caller: str, name: str, model: nn.Module) -> None:
    """Check that an argument is a `torch.nn.Module`.

    Args:
        caller: Name of the function that was called, for the message.
        name: Name of the argument.
        model: What the user passed.

    Raises:
        TypeError: It is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}: {name} must be a torch.nn.Module, not {type(model).__name__}; for a Learner, pass learn.model"
        )


def check_number(name: str, value: Any, low: float = 0.0, high: float = inf) -> float:
    """Check a finite number.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed: a number, or an array or tensor with one number and no axes.
        low: The smallest number that is allowed.
        high: The largest number that is allowed.

    Returns:
        The number as a float.

    Raises:
        ValueError: It is not a finite number from `low` to `high`.
    """
    value = _without_axes(value)
    if not _is_number(value) or not low <= value <= high:
        allowed = f"of at least {low:g}" if high == inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be a number {allowed}, not {value!r}")
    if float(value) == inf:
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def check_seed(seed: Any) -> int:
    """Check a seed, which is a whole number.

    Args:
        seed: What the user passed.

    Returns:
        The seed.

    Raises:
        TypeError: It is not an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    return seed


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """Check a whole number of at least 1.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.
        most: The largest number that is allowed. Default: any.

    Returns:
        The number.

    Raises:
        ValueError: It is not an int of at least 1, or larger than `most`.
    """
    if not _is_count(value):
        raise ValueError(f"{name} must be a whole number of at least 1, not {quoted(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}, not {quoted(value)}")
    return value


def check_round_to(round_to: Any) -> int | None:
    """Check `round_to`: None, or a number of groups; every layer keeps a multiple of it.

    Args:
        round_to: What the user passed.

    Returns:
        The number, or None.

    Raises:
        ValueError: It is neither None nor an int of at least 1.
    """
    if round_to is not None and not _is_count(round_to):
        raise ValueError(f"round_to must be a whole number of at least 1, a number of groups, not {round_to!r}")
    return round_to


def _without_axes(value: Any) -> Any:
    """The Python number in an array or tensor without axes; other values unchanged."""
    return value.item() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0 else value


def _is_number(value: Any) -> bool:
    """Whether a value is a real number; True and False are none here."""
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
