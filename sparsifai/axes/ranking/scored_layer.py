"""A layer whose groups have scores, as a context sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ...model.layers import NamedWeight


@dataclass
class ScoredLayer:
    """One layer as a context sees it. Arrays have one entry per group, in index order.

    A context ranks layers with `select_groups`, or reads `score`, `alive`, `size` and `grid` itself.

    Attributes:
        target: The weight: its name, axes and parameter.
        part: Function that gives the scores of a slice of the groups, as floats. It is called for one slice after the
            other, so that scores that are computed in it need not be stored.
        alive: False where a group is masked already.
        size: Weights in a group: one number if all groups are equal, else one per group.
        whole: Whether the only group is the whole layer. Then one of the layers that are ranked together is kept, not
            one group of every layer.
        revives: Whether masked groups may be revived, because the sparsity is lower than before.
        may_empty: Whether the best group of the layer may be pruned too.
        grid: Axis name -> number of groups along it, in the order of the groups' index.
        others: Further weights, whose groups are coupled with those of `target`.
    """

    target: NamedWeight
    part: Callable[[slice], np.ndarray]
    alive: np.ndarray
    size: int | np.ndarray = 1
    whole: bool = False
    revives: bool = True
    may_empty: bool = False
    grid: Mapping[str, int] = field(default_factory=dict)
    others: tuple[NamedWeight, ...] = ()

    def __len__(self) -> int:
        return len(self.alive)

    @cached_property
    def score(self) -> np.ndarray:
        """The scores of all groups."""
        score = self.part(slice(None))
        self.check(score, self.alive)
        return score

    @property
    def targets(self) -> tuple[NamedWeight, ...]:
        """The weight, and those that are coupled with it."""
        return (self.target, *self.others)

    @property
    def total(self) -> int:
        """Number of weights in all groups."""
        return self.size * len(self) if isinstance(self.size, int) else int(self.size.sum())

    @property
    def masked(self) -> np.ndarray:
        """True where a group is masked already."""
        return ~self.alive

    def weights(self, chosen: np.ndarray, part: slice = slice(None)) -> int:
        """Number of weights in the chosen groups.

        Args:
            chosen: Bool per group of `part`.
            part: Slice of the groups; by default all of them.
        """
        if isinstance(self.size, int):
            return self.size * int(np.count_nonzero(chosen))
        return int(self.size[part][chosen].sum())

    def check(self, score: np.ndarray, where: np.ndarray | bool = True) -> None:
        """Check scores of this layer for NaN.

        Args:
            score: The scores.
            where: Bool per score, False where NaN does not matter; by default NaN matters everywhere.

        Raises:
            ValueError: There is NaN. The message names the layer.
        """
        nan = np.isnan(score)
        if nan.any() and (nan & where).any():
            raise ValueError(nan_message(self.target.name))


def nan_message(name: str) -> str:
    """The error message for a layer whose scores are NaN."""
    return f"NaN scores for {name}: look for NaN or inf in its weights, or in what the criterion computes from them"


def bundle(layer: ScoredLayer, count: int) -> tuple[ScoredLayer, np.ndarray]:
    """Join groups that follow each other in rank into bundles of `count`; the lowest bundle takes the remainder.

    Whole bundles are pruned, so the number of groups kept is a multiple of `count`, or all of them. The score of a
    bundle is the score in its middle.

    Args:
        layer: The layer whose groups are joined.
        count: Number of groups in a bundle.

    Returns:
        The layer with bundles for groups, and the number of the bundle of every group.
    """
    order = np.lexsort((layer.score, ~layer.masked))
    remainder = len(order) % count
    of_rank = (np.arange(len(order)) + (count - remainder) % count) // count
    of_group = np.empty(len(order), int)
    of_group[order] = of_rank
    starts = np.flatnonzero(np.diff(of_rank, prepend=-1))
    lengths = np.diff(starts, append=len(order))
    joined = ScoredLayer(
        layer.target,
        layer.score[order][starts + lengths // 2].__getitem__,
        alive=np.bincount(of_group, weights=layer.masked) == 0,
        size=np.bincount(of_group, weights=np.broadcast_to(layer.size, len(order))).astype(np.int64),
        whole=layer.whole,
        revives=layer.revives,
        may_empty=layer.may_empty,
        others=layer.others,
    )
    return joined, of_group


def all_equal(layers: Sequence[ScoredLayer]) -> bool:
    """Whether all groups of all layers have the same score."""
    return len({float(edge) for layer in layers for edge in (layer.score.min(), layer.score.max())}) == 1
