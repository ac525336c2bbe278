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
    masked = int(np.count_nonzero(layer.masked))
    starts = np.append(0, np.arange(len(layer) % count or count, len(layer), count))
    lengths = np.diff(starts, append=len(layer))
    joined = Bundles(
        layer.target,
        lambda part: joined.all_scores[part],
        alive=starts >= masked,
        size=lengths * layer.size
        if isinstance(layer.size, int)
        else np.add.reduceat(layer.size[_order(layer)], starts),
        whole=layer.whole,
        revives=layer.revives,
        may_empty=layer.may_empty,
        others=layer.others,
        groups=layer,
        starts=starts,
    )

    def spread(kept: np.ndarray) -> np.ndarray:
        pruned = int(lengths[~kept].sum())
        if isinstance(layer.size, int) and not kept[: len(kept) - np.count_nonzero(kept)].any():
            return _all_but_lowest(layer, pruned, masked)
        of_group = np.empty(len(layer), bool)
        of_group[_order(layer)] = np.repeat(kept, lengths)
        return of_group

    return joined, spread


@dataclass
class Bundles(ScoredLayer):
    """A layer with bundles for groups. Its scores are found among those of the groups, without sorting all of them.

    Attributes:
        groups: The layer whose groups are joined.
        starts: Rank of the lowest group of each bundle; masked groups rank lowest.
    """

    groups: ScoredLayer = None  # type: ignore[assignment]
    starts: np.ndarray = None  # type: ignore[assignment]

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
        among = [group for group, bundles in self._runs(candidate) if bundles.any()]
        if not among:
            return np.empty(0, np.float32)
        every = slice(None, None, max(step * len(self.groups) // len(self), 1))
        chosen = np.logical_or.reduce([each[every] for each in among])
        number = len(candidate[::step][candidate[::step]])
        drawn = np.sort(self.groups.part(every)[chosen])
        return drawn[np.arange(number) * len(drawn) // max(number, 1)] if len(drawn) else np.empty(0, np.float32)

    def divide(self, candidate: np.ndarray, low: float, high: float) -> Divided:
        """As of a ScoredLayer. The groups are compared, and those within the bracket sorted."""
        below, scores = np.zeros(len(self), bool), np.full(len(self), np.inf)
        within = np.zeros(len(self), bool)
        first = 0
        for groups, bundles in self._runs(candidate):
            total = int(np.count_nonzero(groups))
            if bundles.any():
                found = self.groups.divide(groups, low, high)
                lower = total - int(np.count_nonzero(found.kept))
                ranked = np.sort(found.scores)
                place = self.middles - first - lower
                below |= bundles & (place < 0)
                inside = bundles & (place >= 0) & (place < len(ranked))
                within |= inside
                scores[inside] = ranked[place[inside]]
            first += total
        kept, within = candidate & ~below, within & candidate
        places = np.flatnonzero(within)
        return Divided(kept, places, scores[places], self.weights(kept), bool((kept & ~within).any()))

    def best(self) -> np.ndarray:
        """Index of the best bundle that is not masked, which is the last."""
        return np.flatnonzero(self.alive)[-1:]

    def _runs(self, candidate: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The masked groups, and the candidates whose middle is one of them; the same of the groups that are not."""
        masked = self.groups.masked
        is_masked = self.middles < np.count_nonzero(masked)
        return [(masked, candidate & is_masked), (self.groups.alive, candidate & ~is_masked)]


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
