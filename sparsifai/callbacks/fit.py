"""What SparsifyCallback knows and shows of one fit: made when the fit begins, dropped when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastai.learner import Learner

from .display import Column, Curves, Trackers
from .keep import KeepSparsity


@dataclass(eq=False)
class Fit:
    """One fit of a Learner with SparsifyCallback.

    Attributes:
        learn: The Learner.
        measure: Gives the measured sparsity, for the training table.
        advances: Whether the sparsity moves along the schedule: not while layers are frozen.
        floor: What earlier fits have reached, as a fraction of the target sparsity.
        keeper: What keeps the zeros, from the first batch on. None before.
        brought: Whether this fit has put the keeper on the Learner.
        updated: Batches that were over at the last mask update.
        moved: Whether the level has changed since the trackers last judged an epoch.
    """

    learn: Learner
    measure: Callable[[], float]
    advances: bool
    floor: float
    keeper: KeepSparsity | None = None
    brought: bool = False
    updated: int = 0
    moved: bool = False
    column: Column = field(init=False)
    curves: Curves = field(default_factory=Curves)
    trackers: Trackers = field(default_factory=Trackers)

    def __post_init__(self) -> None:
        self.column = Column(self.learn, self.measure)
        self.column.show()

    @property
    def begun(self) -> bool:
        """Whether the fit is past its first batch."""
        return self.keeper is not None

    def end_epoch(self, level: float, short: bool) -> None:
        """Record an epoch. If it is short of the target sparsity, trackers ignore it."""
        self.curves.by_epoch.append((self.learn.epoch, level, self.measure()))
        if self.moved:
            self.trackers.forget(self.learn)
            self.moved = False
        if short:
            self.trackers.pause(self.learn)

    def undo(self) -> None:
        """Leave the training table and the trackers as they were."""
        self.column.hide()
        self.trackers.resume()
