"""A Sparsifier that follows a ramp: what is done before and after each step of an optimizer, in whatever loop."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ..model.tensors import all_finite
from ..sparsifier.layer_selection import scopes
from ..sparsifier.sparsifier import Sparsifier
from ..support.listing import in_short
from ..support.table import percent
from ..support.warning import warn
from .gradual_pruning import GradualPruning

# By less than this fraction of the weights, a sparsity above the target is not worth a warning.
EXCESS = 0.01


@dataclass(eq=False)
class GradualSparsifier:
    """A Sparsifier whose sparsity follows a ramp, step by step.

    Attributes:
        pruning: What is pruned, how, and when.
        sparsifier: The Sparsifier.
        optimizer: The optimizer that steps the weights.
        show: Called with True if layers have joined, else False, before masks are built: collects what the criterion
            needs of data.
        reached: The level that was last asked for, as a fraction of the target sparsity.
        updated: How many steps were done at the last mask update.
        regrowing: Whether weights have regrown in the last update that was due.
        postponed: Whether the update that is due waits for a batch with finite gradients.
        layers: Names of the layers that were ranked at the last mask update.
        told: The layers of which the user was told that they rest because they are frozen.
    """

    pruning: GradualPruning
    sparsifier: Sparsifier
    optimizer: Any
    show: Callable[[bool], None]
    reached: float = 0.0
    updated: int = 0
    regrowing: bool = False
    postponed: bool = False
    layers: set[str] = field(init=False)
    told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers = set(self.sparsifier.masks)

    @property
    def changes_its_mind(self) -> bool:
        """Whether dense weights are ranked anew, until the masks settle."""
        return self.sparsifier.is_straight_through

    def is_final(self, steps: int, total: int) -> bool:
        """Whether the masks stay as they are until the end, after a number of steps."""
        t, ramp = steps / total, self.pruning.ramp
        if self.changes_its_mind or self.reached != ramp.at(1.0):
            return False
        return steps == total or (t >= ramp.last_move and not self.pruning.drop_at(t))

    # --- Around a step ------------------------------------------------------------------------------------------

    def before_step(self, steps: int, total: int) -> None:
        """Collect the gradients, which are not masked yet, for the criterion; regrow weights, or pull pruned ones.

        Args:
            steps: Steps that are done, without this one.
            total: Steps of the whole training.
        """
        sparsifier = self.sparsifier
        is_due = self.pruning.is_due(steps + 1, self.updated, total)
        # Weights regrow before the step, so that this step already moves them away from zero.
        drop = self.pruning.drop_at(steps / total) if is_due else 0.0
        self.postponed = bool(drop) and not all_finite(
            layer.parameter.grad for layer in sparsifier.layers.values() if layer.is_selected
        )
        if self.postponed:
            return
        reached = self.pruning.ramp.at((steps + 1) / total)
        if is_due:
            self.regrowing = drop > 0
        if drop and reached > 0:
            self.show(False)
            sparsifier.collect_gradients()
            # A rising level is reached in the same update. A second update would prune the regrown weights at once,
            # because their scores are lowest.
            self._update(reached, drop)
        elif self.changes_its_mind:
            sparsifier.mask_gradients()
        elif sparsifier.collected.at("backward"):
            sparsifier.collected.add("backward")

    def after_step(self, steps: int, total: int) -> None:
        """Prune to where the ramp is after this step.

        Args:
            steps: Steps that are done, with this one.
            total: Steps of the whole training.
        """
        is_due = self.pruning.is_due(steps, self.updated, total) and not self.postponed
        if is_due or steps == total or self._settles_at(steps / total):
            self.updated = steps
            self.go_to(steps / total)

    def go_to(self, t: float) -> None:
        """Update the masks, if the ramp has another value at t, or if layers that were frozen are trained now."""
        reached, sparsifier = self.pruning.ramp.at(t), self.sparsifier
        sparsifier.select_unfrozen()
        # While weights regrow, layers that cannot regrow rest: an update of all would prune what has just regrown.
        resting = sparsifier.resting(drop=float(self.regrowing))
        joining = not sparsifier.masks.keys() <= {*self.layers, *resting}
        if joining or reached != self.reached or (self.changes_its_mind and reached):
            if sparsifier.collected.looks_at_data:
                sparsifier.apply_masks()  # the last step may have moved masked weights
            self.show(joining)
            self._update(reached)
        if self._settles_at(t):
            sparsifier.settle(self.optimizer)

    def _settles_at(self, t: float) -> bool:
        settle = self.pruning.settle
        return self.changes_its_mind and settle is not None and t >= settle

    def _update(self, reached: float, drop: float = 0.0) -> None:
        """Update the masks. drop: fraction of the remaining weights that is pruned and regrown."""
        sparsifier = self.sparsifier
        resting = sparsifier.resting(drop)
        self._tell_of_resting(resting)
        before = dict(sparsifier.layers)
        try:
            sparsifier.update_masks(self.pruning.ramp.sparsity_at(reached), self.optimizer, drop=drop)
            self._note(reached, resting)
        except BaseException:
            sparsifier.apply_masks()  # ends the update, if it has begun
            if any(layer is not before.get(name) for name, layer in sparsifier.layers.items()):
                self._note(reached, resting)
            raise

    def _note(self, reached: float, resting: Collection[str]) -> None:
        self.reached, self.layers = reached, self.sparsifier.masks.keys() - resting

    def _tell_of_resting(self, resting: Collection[str]) -> None:
        """Warn once of each layer that updates leave out because it is frozen."""
        new = [name for name in self.sparsifier.masks if name in resting and name not in self.told]
        self.told.update(new)
        if new:
            warn(
                f"no gradient reaches {in_short(new)}, frozen at present, so its sparsity stays as it is until it is "
                "trained"
            )

    # --- Told ---------------------------------------------------------------------------------------------------

    def warn_of_higher_sparsity(self) -> None:
        """Warn if more is pruned than is asked for, and stays so, because the model was sparse before."""
        sparsifier, end = self.sparsifier, self.pruning.ramp.at(1.0)
        if self.pruning.regrows or self.pruning.ramp.falls_after(0.0, 0.0):
            return
        for target, names in scopes(self.pruning.ramp.sparsity_at(end), sparsifier.layers, sparsifier.model):
            layers = [sparsifier.layers[name] for name in names]
            counts = [layer.count() for layer in layers]
            zeros, weights = sum(each.zeros for each in counts), sum(each.weights for each in counts)
            if target and zeros > target * weights + max(EXCESS * weights, self._rounding(names)):
                warn(
                    f"{percent(zeros / weights)} of the weights are pruned, more than the {percent(target)} asked for, "
                    "because the zeros that the model has stay; to let them go, load weights from before they were "
                    "pruned"
                )
                return

    def _rounding(self, names: list[str]) -> float:
        """By how many weights the count can be above the target, since groups are pruned as a whole."""
        coupling, layers = self.sparsifier.ranking.coupling, self.sparsifier.layers
        if coupling is not None:
            return coupling.rounding(names, layers)
        return max(_largest(layers[name].grouping.size) for name in names)

    # --- State --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What another one of the same options needs to continue."""
        of_ramp = {"reached": float(self.reached), "updated": self.updated, "regrowing": self.regrowing}
        return {"sparsifier": self.sparsifier.state_dict(), **of_ramp, "layers": sorted(self.layers)}

    def load(self, state: Any) -> None:
        """Continue from what `state` has returned."""
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.reached, self.updated = state["reached"], state["updated"]
        self.regrowing, self.layers = state["regrowing"], set(state["layers"])


def _largest(size: Any) -> float:
    """The largest number of weights of a group."""
    return float(size if isinstance(size, int) else size.max())
