"""Standing in for the step of an optimizer that others call."""

from __future__ import annotations

from typing import Any

# What torch's schedulers leave on a step, to warn of one that was replaced.
_MARK = "_wrapped_by_lr_sched"


class StandIn:
    """Stands in for the `step` of an optimizer, from `begin` to `end`. Subclasses say what is done in its place.

    Args:
        optimizer: The optimizer.

    Attributes:
        optimizer: The optimizer.
        own_step: What it stands in for.
        ended: Whether `end` was called. Then it only calls `own_step`, since another one may stand in for it.
    """

    def __init__(self, optimizer: Any):
        self.optimizer, self.own_step, self.ended = optimizer, optimizer.step, False
        self._is_put_on = False  # whether `own_step` is not that of the class, as after a scheduler

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The step."""
        return self.own_step(*arguments, **keywords) if self.ended else self._step(*arguments, **keywords)

    def _step(self, *arguments: Any, **keywords: Any) -> Any:
        """What is done in place of the own step."""
        raise NotImplementedError

    def begin(self) -> None:
        """Replace the step."""
        self.own_step, self._is_put_on = self.optimizer.step, "step" in vars(self.optimizer)
        if hasattr(self.own_step, _MARK):
            setattr(self, _MARK, True)
        self.optimizer.step = self

    def end(self) -> None:
        """Give the optimizer its own step again. It may be called twice."""
        self.ended = True
        step = vars(self.optimizer).get("step")
        if step is not self:  # another one stands in for this one, and gives back what this one has stood in for
            return
        while isinstance(step, StandIn) and step.ended:
            step = step.own_step if step._is_put_on else None
        if step is None:
            del self.optimizer.step
        else:
            self.optimizer.step = step
