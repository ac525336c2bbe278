import math

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifai import contexts
from sparsifai.axes.ranking.scored_layer import ScoredLayer, bundle
from sparsifai.axes.ranking.selection import select_groups


def layer(score, size=1, masked=None, whole=False, dtype=np.float32):
    score = np.asarray(score, dtype)
    masked = np.zeros(len(score), bool) if masked is None else np.asarray(masked, bool)
    size = size if isinstance(size, int) else np.asarray(size)
    return ScoredLayer(None, score.__getitem__, ~masked, size, whole)


def falling(layers, sparsity):
    """Which groups do not stay."""
    return [~stays for stays in select_groups(layers, sparsity)]


def test_lowest_fall_by_hand():
    assert falling([layer([3, 1, 2, 4])], 0.5)[0].tolist() == [False, True, True, False]


def test_ties_fall_in_index_order():
    assert falling([layer([1, 1, 1, 1])], 0.5)[0].tolist() == [True, True, False, False]
    assert [falls.tolist() for falls in falling([layer([1, 1]), layer([1, 1])], 0.25)] == [
        [True, False],
        [False, False],
    ]


def test_half_is_rounded_up():
    assert falling([layer([1, 2, 3, 4, 5])], 0.5)[0].sum() == 3
    assert falling([layer(range(100))], 0.29)[0].sum() == 29


def test_a_layer_is_never_emptied_and_the_others_make_up_for_it():
    first, second = falling([layer([1, 2]), layer([3, 4, 5, 6])], 0.5)
    assert first.tolist() == [True, False]
    assert second.tolist() == [True, True, False, False]
    assert [falls.sum() for falls in falling([layer([1, 2]), layer([3, 4, 5, 6])], 1.0)] == [1, 3]


def test_whole_layers_fall_jointly_but_never_all():
    layers = [layer([2], 10, whole=True), layer([1], 20, whole=True), layer([3], 30, whole=True)]
    assert [falls.tolist() for falls in falling(layers, 0.4)] == [[False], [True], [False]]
    assert [falls.tolist() for falls in falling(layers, 1.0)] == [[True], [True], [False]]
    assert falling(layers[:1], 0.9)[0].tolist() == [False]


def test_masked_groups_fall_first_and_come_back_best_first():
    rising = falling([layer([9, 1, 2, 3], masked=[True, False, False, False])], 0.5)[0]
    assert rising.tolist() == [True, True, False, False]
    back = falling([layer([9, 8, 0, 0], masked=[True, True, False, False])], 0.25)[0]
    assert back.tolist() == [False, True, False, False]


def test_where_nothing_may_come_back_nothing_does():
    may, must_not = (layer([4, 3, 2, 1], masked=[True, True, False, False]) for _ in range(2))
    must_not.revives = False
    stays = select_groups([may, must_not], 0.25)
    assert [each.tolist() for each in stays] == [[True] * 4, [False, False, True, True]]
    assert [each.tolist() for each in select_groups([may, must_not], 0.375)] == [
        [True, False, True, True],
        [False, False, True, True],
    ]
    may.revives = False
    assert [each.tolist() for each in select_groups([may, must_not], 0.25)] == [[False, False, True, True]] * 2


def test_no_layers_are_no_error():
    assert select_groups([], 0.5) == []


@pytest.mark.parametrize("size", [1, [1, 2, 1, 1]])
def test_nan_of_groups_that_are_masked_matters_only_if_they_may_come_back(size):
    def nan_layer():
        each = layer([math.nan, 1, 2, 3], size, masked=[True, False, False, False])
        each.target = type("Named", (), {"name": "it"})
        return each

    for level in (0.2, 0.5, 1.0):
        assert not select_groups([nan_layer()], level)[0][0]
    with pytest.raises(ValueError, match="NaN scores for it"):
        select_groups([nan_layer()], 0.0)


def test_budget_counts_weights_not_groups():
    # The three small groups hold 30 of 130 weights; the nearest to 50 % is 30 or 130 - 100 = 30 plus none.
    falls = falling([layer([1, 2, 3, 4], [10, 10, 10, 100])], 0.5)[0]
    assert falls.tolist() == [True, True, True, False]
    falls = falling([layer([1, 2, 3, 4], [40, 10, 40, 40])], 0.35)[0]  # 45.5 of 130: 50 is nearer than 40
    assert falls.tolist() == [True, True, False, False]


def test_infinite_scores_are_ordinary_scores():
    infinity = math.inf
    assert falling([layer([infinity, 1, -infinity, infinity])], 0.75)[0].tolist() == [True, True, True, False]
    assert falling([layer([-infinity] * 3, masked=[False, False, True])], 0.67)[0].tolist() == [True, False, True]


