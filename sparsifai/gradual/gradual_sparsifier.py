"""A Sparsifier that follows a ramp: what is done before and after each step of an optimizer, in whatever loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.tensors import all_finite
from ..sparsifier.layer_selection import scopes
from ..sparsifier.model_masks import prunes
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
        floor: What earlier trainings have reached, as a fraction of the target sparsity, below which it does not go.
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
    floor: float = 0.0
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

    def level_at(self, t: float) -> float:
        """Where the ramp is after a fraction t of the training, as a fraction of the target sparsity."""
        return self.pruning.ramp.at(t, self.floor)

    def is_final(self, steps: int, total: int) -> bool:
        """Whether the masks stay as they are until the end, after a number of steps."""
        t = steps / total
        if self.changes_its_mind or self.reached != self.level_at(1.0):
            return False
        return steps == total or (t >= self.pruning.ramp.last_move and not self.pruning.drop_at(t))

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
        reached = self.level_at((steps + 1) / total)
        if is_due:
            self.regrowing = drop > 0
        if drop and reached > 0:
            self.show(False)
            sparsifier.collect_gradients()
            # A rising level is reached in the same update. A second update would prune the regrown weights at once,
            # because their scores are lowest.
            self._update(reached, drop)
        elif self.changes_its_mind:
            self._pull()
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
        reached, sparsifier = self.level_at(t), self.sparsifier
        self._select_unfrozen()
        # While weights regrow, layers that cannot regrow rest: an update of all would prune what has just regrown.
        resting = sparsifier.resting(drop=float(self.regrowing))
        joining = not sparsifier.masks.keys() <= {*self.layers, *resting}
        if joining or reached != self.reached or (self.changes_its_mind and reached):
            if sparsifier.collected.looks_at_data:
                sparsifier.apply_masks()  # the last step may have moved masked weights
            self.show(joining)
            self._update(reached)
        if self._settles_at(t):
            self._settle()

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
            self._note(reached, drop, resting)
        except BaseException:
            sparsifier.apply_masks()  # ends the update, if it has begun
            if any(layer is not before.get(name) for name, layer in sparsifier.layers.items()):
                self._note(reached, drop, resting)
            raise

    def _tell_of_resting(self, resting: Collection[str]) -> None:
        """Tell the user once of each layer that updates leave out because it is frozen."""
        new = [name for name in self.sparsifier.masks if name in resting and name not in self.told]
        self.told.update(new)
        if new:
            self._tell(
                f"no gradient reaches {in_short(new)}, frozen at present, so its sparsity stays as it is until it is "
                "trained"
            )

    # --- What a loop can do in another way ----------------------------------------------------------------------

    def _note(self, reached: float, drop: float, resting: Collection[str]) -> None:
        """Note an update that was made. The arguments are those of the update, and the layers that it left out."""
        self.reached, self.layers = reached, self.sparsifier.masks.keys() - resting

    def _select_unfrozen(self) -> None:
        """Select the layers that were frozen and are trained now."""
        self.sparsifier.select_unfrozen()

    def _pull(self) -> None:
        """In straight-through training, prepare the gradients for a step of the dense weights."""
        self.sparsifier.mask_gradients()

    def _settle(self) -> None:
        """Fix the masks. From here on, a sparse model is trained."""
        self.sparsifier.settle(self.optimizer)

    def _tell(self, message: str) -> None:
        """Tell the user something."""
        warn(message)

    def higher_sparsity(self, masks: Mapping[str, Tensor], start: float = 0.0) -> str:
        """What to warn of if more is pruned than is asked for, and stays so; else nothing.

        Args:
            masks: Parameter name -> mask of everything that is kept at zero.
            start: The fraction of the training that is done.
        """
        sparsifier, ramp = self.sparsifier, self.pruning.ramp
        if self.pruning.regrows or ramp.falls_after(start, self.floor):
            return ""
        for target, names in scopes(ramp.sparsity_at(self.level_at(1.0)), sparsifier.layers, sparsifier.model):
            layers = [sparsifier.layers[name] for name in names]
            counts = [layer.count(masks[layer.name]) for layer in layers]
            zeros, weights = sum(each.zeros for each in counts), sum(each.weights for each in counts)
            if target and zeros > target * weights + max(EXCESS * weights, self._rounding(names)):
                return (
                    f"{percent(zeros / weights)} of the weights are pruned, more than the {percent(target)} asked for"
                )
        return ""

    def _rounding(self, names: list[str]) -> float:
        """By how many weights the count can be above the target, since groups are pruned as a whole."""
        coupling, layers = self.sparsifier.ranking.coupling, self.sparsifier.layers
        if coupling is not None:
            return coupling.rounding(names, layers)
        return max(float(torch.as_tensor(layers[name].grouping.size).max()) for name in names)

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


def show_batches(sparsifier: Sparsifier, batches: Iterable, loss_func: Callable | None, short: bool) -> None:
    """Give a Sparsifier the batches that it needs beside the gradients of past steps.

    Args:
        sparsifier: The Sparsifier.
        batches: As of `Sparsifier.calibrate`.
        loss_func: As of `Sparsifier.calibrate`.
        short: Whether its criterion needs them, as `Sparsifier.means_are_short` says; else only passes do.
    """
    if not short:
        sparsifier.keep_batches(batches, loss_func)
        return
    sparsifier.calibrate(batches, loss_func)
    # Start anew with the next gradients, so that no batch counts twice.
    sparsifier.collected.begins = sparsifier.collected.begins.union(sparsifier.collected.at("backward"))


def adopted(sparsifier: Sparsifier, others: Mapping[str, Tensor]) -> set[str]:
    """Names of the zeros of earlier trainings that a Sparsifier prunes as well, so that it can let them regrow.

    Args:
        sparsifier: The Sparsifier, whose masks may have been recovered from the zeros.
        others: Parameter name -> mask of these zeros.
    """
    masks, of_all = sparsifier.masks, sparsifier.all_masks
    of_layers = others.keys() & masks.keys()
    both = {name for name in of_layers if prunes(masks, {name: others[name]})}
    if both == of_layers:  # if all filters can regrow, their biases can, too
        both |= {name for name in others.keys() & of_all.keys() if prunes(of_all, {name: others[name]})}
    return both
