"""Bundles: groups that follow each other in rank and are pruned together, so that a multiple of groups is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .scored_layer import Divided, ScoredLayer
from .selection import keep_all_but_lowest


def bundle(layer: ScoredLayer, count: int) -> tuple[ScoredLayer, Callable[[np.ndarray], np.ndarray]]:
    """Join groups that follow each other in rank into bundles of `count`; the lowest bundle takes the remainder.

    Whole bundles are pruned, so the number of groups kept is a multiple of `count`, or all of them. The score of a
    bundle is the score in its middle.

    Args:
        layer: The layer whose groups are joined.
        count: Number of groups in a bundle.

    Returns:
        The layer with bundles for groups, in the order of their rank, and a function from its kept bundles to the kept
        groups of `layer`.
    """
    masked = len(layer) - int(np.count_nonzero(layer.alive))
    lowest = len(layer) % count or min(count, len(layer))
    starts = np.append(0, np.arange(lowest, len(layer), count))
    is_equal = isinstance(layer.size, int) and (lowest == count or len(starts) == 1)
    joined = Bundles(
        layer.target,
        lambda part: joined.all_scores[part],
        alive=starts >= masked,
        size=lowest * layer.size if is_equal else _sizes(layer, starts),
        whole=layer.whole,
        revives=layer.revives,
        may_empty=layer.may_empty,
        others=layer.others,
        groups=layer,
        starts=starts,
    )

    def spread(kept: np.ndarray) -> np.ndarray:
        fallen = len(kept) - int(np.count_nonzero(kept))
        if isinstance(layer.size, int) and not kept[:fallen].any():
            return _all_but_lowest(layer, int(starts[fallen]) if fallen < len(kept) else len(layer), masked)
        of_group = np.empty(len(layer), bool)
        of_group[_order(layer)] = np.repeat(kept, np.diff(starts, append=len(layer)))
        return of_group

    return joined, spread


def _sizes(layer: ScoredLayer, starts: np.ndarray) -> np.ndarray:
    """Number of weights in each bundle."""
    if isinstance(layer.size, int):
        return np.diff(starts, append=len(layer)) * layer.size
    return np.add.reduceat(layer.size[_order(layer)], starts)


@dataclass
class Bundles(ScoredLayer):
    """A layer with bundles for groups. Its scores are found among those of the groups, without sorting all of them.

    Attributes:
        groups: The layer whose groups are joined.
        starts: Rank of the lowest group of each bundle; masked groups rank lowest.
    """

    groups: ScoredLayer = None  # type: ignore[assignment]
    starts: np.ndarray = None  # type: ignore[assignment]

    @property
    def alone(self) -> ScoredLayer:
        """Bundles are in the order of rank, unless masked ones may be revived: so an index is as good as a score."""
        if self.revives:
            return self
        index = np.arange(len(self), dtype=np.float64)
        return ScoredLayer(
            self.target, index.__getitem__, self.alive, self.size, self.whole, revives=False, may_empty=self.may_empty
        )

    @cached_property
    def middles(self) -> np.ndarray:
        """Rank of the group in the middle of each bundle."""
        return self.starts + np.diff(self.starts, append=len(self.groups)) // 2

    @cached_property
    def all_scores(self) -> np.ndarray:
        """The scores of all bundles, which a context of the user's own may read."""
        return self.groups.score[_order(self.groups)][self.middles]

    def sample(self, step: int, candidate: np.ndarray) -> np.ndarray:
        """Scores of groups in place of those of bundles, which lie among them: as many as a sample of bundles has."""
        among = [groups for groups, *_ in self._runs(candidate)]
        if not among:
            return np.empty(0, np.float32)
        every = slice(None, None, max(step * len(self.groups) // len(self), 1))
        chosen = np.logical_or.reduce([each[every] for each in among])
        number = len(candidate[::step][candidate[::step]])
        drawn = np.sort(self.groups.part(every)[chosen])
        return drawn[np.arange(number) * len(drawn) // max(number, 1)] if len(drawn) else np.empty(0, np.float32)

    def divide(self, candidate: np.ndarray, low: float, high: float) -> Divided:
        """As of a ScoredLayer. The groups are compared, and those within the bracket sorted."""
        kept, has_above = candidate.copy(), False
        places, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for groups, first, bundles in self._runs(candidate):
            found = self.groups.divide(groups, low, high)
            ranked = np.sort(found.scores)
            lowest = first + int(np.count_nonzero(groups)) - int(np.count_nonzero(found.kept))
            start, end = bundles.start + np.searchsorted(self.middles[bundles], [lowest, lowest + len(ranked)])
            kept[bundles.start : start] = False
            has_above = has_above or bool(kept[end : bundles.stop].any())
            places.append(start + np.flatnonzero(candidate[start:end]))
            scores.append(ranked[self.middles[places[-1]] - lowest])
        return Divided(kept, np.concatenate(places), np.concatenate(scores), self.weights(kept), has_above)

    def best(self) -> np.ndarray:
        """Index of the best bundle that is not masked, which is the last."""
        return np.flatnonzero(self.alive)[-1:]

    def _runs(self, candidate: np.ndarray) -> list[tuple[np.ndarray, int, slice]]:
        """The masked groups, their lowest rank and the bundles whose middle is one of them; the same of the others.

        Runs without candidates among the bundles are left out.
        """
        masked = len(self.groups) - int(np.count_nonzero(self.groups.alive))
        split = int(np.searchsorted(self.middles, masked))
        runs = []
        if candidate[:split].any():
            runs.append((self.groups.masked, 0, slice(0, split)))
        if candidate[split:].any():
            runs.append((self.groups.alive, masked, slice(split, len(self))))
        return runs


def _order(layer: ScoredLayer) -> np.ndarray:
    """The groups of a layer by rank: masked ones first, then by score, ties in index order."""
    return np.lexsort((layer.score, layer.alive))


def _all_but_lowest(layer: ScoredLayer, pruned: int, masked: int) -> np.ndarray:
    """Keep all groups but the `pruned` lowest, of which the `masked` ones rank lowest."""
    if pruned == masked:
        return layer.alive
    if pruned > masked:
        return keep_all_but_lowest(layer, layer.alive, pruned - masked)
    return layer.alive | keep_all_but_lowest(layer, layer.masked, pruned)
