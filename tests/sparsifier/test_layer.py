"""The record of one layer: its masks, counts and levels."""

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier
from sparsifai.sparsifier.layer import count_of, level_of, selected


def layers_of_a_net(granularity="filter", memory_format=torch.contiguous_format):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(memory_format=memory_format)
    return Sparsifier(model, granularity, layers=["0", "1"], exclude="1").layers


def test_a_layer_keeps_all_weights_at_first():
    layers = layers_of_a_net()
    pruned, dense = layers.values()
    assert (pruned.is_selected, pruned.why_dense, pruned.level) == (True, "", 0)
    assert (dense.is_selected, dense.why_dense) == (False, "excluded")
    assert pruned.mask.shape == (4, 1, 1, 1)
    assert pruned.mask.all()
    assert dense.mask.all()
    assert list(selected(layers)) == ["0.weight"]


def test_the_mask_of_kept_groups():
    layer = layers_of_a_net()["0.weight"]
    kept = torch.tensor([True, False, True, True])
    mask = layer.mask_of(kept)
    assert torch.equal(mask.flatten(), kept)
    changed = layer.with_mask(mask, 0.25)
    assert torch.equal(changed.kept, kept)
    assert torch.equal(changed.kept_outputs, kept)
    assert (changed.level, changed.count().weights, changed.count().zeros) == (0.25, 108, 27)
    assert (layer.level, layer.count().zeros) == (0, 0)
    assert layer.count(mask).zeros == 27


def test_a_mask_has_the_memory_order_of_its_weight():
    layer = layers_of_a_net("weight", torch.channels_last)["0.weight"]
    kept = torch.rand(108) < 0.5
    mask = layer.mask_of(kept)
    assert mask.stride() == layer.parameter.stride() != torch.empty(4, 3, 3, 3).stride()
    assert torch.equal(mask, kept.view(4, 3, 3, 3))


def test_the_mask_of_zeros_prunes_groups_of_zeros_only():
    layer = layers_of_a_net()["0.weight"]
    with torch.no_grad():
        layer.parameter[1] = 0
        layer.parameter[2, 0] = 0
    assert layer.mask_of_zeros().flatten().tolist() == [True, False, True, True]
    with torch.no_grad():
        layer.parameter.zero_()
    assert layer.mask_of_zeros().all()


def test_counts_and_levels_of_several_layers_are_by_their_weights():
    first, second = layers_of_a_net().values()
    first = first.with_mask(first.mask_of(torch.tensor([False, False, True, True])), 0.5)
    counts = count_of([first, second])
    assert (counts.weights, counts.zeros) == (108 + 8, 54)
    assert level_of([first, second]) == pytest.approx(0.5 * 108 / 116)
