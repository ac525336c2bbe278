"""Ranking within rows and blocks: which groups of each have the lowest scores, ties in index order."""

from __future__ import annotations

import math

import numpy as np

from .order_statistic import SHORT
from .scored_layer import ScoredLayer

# Blocks of at most this size are ranked by comparing all pairs. Numpy takes too long to start on each of so short ones.
PAIRS = 32

# Number of blocks that are compared at once, so many that each call of numpy has enough to do.
BLOCKS = 16384


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
        # The place within a block becomes the first axis, to compare many blocks at once, or the last one.
        place, write = (0, _write_by_pairs) if block <= PAIRS else (-1, _write_by_row)
        ordered = np.ascontiguousarray(np.moveaxis(keys[where].reshape(form), axis + 1, place))
        written = np.moveaxis(kept[where].reshape(form), axis + 1, place)  # a view, because an axis is only split
        write(written, ordered, max(count - (size - block), 0))


def _write_by_pairs(kept: np.ndarray, keys: np.ndarray, count: int) -> None:
    """Write False at the `count` lowest along the first axis, True elsewhere; ties in index order."""
    # Rank = number of keys in the block that are lower. At first each key counts as higher than all that follow it.
    rank = np.empty(keys.shape, np.int8)
    rank[...] = np.arange(len(keys) - 1, -1, -1, dtype=np.int8).reshape(-1, *[1] * (keys.ndim - 1))
    is_no_lower = np.empty(keys.shape, bool)
    for first in range(len(keys) - 1):
        np.less_equal(keys[first], keys[first + 1 :], out=is_no_lower[first + 1 :])
        following = is_no_lower[first + 1 :].view(np.int8)
        rank[first + 1 :] += following
        rank[first] -= following.sum(0, dtype=np.int8)
    np.greater_equal(rank, count, out=kept)


def _write_by_row(kept: np.ndarray, keys: np.ndarray, count: int) -> None:
    """Write False at the `count` lowest along the last axis, True elsewhere; ties in index order."""
    if count == 0:
        kept[...] = True
        return
    rows = keys.reshape(-1, keys.shape[-1])
    last = _last_pruned(rows, count)[:, None]
    above = rows > last
    # Of the ties at the last key the first are pruned, and so many of them are kept.
    spared = rows.shape[1] - count - _count_in_rows(above)
    tied = np.flatnonzero(spared)
    ties = rows[tied] == last[tied]
    from_the_end = ties[:, ::-1].cumsum(1)[:, ::-1]
    above[tied] |= ties & (from_the_end <= spared[tied, None])
    kept[...] = above.reshape(keys.shape)


def _last_pruned(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count`-th lowest key of each row.

    A sample of the row gives a bracket, as in the ranking of whole layers. A bracket that misses the key costs time.
    np.partition takes many times as long where half of the keys are equal, as those of masked weights are.
    """
    length = rows.shape[1]
    if length <= SHORT:
        return np.sort(rows, axis=1)[:, count - 1]
    step = length // SHORT
    step += step % 3 == 0  # in rows of 3 x 3 kernels, every ninth key would be at the same place of all kernels
    sample = np.sort(rows[:, ::step], axis=1)
    middle, spread = sample.shape[1] * count / length, 1.5 * math.sqrt(sample.shape[1])
    first, end = math.floor(middle - spread), math.ceil(middle + spread)
    low = sample[:, first] if first >= 0 else np.full(len(rows), -np.inf, rows.dtype)
    within = rows > low[:, None]
    below = length - _count_in_rows(within)
    if end < sample.shape[1]:
        within &= rows <= sample[:, end, None]
    counts = _count_in_rows(within)
    table = np.full((len(rows), counts.max(initial=0) + 1), np.inf, rows.dtype)
    # By index, because numpy takes three times as long to select by a bool array.
    table[np.arange(table.shape[1]) < counts[:, None]] = rows.reshape(-1)[np.flatnonzero(within)]
    table[:, -1] = low
    table.sort(axis=1)
    place = count - below  # in the sorted table, whose first entry is `low`
    last = table[np.arange(len(rows)), place.clip(0, table.shape[1] - 1)]
    missed = np.flatnonzero((place < 0) | (place > counts))
    last[missed] = np.sort(rows[missed], axis=1)[:, count - 1]
    return last


def _count_in_rows(flags: np.ndarray) -> np.ndarray:
    """Number of True in each row. Numpy adds up short integers four times as fast as it counts along an axis."""
    short = np.int16 if flags.shape[1] < 2**15 else np.int64
    return flags.view(np.int8).sum(axis=1, dtype=short).astype(np.int64)


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
        ranks = np.empty(len(score))
        ranks[np.lexsort((score, alive))] = np.arange(len(score))
        return ranks
    # Magnitudes are such keys already if the weights are zero where they are masked, and nowhere else.
    if alive.all() or (lowest >= 0 and np.array_equal(score != 0, alive)):
        return score
    # The smaller of the score and +inf or -inf: many times faster than np.where with a random mask.
    limit = np.subtract(alive, 0.5, dtype=score.dtype)
    limit *= np.inf
    return np.fmin(np.maximum(score, np.finfo(score.dtype).min), limit, out=limit)
