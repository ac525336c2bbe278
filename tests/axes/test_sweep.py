"""The sweep of SparseGPT: equal to the algorithm of the paper, written plainly."""

import copy
from functools import partial

import pytest
import torch
from conftest import misses_sparsity
from second_order import plain_sparsegpt
from torch import nn

from sparsifai import Sparsifier, blocks, contexts, criteria, is_nm


def inputs(samples=60, size=20):
    return torch.randn(samples, size).double() @ torch.randn(size, size).double()


def swept(layer, value, sparsity=0.5, context="local", **options):
    model = nn.Sequential(copy.deepcopy(layer))
    sparsifier = Sparsifier(model, "weight", context, partial(criteria["sparsegpt"], **options))
    sparsifier.calibrate([value])
    sparsifier.sparsify(sparsity)
    return model[0].weight.detach(), sparsifier.masks["0.weight"]


@pytest.mark.parametrize("width", [128, 8])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.83])
@pytest.mark.parametrize("context", ["local", "per_output"])
def test_unstructured_as_published(context, sparsity, width):
    layer, value = nn.Linear(20, 7).double(), inputs()
    weight, mask = swept(layer, value, sparsity, context, block_size=width)
    expected = plain_sparsegpt(layer.weight.detach(), value, sparsity, per_output=context == "per_output", width=width)
    assert torch.equal(mask, expected[1])
    assert torch.allclose(weight, expected[0], atol=1e-9)
    count = int(sparsity * 20 + 0.5) * 7 if context == "per_output" else int(sparsity * 140 + 0.5)
    assert int((~mask).sum()) == count


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("width", [128, 8])
def test_n_of_m_as_published(n_of_m, width):
    size = 24
    layer, value = nn.Linear(size, 7).double(), inputs(size=size)
    n, m = n_of_m
    weight, mask = swept(layer, value, 1 - n / m, f"{n}:{m}", block_size=width)
    expected = plain_sparsegpt(layer.weight.detach(), value, n_of_m=n_of_m, width=width)
    assert torch.equal(mask, expected[1])
    assert torch.allclose(weight, expected[0], atol=1e-9)
    assert is_nm(weight, n, m)


def test_a_convolution_is_swept_over_kernel_positions_and_then_inputs():
    layer, value = nn.Conv2d(8, 6, (3, 2)).double(), torch.randn(6, 8, 6, 6).double()
    columns = nn.functional.unfold(value, (3, 2)).view(6, 8, 6, -1).permute(0, 3, 2, 1).reshape(-1, 48)
    rows = layer.weight.detach().permute(0, 2, 3, 1).reshape(6, 48)
    for context, given in (("local", {"sparsity": 0.5}), ("2:4", {"n_of_m": (2, 4)})):
        weight, mask = swept(layer, value, 0.5, context)
        expected = plain_sparsegpt(rows, columns, **given)
        assert torch.equal(mask.permute(0, 2, 3, 1).reshape(6, 48), expected[1])
        assert torch.allclose(weight.permute(0, 2, 3, 1).reshape(6, 48), expected[0], atol=1e-9)
    assert is_nm(weight, 2, 4)


def test_groups_of_a_convolution_are_swept_side_by_side():
    layer, value = nn.Conv1d(8, 6, 1, groups=2).double(), torch.randn(10, 8, 9).double()
    weight, _ = swept(layer, value, 0.5, "per_output")
    for group in range(2):
        part = value[:, 4 * group : 4 * group + 4].transpose(1, 2).reshape(-1, 4)
        own = slice(3 * group, 3 * group + 3)
        expected, _ = plain_sparsegpt(layer.weight.detach()[own, :, 0], part, 0.5, per_output=True)
        assert torch.allclose(weight[own, :, 0], expected, atol=1e-9)


def test_an_input_that_is_always_zero_is_pruned_first():
    layer, value = nn.Linear(20, 7).double(), inputs()
    value[:, [3, 11]] = 0
    weight, mask = swept(layer, value, 0.1)
    assert not mask[:, [3, 11]].any()
    assert mask.sum() == 7 * 18
    assert torch.allclose(weight[mask], layer.weight[mask])  # nothing that matters was lost


@misses_sparsity
def test_counts_are_exact_and_a_rest_of_a_block_is_ranked():
    layer, value = nn.Linear(21, 5).double(), inputs(size=21)
    for sparsity in (0.01, 0.37, 0.5, 0.99, 1.0):
        _, mask = swept(layer, value, sparsity, "local", block_size=4)
        assert int((~mask).sum()) == min(int(sparsity * 105 + 0.5), 104)
        _, mask = swept(layer, value, sparsity, "per_output", block_size=4)
        assert ((~mask).sum(1) == min(int(sparsity * 21 + 0.5), 20)).all()
    _, mask = swept(layer, value, 0.5, "2:4")
    assert ((~mask).sum(1) == 10).all()
    _, mask = swept(layer, value, 0.75, blocks(4))
    assert (mask.sum(1) == 6).all()


def test_what_is_pruned_before_stays_pruned_and_counts():
    torch.manual_seed(0)
    model, value = nn.Sequential(nn.Linear(30, 8)), inputs(size=30).float()
    for context, unit in (("local", 240), ("per_output", 30)):
        sparsifier = Sparsifier(model, "weight", context, partial(criteria["sparsegpt"], block_size=8))
        sparsifier.calibrate([value])
        mask = torch.ones(8, 30, dtype=torch.bool)
        mask[:, 22:] = False  # more of the last columns than a first sweep would prune
        sparsifier.set_masks({"0.weight": mask})
        sparsifier.sparsify(0.5)
        now = sparsifier.masks["0.weight"]
        assert not (now & ~mask).any()
        assert ((~now).view(-1, unit).sum(1) == unit // 2).all()


def test_a_context_of_ones_own_may_say_how_it_ranks():
    layer, value = nn.Linear(20, 7).double(), inputs()
    context = contexts.register(lambda layers, sparsity: [], name="mine", ranks_within="output", replace=True)
    try:
        weight, _ = swept(layer, value, 0.5, context)
    finally:
        del contexts._functions["mine"]
    assert torch.equal(weight, swept(layer, value, 0.5, "per_output")[0])


def test_without_compensation_masks_are_the_same_and_weights_stay():
    model, value = nn.Sequential(nn.Linear(20, 7).double()), inputs()
    layer = copy.deepcopy(model[0])
    sparsifier = Sparsifier(model, "weight", "local", "sparsegpt", compensate=False)
    sparsifier.calibrate([value])
    sparsifier.sparsify(0.5)
    _, mask = swept(layer, value, 0.5)
    assert torch.equal(sparsifier.masks["0.weight"], mask)
    assert torch.equal(model[0].weight, layer.weight * mask)


def test_a_layer_without_whole_blocks_is_told():
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsifier = Sparsifier(model, "weight", "2:4", "sparsegpt")
    sparsifier.calibrate([torch.randn(20, 2)])
    with pytest.warns(UserWarning, match=r"context 2:4 at most 0.00% of 0.weight can be pruned"):
        sparsifier.sparsify(0.5)
    assert is_nm(model[2].weight.detach(), 2, 4)
