"""What users give about sparsity and the axes, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..axes.context import Context, contexts
from ..axes.criterion import Criterion, criteria
from ..axes.granularity import Granularity, granularities
from ..axes.grouping import poolings
from ..model.patterns import Pattern, as_patterns
from ..support.checks import check_fraction

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
