"""The step of an optimizer in straight-through training: it moves the dense weights, and leaves the sparse ones."""

from __future__ import annotations

from typing import Any

from ..sparsifier.sparsifier import Sparsifier


class DenseStep:
    """Stands in for the `step` of an optimizer, so that whatever happens in it, the model is sparse after it.

    Events of a Learner cannot do this: none comes after a step that was interrupted.

    Args:
        optimizer: The optimizer of the Learner.
        sparsifier: The Sparsifier, with straight_through.
    """

    def __init__(self, optimizer: Any, sparsifier: Sparsifier):
        self.optimizer, self.sparsifier = optimizer, sparsifier
        self._held = vars(optimizer).get("step")  # what a user has put on the optimizer itself, if anything

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with self.sparsifier.dense_weights():
            step = self._held or type(self.optimizer).step.__get__(self.optimizer)
            return step(*arguments, **keywords)

    def put_on(self) -> None:
        """Put it on the optimizer."""
        self.optimizer.step = self

    def take_off(self) -> None:
        """Give the optimizer its own step again."""
        if vars(self.optimizer).get("step") is not self:
            return
        if self._held is None:
            del self.optimizer.step
        else:
            self.optimizer.step = self._held
