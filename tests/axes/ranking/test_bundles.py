"""Bundles: groups that are pruned together, so that a multiple of groups is kept."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, select_groups
from sparsifai.axes.ranking.bundles import bundle
from sparsifai.axes.ranking.scored_layer import ScoredLayer


def test_bundles_keep_multiples():
    joined, spread = bundle(ScoredLayer(None, np.array([5.0, 1, 4, 2, 3]).__getitem__, np.ones(5, bool), size=2), 2)
    # By rank 1 | 2 3 | 4 5: the lowest bundle takes the remainder.
    assert [spread(np.arange(3) == number).tolist() for number in range(3)] == [
        [False, True, False, False, False],
        [False, False, False, True, True],
        [True, False, True, False, False],
    ]
    assert joined.size.tolist() == [2, 4, 4]
    assert joined.score.tolist() == [1, 3, 5]
    for level in np.linspace(0, 1, 21):
        assert spread(select_groups([joined], level)[0]).sum() in (5, 4, 2)


def pruned_by_sorting(layers, masked, count, sparsity):
    """Which groups are pruned: bundles of whole layers that were sorted, ranked by the plain implementation."""
    bundles, orders = [], []
    for score, was in zip(layers, masked, strict=True):
        order = np.lexsort((score, ~was))
        ends = range(len(score), 0, -count)
        of_rank = [order[max(end - count, 0) : end] for end in ends][::-1]
        bundles.append([(score[each[len(each) // 2]], len(each), bool(was[each].any())) for each in of_rank])
        orders.append(of_rank)
    expected = []
    for score, of_rank, fallen in zip(layers, orders, oracle.fallen(bundles, sparsity), strict=True):
        pruned = np.zeros(len(score), bool)
        for each, is_pruned in zip(of_rank, fallen, strict=True):
            pruned[each] = is_pruned
        expected.append(pruned)
    return expected


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.sampled_from([20, 21, 300, 6001]), min_size=1, max_size=3),
    st.integers(2, 9),
    st.floats(0, 1),
    st.sampled_from(["many values", "few values", "half zero"]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
    st.integers(0, 999),
)
def test_bundles_against_a_sort(sizes, count, sparsity, kind, masked_share, revives, seed):
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    if kind == "few values":
        layers = [np.round(score) for score in layers]
    if kind == "half zero":
        layers = [np.maximum(score, 0) for score in layers]
    masked = [rng.random(size) < masked_share for size in sizes]
    for was in masked:
        was[-2 * count :] = False
    if sum(was.sum() + count for was in masked) > sparsity * sum(sizes):
        masked = [np.zeros(size, bool) for size in sizes]  # only rising sparsities
    scored = [
        ScoredLayer(None, score.__getitem__, ~was, revives=revives) for score, was in zip(layers, masked, strict=True)
    ]
    joined, spreads = zip(*(bundle(layer, count) for layer in scored), strict=True)
    kept = [spread(each) for spread, each in zip(spreads, select_groups(joined, sparsity), strict=True)]
    for each, pruned in zip(kept, pruned_by_sorting(layers, masked, count, sparsity), strict=True):
        assert (~each == pruned).all()
    # A context of the user's own may read the scores, in the order of rank.
    assert all((np.diff(each.score[each.alive]) >= 0).all() for each in joined)


@pytest.mark.parametrize("context", ["local", "global", "erk"])
@pytest.mark.parametrize("count", [2, 8, 7])
def test_single_weights_of_large_layers_rise_and_fall(context, count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 99), nn.Linear(99, 150))
    scores = [layer.weight.detach().abs().flatten().clone() for layer in model]
    sparsifier = Sparsifier(model, context=context, criteria="large_init", layers=["0", "1"], round_to=count)
    for level in (0.4, 0.7, 0.2):
        sparsifier.sparsify(level)
        for mask, score in zip(sparsifier.masks.values(), scores, strict=True):
            kept = mask.flatten()
            assert int(kept.sum()) % count == 0
            assert score[kept].min() >= score[~kept].max()
        assert sparsifier.masks["0.weight"].numel() == 14_850
        total = sum(int((~mask).sum()) for mask in sparsifier.masks.values())
        assert abs(total - level * 29_700) <= count * (1 if context == "global" else 2)
