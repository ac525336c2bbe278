"""When: schedules. A schedule says how the sparsity grows during training.

A schedule is a function of t, the progress of training from 0 to 1. It returns s(t), the share of the target sparsity
that is reached at t, also from 0 to 1. Of T batches, the sparsity is target * s(0) before the first, and
target * s((i + 1) / T) after batch i, counted from 0. So it is target * s(1) at the end.

A schedule of your own is such a function. fastai's annealers, such as SchedCos(0, 1), are schedules too:

>>> def square_root(t):
...     return t ** 0.5
>>> half = between(square_root, 0, 0.5)  # the same curve in the first half of training
>>> half(0.125), half(0.5), half(1)
(0.5, 1.0, 1.0)

With `@schedules.register` above its `def`, schedule='square_root' means the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..support.registry import Registry, name_of

Schedule = Callable[[float], float]


def progress(schedule: Schedule, t: float) -> float:
    """Call a schedule and check what it returns.

    Args:
        schedule: A function of t.
        t: Progress of training, from 0 to 1.

    Returns:
        The share of the target sparsity, from 0 to 1. A value that rounding put up to 1e-6 outside is moved to the end.

    Raises:
        ValueError: If the schedule fails, or returns anything but a number from 0 to 1.
    """
    try:
        value = float(schedule(t))
    except Exception as error:
        raise ValueError(
            f"schedule {name_of(schedule)} fails at t={t:g} ({error}); a schedule is a function of t alone, which "
            "returns the share of the target sparsity, in [0, 1]"
        ) from error
    # Cosines leave [0, 1] by a rounding error at the ends.
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(
            f"schedule {name_of(schedule)} gives {value} at t={t:g}; "
            "a schedule must return the share of the target sparsity, in [0, 1], for every t in [0, 1]"
        )
    return min(max(value, 0.0), 1.0)


def falls(schedule: Schedule) -> bool:
    """Whether a schedule falls anywhere, as dsd does. A thousand equal steps are compared."""
    levels = [progress(schedule, step / 1000) for step in range(1001)]
    return any(after < before for before, after in pairwise(levels))


def _check(schedule: Schedule) -> None:
    """Call a schedule at eleven points, so that a mistake in it is found before training and not in the middle."""
    for step in range(11):
        progress(schedule, step / 10)


schedules = Registry("schedule", check=_check)


@schedules.register
def one_shot(t: float) -> float:
    """s(t) = 1: the whole target sparsity at once, before the first batch."""
    return 1.0


@schedules.register
def lin(t: float) -> float:
    """s(t) = t: linear."""
    return t


@schedules.register
def cos(t: float) -> float:
    """s(t) = (1 - cos(pi t)) / 2: half a cosine."""
    return (1 - math.cos(math.pi * t)) / 2


@schedules.register
def agp(t: float) -> float:
    """s(t) = 1 - (1 - t)^3: automated gradual pruning (Zhu and Gupta, 2017, arXiv:1710.01878)."""
    return 1 - (1 - t) ** 3


@schedules.register
def one_cycle(t: float, alpha: float = 14, beta: float = 6) -> float:
    """s(t) = (1 + e^(beta - alpha)) / (1 + e^(beta - alpha t)): one-cycle pruning.

    Hubens et al., 2021, "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget" (arXiv:2107.02086).
    """
    return (1 + math.exp(beta - alpha)) / (1 + math.exp(beta - alpha * t))


@dataclass(frozen=True)
class _Steps:
    """s(t) = ceil(n t) / n."""

    # A class, because a function that is defined within another cannot be pickled. So are the classes below.
    n: int

    def __call__(self, t: float) -> float:
        # 0.07 * 100 is 7.000000000000001: without the allowance the eighth step would come one batch early.
        return max(math.ceil(self.n * t - 1e-9), 0) / self.n

    @property
    def __name__(self) -> str:
        return f"iterative({self.n})"


def iterative(n: int = 3) -> Schedule:
    """Make the schedule of n equal steps, s(t) = ceil(n t) / n. The name 'iterative' means iterative(3).

    Args:
        n: Number of steps, 1 or more; default 3.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: If `n` is not a whole number of at least 1.

    Example:
        >>> [iterative(2)(t) for t in (0, 0.1, 0.5, 0.6, 1)]
        [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"iterative(n): n is the number of steps, a whole number of at least 1, not {n!r}")
    return _Steps(n)


