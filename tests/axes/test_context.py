"""Contexts: local, global, per_output, and what holds for every context."""

import math

import numpy as np
import pytest
import torch
from conftest import as_on_device, has_ties, layers_of, misses_sparsity, without_values
from torch import nn

from sparsifai import Sparsifier, blocks, bounded, contexts, select_groups
from sparsifai.axes.ranking.scored_layer import ScoredLayer


def mlp():
    return nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 100), nn.Linear(100, 10))


def test_local_ranks_layers_alone_and_global_together():
    scores = [np.arange(1, 5.0), np.arange(11, 15.0)]
    layers = [ScoredLayer(None, score.__getitem__, np.ones(4, bool)) for score in scores]
    assert [kept.sum() for kept in contexts["local"](layers, 0.5)] == [2, 2]
    assert [kept.sum() for kept in contexts["global"](layers, 0.5)] == [1, 3]


def test_a_context_of_your_own_is_one_function(registering):
    @contexts.register
    def spare_the_first(layers, sparsity):
        return [*select_groups(layers[:1], sparsity / 2), *select_groups(layers[1:], sparsity)]

    for context in ("spare_the_first", spare_the_first):
        sparsifier = Sparsifier(mlp(), context=context)
        sparsifier.sparsify(0.8)
        first, *others = (int((~mask).sum()) for mask in sparsifier.masks.values())
        assert (first, sum(others)) == (0.4 * 30_000, 0.8 * 31_000)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("masked", [0.0, 0.05])
@misses_sparsity
@has_ties
def test_per_output_ranks_every_row_alone(level, masked):
    model = nn.Sequential(nn.Linear(30, 7), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(9).round_()  # ties
    sparsifier = Sparsifier(model, context="per_output")
    if masked:
        sparsifier.sparsify(masked)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    weights = {name: target.parameter.detach().clone() for name, target in layers_of(sparsifier).items()}
    sparsifier.sparsify(max(level, masked))
    rows_of = {
        "0.weight": lambda value: value.flatten(1),
        "1.weight": lambda value: value.flatten(1),
        "2.weight": lambda value: value.unflatten(0, (2, 2)).permute(0, 2, 1, 3, 4).reshape(6, -1),
    }
    for name, rows in rows_of.items():
        for score, was, kept in zip(
            rows(weights[name].abs()), rows(before[name]), rows(sparsifier.masks[name]), strict=True
        ):
            order = np.lexsort((score.numpy(), was.numpy()))
            count = min(math.floor(max(level, masked) * len(score) + 0.5), len(score) - 1)
            expected = np.ones(len(score), bool)
            expected[order[:count]] = False
            assert (kept.numpy() == expected).all(), name


@pytest.mark.parametrize("context", [*contexts, "2:4", bounded("erk", {"0": 0.2})])
@misses_sparsity
@has_ties
def test_every_context_prunes_ties_in_index_order_empties_no_layer_and_refuses_nan(context):
    model = mlp()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.25)
    sparsifier = Sparsifier(model, context=context)
    sparsifier.sparsify(0.4)
    assert all(mask.any() for mask in sparsifier.masks.values())
    expected = 0.5 if context == "2:4" else 0.4
    assert sparsifier.sparsity == pytest.approx(expected, abs=1e-4)
    for name, mask in sparsifier.masks.items():
        if context not in ("2:4", "per_output"):  # ties in index order
            assert not mask.flatten()[: int((~mask).sum())].any(), name
    with torch.no_grad():
        model[1].weight[5, 5] = float("nan")
        sparsifier.masks["1.weight"][5, 5] = True
    before = sparsifier.masks
    with pytest.raises(ValueError, match="NaN scores"):
        sparsifier.sparsify(0.5 if context == "2:4" else 0.45)
    assert all(after is before[name] for name, after in sparsifier.masks.items())


@pytest.mark.parametrize("context", [*contexts, "2:4", bounded("erk", {"0": 0.2})])
def test_what_is_masked_stays_masked_where_a_context_asks_for_less(context):
    model = mlp()
    sparsifier = Sparsifier(model, context=context)
    adopted = {name: torch.ones_like(mask) for name, mask in sparsifier.masks.items()}
    adopted["1.weight"][:, :200] = False  # whole blocks, and more than any level below
    sparsifier.all_masks.add(adopted)
    sparsifier.apply_masks()
    for level in (0.25, 0.5):
        sparsifier.sparsify(level)
        assert not sparsifier.masks["1.weight"][:, :200].any()
        assert (model[1].weight[:, :200] == 0).all()


