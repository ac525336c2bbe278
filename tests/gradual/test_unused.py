"""Arguments that were given and can do nothing: one line each; and the defaults say nothing."""

import re
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import small_net
from torch import nn

from sparsifai import Recipe, Sparsifier, Sparsify, TrainingManager, blocks, bounded, quantities, taken

UNUSED = {
    "initial_sparsity=0.2 does nothing: schedule one_shot begins at the target": {
        "schedule": "one_shot",
        "initial_sparsity": 0.2,
    },
    "regrow=grad does nothing with drop=0: no weight": {"regrow": "grad", "drop": 0},
    "calibration= does nothing: criterion large_final looks at no data": {"calibration": [1]},
    "calibration= does nothing: criterion movement looks at": {
        "criteria": "movement",
        "regrow": "grad",
        "calibration": [1],
    },
}
OF_SPARSIFIER = {
    "pool=max does nothing: with granularity 'weight' each weight": {"pool": "max"},
    "may_empty=True empties no layer: context 2:4 prunes 50.00% of a layer": {"context": "2:4", "may_empty": True},
}


@pytest.mark.parametrize("message", UNUSED)
def test_arguments_that_do_nothing_are_told_once(message):
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        Sparsify(0.5, **UNUSED[message])
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("message", OF_SPARSIFIER)
def test_options_that_do_nothing_are_told_once(message):
    part, model = Sparsify(0.5, **OF_SPARSIFIER[message]), small_net()
    for make in (partial(Sparsifier, **OF_SPARSIFIER[message]), part.pruning.sparsifier):
        with pytest.warns(UserWarning, match=re.escape(message)) as caught:
            make(model)
        assert len(caught) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "agp", "initial_sparsity": 0.2},
        {"schedule": "dsd", "initial_sparsity": 0.2},
        {"initial_sparsity": 0.5},
        {"regrow": "grad"},
        {"regrow": "grad", "drop": 0.1},
        {"criteria": "wanda", "calibration": [1]},
        {"criteria": "snip", "calibration": [1]},
        {"compensate": True, "calibration": [1]},
        {"granularity": "filter", "pool": "max"},
        {"pool": "mean"},
        {"may_empty": True},
        {"may_empty": True, "granularity": "filter", "context": "local"},
        {"may_empty": True, "context": blocks(4)},
        {"may_empty": True, "context": bounded("global", {"0": 0.3})},
    ],
)
def test_arguments_that_do_something_are_not(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sparsify(0.5, **options).pruning.sparsifier(small_net())


def test_squares_of_signed_scores_have_another_order():
    def signed(weight):
        return weight

    net, masks = nn.Linear(8, 8), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pool in ("mean", "squared_sum"):
            sparsifier = Sparsifier(deepcopy(net), criteria=signed, pool=pool)
            sparsifier.sparsify(0.5)
            masks.append(sparsifier.masks["weight"])
    assert not masks[0].equal(masks[1])


def test_a_context_of_ones_own_may_empty_a_layer_below_its_highest_sparsity():
    def first_layer(layers, sparsity):
        return [np.full(layer.alive.shape, number > 0 or sparsity == 0) for number, layer in enumerate(layers)]

    first_layer.highest_sparsity = 0.5
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), context=first_layer, may_empty=True)
    sparsifier.sparsify(0.5)
    assert not sparsifier.masks["0.weight"].any()


def test_the_batches_of_a_recipe_are_for_the_steps_that_look_at_them():
    step = {"sparsity": 0.5, "layers": "0", "context": "local", "criteria": "wanda"}
    steps = [{"sparsify": step}, {"sparsify": {"sparsity": 0.5, "layers": "1"}}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = Recipe({"epochs": 1, "steps": steps}).parts(calibration=[1])
    assert [part.pruning.calibration for part in parts] == [[1], None]
    with pytest.warns(UserWarning, match="calibration= does nothing: criterion large_final"):
        Recipe({"epochs": 1, "steps": steps[1:]}).parts(calibration=[1])


@pytest.mark.usefixtures("registering")
def test_a_quantity_of_ones_own_can_look_at_data():
    @quantities.register(name="mean_of_gradients")
    @taken("backward")
    def mean_of_gradients(source, name):
        return source.layers[name].parameter.grad

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sparsify(0.5, criteria=lambda weight, mean_of_gradients: mean_of_gradients, calibration=[1])


def test_updates_that_are_further_apart_than_the_training_is_long_are_told_once():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = TrainingManager(model, optimizer, Sparsify(0.5, every=5), epochs=1, steps_per_epoch=4)

    def train():
        for _ in range(4):
            model(torch.randn(2, 8)).sum().backward()
            manager.step()

    with pytest.warns(
        UserWarning, match="^TrainingManager: every=5 is more than the 4 batches of the training"
    ) as caught:
        train()
    assert len(caught) == 1
    assert manager.sparsity == 0.5
