"""What a Sparsifier keeps and lets go, and criteria of one's own that declare what they can."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from conftest import has_ties
from torch import nn

from sparsifai import Sparsifier, quantities, taken


def test_a_pickle_holds_neither_patterns_nor_a_whole_batch(net):
    batch = torch.zeros(1000, 2, 8, 8)
    sparsifier = Sparsifier(net, "filter", layers=lambda name, module: name == "0", example_input=batch)
    assert len(pickle.dumps(sparsifier)) < batch.numel()


def test_a_released_model_is_held_by_nothing(net):
    sparsifier, first = Sparsifier(net, layers=[net[0]]), weakref.ref(net[0])
    net = sparsifier.release()
    del net[0]
    gc.collect()
    assert first() is None


def test_a_quantity_of_the_update_holds_no_graph(mlp):
    @quantities.register
    @taken("update")
    def squared(sparsifier, name):
        return sparsifier.layers[name].parameter ** 2

    try:
        sparsifier = Sparsifier(mlp, criteria=lambda weight: weight.abs(), regrow=lambda squared: squared)
        sparsifier.sparsify(0.5)
        copy.deepcopy(sparsifier)  # of a tensor with a graph it fails
    finally:
        quantities._functions.pop("squared")


def test_with_warnings_as_errors_nothing_has_changed(net):
    sparsifier = Sparsifier(net, "filter")
    sparsifier.sparsify(0.5)
    for update in (sparsifier.sparsify, sparsifier.update_masks):  # in these tests, warnings are errors
        with pytest.raises(UserWarning, match="revives whole outputs"):
            update(0.2)
    assert sparsifier.level == pytest.approx(0.5)


def test_previous_is_zero_where_a_step_has_moved_what_is_masked(mlp):
    sparsifier = Sparsifier(mlp, criteria="updating_movement")
    with torch.no_grad():
        mlp[0].weight.add_(1)
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        mlp[0].weight.add_(1)  # what is masked, too
    sparsifier.update_masks(0.5)  # no weight is newly masked
    previous = sparsifier.state_dict()["statistics"]["stored"]["previous"]
    assert all((previous[name][~mask] == 0).all() for name, mask in sparsifier.masks.items())


def test_a_pattern_that_means_no_sparse_layer_is_an_error_in_steps_too(net):
    with pytest.raises(ValueError, match="matches only layers that stay dense"):
        Sparsifier(net, exclude="0").sparsify({"0": 0.5}, steps=2)


@has_ties
def test_a_criterion_of_ones_own_that_declares_that_it_is_elementwise():
    sizes = []

    def distance(weight):
        sizes.append(weight.numel())
        return (weight - 1).abs()

    model = nn.Linear(1000, 300)
    torch.manual_seed(0)
    plain = Sparsifier(copy.deepcopy(model), criteria=distance)
    plain.sparsify(0.5)
    assert set(sizes) == {300_000}
    distance.elementwise = True
    sizes.clear()
    by_parts = Sparsifier(model, criteria=distance)
    by_parts.sparsify(0.5)
    assert max(sizes) < 300_000
    assert torch.equal(plain.masks["weight"], by_parts.masks["weight"])

    @functools.wraps(distance)
    def of_the_layer(weight):
        return distance(weight) - weight.mean()

    sizes.clear()
    Sparsifier(model, criteria=of_the_layer).sparsify(0.5)
    assert set(sizes) == {300_000}  # a wrapper has to declare it itself


def test_a_criterion_of_ones_own_with_a_formula_for_numpy(mlp):
    called = []

    def negative(weight):
        return -weight

    negative.elementwise, negative.numpy = True, lambda weight: called.append(1) or -weight
    declared, plain = (
        Sparsifier(mlp, criteria=negative),
        Sparsifier(copy.deepcopy(mlp), criteria=lambda weight: -weight),
    )
    for sparsifier in (declared, plain):
        sparsifier.sparsify(0.5)
    assert called
    assert all(torch.equal(mask, declared.masks[name]) for name, mask in plain.masks.items())
