"""The options of a Sparsifier and the sparsity that is asked for, resolved and checked in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..axes.context import Context, contexts
from ..axes.criterion import Criterion, criteria, quantities_of
from ..axes.granularity import Granularity, granularities
from ..axes.grouping import poolings
from ..axes.quantity import quantities
from ..axes.sweep import check_sweeps_within
from ..model.layers import find_weights
from ..model.patterns import Pattern, as_patterns, matching_each
from ..support.capability import capability
from ..support.checks import check_fraction, check_number, check_round_to, check_seed
from ..support.registry import name_of
from .dense_weights import DECAY
from .regrowth import check_regrow

Sparsity = float | Mapping[Pattern, float]


@dataclass(frozen=True)
class Options:
    """The options of a Sparsifier, under the same names. Names of the axes are resolved to functions here, once."""

    granularity: Granularity
    context: Context
    criteria: Criterion
    layers: list[Pattern] | None
    exclude: list[Pattern] | None
    pool: Callable
    may_empty: bool
    regrow: Criterion | None
    round_to: int | None
    coupled: bool
    seed: int
    straight_through: bool
    decay: float | None
    gradient_sparsity: float | None
    compensate: bool

    @classmethod
    def of(
        cls,
        granularity: Any = "weight",
        context: Any = "global",
        criteria: Any = "large_final",
        *,
        layers: Any = None,
        exclude: Any = None,
        pool: Any = None,
        may_empty: Any = False,
        regrow: Any = None,
        round_to: Any = None,
        coupled: Any = False,
        seed: Any = 0,
        straight_through: Any = False,
        decay: Any = None,
        gradient_sparsity: Any = None,
        compensate: Any = None,
    ) -> Options:
        """Resolve and check the arguments of `Sparsifier`.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A name is unknown, or a value cannot work.
        """
        granularity, context, criteria, pool = resolve_axes(granularity, context, criteria, pool)
        if regrow is not None and capability(granularity, "joint", False):
            raise ValueError(
                f"regrow: no gradient reaches a {name_of(granularity)} whose weights are all zero, so it would not "
                "learn when it regrows; choose smaller groups, such as weights or filters, or straight_through=True"
            )
        decay, gradient_sparsity = check_straight_through(straight_through, decay, gradient_sparsity, regrow)
        if is_swept(criteria):
            check_swept(granularity, context, criteria, round_to, coupled, straight_through, regrow)
        return cls(
            granularity,
            context,
            criteria,
            None if layers is None else as_patterns(layers),
            None if exclude is None else as_patterns(exclude),
            pool,
            bool(may_empty),
            None if regrow is None else check_regrow(regrow, context),
            check_round_to(round_to),
            bool(coupled),
            check_seed(seed),
            bool(straight_through),
            decay,
            gradient_sparsity,
            check_compensate(compensate, criteria, straight_through, regrow),
        )

    def with_criteria(self, criteria: Any) -> Options:
        """The same options with another criterion.

        A pooling that is the default of the old criterion is replaced by the default of the new one. Any other pooling
        stays.

        Args:
            criteria: The name of a criterion, or a function.
        """
        default = resolve_axes(self.granularity, self.context, self.criteria)[3]
        criteria, pool = resolve_axes(self.granularity, self.context, criteria)[2:]
        return replace(self, criteria=criteria, pool=pool if self.pool is default else self.pool)

    def only(self, sparsity: Sparsity, model: nn.Module) -> Options:
        """Options that also exclude the layers of a model that a dictionary of sparsities does not name."""
        if not isinstance(sparsity, Mapping):
            return self
        weights = find_weights(model)
        named = set().union(*matching_each(sparsity, weights, model))
        others = [name for name in weights if name not in named]
        return replace(self, exclude=[*(self.exclude or []), *others] or None)


def resolve_axes(
    granularity: Any, context: Any, criterion: Any, pool: Any = None
) -> tuple[Granularity, Context, Criterion, Callable]:
    """The functions that the names of the axes mean; functions are checked and returned.

    Args:
        granularity: Name, tuple of axes, or function.
        context: Name or function.
        criterion: Name or function.
        pool: Name or function. None means the pooling of the criterion's definition.

    Raises:
        ValueError: A name is unknown, or a function is not one of its axis.
    """
    criterion = criteria.resolve(criterion)
    return (
        granularities.resolve(granularity),
        contexts.resolve(context),
        criterion,
        poolings.resolve(getattr(_plain(criterion), "pooling", "mean") if pool is None else pool),
    )


def check_straight_through(
    straight_through: Any, decay: Any, gradient_sparsity: Any, regrow: Any
) -> tuple[float | None, float | None]:
    """The options of straight-through training, with their defaults.

    Returns:
        `decay` and `gradient_sparsity`; None for both without `straight_through`.

    Raises:
        ValueError: An option needs `straight_through`, has no such value, or `regrow` is given, too.
    """
    given = {"decay": decay, "gradient_sparsity": gradient_sparsity}
    if not straight_through:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{named[0]}={given[named[0]]!r} needs straight_through=True: it says how dense weights are trained"
            )
        return None, None
    if regrow is not None:
        raise ValueError("straight_through=True and regrow= are two ways to let masks change; pass one of them")
    return (
        check_number("decay", DECAY if decay is None else decay),
        check_fraction(0.0 if gradient_sparsity is None else gradient_sparsity, "gradient_sparsity"),
    )


def check_compensate(compensate: Any, criterion: Criterion, straight_through: Any, regrow: Any) -> bool:
    """Whether the weights that stay are changed; None means what the method of the criterion does.

    Raises:
        ValueError: Masks may change their mind, too.
    """
    compensates = bool(capability(_plain(criterion), "compensates", False) if compensate is None else compensate)
    if compensates and (straight_through or regrow is not None):
        other = "straight_through=True" if straight_through else "regrow="
        whose = "" if compensate else f", which criterion {name_of(criterion)} does by default,"
        raise ValueError(
            f"compensate=True{whose} changes the weights that stay for the masks as they are, and {other} lets masks "
            "change their mind; leave one of them out, or pass compensate=False"
        )
    return compensates


def reads_passes(criterion: Criterion) -> bool:
    """Whether a criterion names a quantity that is computed in passes over the batches of `calibrate`."""
    return any("passes" in quantities[name].moments for name in quantities_of(criterion))  # type: ignore[attr-defined]


def is_swept(criterion: Criterion) -> bool:
    """Whether a criterion chooses the masks of a layer column by column."""
    return bool(capability(_plain(criterion), "sweeps", False))


def check_swept(
    granularity: Granularity, context: Context, criterion: Criterion, round_to: Any, coupled: Any, *others: Any
) -> None:
    """Refuse options that a criterion that sweeps through the columns of a layer cannot have.

    Args:
        granularity: As of Sparsifier.
        context: As of Sparsifier.
        criterion: The criterion.
        round_to: As of Sparsifier.
        coupled: As of Sparsifier.
        *others: straight_through and regrow.

    Raises:
        ValueError: There is one.
    """
    check_sweeps_within(context, criterion)
    if granularity is not granularities["weight"] or round_to is not None or coupled or any(others):
        raise ValueError(
            f"criterion {name_of(criterion)} chooses single weights, column by column, so it needs granularity "
            "'weight', and no round_to=, coupled=, straight_through= or regrow="
        )


def _plain(criterion: Criterion) -> Any:
    """The function of a criterion that has options bound with `functools.partial`."""
    return criterion.func if isinstance(criterion, partial) else criterion


def check_sparsity(sparsity: Any = None, compression_ratio: Any = None) -> Sparsity:
    """The sparsity that is asked for: a fraction, or a dictionary of fractions by pattern.

    Args:
        sparsity: A fraction from 0 to 1, or {pattern: fraction}.
        compression_ratio: Another name of `sparsity`.

    Raises:
        TypeError: Neither or both are given, or a value is no number.
        ValueError: A value is not from 0 to 1, or the dictionary is empty.

    Example:
        >>> check_sparsity(1), check_sparsity({"layer1.*": 0.5})
        (1.0, {'layer1.*': 0.5})
    """
    if sparsity is None and compression_ratio is None:
        raise TypeError("no sparsity is given; pass the fraction of the weights that are zero at the end: sparsity=0.9")
    if sparsity is not None and compression_ratio is not None:
        raise TypeError("sparsity= and compression_ratio= are two names of one number, and both are given; pass one")
    sparsity = compression_ratio if sparsity is None else sparsity
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("the dictionary of sparsities is empty; give it at least one pattern: {'layer1.*': 0.5}")
        as_patterns(list(sparsity))
        return {pattern: check_fraction(value) for pattern, value in sparsity.items()}
    return check_fraction(sparsity, instead=", or a dictionary of them by layer")


def mapped(sparsity: Sparsity, function: Callable[[float], float]) -> Sparsity:
    """A function of the sparsity, or of each sparsity in a dictionary."""
    if isinstance(sparsity, Mapping):
        return {pattern: function(fraction) for pattern, fraction in sparsity.items()}
    return function(sparsity)


def highest(sparsity: Sparsity) -> float:
    """The sparsity, or the highest in a dictionary."""
    return max(sparsity.values()) if isinstance(sparsity, Mapping) else sparsity


def share_of_initial(initial: float, sparsity: Sparsity) -> float:
    """The initial sparsity as a fraction of the highest target sparsity.

    Raises:
        ValueError: A target sparsity is below the initial one.
    """
    lowest = min(sparsity.values()) if isinstance(sparsity, Mapping) else sparsity
    if initial > lowest:
        raise ValueError(
            f"initial_sparsity {initial:g} is above the sparsity {lowest:g}; give a fraction up to the sparsity"
        )
    return initial / highest(sparsity) if initial else 0.0
