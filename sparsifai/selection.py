"""Exact ranking over a scope: which groups fall so that a given share of the weights is zero.

The definition, which the tests check against a slow plain oracle:

1. The groups of all layers in the scope stand in one list, by score, ties in index order.
2. The best group of every layer is taken out: a layer is never emptied.
3. Groups that are masked already come first, so that a rising target only adds zeros.
4. The groups at the head of the list fall, as many as bring the sum of their weights nearest to
   sparsity x weights of the scope; of two equally near sums the larger (round half up).

No threshold decides: of equal scores exactly as many fall as are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .target import Target


@dataclass
class ScoredLayer:
    """One layer as a context sees it; arrays have one entry per group, in index order.

    score: float. size: weights in a group, one number where all groups are equal. masked: zero already.
    whole: a group is the whole layer; then the scope, not every layer, keeps its best group.
    """

    target: Target
    score: np.ndarray
    size: int | np.ndarray
    masked: np.ndarray
    whole: bool = False


def select_groups(layers: Sequence[ScoredLayer], sparsity: float) -> list[np.ndarray]:
    """Rank the groups of `layers` in one list; for each layer a bool array, True where a group falls."""
    masked = sum(_weights(layer, layer.masked) for layer in layers)
    wanted = sparsity * sum(_weights(layer) for layer in layers)
    if wanted < masked:
        # A falling target: the best of the masked groups come back, no other one falls.
        return _lowest(layers, [layer.masked for layer in layers], wanted)

    def falling(candidates: list[np.ndarray]) -> list[np.ndarray]:
        found = _lowest(layers, candidates, wanted - masked)
        return [falls | layer.masked for falls, layer in zip(found, layers, strict=True)]

    alive = [~layer.masked for layer in layers]
    if _equal_size(layers) is not None:
        # The best group of a layer is the last of it to fall: while no layer is emptied, it need not be looked for.
        fallen = falling(alive)
        if not _empties(layers, fallen):
            return fallen
    _protect_best(layers, alive)
    return falling(alive)


def _lowest(layers: Sequence[ScoredLayer], candidates: list[np.ndarray], amount: float) -> list[np.ndarray]:
    """Those candidates of lowest score whose sizes add up to the nearest of `amount`."""
    size = _equal_size(layers)
    if size is not None:
        # Equal sizes need no order, only the score at which it ends.
        count = min(max(math.floor(amount / size + 0.5), 0), sum(map(np.count_nonzero, candidates)))
        return _lowest_of_equal_size([layer.score for layer in layers], candidates, count)
    scores = np.concatenate([layer.score for layer in layers])
    sizes = np.concatenate([np.broadcast_to(layer.size, layer.score.shape) for layer in layers])
    order = np.flatnonzero(np.concatenate(candidates))
    order = order[np.argsort(scores[order], kind="stable")]
    # Group i falls if the sum with it is at least as near to the amount as the sum without it.
    count = int(np.searchsorted(np.cumsum(sizes[order]) - sizes[order] / 2, amount, side="right"))
    falls = np.zeros(len(scores), bool)
    falls[order[:count]] = True
    return np.split(falls, np.cumsum([len(layer.score) for layer in layers])[:-1])


def _lowest_of_equal_size(scores: list[np.ndarray], candidates: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The `count` candidates of lowest score, ties in index order."""
    if count == 0:
        return [np.zeros(len(score), bool) for score in scores]
    last, ties = _last_to_fall(scores, candidates, count)
    fallen = []
    for score, candidate in zip(scores, candidates, strict=True):
        falls = np.empty(len(score), bool)
        for part in _parts(score):
            np.less(score[part], last, out=falls[part])
            falls[part] &= candidate[part]
            if ties:
                equal = part.start + np.flatnonzero((score[part] == last) & candidate[part])[:ties]
                falls[equal] = True
                ties -= len(equal)
        fallen.append(falls)
    return fallen


