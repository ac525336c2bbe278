"""Straight-through training in a fit of a Learner: the optimizer moves dense weights, until the masks are settled."""

from __future__ import annotations

from typing import Any

from ..support.stand_in import StandIn
from .display import notify
from .pruned import Pruned


class StraightThrough(StandIn):
    """Moves the dense weights in the step of the optimizer of a Learner.

    Whatever happens in the step, the model is sparse after it. Events of a Learner could not ensure that, because none
    comes after a step that was interrupted.

    Args:
        learn: The Learner.
        pruned: What is pruned, and the Sparsifier with straight_through.
        settle: The fraction of the fit after which the masks are fixed.
    """

    def __init__(self, learn: Any, pruned: Pruned, settle: float):
        super().__init__(learn.opt)
        self.learn, self.pruned, self.settle = learn, pruned, settle

    def _step(self, *arguments: Any, **keywords: Any) -> Any:
        with self.pruned.sparsifier.dense_weights():
            return self.own_step(*arguments, **keywords)

    def begin(self) -> None:
        """Let the optimizer move what is pruned, but not the zeros of others, which are kept."""
        super().begin()
        layers, masks = self.pruned.sparsifier.layers, self.pruned.sparsifier.masks
        fixed = [layers[name].count(mask).zeros for name, mask in self.pruned.others.items() if name in masks]
        if any(fixed):
            message = (
                f"{sum(fixed):,} weights were zero before this fit and stay so, though straight_through= lets others "
                "come back; to resume a fit in which all can, load the state_dict of its callback"
            )
            notify(self.learn, f"SparsifyCallback: {message}", matters=True)


def straight_through_of(learn: Any, pruned: Pruned, settle: float, start: float) -> Any:
    """A StraightThrough; or None if the masks are settled, which the user is told of.

    Args:
        learn: As of `StraightThrough`.
        pruned: As of `StraightThrough`.
        settle: As of `StraightThrough`.
        start: The fraction of the fit that is skipped.
    """
    if pruned.sparsifier.is_straight_through:
        return StraightThrough(learn, pruned, settle)
    if start < settle:
        message = "the masks have settled in an earlier fit, so they do not change their mind in this one"
        notify(learn, f"SparsifyCallback: {message}", matters=True)
    return None