@pytest.mark.parametrize("context", [name for name in contexts if name != "uniform_plus"])
@misses_sparsity
def test_may_empty_lets_a_context_empty_a_layer(context):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.uniform_(0.1, 0.2)
        model[1].weight.uniform_(1, 2)
    sparsifier = Sparsifier(model, context=context, may_empty=True)
    sparsifier.sparsify(1.0 if context != "global" else 0.5)
    assert sparsifier.sparsity == (
        pytest.approx(0.95) if context == "per_output" else 1.0 if context != "global" else 0.5
    )
    assert sparsifier.masks["0.weight"].any() == (context == "per_output")


# --- Limits of a layer ------------------------------------------------------------------------------------------------

CANNOT = "the sparsity that was asked for cannot be reached: with granularity "


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 40, 3), nn.Conv2d(40, 4, 3))


@pytest.mark.parametrize(
    ("options", "sparsity", "message"),
    [
        ({"granularity": "filter", "context": "local", "layers": "0"}, 0.9, "filter .* local at most 80.00% of 0"),
        ({"granularity": "filter", "layers": "0"}, 0.9, "filter and context global at most 80.00% of 0"),
        ({"granularity": "filter", "context": "erk", "layers": "0"}, 0.9, "filter and context erk at most 80.00% of 0"),
        ({"granularity": "filter", "context": "local", "round_to": 8, "layers": "1"}, 0.9, "filter .* 80.00% of 1"),
        ({"context": "2:4", "layers": "0"}, 0.5, "weight and context 2:4 at most 33.33% of 0"),
        ({"context": "1:8", "layers": "1"}, 0.87, "weight and context 1:8 at most 80.00% of 1"),
        ({"context": "blocks", "layers": "1"}, 0.9, r"weight and context blocks\(4\) at most 60.00% of 1"),
        ({"context": "per_output", "layers": "0"}, 0.99, "weight and context per_output at most 96.30% of 0"),
        ({"granularity": "channel", "layers": "0"}, 0.8, "channel and context global at most 66.67% of 0"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_pruned_as_much_is_told_of(options, sparsity, message):
    if options.get("context") == "blocks":
        options = {**options, "context": blocks(4)}
    model = convolutions()
    with pytest.raises(UserWarning, match=f"{CANNOT}{message}.weight can be pruned"):
        Sparsifier(model, **options).sparsify(sparsity)
    assert not any((parameter == 0).any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "sparsity", "message"),
    [
        ({"context": "local", "layers": "0"}, 0.9, "filter and context local at most 80.00% of 0"),
        ({"context": "global", "layers": "0"}, 0.9, "filter and context global at most 80.00% of 0"),
        ({"context": "local", "layers": ["0", "1"]}, 0.99, "filter and context local at most 80.00% of 0"),
    ],
)
def test_it_is_told_of_where_nothing_is_read(options, sparsity, message):
    for make in (lambda each: each, as_on_device, without_values):
        sparsifier = make(Sparsifier(convolutions(), "filter", **options))
        with pytest.raises(UserWarning, match=f"{CANNOT}{message}.weight can be pruned"):
            sparsifier.sparsify(sparsity)
    for make in (lambda each: each, as_on_device, without_values):
        make(Sparsifier(convolutions(), "filter", **options)).sparsify(0.5)


@pytest.mark.parametrize("context", ["2:4", "1:4", blocks(4), blocks(2)])
def test_that_nothing_can_be_pruned_is_told_of(context):
    sparsifier = Sparsifier(nn.Conv2d(1, 8, 3), context=context)
    with pytest.warns(UserWarning, match="no group can be pruned"):
        sparsifier.sparsify(0.5)


def test_the_warning_has_the_same_text_at_every_level():
    sparsifier = Sparsifier(convolutions(), "filter", "local", layers="0")
    texts = set()
    for level in (0.82, 0.9, 1.0):
        with pytest.warns(UserWarning, match=CANNOT) as told:
            sparsifier.sparsify(level)
        texts.add(str(told[0].message))
    assert len(texts) == 1


def test_rounding_is_not_told_of_nor_what_other_layers_make_up_for():
    for granularity, context, level in [
        ("filter", "local", 0.5), ("filter", "local", 0.8), ("filter", "global", 0.9), ("weight", blocks(4), 0.6),
        ("weight", "local", 0.99), ("kernel", "local", 0.55),
    ]:  # fmt: skip
        Sparsifier(convolutions(), granularity, context).sparsify(level)


def test_with_may_empty_the_whole_layer_can_be_pruned():
    sparsifier = Sparsifier(convolutions(), "filter", "local", layers="0", may_empty=True)
    sparsifier.sparsify(0.9)
    assert sparsifier.sparsity == 1.0


def test_the_advice_for_blocks_is_to_leave_layers_out():
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(13, 8)), "weight", "2:4", layers="*")
    with pytest.warns(UserWarning, match="whole blocks alone are pruned, and its axis has none, or a rest"):
        sparsifier.sparsify(0.5)
