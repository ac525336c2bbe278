"""Groups of several cells that are pruned in equal numbers: those that have the same rank in their cells are joined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .scored_layer import ScoredLayer


def join_by_rank(
    layer: ScoredLayer, cells: np.ndarray, lines: np.ndarray
) -> tuple[ScoredLayer, Callable[[np.ndarray], np.ndarray]]:
    """Join the groups with the lowest scores of some cells, then those that rank next in their cells, and so on.

    If each cell loses the group that ranks lowest in it, all lose as many. The size of a joined group is the sum of the
    sizes, its score the mean of the scores by size.

    Args:
        layer: The layer whose groups are joined.
        cells: The number of the cell of each group, or -1 for a group that stays by itself.
        lines: The number of the line of each group. Cells of one line are joined with each other; they have the same
            number of groups.

    Returns:
        The layer with joined groups, and a function from its kept groups to the kept groups of `layer`.
    """
    # Masked groups rank lowest; ties are in index order.
    order = np.lexsort((layer.score, layer.alive, cells))
    starts = np.flatnonzero(np.diff(cells[order], prepend=-2))
    rank = np.empty(len(layer), np.int64)
    rank[order] = np.arange(len(layer)) - np.repeat(starts, np.diff(starts, append=len(layer)))
    alone = cells < 0
    place = np.where(alone, np.arange(len(layer)), rank)
    pairs = np.stack([np.where(alone, -1, lines), place], 1)
    _, joined = np.unique(pairs, axis=0, return_inverse=True)
    joined = joined.reshape(-1)
    count = int(joined.max()) + 1
    weights = np.broadcast_to(layer.size, len(layer))
    size = np.bincount(joined, weights, count)
    score = np.bincount(joined, layer.score * weights, count) / size
    alive = np.bincount(joined, layer.alive, count) > 0
    return ScoredLayer(
        layer.target, score.__getitem__, alive, size.astype(np.int64), revives=layer.revives,
        may_empty=layer.may_empty, grid={"out": count}, others=layer.others,
    ), lambda kept: kept[joined]  # fmt: skip
