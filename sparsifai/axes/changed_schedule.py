"""Schedules made from another schedule: moved into a part of training, raised, or turned into a staircase.

Each takes the name of a schedule or any function of t, and returns a schedule, so they can be nested:

>>> prune_late = raised(between('agp', 0.5, 1), 0.2)
>>> prune_late(0.4), prune_late(0.5), prune_late(1)
(0.0, 0.2, 1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..support.arguments import checks_arguments
from ..support.registry import name_of
from .schedule import Schedule, progress, schedules

# The schedules are classes, because a function that is defined within another cannot be pickled.


@dataclass(frozen=True)
class _Moved:
    """A schedule in a part of training: 0 before it, its last value after it."""

    schedule: Schedule
    start: float
    end: float

    def __call__(self, t: float) -> float:
        if t < self.start:
            return 0.0
        return progress(self.schedule, min((t - self.start) / (self.end - self.start), 1.0))

    @property
    def __name__(self) -> str:
        return f"between({name_of(self.schedule)}, {self.start:g}, {self.end:g})"


@checks_arguments
def between(schedule: str | Schedule, start: float, end: float) -> Schedule:
    """Move a schedule into a part of training: 0 before the part, and after it the schedule's last value.

    s'(t) = s((t - start) / (end - start)).

    Args:
        schedule: Name of a schedule, or a function of t.
        start: Where the part begins, as a share of training from 0 to 1.
        end: Where it ends; greater than `start`.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: The schedule is unknown, or not 0 <= start < end <= 1.

    Example:
        Prune in the middle of training, and train the remaining weights in the last quarter:

        >>> [between('lin', 0.25, 0.75)(t) for t in (0.1, 0.5, 0.75, 1)]
        [0.0, 0.5, 1.0, 1.0]
    """
    _check_part("between", start, end)
    return _Moved(schedules.resolve(schedule), start, end)


def _check_part(caller: str, start: float, end: float) -> None:
    """Refuse what is not a part of training."""
    if not all(isinstance(each, (int, float)) for each in (start, end)) or not 0 <= start < end <= 1:
        raise ValueError(
            f"{caller}: start and end are shares of training, 0 <= start < end <= 1, but are {start!r} and {end!r}"
        )


@dataclass(frozen=True)
class _During:
    """A schedule in a part of training: 0 before and after it."""

    schedule: Schedule
    start: float
    end: float

    def __call__(self, t: float) -> float:
        if not self.start <= t < self.end and not t == self.end == 1:
            return 0.0
        return progress(self.schedule, (t - self.start) / (self.end - self.start))

    @property
    def __name__(self) -> str:
        return f"during({name_of(self.schedule)}, {self.start:g}, {self.end:g})"


@checks_arguments
def during(schedule: str | Schedule, start: float, end: float) -> Schedule:
    """Move a schedule into a part of training, like `between`, but return 0 after the part, too.

    Args:
        schedule: Name of a schedule, or a function of t.
        start: Where the part begins, as a share of training from 0 to 1.
        end: Where it ends, not included unless it is 1; greater than `start`.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: The schedule is unknown, or not 0 <= start < end <= 1.

    Example:
        >>> [during('one_shot', 0.25, 0.5)(t) for t in (0.2, 0.25, 0.5)]
        [0.0, 1.0, 0.0]
    """
    _check_part("during", start, end)
    return _During(schedules.resolve(schedule), start, end)


@dataclass(frozen=True)
class _Raised:
    """s'(t) = share + (1 - share) s(t)."""

    schedule: Schedule
    share: float

    def __call__(self, t: float) -> float:
        return self.share + (1 - self.share) * progress(self.schedule, t)

    @property
    def __name__(self) -> str:
        return f"raised({name_of(self.schedule)}, {self.share:g})"


@checks_arguments
def raised(schedule: str | Schedule, share: float) -> Schedule:
    """Let a schedule begin with a share of the target sparsity instead of 0.

    s'(t) = share + (1 - share) s(t). A schedule that `between` has moved is still 0 before its part of training.

    Args:
        schedule: Name of a schedule, or a function of t.
        share: Share of the target sparsity to begin with, from 0 to 1.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: The schedule is unknown, or `share` is not from 0 to 1.

    Example:
        >>> [raised(between('lin', 0.25, 0.75), 0.5)(t) for t in (0, 0.25, 0.5, 0.75)]
        [0.0, 0.5, 0.75, 1.0]
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"raised: share must be a number from 0 to 1, not {share!r}")
    resolved = schedules.resolve(schedule)
    if isinstance(resolved, _Moved):
        return replace(resolved, schedule=raised(resolved.schedule, share))
    return _Raised(resolved, float(share))


@dataclass(frozen=True)
class _Stepped:
    """s'(t) = s(floor(n t) / n)."""

    schedule: Schedule
    n: float

    def __call__(self, t: float) -> float:
        # The allowance is for the rounding of 0.07 * 100, as in _Steps.
        return progress(self.schedule, 1.0 if t == 1 else min(math.floor(self.n * t + 1e-9) / self.n, 1.0))

    @property
    def __name__(self) -> str:
        return f"stepped({name_of(self.schedule)}, {self.n:g})"


@checks_arguments
def stepped(schedule: str | Schedule, n: float) -> Schedule:
    """Turn a schedule into a staircase that changes n times only.

    s'(t) = s(floor(n t) / n), and s(1) at the end.

    Args:
        schedule: Name of a schedule, or a function of t.
        n: How often the schedule changes over training, a number above 0; it need not be a whole number.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: The schedule is unknown, or `n` is not a finite number above 0.

    Example:
        >>> [stepped('lin', 2)(t) for t in (0, 0.4, 0.5, 0.9, 1)]
        [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < n < math.inf:
        raise ValueError(f"stepped: n is how often the schedule changes, a finite number above 0, not {n!r}")
    return _Stepped(schedules.resolve(schedule), n)
