"""What SparsifyCallback stores for the time of one fit: created when the fit begins, dropped when it ends."""

from __future__ import annotations

from collections.abc import Callable
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
        measure: Returns the measured sparsity, for the training table and notices.
        advances: Whether the sparsity follows the schedule; it does not while layers are frozen.
        floor: What earlier fits reached, as a fraction of the target sparsity.
        keeper: The KeepSparsity that keeps the pruned weights at zero. None before the first batch.
        updated: How many batches were done at the last mask update.
        moved: Whether the level has changed or weights have regrown since the trackers last compared an epoch.
        column: The column `sparsity` of the training table.
        curves: The curves for the Recorder.
        trackers: Pauses SaveModelCallback and the like.
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
        """Add a KeepSparsity to the Learner, unless an earlier fit left one. Returns whether the Learner had any."""
        keepers = list(self.learn._grab_cbs(KeepSparsity))
        for each in keepers:
            each.recover()  # adds the zeros of the model, before any mask changes
        keeper = next((each for each in keepers if each.left_by_fit), None)
        if keeper is None:
            keeper = KeepSparsity()
            keeper.left_by_fit = True
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

    def take_over(self) -> None:
        """Empty the masks of the other KeepSparsity callbacks. They would hinder weights from regrowing or reviving."""
        for each in self.learn._grab_cbs(KeepSparsity):
            if each is not self.keeper:
                each.masks = {}

    def keep(self, sparsifier: Sparsifier, others: dict[str, Tensor]) -> None:
        """Hand the present masks to the keeper.

        Args:
            sparsifier: The Sparsifier of the fit.
            others: Masks of zeros that it did not prune itself, such as those of earlier fits.
        """
        if self.keeper is None:
            return
        self.keeper.masks = merged({**sparsifier.masks, **sparsifier.follower_masks}, others)
        if self.keeper.learn is None:  # the user has removed it during the fit
            sparsifier.apply_masks()
            sparsifier.mask_moments(self.learn.opt)

    def announce_keeper(self) -> None:
        """Tell the user that the keeper stays on the Learner; or remove it, if nothing is pruned."""
        for keeper in self.learn._grab_cbs(KeepSparsity):
            keeper.enforce()  # an interrupt can come between a step and the event after it
        if self.keeper is None or self.keeper.learn is None:  # before the first batch, or removed by the user
            return
        if not self.keeper.masks_something:
            self.learn.remove_cb(self.keeper)
        elif not self.keeper.announced:
            self.keeper.announced = True
            notify(
                self.learn,
                f"KeepSparsity keeps the {percent(self.measure())} of zeros in later fits, too; "
                "learn.remove_cb(KeepSparsity) removes it",
            )

    # --- What is shown ------------------------------------------------------------------------------------------

    def end_epoch(self, level: float, short: bool) -> None:
        """Record an epoch. Trackers ignore it if it is short of the target sparsity."""
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
        """Restore the training table and the trackers."""
        self.column.hide()
        self.trackers.resume()
