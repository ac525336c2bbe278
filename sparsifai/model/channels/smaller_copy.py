"""A copy of a model that gets smaller step by step, and must keep its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..running import sharing_copy
from ..tensors import is_float
from .output_check import OutputCheck


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    return [*model.named_parameters(), *model.named_buffers()]


class SmallerCopy:
    """A copy of a model, and the check that it keeps the outputs of the model.

    Parameters that have not been cut share memory with those of the model, so no step needs the memory of a whole copy.

    Args:
        model: The model, which is not changed.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.

    Attributes:
        model: The copy, in evaluation mode, in float32 where the model has half precision.
        example_input: The example, in float32 likewise.
        check: The example inputs, and the outputs of the model for them.

    Raises:
        ValueError: The model does not run on the example, or has other outputs when run again.
    """

    def __init__(self, model: nn.Module, example_input: Any):
        self.model = sharing_copy(model).eval()
        self.example_input = example_input
        halves = [value for _, value in named_tensors(self.model) if value.dtype in (torch.float16, torch.bfloat16)]
        if halves:
            # In half precision rounding would hide real differences.
            for value in halves:
                value.data = value.data.float()
            self.example_input = tree_map(_in_float32, self.example_input)
        self.check = OutputCheck(self.model, self.example_input)

    def try_change(self, change: Callable[[nn.Module], Any]) -> str:
        """Change the copy if the change keeps its outputs.

        Args:
            change: A function that changes a model in place. It replaces parameters and writes to none.

        Returns:
            Why the copy was not changed; empty if it was.
        """
        trial = sharing_copy(self.model)
        change(trial)
        why = self.check.why_not(trial)
        if not why:
            self.model = trial
        return why


def _in_float32(value: Any) -> Any:
    """A float tensor in float32; all else unchanged."""
    return value.float() if is_float(value) else value
