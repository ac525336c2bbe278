"""What is found in scores: many ties in a layer that starts at zero, on the CPU and where nothing is read."""

import re
import warnings

import pytest
import torch
from conftest import as_on_device
from torch import nn

from sparsifai import Sparsifier
from sparsifai.gradual.plan import plan_of


def with_zero_head():
    """A model whose last layer is initialized to zero, as is often done for the head of a network."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    nn.init.zeros_(model[2].weight)
    return model


def with_low_rank_term():
    """Of LoRA, B is zero at first: Hu et al., 2021 (arXiv:2106.09685)."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 40, bias=False))
    nn.init.zeros_(model[1].weight)
    return model


def with_constant_kernels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    nn.init.constant_(model[1].weight, 0.1)
    return model


TIED = {
    "zero head": (with_zero_head, "160 scores of 2.weight by large_final are equal"),
    "low rank": (with_low_rank_term, "160 scores of 1.weight by large_final are equal"),
    "constant": (with_constant_kernels, "576 scores of 1.weight by large_final are equal"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["local", "global", "erk"])
@pytest.mark.parametrize(("make", "message"), TIED.values(), ids=TIED)
def test_many_ties_are_told_of_before_anything_is_changed(make, message, context, dtype):
    if make is with_constant_kernels and context == "global":
        pytest.skip("smaller weights are pruned first")
    sparsifier = Sparsifier(make().to(dtype), context=context)
    with pytest.raises(UserWarning, match=f"{message}.*whole rows first; train the layer before its first update"):
        sparsifier.sparsify(0.3)
    assert all(mask.all() for mask in sparsifier.masks.values())


@pytest.mark.parametrize(("make", "message"), TIED.values(), ids=TIED)
def test_where_scores_are_not_read_they_are_told_of_when_something_is(make, message):
    sparsifier = as_on_device(Sparsifier(make(), context="local"))
    sparsifier.sparsify(0.3)
    sparsifier.sparsify(0.5)
    with pytest.warns(UserWarning, match=message) as told:
        _ = sparsifier.sparsity
    assert told[0].filename == __file__
    sparsifier.report()  # once


def test_a_plan_tells_of_ties():
    with pytest.warns(UserWarning, match=re.escape(TIED["zero head"][1])):
        plan_of(Sparsifier(with_zero_head(), context="local"), 0.5, "lin", 1, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"context": "per_output"},  # the same number in every row
        {"context": "2:4"},
        {"granularity": "filter", "layers": ["0", "2"]},  # rows are equal, whichever is pruned
        {"exclude": "2"},
        {"criteria": "random"},
    ],
)
def test_ties_that_do_no_harm_are_not_told_of(options):
    Sparsifier(with_zero_head(), **options).sparsify(0.5)


def test_a_layer_that_was_trained_is_not_told_of():
    model = with_zero_head()
    sparsifier = Sparsifier(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for level in (0.2, 0.5):
        nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(10, (32,))).backward()
        optimizer.step()
        sparsifier.sparsify(level)


def test_inputs_that_are_always_zero_are_not_told_of():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    sparsifier = Sparsifier(model, context="local", criteria="wanda", layers="0")
    sparsifier.calibrate([torch.randn(16, 8) * (torch.arange(8) > 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.sparsify(0.3)
