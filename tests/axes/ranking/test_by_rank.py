"""Groups with the same rank in their cells are joined."""

import numpy as np

from sparsifai.axes.ranking.by_rank import join_by_rank
from sparsifai.axes.ranking.scored_layer import ScoredLayer


def layer(score, size=1, alive=None):
    score = np.array(score, float)
    return ScoredLayer(None, score.__getitem__, np.ones(len(score), bool) if alive is None else np.array(alive), size)


def test_the_lowest_of_each_cell_are_joined_then_the_next():
    cells, lines = np.array([0, 0, 1, 1, -1]), np.array([0, 0, 0, 0, -1])
    joined, spread = join_by_rank(layer([3, 1, 5, 8, 2], np.array([1, 1, 3, 3, 7])), cells, lines)
    # The one that is in no cell comes first, then ranks: (1 + 3 x 5) / 4 and (3 + 3 x 8) / 4.
    assert joined.score.tolist() == [2, 4, 6.75]
    assert joined.size.tolist() == [7, 4, 4]
    assert spread(np.array([True, False, True])).tolist() == [True, False, False, True, True]


def test_masked_groups_rank_lowest():
    cells = np.array([0, 0, 1, 1])
    joined, spread = join_by_rank(layer([9, 1, 2, 3], alive=[False, True, False, True]), cells, np.zeros(4, int))
    assert joined.alive.tolist() == [False, True]
    assert joined.score.tolist() == [5.5, 2]
    assert spread(np.array([False, True])).tolist() == [False, True, False, True]


def test_cells_of_different_lines_are_not_joined_and_ties_are_in_index_order():
    cells, lines = np.array([0, 1, 0, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1])
    joined, spread = join_by_rank(layer([1] * 6), cells, lines)
    assert joined.size.tolist() == [2, 2, 1, 1]
    assert spread(np.array([False, True, True, True])).tolist() == [False, False, True, True, True, True]
    assert spread(np.array([True, True, False, True])).tolist() == [True, True, True, True, False, True]
