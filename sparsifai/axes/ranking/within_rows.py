"""Ranking within rows and blocks: the lowest of each, ties in index order."""

from __future__ import annotations

import numpy as np

from .scored_layer import ScoredLayer

# Blocks of so many are ranked by comparing all pairs; larger ones are sorted.
PAIRS = 8


def write_kept(stays: np.ndarray, keys: np.ndarray, axis: int, size: int, count: int) -> None:
    """Of every `size` along an axis, False at the `count` lowest, ties in index order."""
    length = keys.shape[axis]
    whole = length // size * size
    for start, end, block in ((0, whole, size), (whole, length, length - whole)):
        if start == end:
            continue
        where = (slice(None),) * axis + (slice(start, end),)
        form = (*keys.shape[:axis], (end - start) // block, block, *keys.shape[axis + 1 :])
        # The places within a block come first: what is compared lies side by side in memory.
        by_place = np.moveaxis(keys[where].reshape(form), axis + 1, 0).copy()
        written = np.moveaxis(stays[where].reshape(form), axis + 1, 0)  # a view: the axis is only split
        for place, stay in enumerate(_all_but_lowest(by_place, max(count - (size - block), 0))):
            written[place] = stay


def _all_but_lowest(keys: np.ndarray, count: int) -> np.ndarray:
    """False at the `count` lowest along the first axis, ties in index order."""
    size = len(keys)
    if size > PAIRS:
        return np.moveaxis(~lowest_of_rows(np.moveaxis(keys, 0, -1), count), -1, 0)
    # How many of its block each is higher than: of all that follow it, at first.
    rank = np.empty(keys.shape, np.int8)
    rank[...] = np.arange(size - 1, -1, -1).reshape(-1, *[1] * (keys.ndim - 1))
    for first in range(size):
        for second in range(first + 1, size):
            is_no_higher = np.less_equal(keys[first], keys[second]).view(np.int8)
            rank[first] -= is_no_higher
            rank[second] += is_no_higher
    return rank >= count


def lowest_of_rows(keys: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` lowest along the last axis, ties in index order."""
    if count == 0:
        return np.zeros(keys.shape, bool)
    last = np.partition(keys, count - 1, axis=-1)[..., count - 1 : count]
    falls, ties = keys < last, keys == last
    needed = count - falls.sum(-1, keepdims=True)
    return falls | (ties & (ties.cumsum(-1) <= needed))


def ranking_keys(layer: ScoredLayer, part: slice = slice(None)) -> np.ndarray:
    """Scores of a part of a layer, or ranks, those that are masked lower than all others. ValueError if one is NaN."""
    score, alive = layer.part(part), layer.alive[part]
    lowest = score.min()
    if np.isnan(lowest):
        layer.check(score, alive | layer.revives)
    if layer.revives and not alive.all():
        # Those that are masked have an order among themselves.
        ranks = np.empty(len(score), np.int64)
        ranks[np.lexsort((score, alive))] = np.arange(len(score))
        return ranks
    # Magnitudes of weights that are zero where they are masked, and nowhere else, are so already.
    if alive.all() or (lowest >= 0 and np.array_equal(score != 0, alive)):
        return score
    # The smaller of the score and of plus or minus infinity: many times faster than to choose by a random mask.
    limit = np.subtract(alive, 0.5, dtype=score.dtype)
    limit *= np.inf
    return np.fmin(np.maximum(score, np.finfo(score.dtype).min), limit, out=limit)
