"""Arguments that were given and can do nothing: one line each; and the defaults say nothing."""

import re
import warnings
from functools import partial

import pytest
import torch
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier, Sparsify, TrainingManager, quantities, taken

UNUSED = {
    "initial_sparsity=0.2 does nothing: schedule one_shot begins at the target": {
        "schedule": "one_shot",
        "initial_sparsity": 0.2,
    },
    "regrow=grad does nothing with drop=0: no weight": {"regrow": "grad", "drop": 0},
    "calibration= does nothing: criterion large_final looks at no data": {"calibration": [1]},
}
OF_SPARSIFIER = {
    "pool=max does nothing: with granularity 'weight' each weight": {"pool": "max"},
    "may_empty=True does nothing: context 2:4 prunes 50.00% of a layer": {"context": "2:4", "may_empty": True},
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
    ],
)
def test_arguments_that_do_something_are_not(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sparsify(0.5, **options).pruning.sparsifier(small_net())


def test_a_quantity_of_ones_own_can_look_at_data():
    @quantities.register(name="mean_of_gradients")
    @taken("backward")
    def mean_of_gradients(source, name):
        return source.layers[name].parameter.grad

    try:
        Sparsify(0.5, criteria=lambda weight, mean_of_gradients: mean_of_gradients, calibration=[1])
    finally:
        quantities._functions.pop("mean_of_gradients")


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
