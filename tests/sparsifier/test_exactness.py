"""Exact counts and exact masks on weights of every dtype, layout and kind of ties, by both rankings, against a sort."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import as_on_device, layers_of, levels_of, misses_sparsity
from torch import nn

from sparsifai import Sparsifier, criteria
from sparsifai.axes import grouping
from sparsifai.axes.criterion import is_elementwise
from sparsifai.axes.ranking import scored_layer

LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.to(memory_format=torch.channels_last),
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda weight: torch.stack([weight, weight], 4)[..., 0],
}
KINDS = {
    "normal": lambda weight: weight,
    "many ties": lambda weight: (weight * 8).round() / 8,
    "mostly zero": lambda weight: weight * (weight > 1.5),
    "one value": lambda weight: torch.full_like(weight, 0.1),
    "two signs": lambda weight: weight.sign(),
    "huge": lambda weight: torch.where(weight > 0, math.inf, weight),
    "denormal": lambda weight: weight * 1e-40,
}
LEVELS = (0.0, 0.00004, 0.3, 0.5, 0.50001, 0.9, 0.999, 1.0)


def model_of(kind, dtype, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(40, 40, 3, bias=False), nn.Conv2d(40, 9, 5, bias=False), nn.Linear(9, 7))
    for module in model:
        weight = KINDS[kind](torch.randn(module.weight.shape)).to(dtype)
        if weight.dim() == 4:
            weight = LAYOUTS[layout](weight)
        module.weight = nn.Parameter(weight)
    return model


def sorted_masks(before, masked, scopes, level):
    """Masks by a stable sort: masked ones first, then the lowest of all but the best of every layer."""
    kept = {}
    for names in scopes:
        score = np.concatenate([before[name].detach().double().abs().numpy().ravel() for name in names])
        was = np.concatenate([masked[name] for name in names])
        best, start = [], 0
        for name in names:
            own = np.where(masked[name], -1, score[start : start + len(masked[name])])
            best.append(start + len(own) - 1 - np.argmax(own[::-1]))
            start += len(own)
        order = np.lexsort((score, ~was))
        order = order[~np.isin(order, best)]
        stays = np.ones(len(score), bool)
        stays[order[: math.floor(level * len(score) + 0.5)]] = False
        kept.update(zip(names, np.split(stays, np.cumsum([len(masked[name]) for name in names])[:-1]), strict=True))
    return kept


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("context", ["global", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_masks_are_those_of_a_stable_sort(kind, dtype, context, on_device):
    model = model_of(kind, dtype, "contiguous")
    sparsifier = Sparsifier(model, context=context)
    if on_device:
        as_on_device(sparsifier)
    names = list(sparsifier.masks)
    scopes = [names] if context == "global" else [[name] for name in names]
    for level in LEVELS:
        before = {name: target.parameter.clone() for name, target in layers_of(sparsifier).items()}
        masked = {name: ~mask.numpy().ravel() for name, mask in sparsifier.masks.items()}
        sparsifier.sparsify(level)
        expected = sorted_masks(before, masked, scopes, level)
        for name in names:
            assert (sparsifier.masks[name].numpy().ravel() == expected[name]).all(), (name, level)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouped", ["weight", "kernel", "filter", "channel", "row"])
@pytest.mark.parametrize("kind", ["normal", "many ties"])
def test_masks_do_not_depend_on_the_memory_order(kind, grouped, layout):
    masks = []
    for each in ("contiguous", layout):
        model = model_of(kind, torch.float32, each)
        sparsifier = Sparsifier(model, grouped, layers=["0", "1"])
        sparsifier.sparsify(0.3)
        sparsifier.sparsify(0.6)
        masks.append({name: mask.expand_as(model.get_parameter(name)) for name, mask in sparsifier.masks.items()})
        weights = [model.get_parameter(name) for name in masks[-1]]
        assert all((weight[~mask] == 0).all() for weight, mask in zip(weights, masks[-1].values(), strict=True))
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("grouped", ["weight", "kernel", "filter", "channel", "row", "layer"])
@pytest.mark.parametrize("part", [7, 1000, 10**9])
@misses_sparsity
def test_masks_do_not_depend_on_the_chunk_size(part, grouped, monkeypatch):
    masks = []
    for size in (scored_layer.CHUNK, part):
        monkeypatch.setattr(scored_layer, "CHUNK", size)
        monkeypatch.setattr(grouping, "CHUNK", size)
        sparsifier = Sparsifier(model_of("many ties", torch.float32, "contiguous"), grouped, layers=["0", "1"])
        sparsifier.sparsify(0.5)
        masks.append(sparsifier.masks)
    assert any((~mask).any() for mask in masks[0].values())
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_masks_do_not_depend_on_the_number_of_threads():
    masks = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            sparsifier = Sparsifier(nn.Sequential(nn.Linear(1000, 2000), nn.Linear(1000, 2000)), "filter", layers=["0"])
            sparsifier.sparsify(0.5)
        finally:
            torch.set_num_threads(1)
        masks.append(sparsifier.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("criterion", ["large_final", "small_final", "movement", lambda weight: weight.abs()])
@pytest.mark.parametrize("grouped", ["weight", "filter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_nan_among_many_weights_is_found_and_nothing_is_changed(dtype, grouped, criterion):
    model = model_of("normal", dtype, "contiguous")
    sparsifier = Sparsifier(model, grouped, criteria=criterion, layers=["0", "1"])
    with torch.no_grad():
        model[0].weight.add_(1)
        sparsifier.sparsify(0.3)
        alive = sparsifier.masks["1.weight"].expand_as(model[1].weight)
        model[1].weight[tuple(alive.nonzero()[77])] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    masks, levels = dict(sparsifier.masks), dict(levels_of(sparsifier))
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.sparsify(0.6)
    assert sparsifier.masks == masks
    assert levels_of(sparsifier) == levels
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def test_a_pooling_of_your_own_gets_the_whole_layer():
    def relative(grouping, scores):
        pooled = grouping.members(scores).sum(1)
        return pooled / pooled.max()

    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 1024))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].weight[:128] *= 1.5
    sparsifier = Sparsifier(model, "filter", "local", pool=relative, layers=["0"])
    sparsifier.sparsify(0.75)
    assert sparsifier.masks["0.weight"].flatten().nonzero().flatten().tolist() == list(range(128))


@pytest.mark.parametrize("criterion", ["large_final", lambda weight: weight.abs()])
def test_values_of_pruned_weights_do_not_decide_which_are_revived(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20))
    sparsifier = Sparsifier(model, criteria=criterion)
    sparsifier.sparsify(0.5)
    masked = (~sparsifier.masks["0.weight"]).nonzero()
    with torch.no_grad():
        model[0].weight[tuple(masked[0])] = 9.0
        model[0].weight[tuple(masked[1])] = float("nan")
    sparsifier.sparsify(0.25)
    assert not sparsifier.masks["0.weight"][tuple(masked[0])]
    assert (~sparsifier.masks["0.weight"]).sum() == 100
    assert (model[0].weight == 0).sum() == 200


def test_a_wrapper_of_an_elementwise_criterion_is_not_elementwise():
    @functools.wraps(criteria["large_final"])
    def centred(weight):
        return (weight - weight.mean()).abs()

    assert is_elementwise(criteria["large_final"])
    assert is_elementwise(functools.partial(criteria["magnitude_increase"], alpha=0.5))
    assert not is_elementwise(centred)
    assert not is_elementwise(functools.partial(criteria["movement"], init=torch.zeros(3)))


def test_a_context_of_your_own_cannot_change_the_masks():
    def writes(layers, sparsity):
        layers[0].alive[:] = False

    with pytest.raises(ValueError, match="read-only"):
        Sparsifier(nn.Sequential(nn.Linear(4, 4)), context=writes).sparsify(0.5)
