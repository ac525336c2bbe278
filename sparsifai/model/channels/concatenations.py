"""Concatenations in torch-pruning's graph, which guesses how many channels each of their inputs has.

It does so by the layers before an input, and is wrong behind a slice of channels. torch knows the shapes.
"""

from __future__ import annotations

from typing import Any

from .rewriting import CHANNEL_AXES


def sizes_of_concatenation(grad_fn: Any) -> list[int] | None:
    """Number of channels of each input of a concatenation; None if it is along another axis, or has a constant input.

    Args:
        grad_fn: The operation, as autograd keeps it.
    """
    if any(function is None for function, _ in grad_fn.next_functions):
        return None
    shapes = [function._input_metadata[number].shape for function, number in grad_fn.next_functions]
    axis = grad_fn._saved_dim
    axis -= 2**64 if axis >= 2**63 else 0  # it is stored without a sign
    if axis % len(shapes[0]) != CHANNEL_AXES.get(len(shapes[0])):
        return None
    return [shape[axis] for shape in shapes]
