"""What users give, checked: clear errors before anything is changed."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn


def check_fraction(value: Any, name: str = "sparsity", instead: str = "") -> float:
    """A fraction from 0 to 1. TypeError and ValueError for anything else.

    name: of what it is, for the message. instead: what else it may be.
    """
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number from 0 to 1{instead}, not {value!r}")
    value = float(value)
    if 1 < value <= 100:
        raise ValueError(f"{name} {value:g} is a percentage, not a fraction; pass {value / 100:g} for {value:g} %")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value!r} is not a fraction from 0 to 1")
    return value


def check_is_module(caller: str, name: str, model: nn.Module) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: {name} is a torch.nn.Module, not {type(model).__name__}; of a Learner, learn.model")


def check_number(name: str, value: Any, low: float = 0.0, high: float = inf) -> float:
    """A finite number from `low` to `high`."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real) or not low <= float(value) <= high:
        upto = "on" if high == inf else f"to {high:g}"
        raise ValueError(f"{name} is a number from {low:g} {upto}, not {value!r}")
    if float(value) == inf:
        raise ValueError(f"{name} is a finite number, not {value!r}")
    return float(value)


def check_seed(seed: Any) -> int:
    """A whole number."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is a whole number, not {seed!r}")
    return seed


def check_count(name: str, value: Any) -> int:
    """A whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number from 1 on, not {value!r}")
    return value


def check_round_to(round_to: Any) -> int | None:
    """A whole number from 1 on, or None."""
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to is a whole number of groups from 1 on, not {round_to!r}")
    return round_to
