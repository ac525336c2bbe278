"""What users give, checked: clear errors before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..axes.context import Context, contexts
from ..axes.criterion import Criterion, criteria
from ..axes.granularity import Granularity, granularities, poolings
from ..model.layers import Pattern, as_patterns

Sparsity = float | Mapping[Pattern, float]


def check_sparsity(sparsity: Any = None, compression_ratio: Any = None) -> Sparsity:
    """The target as a fraction, or a dictionary of fractions by pattern. `compression_ratio` is its other name."""
    if (sparsity is None) == (compression_ratio is None):
        given = "neither is given" if sparsity is None else "both are given"
        raise TypeError(f"sparsity= and compression_ratio= are two names of one number, pass one of them; {given}")
    sparsity = compression_ratio if sparsity is None else sparsity
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("the dictionary of sparsities is empty; give it at least one pattern: {'layer1.*': 0.5}")
        as_patterns(list(sparsity))
        return {pattern: check_fraction(value) for pattern, value in sparsity.items()}
    return check_fraction(sparsity, instead=", or a dictionary of them by layer")


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


def mapped(sparsity: Sparsity, function: Callable[[float], float]) -> Sparsity:
    """A function of the sparsity, of every layer if they differ."""
    if isinstance(sparsity, Mapping):
        return {pattern: function(fraction) for pattern, fraction in sparsity.items()}
    return function(sparsity)


def share_of_initial(initial: float, sparsity: Sparsity) -> float:
    """The sparsity that a schedule begins with, as a share of the highest target. ValueError if a target is lower."""
    targets = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    if initial > min(targets):
        raise ValueError(
            f"initial_sparsity {initial:g} is above the sparsity {min(targets):g}; "
            "it is one fraction up to the sparsity"
        )
    return initial / max(targets) if initial else 0.0


def resolve_axes(
    granularity: Any, context: Any, criterion: Any, pool: Any = None
) -> tuple[Granularity, Context, Criterion, Callable]:
    """Names -> functions, once; past this only functions travel. pool: None for that of the criterion's definition."""
    criterion = criteria.resolve(criterion)
    plain = criterion.func if isinstance(criterion, partial) else criterion
    return (
        granularities.resolve(granularity),
        contexts.resolve(context),
        criterion,
        poolings.resolve(getattr(plain, "pooling", "mean") if pool is None else pool),
    )


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
