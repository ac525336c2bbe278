"""One fit of a Learner with SparsifyCallbacks: created when the fit begins, dropped when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any

from fastai.learner import Learner

from ..model.parallel import unwrapped
from ..sparsifier.model_masks import prune_any
from ..sparsifier.options import highest, mapped
from ..sparsifier.report import Report
from ..sparsifier.sparsifiers import check_apart, mean_level_of, sparsity_of
from ..support.table import percent
from .display import Column, Curves, Trackers, notify
from .fit_part import FitPart
from .keepers import Keepers


@dataclass(eq=False)
class Fit:
    """Keeps and shows what the SparsifyCallbacks of one fit have pruned. Each of them has a part in it.

    Attributes:
        learn: The Learner.
        callbacks: The callbacks, in the order of their events.
        left: Those of them that have left the fit.
        parts: Callback -> its part, from the first batch on; without those that have pruned nothing.
        advances: Whether the sparsity follows the ramps; it does not while layers are frozen.
        keepers: What keeps the pruned weights at zero; or None, before the first batch.
        column: The column `sparsity` of the training table.
        curves: The curves for the Recorder.
        trackers: Pauses SaveModelCallback and the like.
    """

    learn: Learner
    callbacks: list[Any] = field(default_factory=list)
    left: set[Any] = field(default_factory=set)
    parts: dict[Any, FitPart] = field(default_factory=dict)
    advances: bool = False
    keepers: Any = None
    column: Column = field(init=False)
    curves: Curves = field(default_factory=Curves)
    trackers: Trackers = field(default_factory=Trackers)

    def __post_init__(self) -> None:
        self.column = Column(self.learn, self.measured)
        self.column.show()

    @property
    def begun(self) -> bool:
        """Whether the fit is past its first batch."""
        return self.keepers is not None

    @property
    def moves(self) -> bool:
        """Whether the sparsity follows the ramps at present."""
        return self.advances and self.begun

    @property
    def is_short(self) -> bool:
        """Whether a level is not yet that of the end of the fit, or masks can still change their mind."""
        return self.moves and any(part.is_short for part in self.parts.values())

    @property
    def level(self) -> float:
        """The sparsity that was last asked for."""
        return mean_level_of(self._sparsifiers) if self._sparsifiers else 0.0

    def measured(self) -> float:
        """The measured sparsity of the selected layers."""
        if self._sparsifiers:
            return sparsity_of(self._sparsifiers)
        return Report.of(unwrapped(self.learn.model)).selected.sparsity

    def is_last(self, callback: Any) -> bool:
        """Whether a callback is the last one that has not left the fit: it does what is done once for all of them."""
        return callback is [each for each in self.callbacks if each not in self.left][-1]

    def begin(self, start: float) -> None:
        """At the first batch, put a KeepSparsity on the Learner, and give it all masks.

        Args:
            start: The fraction of the fit that is skipped, as when training is resumed.

        Raises:
            ValueError: Two SparsifyCallbacks prune the same layer.
        """
        instead = ", prune in two fits (the second keeps the zeros of the first), or remove one of them"
        check_apart("fit", "SparsifyCallbacks", self._sparsifiers, instead)
        self.keepers = keepers = Keepers(self.learn)
        had_keepers = keepers.find()
        for callback in self.callbacks:
            if callback.pruned is not None:
                self.parts[callback] = FitPart(self.learn, callback.pruning, callback.pruned, keepers)
        keepers.parts = list(self.parts.values())
        if self.advances:
            for part in keepers.parts:
                part.prepare(start)
        if any(part.changes_its_mind for part in keepers.parts):
            keepers.own.masks_of_gradients = {}  # moments that a resumed fit has loaded move dense weights: they stay
        if not had_keepers and any(highest(callback.pruning.ramp.sparsity) for callback in self.callbacks):
            self._recover_zeros(start)
        kept = keepers.masks
        for part in keepers.parts:
            others = [each for each in self._sparsifiers if each is not part.sparsifier]
            part.pruned.take_in(kept, self.learn, {name for each in others for name in each.all_masks})
            part.warn_of_higher_sparsity(start)
        keepers.give(kept)
        for part in keepers.parts:
            if self.advances:
                part.tell_of_earlier_zeros(start)
            if part.straight_through is not None:
                part.straight_through.begin()

    def _recover_zeros(self, start: float) -> None:
        """Keep the zeros of a model that is sparse already. A schedule that falls can revive them."""
        parts = self.parts.values() if self.advances else ()
        reviving = [part.sparsifier for part in parts if part.pruning.ramp.falls_after(start, part.floor)]
        for sparsifier in reviving:
            sparsifier.recover_masks()
        if len(reviving) == len(self.callbacks):
            return
        resumed = [part.sparsifier for part in self.parts.values() if part.pruned.is_resumed]
        self.keepers.own.recover(True, {name: mask for each in resumed for name, mask in each.masks.items()})
        if self.advances and prune_any(self.keepers.own.masks):
            share = self.measured()
            what = (
                f"the {percent(share)} of zeros that the model has" if share else "the zeros of layers that stay dense"
            )
            notify(self.learn, f"SparsifyCallback keeps {what}")

    def tell_of_trackers(self) -> None:
        """Tell the user which epochs trackers will ignore."""
        learn = self.learn
        names, total = self.trackers.names(learn), learn.n_epoch * learn.n_iter
        short = [
            epoch
            for epoch in range(learn.epoch, learn.n_epoch)
            if any(part.is_short_after((epoch + 1) * learn.n_iter, total) for part in self.parts.values())
        ]
        if not names or not short:
            return
        epochs = f"epoch {short[0]}" if len(short) == 1 else f"epochs {short[0]} to {short[-1]}"
        targets = dict.fromkeys(
            percent(highest(mapped(part.pruning.ramp.sparsity, partial(mul, part.level_at(1.0)))))
            for part in self.parts.values()
        )
        settles = any(part.straight_through is not None for part in self.parts.values())
        ignore = f"{' and '.join(names)} {'ignore' if len(names) > 1 else 'ignores'} {epochs}"
        until = f"before the schedule is at its target of {' and '.join(targets)}"
        notify(learn, f"{ignore}, {until}{' and masks have settled' if settles else ''}")

    # --- What is shown ------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Record an epoch. Trackers ignore it if it is short of the target sparsity."""
        self.curves.by_epoch.append((self.learn.epoch, self.level, self.measured()))
        if any(part.moved for part in self.parts.values()):
            self.trackers.forget(self.learn)
            for part in self.parts.values():
                part.moved = False
        if self.is_short:
            self.trackers.pause(self.learn)

    def record(self) -> None:
        """Give the curves to the recorder. If the fit is short of the target sparsity, no best epoch is loaded."""
        self.trackers.resume()
        if self.begun:
            self.curves.hand_over(self.learn)
            if self.advances:
                for part in self.parts.values():
                    part.warn_of_higher_sparsity()
                self.trackers.pause_loading(self.learn, self.is_short)
                self.trackers.paused = []  # fastai switches all callbacks on again at the end of a fit

    def leave(self, callback: Any) -> None:
        """Let a callback leave the fit. The last one that leaves ends it."""
        if all(each in self.left for each in self.callbacks if each is not callback):
            self.end()
        if callback in self.parts:
            self.parts[callback].end()
        self.left.add(callback)

    def end(self) -> None:
        """Restore the Learner, except for the zeros and the KeepSparsity, and tell the user what is left."""
        if self.begun:
            self.keepers.give_back()
            if self.is_short:
                notify(self.learn, "SparsifyCallback: the fit has ended before its schedule did, or its masks settled")
            self.keepers.announce(self.measured())
            for part in self.parts.values():
                part.pruned.tell_of_starved(self.learn)
        self.undo()

    def undo(self) -> None:
        """Restore the training table, the trackers and the step of the optimizer."""
        for part in self.parts.values():
            part.end()
        self.column.hide()
        self.trackers.resume()

    @property
    def _sparsifiers(self) -> list:
        return [callback.sparsifier for callback in self.callbacks if callback.pruned is not None]
