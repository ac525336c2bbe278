"""Straight-through training in a fit of a Learner: the optimizer moves dense weights, until the masks are settled."""

from __future__ import annotations

from typing import Any

from .display import notify
from .keep import KeepSparsity
from .others import are_all_known
from .pruned import Pruned


class StraightThrough:
    """Stands in for the `step` of the optimizer of a Learner, which moves the dense weights.

    Whatever happens in the step, the model is sparse after it. Events of a Learner could not ensure that, because none
    comes after a step that was interrupted.

    Args:
        learn: The Learner.
        pruned: What is pruned, and the Sparsifier with straight_through.
        keeper: The KeepSparsity that keeps the zeros in this fit.
        settle: The fraction of the fit after which the masks are fixed.
    """

    def __init__(self, learn: Any, pruned: Pruned, keeper: KeepSparsity, settle: float):
        self.learn, self.pruned, self.keeper, self.settle = learn, pruned, keeper, settle
        self.optimizer: Any = learn.opt
        self.own_step = self.optimizer.step
        self.is_put_on = "step" in vars(self.optimizer)  # whether it is not that of the class, as after a scheduler
        keeper.masks_of_gradients = {}  # moments that a resumed fit has loaded move dense weights, so they stay

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The step."""
        with self.pruned.sparsifier.dense_weights():
            return self.own_step(*arguments, **keywords)

    def begin(self) -> None:
        """Let the optimizer move what is pruned, but not the zeros of others, which are kept."""
        self.keeper.masks_of_gradients = self.pruned.others
        self.keeper.enforce()
        self.optimizer.step = self
        layers, masks = self.pruned.sparsifier.layers, self.pruned.sparsifier.masks
        fixed = [layers[name].count(mask).zeros for name, mask in self.pruned.others.items() if name in masks]
        if any(fixed):
            message = (
                f"{sum(fixed):,} weights were zero before this fit and stay so, though straight_through= lets others "
                "come back; to resume a fit in which all can, load the state_dict of its callback"
            )
            notify(self.learn, f"SparsifyCallback: {message}", matters=True)

    def pull(self) -> None:
        """Collect the gradients, and prepare them for a step of the dense weights."""
        if not are_all_known(self.learn):
            self.pruned.sparsifier.apply_masks()  # looks at all weights, of which a callback may have changed any
        self.pruned.sparsifier.mask_gradients()

    def fix(self) -> None:
        """Fix the masks. From here on, the fit trains a sparse model."""
        self.pruned.sparsifier.settle()
        self.end()
        if self.keeper.learn is not None:  # the user has not removed it
            self.keeper.enforce()

    def end(self) -> None:
        """Give the optimizer its own step again; from here on all zeros are kept."""
        self.keeper.masks_of_gradients = None
        if vars(self.optimizer).get("step") is self:
            del self.optimizer.step
            if self.is_put_on:
                self.optimizer.step = self.own_step


def straight_through_of(learn: Any, pruned: Pruned, keeper: KeepSparsity, settle: float, start: float) -> Any:
    """A StraightThrough; or None if the masks are settled, which the user is told of.

    Args:
        learn: As of `StraightThrough`.
        pruned: As of `StraightThrough`.
        keeper: As of `StraightThrough`.
        settle: As of `StraightThrough`.
        start: The fraction of the fit that is skipped.
    """
    if pruned.sparsifier.is_straight_through:
        return StraightThrough(learn, pruned, keeper, settle)
    if start < settle:
        message = "the masks have settled in an earlier fit, so they do not change their mind in this one"
        notify(learn, f"SparsifyCallback: {message}", matters=True)
    return None
