"""Which layers are pruned, and why the others stay dense."""

import pytest
from conftest import dense_of
from torch import nn

from sparsifai import Sparsifier


def test_by_default_frozen_layers_and_embeddings_stay_dense():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="are frozen, so they stay dense"):
        sparsifier = Sparsifier(model)
    assert list(sparsifier.masks) == ["2.weight"]
    assert dense_of(sparsifier) == {"0.weight": "embedding", "1.weight": "frozen"}
    assert list(Sparsifier(model, layers=["0", nn.Linear]).masks) == ["0.weight", "1.weight", "2.weight"]


def test_the_last_layer_stays_dense_if_outputs_are_pruned_and_the_first_if_inputs_are(net):
    reason = {"12.weight": "yields the model's output"}
    assert dense_of(Sparsifier(net, "filter")) == reason
    assert dense_of(Sparsifier(net, "channel")) == {"0.weight": "reads the model's input"}
    assert dense_of(Sparsifier(net, "layer")) == {"0.weight": "reads the model's input", **reason}
    assert dense_of(Sparsifier(net, "kernel")) == {}
    assert dense_of(Sparsifier(net, "row")) == reason  # a row of a matrix is an output


def test_a_first_or_last_layer_is_pruned_if_it_is_named_exactly(net):
    assert list(Sparsifier(net, "filter", layers=["12", "0.weight"]).masks) == ["0.weight", "12.weight"]
    assert list(Sparsifier(net, "filter", layers=[nn.Linear]).masks) == ["10.weight"]


def test_layers_that_cannot_have_a_granularity_stay_dense_with_the_reason(net):
    dense = dense_of(Sparsifier(net, "shared_channel"))
    assert dense == {
        "10.weight": "shared_channel needs axis 'h', but the layer has only (out, in)",
        "12.weight": "shared_channel needs axis 'h', but the layer has only (out, in)",
    }


def test_a_granularity_that_no_layer_can_have_is_an_error(mlp):
    with pytest.raises(ValueError, match="no layer"):
        Sparsifier(mlp, "shared_channel")
    with pytest.raises(ValueError, match="no layer"):
        Sparsifier(nn.Linear(4, 2), "filter")


def test_a_module_given_as_pattern_names_a_layer_exactly(net):
    assert list(Sparsifier(net, "filter", layers=net[12]).masks) == ["12.weight"]


def test_a_layer_of_one_group_stays_dense_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 3))
    assert dense_of(Sparsifier(model, "filter")) == {
        "1.weight": "has 1 group, of which 1 must be kept",
        "2.weight": "yields the model's output",
    }
