"""The Sparsifier: one call builds masks and applies them."""

import copy
import math
import pickle
import sys

import pytest
import torch
from conftest import masked_of, misses_sparsity, small_net
from torch import nn
from updates import moved, same_state, scores_of

from sparsifai import Sparsifier, schedules
from sparsifai.sparsifier.masking import (
    NEXT_TO_ZERO,
    zero_moments,
)


@pytest.mark.parametrize("schedule", [name for name in schedules if name != "dsd"])
def test_a_loop_over_any_schedule_ends_at_the_target_sparsity(schedule, mlp):
    sparsifier = Sparsifier(mlp)
    for step in range(1, 8):
        sparsifier.sparsify(0.9 * schedules[schedule](step / 7))
    assert sparsifier.report().selected.zeros == 43  # 43.2 of 48


def test_a_dictionary_ranks_the_layers_of_each_pattern_alone_and_leaves_the_others(net):
    sparsifier = Sparsifier(net, context="local")
    untouched = net[10].weight.clone()
    sparsifier.sparsify({"[0-5]": 0.5, "5": 0.25, nn.Linear: 0.9, "10": 0.0})
    rows = {row.name: row.count for row in sparsifier.report().rows}
    assert rows["0.weight"].sparsity == rows["3.weight"].sparsity == 0.5
    assert rows["5.weight"].sparsity == 0.25
    assert rows["12.weight"].zeros == 16  # 16.2 of 18
    assert torch.equal(net[10].weight, untouched)
    sparsifier.sparsify({"10": 0.5})
    assert rows["12.weight"].zeros == (net[12].weight == 0).sum()
    assert (net[10].weight == 0).sum() == 24
    jointly = Sparsifier(small_net())
    jointly.sparsify({"[035]": 0.5})
    joint = [row.count for row in jointly.report().rows[:3]]
    assert sum(count.zeros for count in joint) == math.floor(sum(count.weights for count in joint) / 2 + 0.5)


def test_a_pattern_that_matches_no_selected_layer_is_an_error(net):
    sparsifier = Sparsifier(net, exclude="10")
    with pytest.raises(ValueError, match="'nothing'"):
        sparsifier.sparsify({"0": 0.5, "nothing": 0.5})
    with pytest.raises(ValueError, match="stay dense"):
        sparsifier.sparsify({"0": 0.5, "10": 0.5})
    assert all(mask.all() for mask in sparsifier.masks.values())


def test_model_and_sparsifier_are_copied_together(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.5)
    model, copied = copy.deepcopy((mlp, sparsifier))
    assert copied.model is model
    copied.sparsify(0.9)
    assert sparsifier.sparsity == 0.5
    for granularity in ("weight", "filter", ("out", "in")):
        sparsifier = Sparsifier(small_net(), granularity, criteria="movement")
        moved(sparsifier.model)
        sparsifier.sparsify(0.5)
        restored = pickle.loads(pickle.dumps(sparsifier))
        restored.sparsify(0.8)
        assert torch.equal(restored.masks["0.weight"] | sparsifier.masks["0.weight"], sparsifier.masks["0.weight"])


def test_weights_that_momentum_moved_are_revived_at_zero(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(0.8)
    before = dict(sparsifier.masks)
    with torch.no_grad():
        mlp[0].weight.add_(0.1)  # as a step does; apply_masks is not called
    sparsifier.sparsify(0.2)
    revived = sparsifier.masks["0.weight"] & ~before["0.weight"]
    assert revived.any()
    assert (mlp[0].weight[revived] == 0).all()


def here():
    """The line that calls this function."""
    return sys._getframe(1).f_lineno


def sparse_filters():
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "filter")
    sparsifier.sparsify(0.75)
    return sparsifier


def sparse_layer(*axes, criteria="large_final"):
    return Sparsifier(nn.Linear(4, 4), *axes, criteria=criteria, layers="weight")


