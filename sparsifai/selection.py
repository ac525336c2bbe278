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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """Rank the groups of `layers` in one list; bool arrays, True where a group falls."""
    score = np.concatenate([layer.score for layer in layers])
    masked = np.concatenate([layer.masked for layer in layers])
    size = _joint_size(layers)
    ends = np.cumsum([len(layer.score) for layer in layers])

    candidates = ~masked
    candidates[_kept(layers, score, masked, ends)] = False
    falls = masked.copy()
    amount = sparsity * _weights(size, np.ones_like(masked)) - _weights(size, masked)
    if amount < 0:
        # A falling target: the best of the masked groups come back, no other one falls.
        candidates, amount = masked, amount + _weights(size, masked)
        falls[:] = False
    falls |= lowest(score, size, amount, candidates)
    return np.split(falls, ends[:-1])


def lowest(score: np.ndarray, size: int | np.ndarray, amount: float, candidates: np.ndarray) -> np.ndarray:
    """Those candidates of lowest score whose sizes add up to the nearest of `amount`, as a bool array."""
    if isinstance(size, int):
        # Equal sizes need no order, only the score at which it ends.
        return _lowest(score, max(math.floor(amount / size + 0.5), 0), candidates)
    order = np.flatnonzero(candidates)
    order = order[np.argsort(score[order], kind="stable")]
    # Group i falls if the sum with it is at least as near to the amount as the sum without it.
    count = np.searchsorted(np.cumsum(size[order]) - size[order] / 2, amount, side="right")
    falls = np.zeros(len(score), bool)
    falls[order[:count]] = True
    return falls


def _lowest(score: np.ndarray, count: int, candidates: np.ndarray) -> np.ndarray:
    """The `count` candidates of lowest score, ties in index order, as a bool array."""
    count = min(count, int(np.count_nonzero(candidates)))
    if count == 0:
        return np.zeros(len(score), bool)
    ranked = score.copy()
    np.copyto(ranked, np.inf, where=~candidates)
    last = np.partition(ranked, count - 1)[count - 1]
    falls = (score < last) & candidates
    ties = np.flatnonzero((score == last) & candidates)
    falls[ties[: count - np.count_nonzero(falls)]] = True
    return falls


def _joint_size(layers: Sequence[ScoredLayer]) -> int | np.ndarray:
    sizes = [layer.size for layer in layers]
    if isinstance(sizes[0], int) and all(isinstance(size, int) and size == sizes[0] for size in sizes):
        return sizes[0]
    return np.concatenate([np.broadcast_to(layer.size, layer.score.shape) for layer in layers])


def _weights(size: int | np.ndarray, chosen: np.ndarray) -> int:
    """Number of weights in the chosen groups."""
    return size * np.count_nonzero(chosen) if isinstance(size, int) else int(size[chosen].sum())


def _kept(layers: Sequence[ScoredLayer], score: np.ndarray, masked: np.ndarray, ends: np.ndarray) -> list[int]:
    """Index into the joint list of the group that each layer keeps: its highest score, the last of equals."""
    scopes = [slice(end - len(layer.score), end) for layer, end in zip(layers, ends, strict=True)]
    if all(layer.whole for layer in layers):
        scopes = [slice(0, len(score))]
    kept = []
    for scope in scopes:
        alive = ~masked[scope] if not masked[scope].all() else masked[scope]
        best = score[scope][alive].max() if not alive.all() else score[scope].max()
        kept.append(scope.stop - 1 - np.argmax(((score[scope] == best) & alive)[::-1]))
    return kept


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