schedules.register(iterative(3), name="iterative")


@schedules.register
def dsd(t: float) -> float:
    """s(t) = (1 - cos(2 pi t)) / 2: dense, sparse at t = 1/2, dense again (Han et al., 2016, arXiv:1607.04381)."""
    return (1 - math.cos(2 * math.pi * t)) / 2


@schedules.register
def ac_dc(t: float, warm_up: float = 0.1, phase: float = 0.05, dense: float = 0.75, sparse: float = 0.85) -> float:
    """Sparse and dense phases in turn: s(t) is 1 or 0. Peste et al., 2021, "AC/DC" (arXiv:2106.12379).

    All arguments are shares of training. The defaults are those of ResNet-50 on ImageNet.

    Args:
        t: Progress of training, from 0 to 1.
        warm_up: Where the dense start ends and the first sparse phase begins.
        phase: Length of a phase.
        dense: Where the last dense phase begins.
        sparse: Where the last sparse phase begins.

    Returns:
        1.0 in a sparse phase, 0.0 in a dense one.

    Example:
        >>> [ac_dc(t) for t in (0.05, 0.12, 0.17, 0.7, 0.8, 0.9)]
        [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """
    # 0.15 - 0.1 is 0.04999999999999999: without the allowance the phase would end one batch late.
    t += 1e-9
    if t < warm_up or dense <= t < sparse:
        return 0.0
    return 1.0 if t >= sparse else float(math.floor((t - warm_up) / phase) % 2 == 0)


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
        ValueError: If the schedule is unknown, or not 0 <= start < end <= 1.

    Example:
        Prune in the middle of training, and train the remaining weights in the last quarter:

        >>> [between('lin', 0.25, 0.75)(t) for t in (0.1, 0.5, 0.75, 1)]
        [0.0, 0.5, 1.0, 1.0]
    """
    if not all(isinstance(each, (int, float)) for each in (start, end)) or not 0 <= start < end <= 1:
        raise ValueError(f"between: needs 0 <= start < end <= 1, got start={start!r} and end={end!r}")
    return _Moved(schedules.resolve(schedule), start, end)


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


def during(schedule: str | Schedule, start: float, end: float) -> Schedule:
    """Move a schedule into a part of training, like `between`, but return 0 after the part, too.

    Args:
        schedule: Name of a schedule, or a function of t.
        start: Where the part begins, as a share of training from 0 to 1.
        end: Where it ends, not included unless it is 1; greater than `start`.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: If the schedule is unknown, or not 0 <= start < end <= 1.

    Example:
        >>> [during(one_shot, 0.25, 0.5)(t) for t in (0.2, 0.25, 0.5)]
        [0.0, 1.0, 0.0]
    """
    moved = between(schedule, start, end)
    return _During(moved.schedule, start, end)  # type: ignore[attr-defined]


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


def raised(schedule: str | Schedule, share: float) -> Schedule:
    """Let a schedule begin with a share of the target sparsity instead of 0.

    s'(t) = share + (1 - share) s(t). A schedule that `between` has moved is still 0 before its part of training.

    Args:
        schedule: Name of a schedule, or a function of t.
        share: Share of the target sparsity to begin with, from 0 to 1.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: If the schedule is unknown, or `share` is not from 0 to 1.

    Example:
        >>> [raised(between(lin, 0.25, 0.75), 0.5)(t) for t in (0, 0.25, 0.5, 0.75)]
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


def stepped(schedule: str | Schedule, n: float) -> Schedule:
    """Turn a schedule into a staircase that changes n times only.

    s'(t) = s(floor(n t) / n), and s(1) at the end.

    Args:
        schedule: Name of a schedule, or a function of t.
        n: How often the schedule is evaluated over training, above 0; need not be a whole number.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: If the schedule is unknown, or `n` is not a finite number above 0.

    Example:
        >>> [stepped(lin, 2)(t) for t in (0, 0.4, 0.5, 0.9, 1)]
        [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < n < math.inf:
        raise ValueError(f"stepped: n is how often the schedule is evaluated, a finite number above 0, not {n!r}")
    return _Stepped(schedules.resolve(schedule), n)
