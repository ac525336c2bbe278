"""Bundles: groups that are pruned together, so that a multiple of groups is kept."""

import numpy as np

from sparsifai import select_groups
from sparsifai.axes.ranking.scored_layer import ScoredLayer, bundle


def test_bundles_keep_multiples():
    joined, of_group = bundle(ScoredLayer(None, np.array([5.0, 1, 4, 2, 3]).__getitem__, np.ones(5, bool), size=2), 2)
    # By rank 1 | 2 3 | 4 5: the lowest bundle takes the remainder.
    assert of_group.tolist() == [2, 0, 2, 1, 1]
    assert joined.size.tolist() == [2, 4, 4]
    assert joined.score.tolist() == [1, 3, 5]
    for level in np.linspace(0, 1, 21):
        assert select_groups([joined], level)[0][of_group].sum() in (5, 4, 2)
