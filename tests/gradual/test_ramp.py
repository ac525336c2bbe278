"""initial_sparsity: where the schedule of a SparsifyCallback starts."""

import pytest
from torch import nn

from sparsifai import between


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.fastai
def test_layers_with_different_sparsities_start_with_the_same_sparsity(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback, lin

    levels = []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.learn.training:
                masks = self.learn.sparsify_callback.sparsifier.masks
                levels.append(tuple(float((~masks[name]).float().mean()) for name in ("1.weight", "3.weight")))

    callback = SparsifyCallback(
        {"1": 0.75, "3": 0.5}, context="local", schedule=between(lin, 0.5, 1), initial_sparsity=0.25
    )
    make_learner(net(), steps=4).fit(1, cbs=[callback, Look()])
    assert levels == [(0, 0), (0, 0), (0.25, 0.25), (0.5, pytest.approx(0.375, abs=0.02))]
    assert float((~callback.sparsifier.masks["3.weight"]).float().mean()) == 0.5
    with pytest.raises(ValueError, match="initial_sparsity 0.6"):
        SparsifyCallback({"1": 0.75, "3": 0.5}, initial_sparsity=0.6)
