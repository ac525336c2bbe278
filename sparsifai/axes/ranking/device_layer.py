"""A layer on a GPU whose groups have scores: what a context ranks there. scored_layer.py has that of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ...model.layers import NamedWeight


@dataclass
class DeviceLayer:
    """One layer on a GPU. Tensors have one entry per group, in index order.

    Attributes:
        target: The named weight.
        score: Floats.
        alive: True where a group is not masked.
        size: Weights in a group; one number where all groups are equal.
        whole: Whether a group is the whole layer.
        revives: Whether masked groups may be kept again.
        may_empty: Whether the best group may be pruned, too.
        magnitude: Whether the scores are the absolute values of `score`.
        grid: Axis name -> number of groups along it, in the order of the groups' index.
        unpooled: How `score`, while it has one entry for each weight, is divided into groups.
        nan: Bool tensor once the layer is ranked: whether a score that matters is NaN.
    """

    target: NamedWeight
    score: Tensor
    alive: Tensor
    size: int | Tensor
    whole: bool = False
    revives: bool = True
    may_empty: bool = False
    magnitude: bool = False
    grid: Mapping[str, int] = field(default_factory=dict)
    unpooled: Any = None  # a Grouping; that file stands above this one
    nan: Tensor | None = None

    def has_nan(self) -> Tensor:
        """Whether a score that matters is NaN, as a bool tensor."""
        return (self.score.isnan() & (self.alive | self.revives)).any() if self.nan is None else self.nan

    def __len__(self) -> int:
        return self.alive.numel()  # len() of a tensor takes the host several times as long

    @property
    def weights(self) -> int:
        """Number of weights of the layer, known without reading a tensor."""
        return self.size * len(self) if isinstance(self.size, int) else self.target.parameter.numel()


class Rows(NamedTuple):
    """How the groups of a layer form rows: as an array (outer, length, inner), cut along `length`.

    Attributes:
        outer: Number of groups along the axes before.
        length: Number of groups along the axis of the rows.
        inner: Number of groups along the axes behind.
        size: Groups of a row. A last one along the axis may be shorter; what it lacks counts as pruned.
        pruned: Groups to prune in a whole row.
    """

    outer: int
    length: int
    inner: int
    size: int
    pruned: int

    @property
    def along(self) -> int:
        """Number of rows along the axis."""
        return -(-self.length // self.size)

    @property
    def number(self) -> int:
        """Number of rows."""
        return self.outer * self.along * self.inner
