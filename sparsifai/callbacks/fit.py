"""What SparsifyCallback knows and shows of one fit: made when the fit begins, dropped when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastai.learner import Learner
from torch import Tensor

from ..sparsifier.sparsifier import Sparsifier
from ..support.table import percent
from .display import Column, Curves, Trackers, notify
from .keep import KeepSparsity, merged


@dataclass(eq=False)
class Fit:
    """One fit of a Learner with SparsifyCallback.

    Attributes:
        learn: The Learner.
        measure: Gives the measured sparsity, for the training table and notices.
        advances: Whether the sparsity moves along the schedule: not while layers are frozen.
        floor: What earlier fits have reached, as a fraction of the target sparsity.
        keeper: What keeps the zeros, from the first batch on. None before.
        updated: Batches that were over at the last mask update.
        moved: Whether the level has changed since the trackers last judged an epoch.
    """

    learn: Learner
    measure: Callable[[], float]
    advances: bool
    floor: float
    keeper: KeepSparsity | None = None
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

    # --- What keeps the zeros -----------------------------------------------------------------------------------

    def find_keeper(self) -> bool:
        """Have a KeepSparsity that stays on the Learner; returns whether there was any before."""
        keepers = list(self.learn._grab_cbs(KeepSparsity))
        for each in keepers:
            each.recover()  # the zeros of the model, before the masks move
        keeper = next((each for each in keepers if each.left_by_fit), None)
        if keeper is None:
            keeper = KeepSparsity()
            keeper.left_by_fit = True
            for each in keepers:
                each.is_second = True
            self.learn.add_cb(keeper)
        self.keeper = keeper
        keeper.begin()
        return bool(keepers)

    def kept_masks(self) -> dict[str, Tensor]:
        """The masks of everything that is kept at zero on the Learner."""
        masks: dict[str, Tensor] = {}
        for keeper in self.learn._grab_cbs(KeepSparsity):
            masks = merged(masks, keeper.masks)
        return masks

    def let_go(self, names: Iterable[str]) -> None:
        """Have nothing keep these parameters at zero, until the keeper gets new masks."""
        for keeper in self.learn._grab_cbs(KeepSparsity):
            for name in names:
                keeper.masks.pop(name, None)

    def keep(self, sparsifier: Sparsifier, others: dict[str, Tensor]) -> None:
        """Give the keeper the masks of a Sparsifier as they are now. others: masks of zeros that are not its own."""
        if self.keeper is None:
            return
        self.keeper.masks = merged({**sparsifier.masks, **sparsifier.follower_masks}, others)
        if self.keeper.learn is None:  # the user has taken it off in the fit
            sparsifier.apply_masks()
            sparsifier.mask_moments(self.learn.opt)

    def announce_keeper(self) -> None:
        """Say what keeps the zeros in later fits, or take it off if there are none."""
        for keeper in self.learn._grab_cbs(KeepSparsity):
            keeper.enforce()  # a fit can be interrupted between a step and what comes after it
        if self.keeper is None or self.keeper.announced or self.keeper.learn is None:  # None if it was taken off
            return
        self.keeper.announced = True
        if self.keeper.masks_something:
            notify(
                self.learn,
                f"KeepSparsity keeps the {percent(self.measure())} of zeros in later fits, too; "
                "learn.remove_cb(KeepSparsity) takes it off",
            )
        else:
            self.learn.remove_cb(self.keeper)

    # --- What is shown ------------------------------------------------------------------------------------------

    def end_epoch(self, level: float, short: bool) -> None:
        """Record an epoch. If it is short of the target sparsity, trackers ignore it."""
        self.curves.by_epoch.append((self.learn.epoch, level, self.measure()))
        if self.moved:
            self.trackers.forget(self.learn)
            self.moved = False
        if short:
            self.trackers.pause(self.learn)

    def end(self, short: bool) -> None:
        """Give the curves to the recorder. If the fit is short of the target sparsity, no best epoch is loaded."""
        self.trackers.resume()
        if self.begun:
            self.curves.hand_over(self.learn)
            if self.advances:
                self.trackers.pause_loading(self.learn, short)
                self.trackers.paused = []  # fastai switches all callbacks on again at the end of a fit

    def undo(self) -> None:
        """Leave the training table and the trackers as they were."""
        self.column.hide()
        self.trackers.resume()
