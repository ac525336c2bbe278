"""Several Sparsifiers of one model, each with layers of its own."""

import pytest
import torch
from attentions import WIDTH, Mlp, Net, Separate
from conftest import small_net
from torch import nn

from sparsifai import Sparsifier, Sparsifiers


def pair(model):
    several = Sparsifiers([Sparsifier(model, "filter", layers=["0", "3"]), Sparsifier(model, layers=["10", "12"])])
    for sparsifier, sparsity in zip(several, (0.5, 0.75), strict=True):
        sparsifier.sparsify(sparsity)
    return several


def zeros(model, *positions):
    return sum(int((model[position].weight == 0).sum()) for position in positions)


def test_they_are_measured_and_reported_as_one():
    model = small_net()
    several = pair(model)
    weights = sum(model[position].weight.numel() for position in (0, 3, 10, 12))
    assert several.sparsity == zeros(model, 0, 3, 10, 12) / weights
    assert list(several.masks) == ["0.weight", "3.weight", "10.weight", "12.weight"]
    assert {"0.bias", "1.weight"} <= several.all_masks.keys()
    of_filters, of_weights = (sum(model[at].weight.numel() for at in each) for each in ((0, 3), (10, 12)))
    assert several.level == pytest.approx((0.5 * of_filters + 0.75 * of_weights) / weights)
    report = several.report()
    assert [row.name for row in report.rows if not row.why_dense] == list(several.masks)
    assert (report.selected.weights, report.selected.zeros) == (weights, zeros(model, 0, 3, 10, 12))
    assert report.model == several[0].report().model
    assert len(several) == 2
    assert several[1].sparsity == 50 / 66  # round half up


def test_gradients_weights_and_moments_are_masked_in_the_layers_of_all():
    model = small_net()
    several, optimizer = pair(model), torch.optim.Adam(model.parameters(), 0.1)
    before = several.sparsity
    for _ in range(3):
        model(torch.randn(4, 2, 8, 8)).square().sum().backward()
        several.mask_gradients()
        for name, mask in several.all_masks.items():
            assert not model.get_parameter(name).grad[~mask.expand_as(model.get_parameter(name))].any()
        optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert zeros(model, 0, 3, 10, 12) == 0
    several.apply_masks()
    assert several.sparsity == before
    for state in optimizer.state.values():
        state["exp_avg"] += 1
    several.mask_moments(optimizer)
    for name, mask in several.all_masks.items():
        parameter = model.get_parameter(name)
        assert not optimizer.state[parameter]["exp_avg"][~mask.expand_as(parameter)].any()


def test_joint_groups_of_several_kinds_stand_in_one_report():
    model = Net(lambda: nn.Sequential(Separate(6), Mlp()))
    several = Sparsifiers([Sparsifier(model, "head"), Sparsifier(model, "neuron")])
    for sparsifier in several:
        sparsifier.sparsify(0.5)
    report = several.report()
    assert report.what == "group"
    assert sum(count for _, count in report.joint.values()) == 2 * 6 + 2 * 4
    assert sum(pruned for pruned, _ in report.joint.values()) == 2 * 3 + 2 * 2
    assert "10 of 20 groups are pruned" in str(report)
    assert WIDTH == 5


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (lambda model: [], "give at least one"),
        (lambda model: [Sparsifier(model), Sparsifier(small_net())], "of the same model"),
        (lambda model: [Sparsifier(model), Sparsifier(model, layers="3")], "two Sparsifiers both prune 3.weight; give"),
        # The biases of filters are masked with them.
        (
            lambda model: [Sparsifier(model, "filter", layers="0"), Sparsifier(model, "filter", layers=["0", "3"])],
            "both prune 0.bias, 0.weight, 1.bias and 1 others",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        Sparsifiers(others(small_net()))


def test_a_frozen_layer_waits_for_one_of_them_only():
    model = small_net()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="both prune 0.weight"):
        Sparsifiers([Sparsifier(model, layers=["0", "3"]), Sparsifier(model, layers=["0", "10"])])
