"""Weights that cannot be pruned: their layers stay dense with the reason, or are refused by name."""

import re

import pytest
from kinds_of_weights import dense, same
from torch import nn

from sparsifai import Sparsifier
from sparsifai.gradual.plan import plan_of


@dense
def test_a_layer_that_cannot_be_pruned_stays_dense_and_is_told(make, why):
    model = make()
    with pytest.warns(
        UserWarning, match=f"layers stay dense, because .* cannot be pruned: 0.weight is {re.escape(why)}"
    ):
        sparsifier = Sparsifier(model)
    before = model[0].weight.detach().clone()
    sparsifier.sparsify(0.5)
    own = {name: mask for name, mask in sparsifier.masks.items() if name != "0.weight"}
    assert own.keys() == sparsifier.masks.keys()
    assert sparsifier.sparsity == 0.5
    assert {row.name: row.why_dense for row in sparsifier.report().rows}["0.weight"] == f"cannot be pruned: {why}"
    sparsifier.apply_masks()
    sparsifier.load_state_dict(sparsifier.state_dict())
    assert same(model[0].weight, before)
    str(plan_of(sparsifier, 0.5, "lin", 1, 2))


@dense
def test_a_layer_that_is_named_and_cannot_be_pruned_is_refused(make, why):
    model = make()
    before, weight = model[0].weight.detach().clone(), model[0].weight
    for layers in ("0", nn.Linear, lambda name, module: True):
        message = f"Sparsifier: 0.weight cannot be pruned, because it is {why}; or exclude it with exclude="
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Sparsifier(model, layers=layers)
    assert model[0].weight is weight
    assert same(weight, before)
    others = [name for name in ("2", "3") if hasattr(model, name) and name not in why]
    for named in others[:1]:  # what is left out is not told of
        Sparsifier(model, layers=[named], exclude="0") if "same memory" not in why else None
