"""One fit of a Learner with SparsifyCallback: created when the fit begins, dropped when it ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastai.learner import Learner

from ..gradual.gradual_pruning import GradualPruning
from ..model.parallel import unwrapped
from ..sparsifier.layer_selection import scopes
from ..sparsifier.model_masks import prune_any
from ..sparsifier.options import highest
from ..sparsifier.report import Report
from ..sparsifier.sparsifier import Sparsifier
from ..support.listing import in_short
from ..support.table import percent
from ..support.warning import warn
from .display import Column, Curves, Trackers, notify
from .keepers import Keepers
from .learner import show_data
from .pruned import Pruned
from .straight_through import straight_through_of

# By less than this fraction of the weights, a sparsity above the target is not worth a warning.
EXCESS = 0.01


@dataclass(eq=False)
class Fit:
    """Moves the sparsity of a model along a ramp in one fit, and keeps and shows what was pruned.

    Attributes:
        learn: The Learner.
        pruning: What is pruned in the fit, how, and when.
        pruned: What was pruned so far: a Pruned; or None, before the first batch of the first fit that prunes.
        advances: Whether the sparsity follows the ramp; it does not while layers are frozen.
        floor: What earlier fits reached, as a fraction of the target sparsity.
        keepers: What keeps the pruned weights at zero: Keepers; or None, before the first batch.
        updated: How many batches were done at the last mask update.
        moved: Whether the level has changed or weights have regrown since the trackers last compared an epoch.
        warned: Whether the user was warned of a higher sparsity than asked for.
        regrowing: Whether weights have regrown in the last update that was due.
        told: The layers of which the user was told that they rest because they are frozen.
        column: The column `sparsity` of the training table.
        curves: The curves for the Recorder.
        trackers: Pauses SaveModelCallback and the like.
        straight_through: A StraightThrough, as long as masks can change their mind; else None.
    """

    learn: Learner
    pruning: GradualPruning
    pruned: Any
    advances: bool = False
    floor: float = field(init=False)
    keepers: Any = None
    updated: int = 0
    moved: bool = False
    warned: bool = False
    regrowing: bool = False
    told: set[str] = field(default_factory=set)
    column: Column = field(init=False)
    curves: Curves = field(default_factory=Curves)
    trackers: Trackers = field(default_factory=Trackers)
    straight_through: Any = None

    def __post_init__(self) -> None:
        self.floor = 0.0 if self.pruned is None else self.pruned.reached
        self.column = Column(self.learn, self.measured)
        self.column.show()

    @property
    def begun(self) -> bool:
        """Whether the fit is past its first batch."""
        return self.keepers is not None

    @property
    def moves(self) -> bool:
        """Whether the sparsity follows the ramp at present."""
        return self.advances and self.begun

    @property
    def is_short(self) -> bool:
        """Whether the level is not yet that of the end of the fit, or masks can still change their mind."""
        return self.moves and (self.straight_through is not None or self.pruned.reached != self.level_at(1.0))

    @property
    def level(self) -> float:
        """The sparsity that was last asked for."""
        return 0.0 if self.pruned is None else self.pruned.sparsifier.level

    def measured(self) -> float:
        """The measured sparsity of the selected layers."""
        if self.pruned is not None:
            return self.pruned.sparsifier.sparsity
        return Report.of(unwrapped(self.learn.model)).selected.sparsity

    def level_at(self, t: float) -> float:
        """Where the ramp is after a fraction t of the fit, as a fraction of the target sparsity."""
        return self.pruning.ramp.at(t, self.floor)

    # --- Moving the sparsity ------------------------------------------------------------------------------------

    def begin(self, pruned: Pruned | None, start: float) -> None:
        """At the first batch, put a KeepSparsity on the Learner, and give it all masks.

        Args:
            pruned: What the callback has pruned so far, with its Sparsifier; None if it stays without one.
            start: The fraction of the fit that is skipped, as when training is resumed.
        """
        self.pruned, revives = pruned, self.pruning.ramp.falls_after(start, self.floor)
        self.keepers = Keepers(self.learn)
        had_keepers = self.keepers.find()
        settle = self.pruning.settle
        if pruned is not None and settle is not None and self.advances and highest(self.pruning.ramp.sparsity):
            self.straight_through = straight_through_of(self.learn, pruned, self.keepers.own, settle, start)
        if not had_keepers and highest(self.pruning.ramp.sparsity):
            self._recover_zeros(revives)
        kept = self.keepers.masks
        if pruned is not None:
            pruned.take_in(kept, self.learn)
            kept = pruned.masks
            self._warn_of_higher_sparsity(revives)
        self.keepers.give(kept)
        if self.straight_through is not None:
            self.straight_through.begin()

    def _warn_of_higher_sparsity(self, revives: bool) -> None:
        """Warn once if more is pruned than this fit asks for, and stays so. revives: whether the schedule will fall."""
        sparsifier = self.pruned.sparsifier
        if self.warned or revives or sparsifier.ranking.options.regrow is not None:
            return
        kept = self.pruned.masks
        for target, names in scopes(
            self.pruning.ramp.sparsity_at(self.level_at(1.0)), sparsifier.layers, sparsifier.model
        ):
            layers = [sparsifier.layers[name] for name in names]
            counts = [layer.count(kept[layer.name]) for layer in layers]
            zeros, weights = sum(each.zeros for each in counts), sum(each.weights for each in counts)
            largest_group = _rounding(sparsifier, names)
            if target and zeros > target * weights + max(EXCESS * weights, largest_group):
                self.warned = True
                instead = "call learn.remove_cb(KeepSparsity) and train without sparsity for a while, or "
                outputs = any(layer.grouping.drops_outputs for layer in layers)  # these do not come back by themselves
                warn(
                    f"SparsifyCallback: {percent(zeros / weights)} of the weights are pruned, more than the "
                    f"{percent(target)} asked for, because zeros of earlier fits stay; to let them go, "
                    f"{'' if outputs else instead}load weights from before they were pruned"
                )
                return

    def go_to(self, t: float) -> None:
        """Update the masks, if the ramp has another value at t, or if layers that were frozen are trained now."""
        reached, pruned = self.level_at(t), self.pruned
        # While weights regrow, layers that cannot regrow rest: an update of all would prune what has just regrown.
        joining = pruned.join(pruned.sparsifier.resting(drop=float(self.regrowing)))
        if joining or reached != pruned.reached or (self.straight_through is not None and reached):
            if pruned.sparsifier.collected.looks_at_data:
                pruned.sparsifier.apply_masks()  # the last step may have moved masked weights
            show_data(self.learn, pruned.sparsifier, self.pruning.calibration, anew=joining)
            self.moved |= joining
            self._update(reached)
        if self.settles_at(t):
            self.straight_through.fix()
            self.straight_through, self.moved = None, True

    def collect_gradients(self, t: float, drop: float, is_due: bool) -> None:
        """Collect the gradients for the criterion. They are not masked yet. With straight_through, pull pruned weights.

        Args:
            t: The fraction of the fit that is done after the present batch.
            drop: Fraction of the remaining weights that is pruned and regrown now, or 0.
            is_due: Whether the masks are updated in this step.
        """
        reached, sparsifier = self.level_at(t), self.pruned.sparsifier
        if is_due:
            self.regrowing = drop > 0
        if drop and reached > 0:
            show_data(self.learn, sparsifier, self.pruning.calibration)
            sparsifier.collect_gradients()
            # A rising level is reached in the same update. A second update would prune the regrown weights at once,
            # because their scores are lowest.
            self._update(reached, drop)
        elif self.straight_through is not None:
            self.straight_through.pull()
        elif sparsifier.collected.at("backward"):
            sparsifier.collected.add("backward")

    def settles_at(self, t: float) -> bool:
        """With straight_through, whether the masks are to be fixed after this fraction of the fit."""
        return self.straight_through is not None and t >= self.straight_through.settle

    def _update(self, reached: float, drop: float = 0.0) -> None:
        """Update the masks. drop: fraction of the remaining weights that is pruned and regrown."""
        sparsifier = self.pruned.sparsifier
        resting = sparsifier.resting(drop)
        self._tell_of_resting(resting)
        before = dict(sparsifier.layers)
        try:
            sparsifier.update_masks(self.pruning.ramp.sparsity_at(reached), self.learn.opt, drop=drop)
            self._note_update(reached, drop, resting)
        except BaseException:
            sparsifier.apply_masks()  # ends the update, if it has begun
            if any(layer is not before.get(name) for name, layer in sparsifier.layers.items()):
                self._note_update(reached, drop, resting)
            raise

    def _note_update(self, reached: float, drop: float, resting: Collection[str]) -> None:
        """Keep what an update has pruned. The arguments are those of the update, and the layers that it left out."""
        pruned = self.pruned
        self.keepers.own.masks = pruned.masks
        if self.keepers.own.learn is None:  # the user has removed it during the fit
            pruned.sparsifier.apply_masks()
            pruned.sparsifier.mask_moments(self.learn.opt)
        # After regrowth, too, trackers must forget their best epoch: it has other masks than those that are kept.
        self.moved |= bool(drop) or reached != pruned.reached or self.straight_through is not None
        pruned.reached, pruned.layers = reached, pruned.sparsifier.masks.keys() - resting

    def _tell_of_resting(self, resting: Collection[str]) -> None:
        """Tell the user once of each layer that updates leave out because it is frozen."""
        new = [name for name in self.pruned.sparsifier.masks if name in resting and name not in self.told]
        self.told.update(new)
        if new:
            message = (
                f"SparsifyCallback: no gradient reaches {in_short(new)}, frozen at present, so its sparsity stays as "
                "it is until it is trained"
            )
            notify(self.learn, message, matters=True)

    # --- What keeps the zeros -----------------------------------------------------------------------------------

    def _recover_zeros(self, revives: bool) -> None:
        """Keep the zeros of a model that is sparse already. revives: whether the schedule will fall."""
        if self.advances and revives:
            self.pruned.sparsifier.recover_masks()  # this schedule pruned them, and will revive them
            return
        self.keepers.own.recover(force=True)
        if self.advances and prune_any(self.keepers.own.masks):
            notify(self.learn, f"SparsifyCallback keeps the {percent(self.measured())} of zeros that the model has")

    # --- What is shown ------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Record an epoch. Trackers ignore it if it is short of the target sparsity."""
        self.curves.by_epoch.append((self.learn.epoch, self.level, self.measured()))
        if self.moved:
            self.trackers.forget(self.learn)
            self.moved = False
        if self.is_short:
            self.trackers.pause(self.learn)

    def record(self) -> None:
        """Give the curves to the recorder. If the fit is short of the target sparsity, no best epoch is loaded."""
        self.trackers.resume()
        if self.begun:
            self.curves.hand_over(self.learn)
            if self.advances:
                self._warn_of_higher_sparsity(revives=False)
                self.trackers.pause_loading(self.learn, self.is_short)
                self.trackers.paused = []  # fastai switches all callbacks on again at the end of a fit

    def end(self) -> None:
        """Restore the Learner, except for the zeros and the KeepSparsity, and tell the user what is left."""
        if self.begun:
            self.keepers.give_back()
            if self.is_short:
                notify(self.learn, "SparsifyCallback: the fit has ended before its schedule did, or its masks settled")
            self.keepers.announce(self.measured())
            if self.pruned is not None:  # else all layers were frozen, and nothing was ranked
                self.pruned.tell_of_starved(self.learn)
        self.undo()

    def undo(self) -> None:
        """Restore the training table, the trackers and the step of the optimizer."""
        if self.straight_through is not None:
            self.straight_through.end()
        self.column.hide()
        self.trackers.resume()


def _rounding(sparsifier: Sparsifier, names: Iterable[str]) -> float:
    """By how many weights the count can be above the target, since groups are pruned as a whole."""
    coupling, layers = sparsifier.ranking.coupling, sparsifier.layers
    if coupling is not None:
        return coupling.rounding(names, layers)
    return max(float(torch.as_tensor(layers[name].grouping.size).max()) for name in names)
