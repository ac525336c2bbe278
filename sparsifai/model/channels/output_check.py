"""Whether a smaller model still has the outputs of the model that it is made from."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...support.printable import message_of
from ..running import check_runs, random_restored, run, untraced
from ..tensors import is_float, tensors_in

TOLERANCE = 1e-5  # largest difference between outputs, relative to the largest of them


class OutputCheck:
    """Example inputs, and the outputs that a model has for them.

    The inputs are the example, random numbers like it, and an example of another size if the model accepts one.

    Args:
        model: A model in evaluation mode, in float32 or float64.
        example_input: A batch, a tuple of positional inputs or a dictionary of named ones.

    Raises:
        ValueError: The model does not run on the example, or has other outputs when it is run again.
    """

    def __init__(self, model: nn.Module, example_input: Any):
        with random_restored(model):
            self.others = _example_of_other_size(model, example_input)
            self._inputs = [example_input, tree_map(_random_like, example_input), *self.others]
            self._outputs = self._outputs_of(model)
            torch.manual_seed(0)
            is_repeatable = not self.why_not(model)
        if not is_repeatable:
            raise ValueError(
                f"shrink: {type(model).__name__} has different outputs for the same input in evaluation mode, so the "
                "outputs of the smaller model cannot be checked; turn off what is random in the model, and what it "
                "remembers from one input to the next"
            )

    def why_not(self, model: nn.Module) -> str:
        """Why a model does not have the same outputs, up to `TOLERANCE`; empty if it has."""
        try:
            outputs = self._outputs_of(model)
        except Exception as error:  # shapes that no longer fit together
            return f"the model fails without it ({message_of(error.__cause__ or error)})"
        return "" if all(map(_is_same, outputs, self._outputs)) else "its removal would change the model's outputs"

    def _outputs_of(self, model: nn.Module) -> list[Tensor]:
        with untraced(model), torch.no_grad():
            return [output for inputs in self._inputs for output in tensors_in(check_runs(model, inputs))]


def _is_same(output: Tensor, expected: Tensor) -> bool:
    """Whether an output is as expected up to rounding; infinities and NaN must be at the same positions."""
    if output.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(output, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)


def _random_like(value: Any) -> Any:
    """Random numbers with the mean and standard deviation of a float tensor; all else unchanged."""
    if not is_float(value):
        return value
    deviation = value.std() if value.numel() > 1 else value.abs().max()
    return torch.randn_like(value) * deviation.clamp(min=1e-3) + value.mean()


def _example_of_other_size(model: nn.Module, example_input: Any) -> list[Any]:
    """One example with another batch size, twice the length along another axis, and other values.

    It shows what depends on the size of the input or on the sign of its values. Where the model accepts no such
    example, only one of the sizes is changed; the list is empty if none can be.
    """
    for axes in ((0, -1), (0, 1), (-1,), (1,), (0,)):
        other = tree_map(partial(_resized, axes=axes), example_input)
        try:
            with untraced(model), torch.no_grad():
                run(model, other)
        except Exception:  # the model has a fixed size along one of the axes
            continue
        return [other]
    return []


def _resized(value: Any, axes: tuple[int, ...]) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if 0 in axes:
        value = value[:1] if len(value) > 1 else torch.cat([value, value])
    if not value.is_floating_point():
        return value
    for axis in filter(None, axes if value.dim() > 2 else ()):
        value = torch.cat([value, value], axis)
    return -2 * value
