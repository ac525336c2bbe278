"""The step of an optimizer that another library calls: masks and dense weights are put around it."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from ..loops.manager import TrainingManager


class ReplacedStep:
    """Stands in for the `step` of an optimizer, from `begin` to `end`.

    Args:
        optimizer: The optimizer.
        manager: The manager of its training.
        once: Whether the optimizer gets its own step back before the first call. Default False.
    """

    def __init__(self, optimizer: Any, manager: TrainingManager, once: bool = False):
        self.optimizer, self.manager, self.once = optimizer, manager, once
        self._own: Any = None
        self._replacing: Any = None
        self._was_replaced = False

    def begin(self) -> None:
        """Replace the step."""
        self._own, self._was_replaced = self.optimizer.step, "step" in vars(self.optimizer)

        @wraps(self._own)  # schedulers of torch leave a mark on it
        def step(closure: Any = None, **keywords: Any) -> Any:
            if self.once:
                self.end()
            result = None
            if closure is not None:  # it computes the gradients, with the sparse weights
                with torch.enable_grad():
                    result = closure()
            with self.manager.stepping():
                stepped = self._own(**keywords)
            return stepped if closure is None else result

        self._replacing = step
        self.optimizer.step = step

    def end(self) -> None:
        """Give the optimizer its own step again."""
        if self._replacing is not None and vars(self.optimizer).get("step") is self._replacing:
            del self.optimizer.step
            if self._was_replaced:
                self.optimizer.step = self._own
        self._replacing = None
