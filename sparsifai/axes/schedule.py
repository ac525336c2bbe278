"""When: schedules, functions from training progress t in [0, 1] to progress of the sparsity in [0, 1].

After step i of T the level is `target * schedule((i + 1) / T)`; before the first forward it is `target * schedule(0)`.
Any function of t will do, fastai's annealers (`SchedCos(0, 1)`) too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..support.registry import Registry, name_of

Schedule = Callable[[float], float]


def progress(schedule: Schedule, t: float) -> float:
    """schedule(t) as a float in [0, 1]; ValueError if it is anything else."""
    try:
        value = float(schedule(t))
    except Exception as error:
        raise ValueError(
            f"schedule {name_of(schedule)} fails at t={t:g} ({error}); a schedule is a function of t alone, which "
            "returns the share of the target in [0, 1]"
        ) from error
    # A rounding error at the ends, as cosines make, is forgiven.
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(
            f"schedule {name_of(schedule)} gives {value} at t={t:g}; "
            "a schedule must return the share of the target in [0, 1] for every t in [0, 1]"
        )
    return min(max(value, 0.0), 1.0)


def falls(schedule: Schedule) -> bool:
    """Whether a schedule gives back what it has reached, at one of a thousand points."""
    levels = [progress(schedule, step / 1000) for step in range(1001)]
    return any(after < before for before, after in pairwise(levels))


def _check(schedule: Schedule) -> None:
    """A schedule that fails at one of a few points would fail in the middle of training: say so before it begins."""
    for step in range(11):
        progress(schedule, step / 10)


schedules = Registry("schedule", check=_check)


@schedules.register
def one_shot(t: float) -> float:
    """s(t) = 1: all at once, before the first step."""
    return 1.0


@schedules.register
def lin(t: float) -> float:
    """s(t) = t."""
    return t


@schedules.register
def cos(t: float) -> float:
    """s(t) = (1 - cos(pi t)) / 2."""
    return (1 - math.cos(math.pi * t)) / 2


@schedules.register
def agp(t: float) -> float:
    """s(t) = 1 - (1 - t)^3, automated gradual pruning (Zhu and Gupta, 2017, arXiv:1710.01878)."""
    return 1 - (1 - t) ** 3


@schedules.register
def one_cycle(t: float, alpha: float = 14, beta: float = 6) -> float:
    """s(t) = (1 + e^(beta - alpha)) / (1 + e^(beta - alpha t)), one-cycle pruning (Hubens et al., arXiv:2107.02086)."""
    return (1 + math.exp(beta - alpha)) / (1 + math.exp(beta - alpha * t))


@dataclass(frozen=True)
class _Steps:
    """s(t) = ceil(n t) / n."""

    # A class, because a function made within another cannot be pickled; so is _Moved.
    n: int

    def __call__(self, t: float) -> float:
        # 0.07 * 100 is 7.000000000000001: without the allowance the eighth step would come one batch early.
        return max(math.ceil(self.n * t - 1e-9), 0) / self.n

    @property
    def __name__(self) -> str:
        return f"iterative({self.n})"


def iterative(n: int = 3) -> Schedule:
    """s(t) = ceil(n t) / n: n equal steps. By name, 'iterative' has three.

    >>> [iterative(2)(t) for t in (0, 0.1, 0.5, 0.6, 1)]
    [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"iterative(n): n is the number of steps, a whole number from 1 on, not {n!r}")
    return _Steps(n)


schedules.register(iterative(3), name="iterative")


@schedules.register
def dsd(t: float) -> float:
    """s(t) = (1 - cos(2 pi t)) / 2: dense, sparse at t = 1/2, dense again (Han et al., arXiv:1607.04381)."""
    return (1 - math.cos(2 * math.pi * t)) / 2


@schedules.register
def ac_dc(t: float, warm_up: float = 0.1, phase: float = 0.05, dense: float = 0.75, sparse: float = 0.85) -> float:
    """Alternating compressed and decompressed phases: s(t) is 0 or 1.

    0 before `warm_up`, then 1 and 0 in turn, `phase` long each, but 0 from `dense` and 1 from `sparse` on. The default
    is that of ResNet-50 on ImageNet: Peste et al., 2021, "AC/DC" (arXiv:2106.12379).

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
    """A schedule in a part of training."""

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
    """`schedule` moved into the part [start, end] of training: 0 before it, its last value after it.

    >>> between(lin, 0.25, 0.75)(0.5)
    0.5
    """
    if not all(isinstance(each, (int, float)) for each in (start, end)) or not 0 <= start < end <= 1:
        raise ValueError(f"between: needs 0 <= start < end <= 1, got start={start!r}, end={end!r}")
    return _Moved(schedules.resolve(schedule), start, end)


@dataclass(frozen=True)
class _During:
    """A schedule in a part of training, and nothing outside of it."""

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
    """`schedule` moved into the part [start, end) of training: 0 before it and after it.

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
    """share + (1 - share) s(t): `schedule` that begins with a share of the target; before its part of training nothing.

    >>> [raised(between(lin, 0.25, 0.75), 0.5)(t) for t in (0, 0.25, 0.5, 0.75)]
    [0.0, 0.5, 0.75, 1.0]
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"raised: the share that it begins with is from 0 to 1, not {share!r}")
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
        # As with iterative, 0.07 * 100 is allowed for.
        return progress(self.schedule, 1.0 if t == 1 else min(math.floor(self.n * t + 1e-9) / self.n, 1.0))

    @property
    def __name__(self) -> str:
        return f"stepped({name_of(self.schedule)}, {self.n:g})"


def stepped(schedule: str | Schedule, n: float) -> Schedule:
    """s(floor(n t) / n), and s(1) at the end: `schedule` looked at n times only.

    >>> [stepped(lin, 2)(t) for t in (0, 0.4, 0.5, 0.9, 1)]
    [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < n < math.inf:
        raise ValueError(f"stepped: n is how often the schedule is looked at, a number above 0, not {n!r}")
    return _Stepped(schedules.resolve(schedule), n)
