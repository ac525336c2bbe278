"""A target sparsity that is reached in steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import nn
from updates import batches

from sparsifai import Sparsifier
from sparsifai.sparsifier.collection import CollectedQuantities


@pytest.fixture
def net():
    return small_net().eval()


@pytest.mark.parametrize("criterion", ["snip", "synflow", "large_final"])
def test_each_step_scores_anew_and_the_density_falls_exponentially(net, criterion, monkeypatch):
    levels, moments = [], []
    take, add = CollectedQuantities.take, CollectedQuantities.add

    def seen_update(self, moment, *rest):
        if moment == "update":
            levels.append(sparsifier.layers["0.weight"].level)
        take(self, moment, *rest)

    def seen_add(self, moment, *rest):
        moments.append(moment)
        add(self, moment, *rest)

    monkeypatch.setattr(CollectedQuantities, "take", seen_update)
    monkeypatch.setattr(CollectedQuantities, "add", seen_add)
    sparsifier = Sparsifier(net, criteria=criterion, example_input=batches(1)[0][0])
    if criterion == "snip":
        sparsifier.calibrate(batches(2), F.cross_entropy)
    sparsifier.sparsify(0.9, steps=5)
    assert levels == pytest.approx([1 - 0.1 ** (step / 5) for step in range(1, 6)])
    assert len(moments) == (10 if criterion == "snip" else 0)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=0.005)
    levels.clear()
    sparsifier.sparsify({"0": 0.95}, steps=2)
    assert levels == [pytest.approx(1 - 0.1**0.5 * 0.05**0.5), 0.95]


def test_no_layer_is_sparser_between_steps_than_at_the_end():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    sparsifier = Sparsifier(model, context="local")
    sparsifier.sparsify({"0": 0.9, "1": 0.1})
    sparsifier.sparsify(0.5, steps=5)
    assert int((model[1].weight == 0).sum()) == 450


def test_the_first_step_calibrates_again_only_after_an_update(net, monkeypatch):
    sparsifier, calls = Sparsifier(net, criteria="snip"), []
    monkeypatch.setattr(
        CollectedQuantities,
        "add",
        lambda self, moment, *rest, add=CollectedQuantities.add: calls.append(moment) or add(self, moment, *rest),
    )
    sparsifier.calibrate(batches(1), F.cross_entropy)
    sparsifier.sparsify(0.3, steps=2)
    sparsifier.sparsify(0.6, steps=2)
    assert len(calls) == 1 + 1 + 2


def nan_when_sparse(weight):
    return weight.abs() if (weight != 0).float().mean() > 0.6 else torch.full_like(weight, float("nan"))


def test_steps_that_fail_change_nothing(net):
    sparsifier = Sparsifier(net, criteria=nan_when_sparse)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.sparsify(0.9, steps=10)
    assert sparsifier.level == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate(iter(batches()), F.cross_entropy)
    with pytest.raises(ValueError, match="iterated over again"):
        sparsifier.sparsify(0.9, steps=10)
    assert sparsifier.level == 0
