"""Contexts that give each layer a sparsity of its own: by hand, against plain computations, and with limits."""

import math

import numpy as np
import pytest
import torch
from conftest import layers_of
from torch import nn

from sparsifai import Sparsifier, bounded, criteria, is_nm


def densities(sparsifier):
    return {name: float(mask.expand_as(target.parameter).float().mean()) for (name, mask), target in
            zip(sparsifier.masks.items(), layers_of(sparsifier).values(), strict=True)}  # fmt: skip


def sparsified(model, context, sparsity, **options):
    sparsifier = Sparsifier(model, context=context, **options)
    sparsifier.sparsify(sparsity)
    return sparsifier


def mlp():
    return nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 100), nn.Linear(100, 10))


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 1), nn.Linear(32, 10))


def test_erk_by_hand():
    # (out + in) / (out in): 4/300, 4/300, 11/100; 10 % of 61,000 weights are 6100. The last layer is dense
    # at any scale above 100/11; at 5300 / (400 + 400 + 110) = 5.8 it is 64 % dense, the others 7.8 %.
    scale = 6100 / (400 + 400 + 110)
    found = densities(sparsified(mlp(), "erk", 0.9))
    assert found == pytest.approx(
        {"0.weight": scale * 4 / 300, "1.weight": scale * 4 / 300, "2.weight": scale * 0.11}, abs=1e-3
    )


def test_erk_keeps_a_layer_dense_whose_density_would_be_above_one():
    # At 30 % density 18,300 weights are kept; the last layer's 1000 are dense, the others share 17,300 of 60,000.
    found = densities(sparsified(mlp(), "erk", 0.7))
    assert found == pytest.approx({"0.weight": 17_300 / 60_000, "1.weight": 17_300 / 60_000, "2.weight": 1.0}, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("context", ["erk", "er"])
def test_erdos_renyi_against_a_search_for_the_scale(context, sparsity):
    model = conv_net()
    sparsifier = sparsified(model, context, sparsity)
    shapes = {name: tuple(target.parameter.shape) for name, target in layers_of(sparsifier).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    relative = {
        name: sum(shape) / math.prod(shape) if context == "erk" else sum(shape[:2]) / math.prod(shape[:2])
        for name, shape in shapes.items()
    }
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        kept = sum(min(1, scale * relative[name]) * sizes[name] for name in sizes)
        low, high = (scale, high) if kept < (1 - sparsity) * sum(sizes.values()) else (low, scale)
    expected = {name: min(1, high * relative[name]) for name in sizes}
    found = densities(sparsifier)
    for name, size in sizes.items():
        assert abs(found[name] - expected[name]) * size <= 1, name
    assert abs(sparsifier.sparsity - sparsity) * sum(sizes.values()) <= len(sizes)


@pytest.mark.parametrize("context", ["erk", "er", bounded("erk", {"2": 0.1})])
def test_the_other_layers_make_up_for_one_that_is_masked_beyond_its_budget(context):
    model = mlp()
    sparsifier = Sparsifier(model, context=context)
    adopted = {name: torch.ones_like(mask) for name, mask in sparsifier.masks.items()}
    adopted["1.weight"][:, :290] = False
    sparsifier.all_masks.add(adopted)
    for level in (0.5, 0.6, 0.9):
        sparsifier.sparsify(level)
        assert sparsifier.sparsity == pytest.approx(level, abs=1e-4)


def test_uniform_plus_spares_the_first_convolution_and_the_last_layer():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))
    found = densities(sparsified(model, "uniform_plus", 0.9))
    total, first, last = 432 + 9216 + 36864 + 640, 432, 640
    others = (0.1 * total - first - 0.2 * last) / (total - first - last)
    assert found == pytest.approx({"0.weight": 1, "1.weight": others, "2.weight": others, "3.weight": 0.2}, abs=1e-3)
    # Without a first convolution, and below 80 %, all layers are equally sparse.
    assert densities(sparsified(mlp(), "uniform_plus", 0.5)) == pytest.approx(
        dict.fromkeys(("0.weight", "1.weight", "2.weight"), 0.5)
    )


def lamp_scores(weight):
    """LAMP scores, the plain way: the square of a weight over the sum of squares of all weights that are no smaller."""
    squares = weight.detach().double().flatten() ** 2
    order = np.argsort(squares.numpy(), kind="stable")
    scores = torch.empty_like(squares)
    for position, place in enumerate(order):
        scores[place] = squares[place] / squares[order[position:]].sum()
    return scores.view_as(weight)


