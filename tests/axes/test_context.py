"""Contexts that spend a budget, or rank within outputs: by hand, against plain computations, and their limits."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsifai import Sparsifier, blocks, bounded, contexts, criteria, is_nm


def densities(sparsifier):
    return {name: float(mask.expand_as(target.parameter).float().mean()) for (name, mask), target in
            zip(sparsifier.masks.items(), sparsifier.targets.values(), strict=True)}  # fmt: skip


def sparsified(model, context, sparsity, **options):
    sparsifier = Sparsifier(model, context=context, **options)
    sparsifier.sparsify(sparsity)
    return sparsifier


def mlp():
    return nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 100), nn.Linear(100, 10))


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 1), nn.Linear(32, 10))


def test_erk_by_hand():
    # (out + in) / (out in): 4/300, 4/300, 11/100; 10 % of 61,000 weights are 6100. The last would be dense twice over
    # at any scale above 100/11: at 5300 / (400 + 400 + 110) = 5.8 it is 64 % dense, the others 7.8 %.
    scale = 6100 / (400 + 400 + 110)
    found = densities(sparsified(mlp(), "erk", 0.9))
    assert found == pytest.approx(
        {"0.weight": scale * 4 / 300, "1.weight": scale * 4 / 300, "2.weight": scale * 0.11}, abs=1e-3
    )


def test_erk_leaves_dense_what_would_be_more_than_dense():
    # At 30 % density 18,300 weights stay; the last layer's 1000 are dense, the others share 17,300 of 60,000.
    found = densities(sparsified(mlp(), "erk", 0.7))
    assert found == pytest.approx({"0.weight": 17_300 / 60_000, "1.weight": 17_300 / 60_000, "2.weight": 1.0}, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("context", ["erk", "er"])
def test_erdos_renyi_against_a_search_for_the_scale(context, sparsity):
    model = conv_net()
    sparsifier = sparsified(model, context, sparsity)
    shapes = {name: tuple(target.parameter.shape) for name, target in sparsifier.targets.items()}
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
def test_others_make_up_for_what_is_masked_beyond_a_budget(context):
    model = mlp()
    sparsifier = Sparsifier(model, context=context)
    adopted = {name: torch.ones_like(mask) for name, mask in sparsifier.masks.items()}
    adopted["1.weight"][:, :290] = False
    sparsifier.adopt(adopted)
    for level in (0.5, 0.6, 0.9):
        sparsifier.sparsify(level)
        assert sparsifier.sparsity == pytest.approx(level, abs=1e-4)


def test_uniform_plus_spares_the_first_convolution_and_the_last_layer():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))
    found = densities(sparsified(model, "uniform_plus", 0.9))
    total, first, last = 432 + 9216 + 36864 + 640, 432, 640
    others = (0.1 * total - first - 0.2 * last) / (total - first - last)
    assert found == pytest.approx({"0.weight": 1, "1.weight": others, "2.weight": others, "3.weight": 0.2}, abs=1e-3)
    # Of linear layers none is a first convolution, and below 80 % the last is as sparse as all.
    assert densities(sparsified(mlp(), "uniform_plus", 0.5)) == pytest.approx(
        dict.fromkeys(("0.weight", "1.weight", "2.weight"), 0.5)
    )
    with pytest.raises(ValueError, match=r"sparsity 0.999 cannot be had: the limits allow 0.9881 at most"):
        sparsified(model, "uniform_plus", 0.999)


def lamp_scores(weight):
    """Of every weight: its square over those of all that are no smaller, the plain way."""
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
    # The budget is LAMP's, what falls within a layer is the criterion's.
    random = Sparsifier(other, context="lamp", criteria="random")
    random.sparsify(0.7)
    assert sum(int((~mask).sum()) for mask in random.masks.values()) == pytest.approx(0.7 * 420, abs=1)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("masked", [0.0, 0.05])
def test_per_output_ranks_every_row_alone(level, masked):
    model = nn.Sequential(nn.Linear(30, 7), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(9).round_()  # ties
    sparsifier = Sparsifier(model, context="per_output")
    if masked:
        sparsifier.sparsify(masked)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    weights = {name: target.parameter.detach().clone() for name, target in sparsifier.targets.items()}
    sparsifier.sparsify(max(level, masked))
    rows_of = {
        "0.weight": lambda value: value.flatten(1),
        "1.weight": lambda value: value.flatten(1),
        "2.weight": lambda value: value.unflatten(0, (2, 2)).permute(0, 2, 1, 3, 4).reshape(6, -1),
    }
    for name, rows in rows_of.items():
        for score, was, kept in zip(
            rows(weights[name].abs()), rows(before[name]), rows(sparsifier.masks[name]), strict=True
        ):
            order = np.lexsort((score.numpy(), was.numpy()))
            count = min(math.floor(max(level, masked) * len(score) + 0.5), len(score) - 1)
            expected = np.ones(len(score), bool)
            expected[order[:count]] = False
            assert (kept.numpy() == expected).all(), name


def test_per_output_needs_parts_of_outputs():
    with pytest.raises(ValueError, match=r"context per_output: the groups of 0.weight are not parts of outputs"):
        sparsified(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "per_output", 0.5, granularity="row")


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


def test_a_layer_that_is_fixed_within_global_leaves_the_ranking_of_the_others():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30))
    weights = [layer.weight.detach().abs().flatten() for layer in model]
    sparsifier = sparsified(model, bounded("global", {"2": 0.25}), 0.6)
    others = torch.cat(weights[:2])
    count = round(0.6 * 6200) - 300
    threshold = others.sort().values[count]
    assert torch.equal(torch.cat([sparsifier.masks[f"{n}.weight"].flatten() for n in (0, 1)]), others >= threshold)


def test_bounds_that_cannot_be_kept_are_an_error():
    model = mlp()
    with pytest.raises(ValueError, match=r"sparsity 0.9 cannot be had: the limits allow 0.5 at most; widen them"):
        sparsified(model, bounded("global", {"*": (0, 0.5)}), 0.9)
    with pytest.raises(ValueError, match="no layer with a weight to sparsify matches 'head'"):
        sparsified(model, bounded("local", {"head": 0.5}), 0.1)
    for wrong in ({"0": 1.5}, {"0": (0.6, 0.4)}, {nn.Linear: 0.5}, {"0": (0.1,)}, {"0": None}, {"0": True}):
        with pytest.raises(ValueError, match="is not a glob of layer names and a sparsity from 0 to 1, or two"):
            bounded("global", wrong)
    with pytest.raises(ValueError, match="unknown context 'globl'"):
        bounded("globl", {})
    with pytest.raises(TypeError, match="bounds is a dictionary"):
        bounded("global", 0.5)
    for uncalled in (bounded, blocks):
        with pytest.raises(TypeError, match="is to be called"):
            Sparsifier(model, context=uncalled)


@pytest.mark.parametrize("context", ["global", "local", "erk"])
@pytest.mark.parametrize("granularity", ["weight", "3x4"])
def test_bounds_hold_at_every_level_of_a_ramp(context, granularity):
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


def test_bounded_keeps_what_the_context_within_is_about():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(18, 6))
    sparsifier = sparsified(model, bounded("2:4", {"0": 0.25}), 0.4)
    assert densities(sparsifier)["0.weight"] == 0.75
    assert is_nm(model[0].weight, 3, 4)
    assert is_nm(model[1].weight, 2, 4)
    assert "blocks of 4 leave 2 of 18" in str(sparsifier.report())


@pytest.mark.parametrize("context", [*contexts, "2:4", bounded("erk", {"0": 0.2})])
def test_every_context_is_exact_about_ties_nan_and_never_empties(context):
    model = mlp()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.25)
    sparsifier = Sparsifier(model, context=context)
    sparsifier.sparsify(0.4)
    assert all(mask.any() for mask in sparsifier.masks.values())
    expected = 0.5 if context == "2:4" else 0.4
    assert sparsifier.sparsity == pytest.approx(expected, abs=1e-4)
    for name, mask in sparsifier.masks.items():
        if context not in ("2:4", "per_output"):  # ties in index order
            assert not mask.flatten()[: int((~mask).sum())].any(), name
    with torch.no_grad():
        model[1].weight[5, 5] = float("nan")
        sparsifier.masks["1.weight"][5, 5] = True
    before = sparsifier.masks
    with pytest.raises(ValueError, match=r"NaN scores for 1.weight"):
        sparsifier.sparsify(0.5 if context == "2:4" else 0.45)
    assert sparsifier.masks is before


@pytest.mark.parametrize("context", [*contexts, "2:4", bounded("erk", {"0": 0.2})])
def test_what_is_masked_beyond_what_a_context_asks_for_stays(context):
    model = mlp()
    sparsifier = Sparsifier(model, context=context)
    adopted = {name: torch.ones_like(mask) for name, mask in sparsifier.masks.items()}
    adopted["1.weight"][:, :200] = False  # whole blocks, and more than any level below
    sparsifier.adopt(adopted)
    sparsifier.apply_masks()
    for level in (0.25, 0.5):
        sparsifier.sparsify(level)
        assert not sparsifier.masks["1.weight"][:, :200].any()
        assert (model[1].weight[:, :200] == 0).all()


@pytest.mark.parametrize("context", [name for name in contexts if name != "uniform_plus"])
def test_a_layer_may_be_emptied_where_that_is_asked_for(context):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.uniform_(0.1, 0.2)
        model[1].weight.uniform_(1, 2)
    sparsifier = Sparsifier(model, context=context, may_empty=True)
    sparsifier.sparsify(1.0 if context != "global" else 0.5)
    assert sparsifier.sparsity == (
        pytest.approx(0.95) if context == "per_output" else 1.0 if context != "global" else 0.5
    )
    assert sparsifier.masks["0.weight"].any() == (context == "per_output")
