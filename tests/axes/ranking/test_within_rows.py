"""Ranking within rows and blocks of every length, against a stable sort of each of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, blocks
from sparsifai.axes.ranking.within_rows import write_kept

KINDS = {
    "magnitudes": lambda rng, shape: np.abs(rng.standard_normal(shape, np.float32)),
    "half of them zero": lambda rng, shape: np.abs(rng.standard_normal(shape)) * (rng.random(shape) < 0.5),
    "few values": lambda rng, shape: rng.integers(-2, 3, shape).astype(np.float32),
    "all equal": lambda rng, shape: np.full(shape, 0.25, np.float32),
    "many infinite": lambda rng, shape: np.where(rng.random(shape) < 0.4, -np.inf, rng.standard_normal(shape)),
    "unlike their sample": lambda rng, shape: np.where(np.arange(shape[1]) % 2, 1, -1) * rng.random(shape),
}


def expected(keys, count):
    """False at the `count` lowest of each row, ties in index order."""
    kept = np.ones(keys.shape, bool)
    np.put_along_axis(kept, np.argsort(keys, axis=1, kind="stable")[:, :count], False, axis=1)
    return kept


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from([2, 16, 31, 32, 33, 100, 256, 257, 700, 3000]),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_rows_against_a_stable_sort(kind, length, share, seed):
    keys = KINDS[kind](np.random.default_rng(seed), (7, length))
    count, kept = min(round(share * length), length - 1), np.empty(keys.shape, bool)
    write_kept(kept, keys, 1, length, count)
    assert (kept == expected(keys, count)).all()


@pytest.mark.parametrize("size", [16, 32, 48, 300])
@pytest.mark.parametrize("kind", ["magnitudes", "half of them zero", "few values"])
def test_blocks_along_each_axis_against_a_stable_sort(size, kind):
    keys, count = KINDS[kind](np.random.default_rng(0), (6, 2 * size, 5)), size // 3
    for axis in range(3):
        turned = np.moveaxis(keys, 1, axis)
        kept = np.empty(turned.shape, bool)
        write_kept(kept, turned, axis, size, count)
        by_block = np.moveaxis(turned, axis, -1).reshape(-1, size)
        assert (np.moveaxis(kept, axis, -1).reshape(-1, size) == expected(by_block, count)).all()


@pytest.mark.parametrize(
    ("layer", "outputs"),
    [
        (lambda: nn.Linear(900, 300), lambda weight: weight),
        (lambda: nn.Conv2d(64, 40, 3, groups=2), lambda weight: weight.flatten(1)),
        (lambda: nn.ConvTranspose2d(90, 20, 3), lambda weight: weight.transpose(0, 1).flatten(1)),
        (
            lambda: nn.ConvTranspose1d(60, 20, 5, groups=2),
            lambda weight: weight.unflatten(0, (2, 30)).transpose(1, 2).flatten(0, 1).flatten(1),
        ),
    ],
)
@pytest.mark.parametrize("criteria", ["large_final", "movement"])
def test_each_output_loses_its_lowest_weights(layer, outputs, criteria):
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    sparsifier = Sparsifier(model, context="per_output", criteria=criteria, layers=["0"])
    alive = None
    for level in (0.3, 0.55, 0.8):
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight) / 50)
        weight, init = model[0].weight.detach(), sparsifier.collected.values("0.weight").get("init")
        score = weight.abs() if criteria == "large_final" else (weight - init).abs()
        keys = outputs(score).clone()
        if alive is not None:
            keys[~alive] = -math.inf
        sparsifier.sparsify(level)
        kept = outputs(sparsifier.masks["0.weight"])
        count = math.floor(level * keys.shape[1] + 0.5)
        assert (kept.numpy() == expected(keys.numpy(), count)).all()
        alive = kept


def test_a_falling_sparsity_of_long_rows_revives_the_best_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 12))
    sparsifier = Sparsifier(model, context=blocks(400), layers=["0"], criteria="large_init")
    score = model[0].weight.detach().abs().clone().reshape(24, 400)
    for level, count in ((0.75, 300), (0.25, 100)):
        sparsifier.sparsify(level)
        assert (sparsifier.masks["0.weight"].reshape(24, 400).numpy() == expected(score.numpy(), count)).all()