def test_lamp_against_the_plain_formula():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9))
    with torch.no_grad():
        model[1].weight.mul_(7).round_().div_(3)  # ties, and another scale
    for layer in model:
        assert torch.allclose(criteria["lamp"](layer.weight.detach()), lamp_scores(layer.weight), rtol=1e-12)
    by_criterion = sparsified(model, "global", 0.7, criteria="lamp")
    counts = {name: int((~mask).sum()) for name, mask in by_criterion.masks.items()}
    other = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9))
    other.load_state_dict(model.state_dict())
    assert {name: int((~mask).sum()) for name, mask in sparsified(model, "lamp", 0.7).masks.items()} == counts
    assert counts["0.weight"] / 240 != pytest.approx(counts["1.weight"] / 180, abs=0.01)
    # LAMP gives the number of pruned weights, the criterion chooses them.
    random = Sparsifier(other, context="lamp", criteria="random")
    random.sparsify(0.7)
    assert sum(int((~mask).sum()) for mask in random.masks.values()) == pytest.approx(0.7 * 420, abs=1)


@pytest.mark.parametrize("context", ["global", "local", "erk", "lamp"])
def test_bounds_hold_and_the_others_make_up_for_them(context):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 20))
    with torch.no_grad():
        model[1].weight.mul_(0.1)
        model[3].weight.mul_(10)
    limits = {"0": 0.5, "1": (0.0, 0.8), "3": (0.3, 0.9)}
    sparsifier = sparsified(model, bounded(context, limits), 0.7)
    sparse = {name: 1 - density for name, density in densities(sparsifier).items()}
    assert sparse["0.weight"] == pytest.approx(0.5, abs=1 / 3000)
    assert sparse["1.weight"] <= 0.8 + 1 / 2000
    assert 0.3 - 1 / 600 <= sparse["3.weight"] <= 0.9 + 1 / 600
    assert sparsifier.sparsity == pytest.approx(0.7, abs=4 / 6800)


def test_global_ranks_the_other_layers_without_one_of_fixed_sparsity():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30))
    weights = [layer.weight.detach().abs().flatten() for layer in model]
    sparsifier = sparsified(model, bounded("global", {"2": 0.25}), 0.6)
    others = torch.cat(weights[:2])
    count = round(0.6 * 6200) - 300
    threshold = others.sort().values[count]
    assert torch.equal(torch.cat([sparsifier.masks[f"{n}.weight"].flatten() for n in (0, 1)]), others >= threshold)


@pytest.mark.parametrize("context", ["global", "local", "erk"])
@pytest.mark.parametrize("granularity", ["weight", "3x4"])
def test_bounds_hold_while_the_sparsity_rises(context, granularity):
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 20))
    limits = {"0": 0.5, "1": (0.6, 1.0), "2": (0.0, 0.4)}
    sparsifier = Sparsifier(model, granularity, bounded(context, limits))
    lowest = (0.5 * 2000 + 0.6 * 2000) / 5800
    slack = 0.5 / 5800 * 4 if granularity == "weight" else 0.01
    for level in np.linspace(0, 0.7, 15):
        sparsifier.sparsify(float(level))
        assert sparsifier.sparsity == pytest.approx(level, abs=slack)
        sparse = {name: 1 - density for name, density in densities(sparsifier).items()}
        share = min(1, level / lowest)
        assert sparse["0.weight"] == pytest.approx(0.5 * share, abs=5 * slack)
        assert sparse["1.weight"] >= 0.6 * share - 5 * slack
        assert sparse["2.weight"] <= 0.4 + 5 * slack
    steps = Sparsifier(mlp(), context=bounded(context, {"0": 0.5}))
    steps.sparsify(0.6, steps=7)
    assert steps.sparsity == pytest.approx(0.6, abs=1e-4)


def test_bounded_keeps_the_pattern_of_its_context():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(18, 6))
    sparsifier = sparsified(model, bounded("2:4", {"0": 0.25}), 0.4)
    assert densities(sparsifier)["0.weight"] == 0.75
    assert is_nm(model[0].weight, 3, 4)
    assert is_nm(model[1].weight, 2, 4)
    assert "18 along 'in' is no multiple of 4: the last block has 2" in str(sparsifier.report())
