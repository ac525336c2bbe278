"""Ranking within rows and blocks: which groups of each have the lowest scores, ties in index order."""

from __future__ import annotations

import numpy as np

from .scored_layer import ScoredLayer

# Blocks of at most this size are ranked by comparing all pairs, larger ones by partition.
PAIRS = 8


def write_kept(kept: np.ndarray, keys: np.ndarray, axis: int, size: int, count: int) -> None:
    """Write which keys of each block are kept: all but the `count` lowest, ties in index order.

    Args:
        kept: Bool array of the shape of `keys`, written to.
        keys: What to rank by, no NaN.
        axis: Axis along which the blocks run. At its end a block may be shorter; zeros that would fill it up count as
            pruned.
        size: Length of a block.
        count: Number of keys to prune in a whole block.
    """
    length = keys.shape[axis]
    whole = length // size * size
    for start, end, block in ((0, whole, size), (whole, length, length - whole)):
        if start == end:
            continue
        where = (slice(None),) * axis + (slice(start, end),)
        form = (*keys.shape[:axis], (end - start) // block, block, *keys.shape[axis + 1 :])
        # The place within a block becomes the first axis, so that the arrays that are compared are contiguous.
        by_place = np.moveaxis(keys[where].reshape(form), axis + 1, 0).copy()
        written = np.moveaxis(kept[where].reshape(form), axis + 1, 0)  # a view, because an axis is only split
        for place, is_kept in enumerate(_all_but_lowest(by_place, max(count - (size - block), 0))):
            written[place] = is_kept


def _all_but_lowest(keys: np.ndarray, count: int) -> np.ndarray:
    """False at the `count` lowest along the first axis, ties in index order."""
    size = len(keys)
    if size > PAIRS:
        return np.moveaxis(~lowest_of_rows(np.moveaxis(keys, 0, -1), count), -1, 0)
    # Rank = number of keys in the block that are lower. At first each key counts as higher than all that follow it.
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
    lowest, ties = keys < last, keys == last
    needed = count - lowest.sum(-1, keepdims=True)
    return lowest | (ties & (ties.cumsum(-1) <= needed))


def ranking_keys(layer: ScoredLayer, part: slice = slice(None)) -> np.ndarray:
    """What to rank the groups of a layer by: their scores or ranks, with masked groups lower than all others.

    Args:
        layer: The layer.
        part: Slice of the groups; by default all of them.

    Returns:
        One key per group of the part, without NaN.

    Raises:
        ValueError: A score that matters is NaN.
    """
    score, alive = layer.part(part), layer.alive[part]
    lowest = score.min()
    if np.isnan(lowest):
        layer.check(score, alive | layer.revives)
    if layer.revives and not alive.all():
        # Masked groups may be revived, so they are ranked among themselves too.
        ranks = np.empty(len(score), np.int64)
        ranks[np.lexsort((score, alive))] = np.arange(len(score))
        return ranks
    # Magnitudes are such keys already if the weights are zero where they are masked, and nowhere else.
    if alive.all() or (lowest >= 0 and np.array_equal(score != 0, alive)):
        return score
    # The smaller of the score and +inf or -inf: many times faster than np.where with a random mask.
    limit = np.subtract(alive, 0.5, dtype=score.dtype)
    limit *= np.inf
    return np.fmin(np.maximum(score, np.finfo(score.dtype).min), limit, out=limit)
