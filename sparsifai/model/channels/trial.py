"""What a model is tried on: inputs like an example, of other values and another size; and when outputs are the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...axes.quantity import run
from ...sparsifier.collection import untraced
from ..flow import is_float

TOLERANCE = 1e-5  # of outputs, relative to the largest of them


def alike(output: Tensor, expected: Tensor) -> bool:
    """Whether an output is as expected, but for rounding; infinities and NaN at the same places."""
    if output.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(output, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)


def random_like(value: Any) -> Any:
    """Random numbers with the mean and the deviation of a tensor of floats; all else as it is."""
    if not is_float(value):
        return value
    spread = value.std() if value.numel() > 1 else value.abs().max()
    return torch.randn_like(value) * spread.clamp(min=1e-3) + value.mean()


def other_size(model: nn.Module, example_input: Any) -> list[Any]:
    """One example of another batch size, as long again in a further axis, of other values: as much as the model takes.

    What depends on the size of the input, or on the sign of its values, is another with it.
    """
    for axes in ((0, -1), (0, 1), (-1,), (1,), (0,)):
        other = tree_map(partial(_resized, axes=axes), example_input)
        try:
            with untraced(model), torch.no_grad():
                run(model, other)
        except Exception:  # it has a fixed size
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


def in_float32(value: Any) -> Any:
    """A tensor of floats in float32; all else as it is."""
    return value.float() if is_float(value) else value
