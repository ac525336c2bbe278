"""The step of an optimizer that another library calls: masks and dense weights are put around it."""

from __future__ import annotations

from typing import Any

import torch

from ..loops.manager import TrainingManager
from ..support.stand_in import StandIn


class ReplacedStep(StandIn):
    """Does in the place of an optimizer's step what a manager does around it, from `begin` to `end`.

    Args:
        optimizer: The optimizer.
        manager: The manager of its training.
        once: Whether the optimizer gets its own step back before the first call. Default False.
    """

    def __init__(self, optimizer: Any, manager: TrainingManager, once: bool = False):
        super().__init__(optimizer)
        self.manager, self.once = manager, once

    def _step(self, closure: Any = None, **keywords: Any) -> Any:
        if self.once:
            self.end()
        result = None
        if closure is not None:  # it computes the gradients, with the sparse weights
            with torch.enable_grad():
                result = closure()
        with self.manager.stepping():
            stepped = self.own_step(**keywords)
        return stepped if closure is None else result
