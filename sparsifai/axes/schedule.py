"""When: schedules. A schedule says how the sparsity grows during training.

A schedule is a function of t, the progress of training from 0 to 1. It returns s(t), the share of the target sparsity
that is reached at t, also from 0 to 1. Of T batches, the sparsity is target * s(0) before the first, and
target * s((i + 1) / T) after batch i, counted from 0. So it is target * s(1) at the end.

A schedule of your own is such a function. fastai's annealers, such as SchedCos(0, 1), are schedules too:

>>> def square_root(t):
...     return t ** 0.5
>>> from sparsifai import between
>>> half = between(square_root, 0, 0.5)  # the same curve in the first half of training
>>> half(0.125), half(0.5), half(1)
(0.5, 1.0, 1.0)

With `@schedules.register` above its `def`, schedule='square_root' means the same function.
changed_schedule.py has the functions that make a schedule from another one, such as `between`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ..support.printable import message_of
from ..support.registry import Registry, name_of

Schedule = Callable[[float], float]


def progress(schedule: Schedule, t: float) -> float:
    """Call a schedule and check what it returns.

    Args:
        schedule: A function of t.
        t: Progress of training, from 0 to 1.

    Returns:
        The share of the target sparsity, from 0 to 1. Values up to 1e-6 outside are clipped, as rounding.

    Raises:
        ValueError: The schedule fails, or returns anything but a number from 0 to 1.
    """
    try:
        value = float(schedule(t))
    except Exception as error:
        raise ValueError(
            f"schedule {name_of(schedule)} fails at t={t:g} ({message_of(error)}); a schedule is a function of t "
            "alone, which returns the share of the target sparsity, in [0, 1]"
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
"""The schedules by name. `schedules.register` adds a function from [0, 1] to [0, 1].

Example:
    >>> @schedules.register
    ... def square_root(t):
    ...     return t ** 0.5
    >>> part = Sparsify(0.9, schedule='square_root')
"""


@schedules.register
def one_shot(t: float) -> float:
    """s(t) = 1: the whole target sparsity at once, before the first batch.

    Example:
        >>> one_shot(0.0), one_shot(0.5), one_shot(1.0)
        (1.0, 1.0, 1.0)
    """
    return 1.0


@schedules.register
def lin(t: float) -> float:
    """s(t) = t: linear.

    Example:
        >>> lin(0.0), lin(0.5), lin(1.0)
        (0.0, 0.5, 1.0)
    """
    return t


@schedules.register
def cos(t: float) -> float:
    """s(t) = (1 - cos(pi t)) / 2: half a cosine.

    Example:
        >>> [round(cos(t), 3) for t in (0, 0.25, 0.5, 1)]
        [0.0, 0.146, 0.5, 1.0]
    """
    return (1 - math.cos(math.pi * t)) / 2


@schedules.register
def agp(t: float) -> float:
    """s(t) = 1 - (1 - t)^3: automated gradual pruning (Zhu and Gupta, 2017, arXiv:1710.01878).

    Example:
        >>> agp(0.0), agp(0.5), agp(1.0)
        (0.0, 0.875, 1.0)
    """
    return 1 - (1 - t) ** 3


@schedules.register
def one_cycle(t: float, alpha: float = 14, beta: float = 6) -> float:
    """s(t) = (1 + e^(beta - alpha)) / (1 + e^(beta - alpha t)): one-cycle pruning.

    Hubens et al., 2021, "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget" (arXiv:2107.02086).

    Example:
        >>> [round(one_cycle(t), 3) for t in (0, 0.25, 0.5, 1)]
        [0.002, 0.076, 0.731, 1.0]
    """
    return (1 + math.exp(beta - alpha)) / (1 + math.exp(beta - alpha * t))


@dataclass(frozen=True)
class _Steps:
    """s(t) = ceil(n t) / n."""

    # A class, because a function that is defined within another cannot be pickled.
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
        n: Number of steps, at least 1. Default 3.

    Returns:
        The schedule, a function of t.

    Raises:
        ValueError: `n` is not a whole number of at least 1.

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
    """s(t) = (1 - cos(2 pi t)) / 2: dense, sparse at t = 1/2, dense again (Han et al., 2016, arXiv:1607.04381).

    Example:
        >>> [round(dsd(t), 3) for t in (0, 0.25, 0.5, 1)]
        [0.0, 0.5, 1.0, 0.0]
    """
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
