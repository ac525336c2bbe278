"""Flows that are written by hand; tests/model/test_tracing.py has those of models."""

import pytest
from torch import nn

from sparsifai.model.flow import Flow, Operation


def conv_norm_relu():
    """input -> conv -> relu -> norm -> head, and a second norm layer after the sum of conv and norm."""
    return nn.ModuleDict({
        "conv": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "after_sum": nn.BatchNorm2d(4), "head": nn.Linear(4, 2),
    }), Flow(
        [
            Operation([], set()),
            Operation([0], {"conv.weight", "conv.bias"}),
            Operation([1], set(), keeps_zeros=True),
            Operation([2], {"norm.weight", "norm.bias"}),
            Operation([1, 3], set()),
            Operation([4], {"after_sum.weight", "after_sum.bias"}),
            Operation([5], {"head.weight"}),
        ],
        {0},
        {6},
    )  # fmt: skip


LAYERS = ["conv.weight", "head.weight"]


def test_first_and_last_layers():
    _, flow = conv_norm_relu()
    assert flow.first(LAYERS) == {"conv.weight"}
    assert flow.last(LAYERS) == {"head.weight"}
    assert flow.first(["head.weight"]) == {"head.weight"}
    assert flow.last(["conv.weight"]) == {"conv.weight"}


def test_a_norm_layer_after_a_sum_follows_no_layer():
    model, flow = conv_norm_relu()
    assert flow.norms_behind(model, LAYERS) == {("norm", False): {"conv.weight"}}


def test_an_operation_that_mixes_channels_ends_the_search():
    model, flow = conv_norm_relu()
    flow.steps[2].keeps_zeros = False
    assert flow.norms_behind(model, LAYERS) == {}


@pytest.mark.parametrize(("order", "expected"), [((0, 2, 3, 1), {("norm", True)}), ((0, 2, 1, 3), set())])
def test_channels_that_are_moved_to_the_last_axis(order, expected):
    model, flow = conv_norm_relu()
    flow.steps[2] = Operation([1], set(), moved=order)
    assert set(flow.norms_behind(model, LAYERS)) == expected
