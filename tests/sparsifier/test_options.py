"""The options of a Sparsifier, and the sparsity that is asked for."""

from functools import partial

import pytest
import torch

from sparsifai import Sparsifier, criteria
from sparsifai.axes.grouping import poolings
from sparsifai.sparsifier.options import Options


@pytest.mark.parametrize("wrong", [50, -0.1, {}, {"0": 50}, {"0": 0.5, "2": "much"}, "0.5", True, None])
def test_a_wrong_sparsity_is_refused_and_changes_nothing(mlp, wrong):
    sparsifier = Sparsifier(mlp)
    with pytest.raises((TypeError, ValueError), match="sparsit"):
        sparsifier.sparsify(wrong)
    assert all(mask.all() for mask in sparsifier.masks.values())


def test_compression_ratio_is_another_name_of_sparsity(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(compression_ratio=torch.tensor(0.5))
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize(
    ("criterion", "pool", "other", "expected"),
    [
        ("taylor", None, "large_final", "mean"),
        ("large_final", None, "taylor", "squared_sum"),
        ("large_final", "max", "taylor", "max"),
        ("taylor", "mean", "large_final", "mean"),
        ("taylor", "sum", partial(criteria["taylor"]), "sum"),
        ("large_final", None, partial(criteria["taylor"]), "squared_sum"),
    ],
)
def test_with_criteria_replaces_the_default_pooling_only(criterion, pool, other, expected):
    options = Options.of("filter", "local", criterion, pool=pool, layers="0", may_empty=True, round_to=4, seed=3)
    before = vars(options).copy()
    changed = options.with_criteria(other)
    assert changed.criteria is criteria.resolve(other)
    assert changed.pool is poolings[expected]
    assert {**vars(changed), "criteria": None, "pool": None} == {**before, "criteria": None, "pool": None}
    assert vars(options) == before
