"""Counting zeros in weights. Reports use these counts, never the sparsity that a schedule asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.table import percent
from .parallel import whole


@dataclass(frozen=True)
class Count:
    """The number of zeros among some weights.

    Args:
        weights: Number of weights.
        zeros: How many of them are zero.

    Example:
        >>> Count.of(torch.tensor([0.0, 1.0, 0.0, 2.0])).sparsity
        0.5
    """

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """zeros / weights, from 0 to 1; 0 if there are no weights."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def density(self) -> float:
        """The remaining fraction, 1 - sparsity."""
        return 1 - self.sparsity

    @classmethod
    def of(cls, *tensors: Tensor) -> Count:
        """Count the zeros of tensors; sharded ones are gathered, so every process of the mesh must call this.

        Raises:
            ValueError: A tensor is on the meta device.
        """
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                "zeros cannot be counted: a parameter is on the meta device, without values; load the model into "
                "memory first"
            )
        weights = sum(tensor.numel() for tensor in tensors)
        return cls(weights, weights - sum(int(torch.count_nonzero(whole(tensor.detach()))) for tensor in tensors))


def figures(count: Count) -> tuple[str, str, str]:
    """Return the cells of a table for a count: weights, zeros and sparsity in percent."""
    return f"{count.weights:,}", f"{count.zeros:,}", percent(count.sparsity)