def _last_to_fall(scores: list[np.ndarray], candidates: list[np.ndarray], count: int) -> tuple[float, int]:
    """The `count`-th lowest score of the candidates, and how many with just this score are among the `count`.

    The order statistics of a sample bracket it; one pass counts what lies below the bracket and collects what lies
    within. A bracket that misses, or holds heavy ties, costs time and nothing else.
    """
    total = sum(map(np.count_nonzero, candidates))
    stride = max(1, round(total ** (1 / 3) / 4))
    sample = np.concatenate([s[::stride][c[::stride]] for s, c in zip(scores, candidates, strict=True)])
    sample.sort()
    share = count / total
    spread = 4 * math.sqrt(len(sample) * share * (1 - share)) + 4
    first, end = math.floor(share * len(sample) - spread), math.ceil(share * len(sample) + spread)
    low = sample[first] if first >= 0 and stride > 1 else -np.inf
    high = sample[end] if end < len(sample) and stride > 1 else np.inf

    below, inside = _bracketed(scores, candidates, low, high)
    if not below < count <= below + len(inside):
        below, inside = _bracketed(scores, candidates, -np.inf, np.inf)
    last = np.partition(inside, count - below - 1)[count - below - 1]
    return last, count - below - np.count_nonzero(inside < last)


def _bracketed(
    scores: list[np.ndarray], candidates: list[np.ndarray], low: float, high: float
) -> tuple[int, np.ndarray]:
    """How many candidates score below `low`, and the scores of those from `low` to `high`."""
    below, inside = 0, []
    for score, candidate in zip(scores, candidates, strict=True):
        for part in _parts(score):
            lower = score[part] < low
            lower &= candidate[part]
            below += np.count_nonzero(lower)
            within = score[part] <= high
            within &= candidate[part]
            within ^= lower
            inside.append(score[part][within])
    return below, np.concatenate(inside)


def _parts(score: np.ndarray) -> Iterator[slice]:
    """Slices so short that what is computed of one stays in the cache."""
    return (slice(start, start + 131072) for start in range(0, len(score), 131072))


def _equal_size(layers: Sequence[ScoredLayer]) -> int | None:
    """The size of all groups, if it is the same in all layers."""
    sizes = {layer.size if isinstance(layer.size, int) else None for layer in layers}
    return sizes.pop() if len(sizes) == 1 else None


def _weights(layer: ScoredLayer, chosen: np.ndarray | None = None) -> int:
    """Number of weights in the chosen groups of a layer, or in all of them."""
    if isinstance(layer.size, int):
        return layer.size * (len(layer.score) if chosen is None else np.count_nonzero(chosen))
    return int(layer.size.sum() if chosen is None else layer.size[chosen].sum())


def _empties(layers: Sequence[ScoredLayer], fallen: list[np.ndarray]) -> bool:
    """Whether a layer has no group left; if groups are whole layers, whether none of the layers is left."""
    empty = [bool(falls.all()) for falls in fallen]
    return all(empty) if all(layer.whole for layer in layers) else any(empty)


def _protect_best(layers: Sequence[ScoredLayer], candidates: list[np.ndarray]) -> None:
    """Take the best candidate of every layer out: its highest score, the last of equals.

    If groups are whole layers, the best of them all.
    """
    best = []
    for layer, candidate in zip(layers, candidates, strict=True):
        highest = layer.score[candidate].max(initial=-np.inf)
        equals = np.flatnonzero((layer.score == highest) & candidate)
        best.append((highest, equals[-1:]))
    if all(layer.whole for layer in layers):
        highest = max(score for score, index in best if len(index))
        last = max(position for position, (score, index) in enumerate(best) if score == highest and len(index))
        best = [(score, index if position == last else index[:0]) for position, (score, index) in enumerate(best)]
    for (_, index), candidate in zip(best, candidates, strict=True):
        candidate[index] = False


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
        score=layer.score[order][starts + lengths // 2],
        size=np.bincount(of_group, weights=np.broadcast_to(layer.size, len(order))).astype(np.int64),
        masked=np.bincount(of_group, weights=layer.masked) > 0,
        whole=layer.whole,
    )
    return joined, of_group
