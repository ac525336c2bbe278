"""What one SparsifyCallback does in one fit of a Learner: it moves the sparsity of its layers along a ramp."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastai.learner import Learner

from ..gradual.gradual_pruning import GradualPruning
from ..gradual.gradual_sparsifier import EXCESS, GradualSparsifier
from ..gradual.plan import every_of, last_update
from ..sparsifier.layer import count_of
from ..sparsifier.layer_selection import scopes
from ..sparsifier.options import highest
from ..support.progress import bars
from ..support.table import percent
from ..support.warning import warn
from .display import notify
from .keepers import Keepers
from .learner import show_data
from .others import are_all_known
from .pruned import Pruned
from .straight_through import straight_through_of


class FitPart(GradualSparsifier):
    """Moves the sparsity of the layers of one SparsifyCallback along its ramp.

    Attributes:
        learn: The Learner.
        pruned: What the callback has pruned in this fit and earlier ones.
        keepers: What keeps the pruned weights at zero.
        moved: Whether the level has changed or weights have regrown since the trackers last compared an epoch.
        straight_through: A StraightThrough, until the masks are settled; else None.
    """

    def __init__(self, learn: Learner, pruning: GradualPruning, pruned: Pruned, keepers: Keepers):
        reached = pruned.reached
        super().__init__(pruning, pruned.sparsifier, learn.opt, self._show, reached=reached, floor=reached)
        self.learn, self.pruned, self.keepers, self.layers = learn, pruned, keepers, pruned.layers
        self.moved = self._warned = False
        self.straight_through: Any = None

    @property
    def changes_its_mind(self) -> bool:
        """Whether dense weights are ranked anew, until the masks settle."""
        return self.straight_through is not None and not self.straight_through.ended

    @property
    def is_short(self) -> bool:
        """Whether the level is not yet that of the end of the fit, or masks can still change their mind."""
        return self.straight_through is not None or self.reached != self.level_at(1.0)

    def prepare(self, start: float) -> None:
        """At the first batch of a fit in which the sparsity moves, prepare straight-through training.

        Args:
            start: The fraction of the fit that is skipped, as when training is resumed.
        """
        settle = self.pruning.settle
        if settle is not None and highest(self.pruning.ramp.sparsity):
            self.straight_through = straight_through_of(self.learn, self.pruned, settle, start)

    def begin(self, batches: int, start: float) -> None:
        """Prune to where the ramp begins. A fit that is resumed has done so, and waits until an update is due.

        Args:
            batches: Batches of the fit that are skipped.
            start: The fraction of the fit that is skipped.
        """
        if message := self.pruning.notice_of_every(self.learn.n_epoch * self.learn.n_iter):
            self._tell(message)
        self.updated = batches
        if not self.pruned.is_resumed:
            self.go_to(start)
        self.pruned.is_resumed = False

    def is_short_after(self, batches: int, total: int) -> bool:
        """Whether the level will not yet be that of the end of the fit after so many batches, or masks not settled."""
        settles_later = self.straight_through is not None and batches / total < (self.pruning.settle or 0)
        return settles_later or self._level_after(batches, total) != self.level_at(1.0)

    def _level_after(self, batches: int, total: int) -> float:
        """The level of the last mask update within so many batches, as a fraction of the target sparsity."""
        every = every_of(self.pruning.every, self.pruning.options, total)
        return self.level_at(last_update(batches, every, total) / total)

    def end(self) -> None:
        """Leave the fit: give the optimizer its own step. The masks stay as they are."""
        if self.straight_through is not None:
            self.straight_through.end()
            self.keepers.refresh()

    def warn_of_higher_sparsity(self, start: float = 1.0) -> None:
        """Warn once if more is pruned than this fit asks for, and stays so. start: the fraction that is done."""
        message = "" if self._warned else self.higher_sparsity(self.pruned.masks, start)
        if message:
            self._warned = True
            # Whole outputs do not come back by themselves.
            outputs = any(self.sparsifier.layers[name].grouping.drops_outputs for name in self.sparsifier.masks)
            instead = "call learn.remove_cb(KeepSparsity) and train without sparsity for a while, or "
            warn(
                f"SparsifyCallback: {message}, because zeros of earlier fits stay; to let them go, "
                f"{'' if outputs else instead}load weights from before they were pruned"
            )

    def tell_of_earlier_zeros(self, start: float) -> None:
        """Tell the user if the schedule begins so far below earlier zeros that it prunes nothing in this epoch.

        Args:
            start: The fraction of the fit that is done.
        """
        learn, ramp = self.learn, self.pruning.ramp
        can_change = self.pruning.regrows or self.straight_through is not None or ramp.falls_after(start, self.floor)
        if self.reached or self.pruned.is_resumed or can_change:
            return
        masks, layers = self.pruned.masks, self.sparsifier.layers
        share = count_of(layers[name].with_mask(masks[name], 0.0) for name in self.sparsifier.masks).sparsity
        begins, total = self._asked(self.level_at(start)), learn.n_epoch * learn.n_iter
        levels = [self._level_after((epoch + 1) * learn.n_iter, total) for epoch in range(learn.n_epoch)]
        more = next((epoch for epoch, level in enumerate(levels) if self._asked(level) > share), 0)
        if more > learn.epoch and begins < share - EXCESS:
            self._tell(
                f"the schedule begins at {percent(begins)}, below the {percent(share)} of zeros that are kept, and "
                f"prunes more in epoch {more}"
            )

    def _asked(self, reached: float) -> float:
        """The sparsity over all layers that a level asks for."""
        layers = self.sparsifier.layers
        asked = scopes(self.pruning.ramp.sparsity_at(reached), layers, self.sparsifier.model)
        sizes = [(share, layers[name].parameter.numel()) for share, names in asked for name in names]
        return sum(share * size for share, size in sizes) / sum(size for _, size in sizes)

    # --- What is done in a way of its own in a Learner --------------------------------------------------------------

    def _show(self, anew: bool) -> None:
        self.moved |= anew
        with bars(False):  # the bar of the fit is shown
            show_data(self.learn, self.sparsifier, self.pruning.calibration, anew)

    def _update(self, reached: float, drop: float = 0.0) -> None:
        with bars(False):
            super()._update(reached, drop)

    def _note(self, reached: float, drop: float, resting: Collection[str]) -> None:
        self.keepers.refresh()
        if self.keepers.own.learn is None:  # the user has removed it during the fit
            self.sparsifier.apply_masks()
            self.sparsifier.mask_moments(self.learn.opt)
        # After regrowth, too, trackers must forget their best epoch: it has other masks than those that are kept.
        self.moved |= bool(drop) or reached != self.reached or self.straight_through is not None
        super()._note(reached, drop, resting)
        self.pruned.reached, self.pruned.layers = self.reached, self.layers

    def _select_unfrozen(self) -> None:
        if self.sparsifier.select_unfrozen():
            self.sparsifier.all_masks.add(self.pruned.others)

    def _pull(self) -> None:
        if not are_all_known(self.learn):
            self.sparsifier.apply_masks()  # looks at all weights, of which a callback may have changed any
        super()._pull()

    def _settle(self) -> None:
        self.sparsifier.settle()
        self.straight_through.end()
        self.keepers.refresh()
        if self.keepers.own.learn is not None:  # the user has not removed it
            self.keepers.own.enforce()
        self.straight_through, self.moved = None, True

    def _tell(self, message: str) -> None:
        notify(self.learn, f"SparsifyCallback: {message}", matters=True)
