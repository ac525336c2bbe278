"""Criteria that need data, in a fastai Learner."""

import random

import numpy as np
import pytest
import torch
from conftest import small_net
from torch import nn
from updates import batches

pytestmark = pytest.mark.fastai


OF_DATA = ("snip", "grasp", "synflow", "taylor", "fisher", "movement_pruning", "wanda")


@pytest.mark.parametrize("criterion", OF_DATA)
@pytest.mark.parametrize("schedule", ["one_shot", "lin"])
def test_criteria_that_need_data_reach_the_target_sparsity(make_learner, criterion, schedule):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria=criterion, schedule=schedule)
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)
    assert not any(module._forward_pre_hooks for module in learn.model.modules())
    learn.fit(1, 0.01)  # KeepSparsity continues and collects nothing
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("criterion", OF_DATA)
def test_collecting_changes_nothing_else(make_learner, criterion):
    from sparsifai import SparsifyCallback, schedules

    ends = []
    for callbacks in ([], [SparsifyCallback(1e-9, criteria=criterion, schedule=schedules["lin"])]):
        torch.manual_seed(3)
        model = small_net()
        model.insert(3, nn.Dropout(0.3))
        learn = make_learner(model)
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        learn.fit(2, 0.01, cbs=callbacks)
        ends.append([*learn.model.state_dict().values(), torch.get_rng_state(), torch.rand(3)])
        ends.append([random.random(), float(np.random.rand()), learn.recorder.values])
    assert all(map(torch.equal, ends[0], ends[2]))
    assert ends[1][:2] == ends[3][:2]
    assert [row[:2] for row in ends[1][2]] == [row[:2] for row in ends[3][2]]


def test_collected_gradients_are_unscaled_and_unmasked(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    learn, seen = make_learner(), []
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot", every=4)

    def look(self):
        seen.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})

    learn.fit(1, 0.01, cbs=[callback, Callback(after_backward=look)])
    stored = callback.sparsifier.collected.stored["grad"]
    for name, mean in stored.items():
        assert torch.allclose(mean, torch.stack([each[name] for each in seen]).mean(0), atol=1e-7), name
    masked = ~callback.sparsifier.masks["0.weight"]
    assert (stored["0.weight"][masked] != 0).any()
    assert len(seen) == 4


def test_calibration_takes_other_batches(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    calls = []

    class Counted:
        def __iter__(self):
            calls.append(1)
            return iter(batches(2))

    callback = SparsifyCallback(
        0.5, criteria="wanda", context="per_output", schedule="iterative", calibration=Counted()
    )
    learn.fit(2, 0.01, cbs=callback)
    assert len(calls) >= 2
    assert callback.sparsifier.collected.counts["activation"]["0.weight"] == 2 * 4 * 2 * 8 * 8


def test_a_fit_with_frozen_layers_needs_no_gradients_of_them(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot")
    learn.fit(1, 0.01, cbs=callback)
    for parameter in list(learn.model.parameters())[:2]:
        parameter.requires_grad_(False)
        parameter.grad = None
    learn.opt = None
    learn.fit(1, 0.01)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


def test_calibration_with_the_training_data_leaves_no_trace(make_learner):
    from sparsifai import SparsifyCallback

    ends = []
    for given in (False, True):
        torch.manual_seed(3)
        learn = make_learner(small_net())
        learn.dls.train.shuffle, learn.dls.train.rng = True, random.Random(4)
        calibration = learn.dls.train if given else None
        learn.fit(3, 0.01, cbs=SparsifyCallback(1e-9, criteria="snip", schedule="lin", calibration=calibration))
        ends.append(list(learn.model.state_dict().values()))
    assert all(map(torch.equal, *ends))


def test_no_batch_is_counted_twice(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, criteria="movement_pruning", schedule="lin")
    learn.fit(2, 0.01, cbs=callback)
    assert set(callback.sparsifier.collected.counts["weight_grad"].values()) == {8}


def test_a_model_may_return_more_than_its_prediction(make_learner):
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    class WithState(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x), x

    def first(self):
        self.learn.pred = self.pred[0]

    learn = make_learner(WithState())
    callback = SparsifyCallback(0.5, criteria="snip", schedule="one_shot")
    learn.fit(1, 0.01, cbs=[callback, Callback(after_pred=first)])
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


def test_more_than_n_of_m_is_refused_in_the_constructor():
    from sparsifai import SparsifyCallback

    with pytest.raises(ValueError, match="2:4"):
        SparsifyCallback(0.9, context="2:4")
    SparsifyCallback(0.67, context="1:3")
