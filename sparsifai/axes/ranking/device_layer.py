"""A layer on a GPU, as the ranking there sees it; scored_layer.py has that of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...model.layers import NamedWeight


@dataclass
class DeviceLayer:
    """One layer on a GPU; tensors have one entry per group, in index order.

    score: float. alive: not zero already. size: weights in a group. whole: a group is the whole layer. revives: whether
    groups that are zero may come back. may_empty: whether the best group may fall, too. magnitude: the scores are the
    absolute values of `score`. nan: whether a score that matters is NaN, a bool once the layer is ranked.
    """

    target: NamedWeight
    score: Tensor
    alive: Tensor
    size: int | Tensor
    whole: bool = False
    revives: bool = True
    may_empty: bool = False
    magnitude: bool = False
    nan: Tensor | None = None

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def weights(self) -> int:
        """Of the whole layer, which no tensor needs to be read for."""
        return self.target.parameter.numel()
