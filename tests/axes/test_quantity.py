import pytest
import torch

from sparsifai import Sparsifier, quantities, taken


def test_a_quantity_of_your_own_is_one_function(mlp, registering):
    @quantities.register
    @taken("update")
    def updates(source, name):
        return sparsifier.collected.stored.get("updates", {}).get(name, torch.zeros(())) + 1

    sparsifier = Sparsifier(mlp, criteria=lambda weight, updates: weight.abs() * updates)
    with pytest.raises(ValueError, match="needs updates"):
        sparsifier.sparsify(0.5)  # it is computed after an update only
    assert (
        Sparsifier(mlp, criteria=lambda weight, updates=None: weight.abs()).collected.stored == {}
    )  # no criterion needs it
