"""A layer whose groups have scores: what a context ranks."""

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
    """One layer as a context sees it; arrays have one entry per group, in index order.

    part: the scores of a slice of the groups, floats; called for one slice after the other, so that scores that are
    computed there need not be kept. alive: not zero already. size: weights in a group, one number where all groups
    are equal. whole: a group is the whole layer; then the scope, not every layer, keeps its best group. revives:
    whether groups that are zero may come back, for a lower sparsity than before was asked for. may_empty: whether the
    best group may fall, too. grid: number of groups along each axis, in whose order they stand. others: further layers
    whose groups are joined with those of `target`.
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
        """The layer, and those that are joined with it."""
        return (self.target, *self.others)

    @property
    def total(self) -> int:
        """Number of weights in all groups."""
        return self.size * len(self) if isinstance(self.size, int) else int(self.size.sum())

    @property
    def masked(self) -> np.ndarray:
        """Groups that are zero already."""
        return ~self.alive

    def weights(self, chosen: np.ndarray, part: slice = slice(None)) -> int:
        """Number of weights in the chosen groups, of all or of those in a part."""
        if isinstance(self.size, int):
            return self.size * int(np.count_nonzero(chosen))
        return int(self.size[part][chosen].sum())

    def check(self, score: np.ndarray, where: np.ndarray | bool = True) -> None:
        """ValueError if there is NaN among scores of this layer. where: of all, those that matter."""
        nan = np.isnan(score)
        if nan.any() and (nan & where).any():
            raise ValueError(nan_message(self.target.name))


def nan_message(name: str) -> str:
    """What is wrong with scores of a layer that are NaN."""
    return f"NaN scores for {name}: look for NaN or inf in its weights, or in what the criterion makes of them"


def bundle(layer: ScoredLayer, count: int) -> tuple[ScoredLayer, np.ndarray]:
    """Join groups that follow each other in rank into bundles of `count`, the lowest taking the remainder.

    Whole bundles fall, so the number of groups kept is a multiple of `count`, or all. A bundle ranks by the score in
    its middle. Also returns the bundle of every group.
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
    """Whether all groups of all layers have one score."""
    return len({float(edge) for layer in layers for edge in (layer.score.min(), layer.score.max())}) == 1
