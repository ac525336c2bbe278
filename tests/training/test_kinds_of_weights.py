"""Sensitivity and penalties with weights of every type and in every layout: right, or refused by name."""

import re

import pytest
import torch
from kinds_of_weights import bits_of, dense, masked_bits, plain, pruned, same, wide
from torch import nn

from sparsifai import Regularizer, highest_sparsity, sensitivity

# A metric that reads no forward, which torch does not compute in every type.


def remaining(model):
    return float(sum((wide(each) != 0).sum() for each in (model[0].weight, model[2].weight)))


@pruned
@pytest.mark.filterwarnings("ignore:the sparsity that was asked", "ignore:[0-9]+ scores of .* are equal")
def test_sensitivity_is_that_in_float64_and_changes_no_bit(make):
    model = make()
    if len(model) > 3:  # a convolution comes with another module
        model = nn.Sequential(model[0], nn.Sequential(model[1], model[2]), model[3])
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    measured = sensitivity(model, remaining, [0.5, 0.75], progress=False)
    reference = nn.Sequential(*(each for each in plain(make()) if hasattr(each, "weight")))
    expected = sensitivity(
        reference, lambda model: float(sum((each.weight != 0).sum() for each in model)), [0.5, 0.75], progress=False
    )
    assert (measured.sizes, measured.values, measured.baseline) == (expected.sizes, expected.values, expected.baseline)
    assert highest_sparsity(model, 1e9, remaining, precision=0.5) > 0.9
    assert all(torch.equal(bits_of(each), bits_of(before[name])) for name, each in model.named_parameters())


@dense
@pytest.mark.filterwarnings("ignore:Sparsifier. .* layers stay dense, because their weights cannot be pruned")
def test_sensitivity_leaves_out_what_cannot_be_pruned(make, why):
    model = make()
    before = model[0].weight.detach().clone()
    measured = sensitivity(model, lambda model: 1.0, [0.5], progress=False)
    assert "0.weight" not in measured.layers
    assert same(model[0].weight, before)


@pruned
def test_penalties_are_those_in_float64(make):
    model = make()
    if model[0].weight.is_inference():
        with pytest.raises(ValueError, match="Regularizer: the tensors of Sequential were made under torch.inference_"):
            Regularizer(model)
        return
    regularizer = Regularizer(model, layers=["0"])
    penalty = regularizer.penalty()
    weight = wide(model[0].weight).clone()
    assert penalty.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(penalty.double(), weight.abs().sum(), rtol=1e-5, atol=0)
    regularizer.proximal_step(0.5)
    expected = torch.where(weight.abs() > 0.5, weight * (1 - 0.5 / weight.abs()), 0)
    torch.testing.assert_close(wide(model[0].weight), expected, rtol=0.13, atol=0.02)  # float8 has two or three bits
    assert not masked_bits(model[0].weight, expected.abs() > 0).any()


@dense
def test_a_penalty_leaves_out_what_cannot_be_pruned(make, why):
    model = make()
    with pytest.warns(UserWarning, match=f"Regularizer: .* cannot be pruned: 0.weight is {re.escape(why)}"):
        regularizer = Regularizer(model)
    assert "0.weight" not in regularizer.weights
    regularizer.penalty()
