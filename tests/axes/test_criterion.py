"""Scores of every criterion by hand, and criteria of your own."""

from functools import partial

import pytest
import torch
from conftest import levels_of

from sparsifai import Sparsifier, criteria
from sparsifai.axes.criterion import quantities_of

WEIGHT, INIT, PREVIOUS = (torch.tensor(values) for values in ([1.0, -2.0, 0.5], [-1.0, -1.0, 0.75], [3.0, -2.0, 0.0]))

# By hand from the formulas.
SCORES = {
    "large_final": [1, 2, 0.5],
    "small_final": [-1, -2, -0.5],
    "squared_final": [1, 4, 0.25],
    "large_init": [1, 1, 0.75],
    "small_init": [-1, -1, -0.75],
    "large_init_large_final": [1, 1, 0.5],
    "small_init_small_final": [-1, -2, -0.75],
    "magnitude_increase": [0, 1, -0.25],
    "movement": [2, 1, 0.25],
    "movmag": [2, 2, 0.125],
    "updating_magnitude_increase": [-2, 0, 0.5],
    "updating_movement": [2, 0, 0.5],
    "updating_movmag": [2, 0, 0.25],
    "normalized_final": [1 / 5.25**0.5, 2 / 5.25**0.5, 0.5 / 5.25**0.5],
    "lamp": [1 / 5, 1, 0.25 / 5.25],
    "grad": [2, 1, 0.5],
    "snip": [2, 2, 0.25],
    "grasp": [3, 2, 0.25],
    "synflow": [4, 2, 3],
    "taylor": [2, -2, -0.25],
    "fisher": [2, 8, 0.5],
    "movement_pruning": [1, -2, 0.5],
    "wanda": [3, 4, 0.25],
    "obs": [0.25, 2, 0.03125],
    "sparsegpt": [0.5, 4, 0.0625],
    "gate_importance": [2 / 3 * 2**0.5, 2 / 3 * 2**0.5, 1 / 3 * 2**0.5],
}
OF_DATA = {
    "grad": [2.0, 1, -0.5],
    "grad_sq": [4.0, 4, 4],
    "weight_grad": [-1.0, 2, -0.5],
    "hessian_grad": [3.0, -1, 0.5],
    "flow": [4.0, 1, 6],
    "activation": [3.0, 2, 0.5],
    "gate_grad": [2.0, 2, 1],
    "inverse_curvature": [2.0, 1, 4],
}


def test_every_criterion_but_random_has_scores_by_hand():
    assert set(criteria) == {*SCORES, "random"}


@pytest.mark.parametrize("name", SCORES)
def test_scores_by_hand(name):
    known = {"weight": WEIGHT, "init": INIT, "previous": PREVIOUS}
    known |= {quantity: torch.tensor(values) for quantity, values in OF_DATA.items()} | {"group_width": 2}
    criterion = criteria[name]
    scores = criterion(**{quantity: known[quantity] for quantity in quantities_of(criterion)})
    assert scores.tolist() == pytest.approx(SCORES[name], rel=1e-6)


def test_random_is_uniform_and_seeded():
    draws = [criteria["random"](torch.empty(1000), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert 0 <= draws[0].min() < 0.01
    assert 0.99 < draws[0].max() < 1
    assert draws[0].mean() == pytest.approx(0.5, abs=0.05)


def test_options_have_defaults_and_are_set_with_partial():
    doubled = partial(criteria["magnitude_increase"], alpha=2.0)
    assert quantities_of(doubled) == ("weight", "init")
    assert doubled(WEIGHT, INIT).tolist() == [1, 3, 0.25]
    assert criteria.resolve(doubled) is doubled


def test_an_unknown_quantity_is_refused_at_registration_and_in_the_constructor():
    with pytest.raises(ValueError, match="unknown quantity"):

        @criteria.register
        def strange(weight, colour):
            return weight

    assert "strange" not in criteria
    with pytest.raises(ValueError, match="unknown quantity"):
        Sparsifier(torch.nn.Linear(4, 4), criteria=lambda x: x)


def test_a_criterion_of_your_own_by_name_and_as_a_function(mlp, registering):
    @criteria.register
    def distance_from_one(weight):
        return (weight - 1).abs()

    by_name, by_function = (Sparsifier(mlp, criteria=given) for given in ("distance_from_one", distance_from_one))
    assert by_name.ranking.options.criteria is by_function.ranking.options.criteria
    weights = torch.cat([mlp[0].weight.detach().flatten(), mlp[2].weight.detach().flatten()])
    by_name.sparsify(0.5)
    masked = torch.cat([~mask.flatten() for mask in by_name.masks.values()])
    assert weights[masked].min() > weights[~masked].max()  # the nearest to one are pruned


def test_a_criterion_that_writes_in_place_changes_no_weight_and_no_quantity(mlp):
    def greedy(weight, init):
        init.zero_()
        return weight.abs_().add_(1)

    before = [parameter.clone() for parameter in mlp.parameters()]
    sparsifier = Sparsifier(mlp, criteria=greedy)
    sparsifier.sparsify(0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, mlp.parameters(), strict=True))
    assert torch.equal(sparsifier.collected.stored["init"]["0.weight"], before[0])


@pytest.mark.parametrize("wrong", [lambda weight: weight.sum(), lambda weight: 1.0, lambda weight: weight.T])
def test_scores_of_another_shape_are_refused(mlp, wrong):
    with pytest.raises(ValueError, match="one real score per weight"):
        Sparsifier(mlp, criteria=wrong).sparsify(0.5)


def test_nan_scores_name_the_layer_and_change_nothing(mlp):
    with torch.no_grad():
        mlp[2].weight[0, 0] = float("nan")
    sparsifier = Sparsifier(mlp)
    before = mlp[0].weight.clone()
    with pytest.raises(ValueError, match="NaN scores"):
        sparsifier.sparsify(0.5)
    assert torch.equal(mlp[0].weight, before)
    assert all(mask.all() for mask in sparsifier.masks.values())
    assert levels_of(sparsifier) == {"0.weight": 0, "2.weight": 0}


def test_a_failed_update_does_not_advance_the_random_generator(mlp):
    def fails(weight, rng):
        return torch.rand(weight.shape, generator=rng) * float("nan")

    sparsifier = Sparsifier(mlp, criteria=fails)
    before = sparsifier.collected.source.rng.get_state()
    with pytest.raises(ValueError, match="NaN scores"):
        sparsifier.sparsify(0.5)
    assert torch.equal(sparsifier.collected.source.rng.get_state(), before)
    drawn = Sparsifier(mlp, criteria="random")
    drawn.check(0.5)
    assert torch.equal(drawn.collected.source.rng.get_state(), before)
