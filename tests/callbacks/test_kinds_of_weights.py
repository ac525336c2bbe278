"""Fits with weights of other types and layouts: zero bits stay, and what cannot be pruned is left as it is."""

import pytest
import torch
from kinds_of_weights import DENSE, PRUNED, masked_bits, same
from torch import nn

pytest.importorskip("fastai", reason="fastai callbacks need fastai")

from conftest import small_learner

from sparsifai import SparsifyCallback

pytestmark = [
    pytest.mark.fastai,
    pytest.mark.filterwarnings(
        "ignore:[0-9]+ scores of .* are equal", "ignore:.*layers stay dense, because their weights"
    ),
]


class Cast(nn.Module):
    """Runs a model in the type of its weights."""

    def __init__(self, model, skip=0):
        super().__init__()
        self.model, self.skip = model, skip

    def forward(self, inputs):
        return self.model[self.skip :](inputs.to(self.model[-1].weight.dtype)).float()


# Those that torch trains on the CPU.
TRAINED = {
    name: make
    for name, make in PRUNED.items()
    if make()[0].weight.dtype in (torch.bfloat16, torch.float32, torch.float64)
    and name not in ("inference", "subclass", "transposed subclass")
}


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_masked_weights_are_zero_bits_after_fits(make):
    model = make()
    dtype = model[0].weight.dtype
    for each in model.parameters():
        each.data = each.data if each.dtype == dtype else each.data.to(dtype)
    shape = (8, 2, 2) if model[0].weight.dim() == 4 else model[0].weight.shape[1:]
    learn = small_learner(Cast(model), shape=shape)
    callback = SparsifyCallback(0.5, context="local", layers="model.0")
    learn.fit(1, cbs=callback)
    learn.fit(1)
    masks = learn.keep_sparsity.masks
    assert masks["model.0.weight"].float().mean() == 0.5
    assert not any(masked_bits(learn.model.get_parameter(name), mask).any() for name, mask in masks.items())


@pytest.mark.parametrize(
    "make", [DENSE[name][0] for name in ("int8", "uint16", "quantized", "COO", "wrapper", "expanded")]
)
def test_what_cannot_be_pruned_is_as_it_was_after_fits(make):
    model = make()
    before = model[0].weight.detach().clone()
    for each in model[0].parameters():  # it is not run
        each.requires_grad_(False)
    learn = small_learner(Cast(model, skip=1), shape=(16,))
    learn.fit(1, cbs=SparsifyCallback(0.5))
    learn.fit(1)
    assert list(learn.keep_sparsity.masks) == ["model.2.weight"]
    assert (model[2].weight == 0).float().mean() == 0.5
    assert same(model[0].weight, before)