# Warning, and a function that makes the mistake and returns its line.
WARNING_CALLS = {
    "sparsify": ("revives", lambda: (sparse_filters().sparsify(0.25), here())[1]),
    "sparsify in steps": ("revives", lambda: (sparse_filters().sparsify(0.25, steps=3), here())[1]),
    "update_masks": ("revives", lambda: (sparse_filters().update_masks(0.25), here())[1]),
    "scores that are equal": (
        "compares",
        lambda: (sparse_layer(criteria="movement").sparsify(0.5), here())[1],
    ),
    "no group to prune": (
        "no group",
        lambda: (sparse_layer("layer", "local").sparsify(0.5), here())[1],
    ),
    "the constructor": ("regrow", lambda: (Sparsifier(small_net(), "filter", regrow="grad"), here())[1]),
}


@pytest.mark.parametrize("call", WARNING_CALLS)
def test_a_warning_points_at_the_line_that_calls(call):
    message, mistake = WARNING_CALLS[call]
    with pytest.warns(UserWarning, match=message) as caught:
        line = mistake()
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_check_raises_what_sparsify_raises_and_warns_of_nothing():
    sparsifier = sparse_filters()
    before = copy.deepcopy((sparsifier.state_dict(), sparsifier.model.state_dict()))
    for sparsity in (0.25, 0.5, 0.9, {"0": 0.25}):
        sparsifier.check(sparsity)  # of which sparsify would warn, and warnings are errors
    with pytest.raises(ValueError, match="'nothing'"):
        sparsifier.check({"nothing": 0.5})
    with torch.no_grad():
        weight = sparsifier.model[0].weight
        kept, weight[:] = weight.clone(), float("nan")
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.check(0.9)
    with torch.no_grad():
        weight.copy_(kept)
    assert same_state((sparsifier.state_dict(), sparsifier.model.state_dict()), before)


@pytest.mark.parametrize(("granularity", "level_before"), [("weight", 0.7), ("filter", 0.3)])
@misses_sparsity
def test_update_masks_does_the_same_as_sparsify_and_mask_moments(granularity, level_before):
    made = []
    for cheaply in (False, True):
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        sparsifier = Sparsifier(model, granularity)
        for level in (0.2, 0.205, level_before, 0.5, 0.9):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 8, 8)).square().sum().backward()
            sparsifier.mask_gradients()
            optimizer.step()
            if cheaply:
                sparsifier.update_masks(level, optimizer)
            else:
                sparsifier.sparsify(level)
                zero_moments(masked_of(sparsifier), optimizer, squares=NEXT_TO_ZERO)
        moments = [optimizer.state[each] for each in model.parameters()]
        made.append((list(sparsifier.masks.values()), list(model.parameters()), moments))
    (masks, weights, moments), others = made[0], made[1]
    assert all(map(torch.equal, masks, others[0]))
    assert all(map(torch.equal, weights, others[1]))
    for one, other in zip(moments, others[2], strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert torch.allclose(one["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-2, atol=0)  # those of pruned ones decay


def test_taylor_warns_of_filters_before_a_batch_norm():
    def net(norm):
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    with pytest.warns(UserWarning, match="batch norm") as caught:
        sparsifier = Sparsifier(net(nn.BatchNorm2d(4)), "filter", criteria="taylor")
    assert caught[0].filename == __file__
    images = torch.randn(5, 1, 9, 9)
    sparsifier.calibrate([(images, images)], lambda output, target: output.square().mean())
    scores = {name: scores_of(sparsifier, name).flatten(1).sum(1).abs().max() for name in ("0.weight", "3.weight")}
    assert scores["0.weight"] < 1e-4 * scores["3.weight"]  # as the warning says
    Sparsifier(net(nn.GroupNorm(1, 4)), "filter", criteria="taylor")
    Sparsifier(net(nn.BatchNorm2d(4)), "kernel", criteria="taylor")
    Sparsifier(net(nn.BatchNorm2d(4)), "filter", criteria="taylor", pool="mean")
