"""Counting zeros: measured in the weights as they are, never what a schedule says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.table import percent
from .parallel import whole


@dataclass(frozen=True)
class Count:
    """Zeros of some weights. sparsity: zeros / weights."""

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Zeros over weights, 0 if there are none."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def density(self) -> float:
        """1 - sparsity."""
        return 1 - self.sparsity

    @classmethod
    def of(cls, *tensors: Tensor) -> Count:
        """Count the zeros of tensors."""
        weights = sum(tensor.numel() for tensor in tensors)
        return cls(weights, weights - sum(int(torch.count_nonzero(whole(tensor.detach()))) for tensor in tensors))


def figures(count: Count) -> tuple[str, str, str]:
    """Cells of a table: weights, zeros and sparsity."""
    return f"{count.weights:,}", f"{count.zeros:,}", percent(count.sparsity)
