"""How many weights of each layer LAMP prunes: by hand, and against a sort of the scores of all weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, criteria
from sparsifai.axes.ranking.lamp_counts import lamp_counts


def named(layers):
    return [[(f"{number}.weight", torch.as_tensor(values).flatten())] for number, values in enumerate(layers)]


def expected(layers, sparsity, may_empty=False):
    """Sort all scores, equal ones in index order; the best of each layer is no candidate."""
    scores = [criteria["lamp"](torch.as_tensor(values)).flatten().numpy() for values in layers]
    sizes = [len(score) for score in scores]
    layer_of = np.repeat(np.arange(len(sizes)), sizes)
    is_candidate = np.ones(sum(sizes), bool)
    if not may_empty:
        for end, score in zip(np.cumsum(sizes), scores, strict=True):
            is_candidate[end - 1 - np.argmax(score[::-1])] = False
    candidates = np.flatnonzero(is_candidate)
    order = candidates[np.argsort(np.concatenate(scores)[candidates], kind="stable")]
    pruned = order[: math.floor(sparsity * sum(sizes) + 0.5)]
    return np.bincount(layer_of[pruned], minlength=len(sizes)).tolist()


def test_by_hand():
    # Scores 1/14, 4/13, 9/9 and 1/2, 1/1: the lowest two are of the first layer, the third is of the second.
    layers = named([[1.0, -2.0, 3.0], [1.0, 1.0]])
    assert [lamp_counts(layers, share, False) for share in (0.2, 0.4, 0.6, 1.0)] == [[1, 0], [2, 0], [2, 1], [2, 1]]
    assert lamp_counts(layers, 1.0, True) == [3, 2]


VALUES = {
    "normal": lambda rng, count: rng.standard_normal(count).astype(np.float32),
    "narrow": lambda rng, count: (0.01 * rng.standard_normal(count)).astype(np.float32),
    "heavy tails": lambda rng, count: rng.standard_cauchy(count),
    "few values": lambda rng, count: (rng.integers(-8, 9, count) / 8).astype(np.float32),
    "half zero": lambda rng, count: (rng.standard_normal(count) * (rng.random(count) < 0.5)).astype(np.float32),
    "zeros": lambda rng, count: np.zeros(count, np.float32),
    "one large": lambda rng, count: np.where(np.arange(count) == 3, 1e6, rng.random(count)).astype(np.float32),
    "sorted": lambda rng, count: np.sort(rng.standard_normal(count).astype(np.float32)),
}


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(VALUES)), st.sampled_from([1, 2, 50, 3000, 20_000])), min_size=1, max_size=5
    ),
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-4, 0.999])),
    st.booleans(),
    st.integers(0, 999),
)
def test_against_a_sort_of_all_scores(kinds, sparsity, may_empty, seed):
    rng = np.random.default_rng(seed)
    layers = [VALUES[kind](rng, max(count, 4 if kind == "one large" else 1)) for kind, count in kinds]
    assert lamp_counts(named(layers), sparsity, may_empty) == expected(layers, sparsity, may_empty)


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_equal_layers_are_pruned_in_their_order(sparsity):
    values = (np.random.default_rng(0).integers(-500, 500, 40_001) / 512).astype(np.float32)
    layers = [values, values, np.roll(values, 7)]
    assert lamp_counts(named(layers), sparsity, False) == expected(layers, sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.995])
def test_a_bracket_that_misses_only_costs_time(sparsity, monkeypatch):
    rng = np.random.default_rng(0)
    layers = [VALUES[kind](rng, 30_000) for kind in ("normal", "narrow", "half zero", "heavy tails")]
    wrong = [(0.5, 0.6), (-math.inf, 1e-9), (7.0, math.inf), (1e9, 1e10)]
    monkeypatch.setattr("sparsifai.axes.ranking.lamp_counts._brackets", lambda *_: list(wrong))
    assert lamp_counts(named(layers), sparsity, False) == expected(layers, sparsity)


@pytest.mark.parametrize("count", [50, 30_000])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("place", [0, 17])
def test_what_has_no_score_is_named(count, wrong, place):
    layers = [np.random.default_rng(seed).standard_normal(count) for seed in (0, 1)]
    layers[1][place] = wrong
    with pytest.raises(ValueError, match=r"NaN scores for 1\.weight"):
        lamp_counts(named(layers), 0.5, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_dtype_and_layout(dtype, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 256, 1), nn.Conv2d(256, 8, 1))
    model = model.to(dtype=dtype, memory_format=layout)
    weights = [layer.weight.detach() for layer in model]
    sparsifier = Sparsifier(model, context="lamp", layers=[nn.Conv2d])
    counts = expected(weights, 0.7)
    sparsifier.sparsify(0.7)
    assert [int((~mask).sum()) for mask in sparsifier.masks.values()] == counts