groups = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, math.inf]), st.integers(1, 5), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(["sizes", "equal"]), st.booleans())
def test_against_the_oracle(layers, sparsity, sizes, masks):
    if sizes == "equal":
        layers = [[(score, 3, masked) for score, _, masked in groups] for groups in layers]
    if not masks:
        layers = [[(score, size, False) for score, size, _ in groups] for groups in layers]
    # No update leaves a layer empty, so none begins with an empty one.
    layers = [[*groups[:-1], (*groups[-1][:2], False)] for groups in layers]
    total = sum(size for groups in layers for _, size, _ in groups)
    if sum(size for groups in layers for _, size, masked in groups if masked) > sparsity * total:
        layers = [[(score, size, False) for score, size, _ in groups] for groups in layers]  # rising only, here
    scored = [
        layer([group[0] for group in groups], 3 if sizes == "equal" else [group[1] for group in groups],
              [group[2] for group in groups])
        for groups in layers
    ]  # fmt: skip
    assert [falls.tolist() for falls in falling(scored, sparsity)] == oracle.fallen(layers, sparsity)


def unlucky(count, rng):
    """All that a sample with a stride sees is low, all else is high."""
    score = rng.random(count).astype(np.float32) + 1
    for stride in range(2, 30):
        score[:: stride * 7] -= 2
    return score


VALUES = {
    "normal": lambda count, rng: rng.standard_normal(count).astype(np.float32),
    "sorted": lambda count, rng: np.sort(rng.standard_normal(count)),
    "constant": lambda count, rng: np.full(count, 0.25, np.float32),
    "few values": lambda count, rng: rng.integers(0, 4, count).astype(np.float32),
    "infinite": lambda count, rng: np.where(rng.random(count) < 0.4, np.inf, rng.random(count)),
    "unlucky": unlucky,
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("masked_share", [0.0, 0.25])
def test_many_groups_of_equal_size_against_a_stable_sort(values, share, masked_share):
    rng = np.random.default_rng(0)
    counts = (150_000, 3, 40_000, 131_072)
    layers = [layer(VALUES[values](count, rng), masked=rng.random(count) < masked_share) for count in counts]
    for each in layers:
        each.alive[-1] = True
    if share < masked_share:
        share = masked_share + 0.01
    score, masked = (np.concatenate([getattr(each, name) for each in layers]) for name in ("score", "masked"))
    ends = np.cumsum(counts)
    kept = [end - 1 - np.argmax(np.where(masked, -np.inf, score)[end - count : end][::-1])
            for end, count in zip(ends, counts, strict=True)]  # fmt: skip
    order = np.lexsort((score, ~masked))
    order = order[~np.isin(order, kept)]
    expected = np.zeros(len(score), bool)
    expected[order[: math.floor(share * len(score) + 0.5)]] = True
    assert (np.concatenate(falling(layers, share)) == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_many_groups_of_unequal_sizes_against_a_stable_sort(few, share, mostly_masked, seed):
    rng = np.random.default_rng(seed)
    masked = np.full(30_000, mostly_masked)
    masked[rng.choice(30_000, few, replace=False)] = not mostly_masked
    masked[-1] = False
    score, size = rng.integers(0, 2000, 30_000).astype(np.float32), rng.integers(1, 5, 30_000)
    falls = falling([layer(score, size, masked)], share)[0]
    returns = share * size.sum() < size[masked].sum()
    best = 29_999 - np.argmax(np.where(masked, -1, score)[::-1])
    candidates = np.flatnonzero(masked if returns else ~masked & (np.arange(30_000) != best))
    order = candidates[np.argsort(score[candidates], kind="stable")]
    amount = share * size.sum() - (0 if returns else size[masked].sum())
    expected = masked.copy() if not returns else np.zeros(30_000, bool)
    expected[order[np.cumsum(size[order]) - size[order] / 2 <= amount]] = True
    assert (falls == expected).all()


def test_layers_of_different_precision_are_ranked_together():
    wide = layer(np.linspace(1e300, 1e301, 30_000), dtype=np.float64)
    narrow = layer(np.linspace(0, 3e38, 30_000))
    with np.errstate(over="raise"):
        falls = falling([wide, narrow], 0.75)
    assert [each.sum() for each in falls] == [15_001, 29_999]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=2, max_size=30),
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_rising_levels_nest_and_falling_levels_nest(score, levels):
    masked = np.zeros(len(score), bool)
    for level in sorted(levels):
        falls = falling([layer(score, masked=masked)], level)[0]
        assert (falls >= masked).all()
        masked = falls
    for level in sorted(levels, reverse=True):
        falls = falling([layer(score, masked=masked)], level)[0]
        assert (falls <= masked).all()
        assert falls.sum() == min(math.floor(level * len(score) + 0.5), len(score) - 1)
        masked = falls


def test_bundles_keep_multiples():
    joined, of_group = bundle(layer([5, 1, 4, 2, 3], 2), 2)
    # By rank 1 | 2 3 | 4 5: the lowest bundle takes the remainder.
    assert of_group.tolist() == [2, 0, 2, 1, 1]
    assert joined.size.tolist() == [2, 4, 4]
    assert joined.score.tolist() == [1, 3, 5]
    for level in np.linspace(0, 1, 21):
        assert select_groups([joined], level)[0][of_group].sum() in (5, 4, 2)


def test_local_ranks_layers_alone_and_global_together():
    layers = [layer([1, 2, 3, 4]), layer([11, 12, 13, 14])]
    assert [stays.sum() for stays in contexts["local"](layers, 0.5)] == [2, 2]
    assert [stays.sum() for stays in contexts["global"](layers, 0.5)] == [1, 3]
