"""Regrowth: as many weights regrow as are pruned, by a criterion of their own, at zero and with fresh moments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GRANULARITIES, has_ties, misses_sparsity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from updates import alive, rounded, show_gradients

from sparsifai import Sparsifier, contexts
from sparsifai.sparsifier.regrowth import sparsity_of_drop


def lowest(scores, count):
    return np.argsort(scores, kind="stable")[:count]


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(-4, 4), min_size=6, max_size=30),
    gradients=st.lists(st.integers(-4, 4), min_size=30, max_size=30),
    sparsity=st.floats(0.1, 0.9),
    drop=st.floats(0.05, 0.9),
)
@has_ties
def test_pruned_and_regrown_weights_are_those_of_a_plain_computation(weights, gradients, sparsity, drop):
    count = len(weights)
    model = nn.Linear(count, 1, bias=False)
    sparsifier = Sparsifier(model, regrow="grad", may_empty=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights], dtype=torch.float32))
    sparsifier.sparsify(sparsity)
    before = alive(sparsifier).numpy()
    model.weight.grad = torch.tensor([gradients[:count]], dtype=torch.float32)
    sparsifier.collect_gradients()
    sparsifier.sparsify(sparsity, drop=drop)

    magnitude, gradient = np.abs(np.array(weights, float)), np.abs(np.array(gradients[:count], float))
    magnitude[~before] = -1  # pruned weights come first
    pruned = lowest(magnitude, max(rounded(sparsity_of_drop(sparsity, drop) * count), (~before).sum()))
    stays = np.ones(count, bool)
    stays[pruned] = False
    # Of the pruned weights those with the highest gradients regrow, all but the lowest.
    remain = np.sort(pruned)[lowest(gradient[np.sort(pruned)], rounded(sparsity * count))]
    expected = np.ones(count, bool)
    expected[remain] = False
    assert np.array_equal(alive(sparsifier).numpy(), expected)
    assert (alive(sparsifier).numpy() >= stays).all()
    assert (~expected).sum() == rounded(sparsity * count)


def test_a_case_by_hand():
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]))
    sparsifier = Sparsifier(model, regrow="grad")
    sparsifier.sparsify(0.5)
    model.weight.grad = torch.tensor([[9.0, 9, 9, 0.1, 0.2, 5, -6, 0.3]])
    sparsifier.collect_gradients()
    with torch.no_grad():
        model.weight[:, 4:] = 0.5  # as a step may move pruned weights
    sparsifier.sparsify(0.5, drop=0.5)  # 6 and 5 are pruned; the highest gradients of zeros are those of 6 and -6
    assert model.weight.tolist() == [[8, 7, 6, 0, 0, 0, 0, 0]]
    assert sparsifier.masks["weight"].tolist() == [[True, True, True, False, False, False, True, False]]
    assert sparsifier.report().explored == 5 / 8
    assert "62% ever used" in str(sparsifier.report())


@pytest.mark.parametrize(("context", "axis"), [("blocks", "in"), ("per_output", "in"), ("blocks", "out")])
def test_the_highest_gradients_of_a_block_regrow(context, axis):
    from sparsifai import blocks

    model = nn.Linear(4, 4, bias=False)
    rows = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [3, 4, 1, 2], [1, 4, 3, 2]])
    gradients = torch.tensor([[0.0, 1, 9, 3], [0, 9, 1, 0], [0, 2, -3, 9], [7, 0, 5, 6]])
    with torch.no_grad():
        model.weight.copy_(rows if axis == "in" else rows.T)
    sparsifier = Sparsifier(model, context=blocks(4, axis) if context == "blocks" else context, regrow="grad")
    sparsifier.sparsify(0.5)
    model.weight.grad = gradients if axis == "in" else gradients.T.contiguous()
    sparsifier.collect_gradients()
    sparsifier.sparsify(0.5, drop=0.5)  # the lower of two per row is pruned, the highest gradient regrows
    mask = sparsifier.masks["weight"]
    assert (mask if axis == "in" else mask.T).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]]


# Left out: granularities of so few groups per layer that none would move, and those of whole outputs.
APART = {"layer", "filter", "row", *(name for name in GRANULARITIES if "slice" in name)}


CASES = [(granularity, "local") for granularity in GRANULARITIES if granularity not in APART]
CASES += [("weight", context) for context in contexts] + [("kernel", "erk"), ("4x4", "global"), ("weight", "blocks")]


@pytest.mark.parametrize(("granularity", "context"), CASES)
@misses_sparsity
def test_the_sparsity_is_constant_while_masks_move_in_any_granularity_and_context(net, granularity, context):
    from sparsifai import blocks

    context = blocks(4) if context == "blocks" else context
    sparsifier = Sparsifier(net, granularity, context, regrow="grad", example_input=torch.zeros(1, 2, 8, 8))
    sparsifier.sparsify(0.4)
    share, moved = float((~alive(sparsifier)).float().mean()), 0
    # Contexts with budgets round in every layer, to whole groups.
    groups = [(sparsifier.layers[name].parameter.numel(), mask.numel()) for name, mask in sparsifier.masks.items()]
    slack = sum(weights / count for weights, count in groups) / sum(weights for weights, _ in groups)
    for step in range(5):
        before = alive(sparsifier)
        with torch.no_grad():  # as a step does
            for name, mask in sparsifier.masks.items():
                weight = sparsifier.layers[name].parameter
                weight += mask * torch.randn(weight.shape)
        show_gradients(sparsifier, step)
        sparsifier.sparsify(0.4, drop=0.4)
        moved += int((alive(sparsifier) & ~before).sum())
        assert float((~alive(sparsifier)).float().mean()) == pytest.approx(share, abs=slack + 1e-6)
    assert moved > 0


def test_regrown_weights_start_at_zero_with_fresh_moments(mlp):
    optimizer = torch.optim.Adam(mlp.parameters(), 0.1)
    sparsifier = Sparsifier(mlp, context="local", regrow="random")
    sparsifier.sparsify(0.5)
    inputs, labels = torch.randn(32, 4), torch.randint(2, (32,))
    for step in range(6):
        optimizer.zero_grad()
        F.cross_entropy(mlp(inputs), labels).backward()
        before = dict(sparsifier.masks)
        sparsifier.sparsify(0.5, drop=0.5)
        sparsifier.mask_moments(optimizer)
        for name, mask in sparsifier.masks.items():
            weight, back = sparsifier.layers[name].parameter, mask & ~before[name]
            assert (weight[back] == 0).all()
            assert (weight[~mask] == 0).all()
            for kept in optimizer.state[weight].values():
                if kept.shape == weight.shape:
                    assert (kept[back] == 0).all()
                    assert (kept[~mask] == 0).all()
        assert any((mask & ~before[name]).any() for name, mask in sparsifier.masks.items()), step
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
        assert (~alive(sparsifier)).sum() == 24


def test_regrowth_without_gradients_changes_nothing(mlp):
    sparsifier = Sparsifier(mlp, regrow="grad")
    sparsifier.sparsify(0.5)
    before = {name: parameter.clone() for name, parameter in mlp.named_parameters()}
    masks = dict(sparsifier.masks)
    with pytest.raises(ValueError, match="collect_gradients"):
        sparsifier.sparsify(0.5, drop=0.3)
    assert all(torch.equal(before[name], parameter) for name, parameter in mlp.named_parameters())
    assert all(torch.equal(masks[name], mask) for name, mask in sparsifier.masks.items())
    show_gradients(sparsifier)
    sparsifier.sparsify(0.5, drop=0.3)
    with pytest.raises(ValueError, match="collect_gradients"):  # earlier gradients were of other masks
        sparsifier.sparsify(0.5, drop=0.3)


def test_a_rising_sparsity_is_reached_exactly_while_weights_regrow(mlp):
    sparsifier = Sparsifier(mlp, regrow="random")
    for step in range(1, 10):
        sparsifier.sparsify(step / 12, drop=0.3)
        assert (~alive(sparsifier)).sum() == rounded(step / 12 * 48)


def test_limits_hold_for_any_gradients():
    from sparsifai import bounded

    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    sparsifier = Sparsifier(net, context=bounded("global", {"0": (0.5, 0.9)}), regrow="grad")
    sparsifier.sparsify(0.6)
    for _ in range(3):
        # Without limits all zeros of the first layer would regrow.
        first, drawn = sparsifier.masks["0.weight"], torch.rand(40, 40)
        net[0].weight.grad, net[1].weight.grad = torch.where(first, drawn * 1e-3, drawn + 5), torch.rand(40, 40)
        sparsifier.collect_gradients()
        sparsifier.sparsify(0.6, drop=0.3)
        with torch.no_grad():
            for name, mask in sparsifier.masks.items():
                sparsifier.layers[name].parameter.add_(mask * torch.randn(40, 40))
        assert float((~sparsifier.masks["0.weight"]).float().mean()) >= 0.5
        assert int((~alive(sparsifier)).sum()) == 1920
