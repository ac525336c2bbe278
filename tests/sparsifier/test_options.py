"""The options of a Sparsifier, and the sparsity that is asked for."""

import pytest
import torch

from sparsifai import Sparsifier


@pytest.mark.parametrize("wrong", [50, -0.1, {}, {"0": 50}, {"0": 0.5, "2": "much"}, "0.5", True, None])
def test_a_wrong_sparsity_is_refused_and_changes_nothing(mlp, wrong):
    sparsifier = Sparsifier(mlp)
    with pytest.raises((TypeError, ValueError), match="sparsit"):
        sparsifier.sparsify(wrong)
    assert all(mask.all() for mask in sparsifier.masks.values())


def test_compression_ratio_is_another_name_of_sparsity(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.sparsify(compression_ratio=torch.tensor(0.5))
    assert sparsifier.sparsity == 0.5
