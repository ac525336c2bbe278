"""FreezeCallback: layers that are not trained in a part of training."""

from functools import partial

import pytest
import torch
from torch import nn

from sparsifai import Recipe


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.fastai
def test_the_callback_leaves_the_methods_of_the_learner_alone(make_learner):
    from sparsifai import FreezeCallback

    steps = [{"freeze": {"layers": "1", "end": 2}}, {"freeze": {"layers": ["3"], "start": 2}}]
    learn = make_learner(net())
    learn.fit(4, cbs=Recipe({"epochs": 4, "steps": steps}).callbacks())
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn = make_learner(net(), cbs=FreezeCallback("1"))
    learn.fine_tune(1)
    assert callable(learn.freeze)


@pytest.mark.fastai
def test_frozen_layers_are_not_trained_and_are_trained_again_after_an_interrupted_fit(make_learner):
    from fastai.callback.core import Callback
    from fastai.optimizer import SGD

    from sparsifai import FreezeCallback

    learn = make_learner(net())
    before = learn.model[1].weight.detach().clone()

    def stop(self):
        if self.iter == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.1, cbs=[FreezeCallback("1"), Callback(after_step=stop)])
    assert torch.equal(before, learn.model[1].weight)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn.fit(1, 0.1)
    assert not torch.equal(before, learn.model[1].weight)
    halves = []
    learn = make_learner(net(), opt_func=partial(SGD, mom=0.9, wd=0.1))
    note = Callback(after_epoch=lambda self: halves.append(self.model[1].weight.detach().clone()))
    learn.fit(2, 0.1, cbs=[FreezeCallback("1", start=0.5), note])
    assert torch.equal(*halves)  # momentum and weight decay move nothing
    with pytest.raises(ValueError, match="'head'"):
        learn.fit(1, cbs=FreezeCallback("head"))
