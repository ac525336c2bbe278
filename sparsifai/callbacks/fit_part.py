"""What one SparsifyCallback does in one fit of a Learner: it moves the sparsity of its layers along a ramp."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastai.learner import Learner

from ..gradual.gradual_pruning import GradualPruning
from ..sparsifier.layer_selection import scopes
from ..sparsifier.options import highest
from ..sparsifier.sparsifier import Sparsifier
from ..support.listing import in_short
from ..support.table import percent
from ..support.warning import warn
from .display import notify
from .keepers import Keepers
from .learner import show_data
from .pruned import Pruned
from .straight_through import straight_through_of

# By less than this fraction of the weights, a sparsity above the target is not worth a warning.
EXCESS = 0.01


@dataclass(eq=False)
class FitPart:
    """Moves the sparsity of the layers of one SparsifyCallback along its ramp.

    Attributes:
        learn: The Learner.
        pruning: What is pruned in the fit, how, and when.
        pruned: What was pruned so far; or None, before the first batch of the first fit that prunes.
        floor: What earlier fits reached, as a fraction of the target sparsity.
        keepers: What keeps the pruned weights at zero; or None, before the first batch.
        updated: How many batches were done at the last mask update.
        moved: Whether the level has changed or weights have regrown since the trackers last compared an epoch.
        warned: Whether the user was warned of a higher sparsity than asked for.
        regrowing: Whether weights have regrown in the last update that was due.
        told: The layers of which the user was told that they rest because they are frozen.
        straight_through: A StraightThrough, until the masks are settled; else None.
        ended: Whether the callback has left the fit.
    """

    learn: Learner
    pruning: GradualPruning
    pruned: Pruned | None
    floor: float = field(init=False)
    keepers: Keepers | None = None
    updated: int = 0
    moved: bool = False
    warned: bool = False
    regrowing: bool = False
    told: set[str] = field(default_factory=set)
    straight_through: Any = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.floor = 0.0 if self.pruned is None else self.pruned.reached

    @property
    def sparsifier(self) -> Sparsifier:
        """The Sparsifier of the callback."""
        assert self.pruned is not None  # after `Fit.begin`, if the sparsity moves
        return self.pruned.sparsifier

    @property
    def changes(self) -> bool:
        """Whether masks can still change their mind."""
        return self.straight_through is not None and not self.straight_through.ended

    @property
    def is_short(self) -> bool:
        """Whether the level is not yet that of the end of the fit, or masks can still change their mind."""
        reached = 0.0 if self.pruned is None else self.pruned.reached
        return self.straight_through is not None or reached != self.level_at(1.0)

    def level_at(self, t: float) -> float:
        """Where the ramp is after a fraction t of the fit, as a fraction of the target sparsity."""
        return self.pruning.ramp.at(t, self.floor)

    def revives(self, start: float) -> bool:
        """Whether the schedule ever falls after this fraction of the fit."""
        return self.pruning.ramp.falls_after(start, self.floor)

    # --- Moving the sparsity ------------------------------------------------------------------------------------

    def prepare(self, start: float) -> None:
        """At the first batch of a fit in which the sparsity moves, prepare straight-through training.

        Args:
            start: The fraction of the fit that is skipped, as when training is resumed.
        """
        settle, pruned = self.pruning.settle, self.pruned
        if pruned is not None and settle is not None and highest(self.pruning.ramp.sparsity):
            self.straight_through = straight_through_of(self.learn, pruned, settle, start)

    def go_to(self, t: float) -> None:
        """Update the masks, if the ramp has another value at t, or if layers that were frozen are trained now."""
        reached, pruned, sparsifier = self.level_at(t), self.pruned, self.sparsifier
        assert pruned is not None
        # While weights regrow, layers that cannot regrow rest: an update of all would prune what has just regrown.
        joining = pruned.join(sparsifier.resting(drop=float(self.regrowing)))
        if joining or reached != pruned.reached or (self.straight_through is not None and reached):
            if sparsifier.collected.looks_at_data:
                sparsifier.apply_masks()  # the last step may have moved masked weights
            show_data(self.learn, sparsifier, self.pruning.calibration, anew=joining)
            self.moved |= joining
            self._update(reached)
        if self.settles_at(t):
            self._settle()

    def collect_gradients(self, t: float, drop: float, is_due: bool) -> None:
        """Collect the gradients for the criterion. They are not masked yet. With straight_through, pull pruned weights.

        Args:
            t: The fraction of the fit that is done after the present batch.
            drop: Fraction of the remaining weights that is pruned and regrown now, or 0.
            is_due: Whether the masks are updated in this step.
        """
        reached, sparsifier = self.level_at(t), self.sparsifier
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

    def end(self) -> None:
        """Leave the fit: give the optimizer its own step. The masks stay as they are."""
        self.ended = True
        if self.straight_through is not None:
            self.straight_through.end()
            if self.keepers is not None:
                self.keepers.refresh()

    def _settle(self) -> None:
        """Fix the masks. From here on, the fit trains a sparse model."""
        assert self.keepers is not None
        self.sparsifier.settle()
        self.straight_through.end()
        self.keepers.refresh()
        if self.keepers.own.learn is not None:  # the user has not removed it
            self.keepers.own.enforce()
        self.straight_through, self.moved = None, True

    def _update(self, reached: float, drop: float = 0.0) -> None:
        """Update the masks. drop: fraction of the remaining weights that is pruned and regrown."""
        sparsifier = self.sparsifier
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
        pruned, keepers = self.pruned, self.keepers
        assert pruned is not None
        assert keepers is not None
        keepers.refresh()
        if keepers.own.learn is None:  # the user has removed it during the fit
            pruned.sparsifier.apply_masks()
            pruned.sparsifier.mask_moments(self.learn.opt)
        # After regrowth, too, trackers must forget their best epoch: it has other masks than those that are kept.
        self.moved |= bool(drop) or reached != pruned.reached or self.straight_through is not None
        pruned.reached, pruned.layers = reached, pruned.sparsifier.masks.keys() - resting

    # --- What the user is told ----------------------------------------------------------------------------------

    def warn_of_higher_sparsity(self, revives: bool = False) -> None:
        """Warn once if more is pruned than this fit asks for, and stays so. revives: whether the schedule will fall."""
        if self.warned or revives or self.pruned is None or self.pruning.regrows:
            return
        sparsifier, kept = self.sparsifier, self.pruned.masks
        wanted = self.pruning.ramp.sparsity_at(self.level_at(1.0))
        for target, names in scopes(wanted, sparsifier.layers, sparsifier.model):
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

    def _tell_of_resting(self, resting: Collection[str]) -> None:
        """Tell the user once of each layer that updates leave out because it is frozen."""
        new = [name for name in self.sparsifier.masks if name in resting and name not in self.told]
        self.told.update(new)
        if new:
            message = (
                f"SparsifyCallback: no gradient reaches {in_short(new)}, frozen at present, so its sparsity stays as "
                "it is until it is trained"
            )
            notify(self.learn, message, matters=True)


def _rounding(sparsifier: Sparsifier, names: Iterable[str]) -> float:
    """By how many weights the count can be above the target, since groups are pruned as a whole."""
    coupling, layers = sparsifier.ranking.coupling, sparsifier.layers
    if coupling is not None:
        return coupling.rounding(names, layers)
    return max(float(torch.as_tensor(layers[name].grouping.size).max()) for name in names)
