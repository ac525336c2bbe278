"""The ramp: the sparsity that is asked for at each point of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..axes.changed_schedule import between, raised
from ..axes.schedule import Schedule, falls, progress
from ..sparsifier.options import Sparsity, mapped, share_of_initial
from ..support.checks import check_fraction

# At so many points of a fit a schedule is looked at, to find out where it ends.
_STEPS = 1000

# Masks of straight-through training do not settle before this fraction of the fit by themselves, and the default
# schedule ends here. The last quarter is left to the weights that stay.
EARLIEST = 0.75


@dataclass(frozen=True)
class Ramp:
    """A schedule from an initial sparsity to the target sparsity.

    Attributes:
        sparsity: The target sparsity, or {pattern: target sparsity}.
        schedule: A function from [0, 1] to [0, 1].
        initial: The sparsity of all layers at which the schedule begins.
    """

    sparsity: Sparsity
    schedule: Schedule
    initial: float = 0.0

    @cached_property
    def raised_schedule(self) -> Schedule:
        """The schedule from the initial sparsity on, as a fraction of the highest target sparsity."""
        return raised(self.schedule, self._share) if self.initial else self.schedule

    @cached_property
    def end(self) -> float:
        """Where the schedule ends, as a fraction of the target sparsity."""
        return progress(self.raised_schedule, 1.0)

    def at(self, t: float, floor: float = 0.0) -> float:
        """The sparsity at t as a fraction of the target sparsity, but not below the floor.

        A schedule that falls itself, such as dsd and ac_dc, may go below the floor.

        Args:
            t: Fraction of the fit that is done.
            floor: What earlier fits reached, as a fraction of the target sparsity. Default 0.
        """
        reached = progress(self.raised_schedule, t)
        return reached if self._falls else max(reached, min(floor, self.end))

    def falls_after(self, t: float, floor: float) -> bool:
        """Whether the schedule is ever lower after t than at t."""
        return min(self.at(t + (1 - t) * step / 1000, floor) for step in range(1001)) < self.at(t, floor)

    def sparsity_at(self, reached: float) -> Sparsity:
        """The sparsity for a value of `at`. Layers with different targets start from the same initial sparsity."""
        if not self.initial or reached in (0, 1):
            return mapped(self.sparsity, lambda fraction: reached * fraction)
        done = (reached - self._share) / (1 - self._share) if self._share < 1 else 1.0
        return mapped(self.sparsity, lambda fraction: self.initial + (fraction - self.initial) * done)

    @cached_property
    def last_move(self) -> float:
        """The fraction of the fit after which the schedule stays where it ends."""
        steps = range(_STEPS, -1, -1)
        moving = next((step for step in steps if progress(self.raised_schedule, step / _STEPS) != self.end), -1)
        return (moving + 1) / _STEPS

    @cached_property
    def _falls(self) -> bool:
        return falls(self.raised_schedule)

    @cached_property
    def _share(self) -> float:
        return share_of_initial(self.initial, self.sparsity)


def default_schedule(straight_through: bool) -> Schedule:
    """The schedule by default, chosen by measurement.

    The masks stay the same in the last quarter of the fit: the remaining weights recover, which helps most at high
    sparsity. In straight-through training the sparsity is reached earlier, and the masks change until that quarter.
    """
    return between("agp", 0, 0.5 if straight_through else EARLIEST)


def settle_of(ramp: Ramp, settle: Any = None) -> float:
    """The fraction of the fit after which the masks of straight-through training are fixed.

    Args:
        ramp: The sparsity at each point of the fit.
        settle: The fraction that the user gave; None for where the schedule ends, but not before `EARLIEST`.
    """
    if settle is None:
        return max(ramp.last_move, EARLIEST)
    return check_fraction(settle, "settle")
